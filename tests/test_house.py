"""The house: rooms in order, a short list of nevers, public paths, and a wheel that has it all."""

import ast
import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gspo_lightning"
MATHS = (
    "bounds",
    "masked",
    "objectives",
    "advantages",
    "kl",
    "mismatch",
    "micro_batches",
    "rollout",
    "metrics",
    "optim",
)
LOOP = (
    "module",
    "step",
    "collect",
    "update",
    "loss",
    "old_logprobs",
    "tally",
    "evaluation",
)
# From the ground up: a room may import its own files and those of the rooms before it. What stands
# in one row knows nothing of its neighbours.
ORDER = [
    ("maths", "start"),
    ("engine", "checkpoint", "curves"),
    ("environments",),
    ("faces",),
    ("policy", "guards"),
    ("sharding",),
    ("frozen", "critic", "rewards", "data", "supervised", "callbacks", "vllm"),
    ("loop",),
    ("run",),
    ("doctor", "bench", "compare"),
]
# What a row above would allow and the house does not: (room, may not know).
NEVERS = {
    *(("loop", room) for room in ("checkpoint", "data", "supervised", "callbacks")),
    *(("callbacks", room) for room in ("guards", "engine")),
    ("run", "supervised"),
}
WITHOUT_LIGHTNING = ("engine", "environments", "faces", "policy", "frozen", "critic", "rewards")
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    """The room of a file; the front is three of them: maths, the faces of the engine, the loop."""
    inside = path.relative_to(PACKAGE).with_suffix("").parts
    if len(inside) == 2:
        return inside[0]
    for name, stems in (("maths", MATHS), ("faces", ("logprobs", "sampling")), ("loop", LOOP)):
        if inside[0] in stems:
            return name
    return "root" if inside[0] in ("__init__", "__main__") else None


def imports(path):
    """All modules and names that a file imports, with full names, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(path):
    """The files of this package that a file imports, as paths; a face stands for itself."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "gspo_lightning" or len(parts) == 1:
            continue
        for end in range(len(parts), 1, -1):  # the longest part of the name that is a file
            stem = PACKAGE.joinpath(*parts[1:end])
            if stem.with_suffix(".py").is_file():
                found.add(stem.with_suffix(".py"))
                break
            if (stem / "__init__.py").is_file():
                found.add(stem / "__init__.py")
                break
    return found


def outside(path):
    """The packages of others that a file imports."""
    top = {name.split(".")[0] for name in imports(path)}
    return top - set(sys.stdlib_module_names) - {"gspo_lightning"}


# ---- the order -----------------------------------------------------------------------------------


def test_each_file_has_a_room_and_each_room_is_one_deep():
    rooms = {name for row in ORDER for name in row} | {"root"}
    assert {str(path) for path in FILES if room(path) not in rooms} == set()
    assert [
        path for path in PACKAGE.rglob("*.py") if len(path.relative_to(PACKAGE).parts) > 2
    ] == []


def test_rooms_import_only_from_rooms_below():
    floor = {name: number for number, row in enumerate(ORDER) for name in row}
    wrong = [
        f"{path.relative_to(ROOT)} imports {other.relative_to(ROOT)}"
        for path in FILES
        for other in own_imports(path)
        if room(path) != room(other) and "root" not in (room(path), room(other))
        if floor[room(other)] >= floor[room(path)] or (room(path), room(other)) in NEVERS
    ]
    assert wrong == []


def test_no_file_imports_one_that_imports_it():
    above = {path: own_imports(path) for path in FILES if path != PACKAGE / "__init__.py"}
    done = set()

    def visit(path, way):
        assert path not in way, [str(p.relative_to(ROOT)) for p in (*way, path)]
        if path not in done:
            for other in above.get(path, ()):
                visit(other, (*way, path))
            done.add(path)

    for path in above:
        visit(path, ())


def test_the_graph_has_at_most_ten_floors():
    heights = {}

    def height(path):
        if path not in heights:
            below = set()
            for other in own_imports(path):  # a face has no floor of its own: it hands names on
                below |= own_imports(other) if other.name == "__init__.py" else {other}
            below = {other for other in below if room(other) != "root"}
            heights[path] = 1 + max((height(other) for other in below - {path}), default=0)
        return heights[path]

    assert max(height(path) for path in FILES if path.name != "__init__.py") <= 10


# ---- nevers --------------------------------------------------------------------------------------


def test_the_maths_imports_torch_alone():
    allowed = {"torch", "torchmetrics"}  # the latter for what is added up over ranks
    wrong = {p.stem: outside(p) - allowed for p in FILES if room(p) == "maths"}
    assert {stem: names for stem, names in wrong.items() if names} == {}


def test_no_room_below_the_loop_knows_lightning_or_a_peer():
    assert {
        path.stem: outside(path)
        for path in FILES
        if (room(path) in WITHOUT_LIGHTNING and outside(path) & {"lightning"})
        or outside(path) & {"trl", "accelerate", "verl", "pytorch_lightning"}
    } == {}


def test_gradients_are_made_by_manual_backward_alone():
    """``loss.backward()`` would go past the precision plugin and the strategy."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            assert not (called and node.func.attr == "backward"), f"{path.name}:{node.lineno}"


def test_a_home_that_is_nobody_s_stays_a_path():  # which pathlib's own expanduser refuses
    assert [file for file in FILES if ".expanduser()" in file.read_text()] == []


def test_no_name_says_nothing_and_no_class_is_cut_by_inheritance():
    from gspo_lightning import GSPOModule

    stems = {path.stem for path in [*FILES, *ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py")]}
    assert stems.isdisjoint({"utils", "types", "constants", "registry", "base"})
    own = [kind for kind in GSPOModule.__mro__[1:] if kind.__module__.startswith("gspo_lightning")]
    assert own == []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ClassDef) and "Mixin" in node.name), path


def test_a_face_says_what_its_room_decides_and_defines_nothing():
    for path in FILES:
        if path.name != "__init__.py" or path.parent == PACKAGE:
            continue
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        assert all(isinstance(node, ast.ImportFrom) for node in tree.body[1:]), path


def test_the_front_can_be_read_in_an_evening():
    front = sorted(PACKAGE.glob("*.py"))
    assert len(front) <= 22
    assert sum(len(path.read_text().splitlines()) for path in front) <= 4370


# ---- public paths --------------------------------------------------------------------------------

PUBLIC = """
    masked: masked_sum masked_mean
    objectives: Objective importance_log_ratio token_weights policy_loss PolicyLoss
    advantages: group_advantages flat_groups
    kl: kl_estimate MultiplicativeKL ProportionalKL
    logprobs: completion_logprobs LogProbs
    rollout: PromptBatch Samples Rollout
    sampling: Sampler GroupSampler
    frozen: ReferencePolicy RewardModel
    rewards: RewardTerm score MarkedAnswer TimeLimit
    metrics: CURVES pass_at_k PassAtK
    module: GSPOModule
    data: PromptData SFTData PreferenceData
    callbacks: AdaptiveKL CurvePlot SampleTable HFExport
    checkpoint: RolloutCheckpoint
"""


def named(path):
    """What a dotted name stands for."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_the_public_names_are_where_they_were():
    for line in PUBLIC.strip().splitlines():
        module, names = line.split(":")
        for name in names.split():
            assert named(f"gspo_lightning.{module.strip()}.{name}") is not None


def test_every_name_of_the_package_is_imported_when_it_is_asked_for():
    import gspo_lightning

    for name in gspo_lightning.__all__:
        assert getattr(gspo_lightning, name).__name__ == name
    assert set(gspo_lightning.__all__) <= set(dir(gspo_lightning))
    # what type checkers see is what is imported
    seen = {
        alias.name: node.module
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("gspo_lightning")
        for alias in node.names
    }
    homes = {name: f"gspo_lightning.{home}" for name, home in gspo_lightning.HOMES.items()}
    assert seen == homes
    with pytest.raises(AttributeError, match="nonsense"):
        gspo_lightning.nonsense  # noqa: B018


def test_every_class_path_of_configs_and_pages_imports():
    files = [*ROOT.glob("configs/**/*.yaml"), ROOT / "README.md", *ROOT.glob("docs/*.md")]
    text = "\n".join(path.read_text() for path in files)
    found = set(re.findall(r"(?:class_path|fn): (gspo_lightning[\w.]+)", text))
    assert len(found) > 10
    for path in sorted(found):
        assert callable(named(path)), path


def test_rooms_that_do_without_torch_do_not_import_it():
    rooms = [
        "gspo_lightning",
        *(f"gspo_lightning.{r}" for r in ("bench", "compare", "doctor", "run")),
    ]
    rooms += ["gspo_lightning.engine", "gspo_lightning.guards", "gspo_lightning.compare.plan"]
    rooms += ["gspo_lightning.run.entry"]
    program = f"import sys, {', '.join(rooms)}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


# ---- a wheel -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the wheel of this package alone is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = folder / "source"  # a build leaves files beside the sources
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file() and not name.startswith(("docs/", "tests/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(build, check=True, cwd=folder, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    assert wheel.stat().st_size < 4 * 2**20  # the data of the demos, and little else
    install = [*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target"]
    subprocess.run([*install, folder / "site", wheel], check=True, capture_output=True)
    return folder / "site"


def test_a_wheel_has_every_room_and_config_and_the_data(installed):
    package = installed / PACKAGE.name
    for path in FILES:
        assert (package / path.relative_to(PACKAGE)).read_text() == path.read_text()
    configs = sorted(ROOT.glob("configs/**/*.yaml"))
    assert len(configs) > 20
    for path in configs:
        assert (package / path.relative_to(ROOT)).read_text() == path.read_text()
    data = {p.relative_to(ROOT / "data") for p in ROOT.glob("data/**/*") if p.is_file()}
    data = {path for path in data if path.suffix not in (".md", ".py", ".pyc")}
    shipped = {p.relative_to(package / "shipped") for p in package.glob("shipped/**/*.*")}
    assert data <= shipped and len(data) > 25


FIVE = """
from gspo_lightning import train

def right(rows, completions):
    return [float(c.endswith(r["answer"])) for r, c in zip(rows, completions, strict=True)]

policy, sums = "data/arithmetic/policy", "data/arithmetic/train.jsonl"
run = train(policy, sums, right, rollouts=2, max_new_tokens=40, learning_rate=2e-4)
print(run.module.generate(["7+9+4="]), run.export, repr(run.folder))
"""


@pytest.mark.slow
def test_the_five_lines_train_from_a_wheel_in_an_empty_folder(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "error::UserWarning:gspo_lightning", "-c", FIVE]
    process = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    (said,) = process.stderr.splitlines()
    assert said.endswith(f"taken from the package ({installed / PACKAGE.name / 'shipped'})")
    lines = process.stdout.splitlines()
    rollouts = [line.split()[1] for line in lines if line.startswith("rollout ")]
    assert rollouts == ["1/2", "2/2"]
    assert re.match(r"\[\['.*\d'\]\] /.*/runs/default/export ", lines[-1])
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert (tmp_path / "runs/default/export/model.safetensors").is_file()


@pytest.mark.slow
def test_the_demo_trains_from_a_wheel_in_an_empty_folder(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    options = ["--data.num_rollouts", "2", "--trainer.num_sanity_val_steps", "0"]
    script = [sys.executable, installed / "bin" / "gspo"]
    begun = time.monotonic()
    process = subprocess.Popen(
        [*script, "fit", "--config", "arithmetic", *options],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = process.stderr.readline()
    assert first.startswith("gspo_lightning ") and "fit arithmetic; loading" in first
    assert time.monotonic() - begun < 3  # a busy machine takes longer than the half second
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert [line.split()[1] for line in out.splitlines() if line.startswith("rollout ")] == [
        "1/2",
        "2/2",
    ]
    assert str(installed / PACKAGE.name / "shipped") in err
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert f"{installed / 'bin' / 'gspo'} fit --config arithmetic" in out.splitlines()[-1]
