"""Nothing lost: runs that are killed again and again, and disks that fill up.

Each run is `train.py` in a process of its own, forked from a warm one (`warm`), and dies at a
moment that `phases` arranges.
"""

import json
import random
import socket
import subprocess
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from gspo_lightning.checkpoint.files import list_checkpoints
from gspo_lightning.checkpoint.io import damage
from support.run_folder import assert_same, curves, names, state
from support.warm import Warm

# 30 rollouts over two epochs; checkpoints after each second one, validation after each third.
# Everything that has a state of its own: KL coefficient, whitened rewards, redrawn prompts.
CRASH = """
trainer:
  max_epochs: 2
  val_check_interval: 3
  limit_val_batches: 1
  enable_progress_bar: false
  plugins: [{class_path: support.phases.MarkedIO}]
  callbacks:
    - class_path: support.phases.Phases
    - class_path: gspo_lightning.AdaptiveKL
      init_args: {rule: {target: 0.001}, initial: 0.02}
    - class_path: gspo_lightning.RolloutCheckpoint
      init_args: {every_n_rollouts: 2, monitor: val/accuracy_sampled}
    - class_path: gspo_lightning.SampleTable
    - class_path: gspo_lightning.HFExport
model:
  init_args:
    sampler: {init_args: {group_size: 4, max_new_tokens: 12}}
    rewards:
      correct:
        fn: {class_path: gspo_lightning.rewards.terms.MarkedAnswer, init_args: {marker: "answer: "}}
        whiten: true
      length: {fn: support.phases.shortness, weight: 0.1}
    truncated: keep
    num_minibatches: 2
    drop_flat_groups: true
    max_draws: 1
    evaluation: {correct: correct, num_samples: 2, ks: [1]}
    optimizer: {schedule: cosine, min_ratio: 0.5, warmup: 4, learning_rate: 1.0e-3}
data: {init_args: {prompts_per_rollout: 4, num_rollouts: 15, val_batch_size: 4}}
"""
LAST = 30
PHASES = ("rollout", "update", "save", "validation")


class Runs:
    """Runs of one config in one folder, from one warm process."""

    def __init__(self, warm, folder, configs=("configs/arithmetic.yaml",), overlay=CRASH):
        self.warm = warm
        self.folder = folder
        self.root = folder / "run"
        self.log = folder / "phases.txt"
        (folder / "crash.yaml").write_text(overlay)
        self.configs = [*configs, folder / "crash.yaml"]

    def arguments(self, *options):
        configs = [part for config in self.configs for part in ("--config", config)]
        return ["fit", *configs, "--trainer.default_root_dir", self.root, *options]

    def fit(self, *options, kill="never:0:0", **environment):
        environment = {"PHASE_LOG": str(self.log), "PHASE_KILL": kill} | environment
        return self.warm.run(self.folder, *self.arguments(*options), **environment)

    def phase(self):
        """What the last run was at when it ended."""
        return self.log.read_text().split()[-1]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing happened to; the killed ones have other hashes of strings."""
    with Warm(PYTHONHASHSEED="1") as warm:
        runs = Runs(warm, tmp_path_factory.mktemp("straight"))
        ended = runs.fit()
    assert ended.code == 0, ended.output
    return runs.root


@pytest.fixture(scope="module")
def warm():
    with Warm(PYTHONHASHSEED="2") as process:
        yield process


def samples(root):
    return [json.loads(line) for line in Path(root, "samples.jsonl").read_text().splitlines()]


def exported(root):
    return {file.name: file.read_bytes() for file in sorted(Path(root, "export").iterdir())}


def assert_same_run(root, straight, last=LAST):
    """Weights, optimizer, KL coefficient, statistics, position, completions, curves, export."""
    left, right = state(root, last), state(straight, last)
    for checkpoint in (left, right):
        checkpoint["callbacks"].pop("RunSummary", None)  # seconds
    assert left["optimizer_states"][0]["state"], "nothing to compare"
    assert last != LAST or left["gspo"]["whitening"], "nothing to compare"
    assert_same(left, right)
    assert names(root) == names(straight)
    if Path(straight, "samples.jsonl").exists():
        assert samples(root) == samples(straight)
    assert_same(curves(root), curves(straight))
    assert exported(root) == exported(straight)
    assert not list(Path(root).glob("**/*.tmp")) and not list(Path(root).glob("**/*.partial"))


def plan(seed):
    """20 deaths in the four phases of a rollout, and 4 in the first second of a process."""
    draw = random.Random(seed)
    deaths = []
    for _ in range(5):
        deaths.append(f"rollout:{draw.randint(1, 4)}:{draw.uniform(0, 0.05):.4f}")
        deaths.append(f"update:{draw.randint(1, 4)}:{draw.uniform(0, 0.03):.4f}")
        deaths.append(f"validation:1:{draw.uniform(0, 0.05):.4f}")
    deaths += [f"save:{draw.randint(1, 2)}:{draw.uniform(0, 0.02):.4f}" for _ in range(2)]
    deaths += [f"bytes:{draw.randint(1, 2)}:{draw.randrange(1_600_000)}" for _ in range(3)]
    deaths += [f"launch:1:{draw.uniform(0, 1):.4f}" for _ in range(4)]
    draw.shuffle(deaths)
    return deaths


@pytest.mark.parametrize(
    ("deaths", "elsewhere"),
    [
        pytest.param(24, False, marks=pytest.mark.kills, id="24"),
        pytest.param(8, True, marks=pytest.mark.slow, id="8, TMPDIR elsewhere"),
    ],
)
def test_a_run_killed_many_times_is_the_straight_run_bit_for_bit(
    straight, warm, tmp_path, deaths, elsewhere
):
    """Elsewhere: files are made on another file system than the run's."""
    environment = {}
    if elsewhere:
        other = Path("/dev/shm")
        if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("/dev/shm is no file system of its own here")
        environment["TMPDIR"] = str(other)
    runs = Runs(warm, tmp_path)
    died = Counter()
    for kill in plan(seed=int(elsewhere))[:deaths]:
        ended = runs.fit("--ckpt_path=auto", kill=kill, **environment)
        assert ended.code == -9, f"{kill} came too late: {ended}"
        died[runs.phase()] += 1
        damaged = [path for path in list_checkpoints(runs.root) if damage(path)]
        assert not damaged, kill
    if not elsewhere:
        assert all(died[phase] for phase in PHASES), died
        assert sum(died[phase] for phase in PHASES) >= 15, died
    ended = runs.fit("--ckpt_path=auto", **environment)
    assert ended.code == 0, ended.output
    assert_same_run(runs.root, straight)
    print(f"died in {dict(died)}")


@pytest.mark.slow
def test_a_run_killed_while_it_exports_still_exports(straight, warm, tmp_path):
    """All was trained and saved; continuing has nothing to train but what comes at the end."""
    runs = Runs(warm, tmp_path)
    assert runs.fit(kill="end:1:0").code == -9
    ended = runs.fit("--ckpt_path=auto")
    assert ended.code == 0 and "nothing to do" in ended.output
    assert_same_run(runs.root, straight)


# ---- other configurations ------------------------------------------------------------------------

# twelve rollouts; checkpoints after each second one, validation after each fourth
SHORT = """
trainer:
  val_check_interval: 4
  check_val_every_n_epoch: null
  limit_val_batches: 1
  enable_progress_bar: false
  plugins: [{class_path: support.phases.MarkedIO}]
  callbacks:
    - class_path: support.phases.Phases
    - class_path: gspo_lightning.RolloutCheckpoint
      init_args: {every_n_rollouts: 2}
    - class_path: gspo_lightning.HFExport
"""
POLICY = """
    - class_path: gspo_lightning.SampleTable
model:
  init_args:
    sampler: {init_args: {group_size: 4, max_new_tokens: 12}}
    num_minibatches: 2
    evaluation: {correct: correct, num_samples: 2, ks: [1]}
    optimizer: {learning_rate: 1.0e-3}
"""
DATA = "data: {init_args: {prompts_per_rollout: 4, num_rollouts: 12, val_batch_size: 4}}\n"
DEMO = ["configs/arithmetic.yaml"]
STACK = ["configs/base.yaml", "configs/task/arithmetic.yaml", "configs/hardware/cpu.yaml"]
RANKS_OF_CPU = "  strategy: ddp\n  devices: 2\n"
TIMED = """    rewards:
      correct:
        fn:
          class_path: gspo_lightning.rewards.TimeLimit
          init_args:
            seconds: 5
            fn: {class_path: gspo_lightning.rewards.MarkedAnswer, init_args: {marker: "answer: "}}
        whiten: true
    truncated: keep
"""
SUPERVISED = "data: {init_args: {batch_size: 8}}\n"
KINDS = {
    "LoRA": ([*STACK, "configs/model/lora.yaml"], SHORT + POLICY + DATA),
    "critic": (
        [*STACK, "configs/algorithm/ppo.yaml"],
        (SHORT + POLICY).replace("group_size: 4", "group_size: 1")
        + DATA.replace("prompts_per_rollout: 4", "prompts_per_rollout: 8"),
    ),
    "dynamic sampling": ([*STACK, "configs/algorithm/dapo.yaml"], SHORT + POLICY + DATA),
    "two epochs": (DEMO, SHORT + POLICY + "    num_epochs: 2\n" + DATA),
    "Parquet across an epoch end": (
        DEMO,
        SHORT + POLICY + DATA.replace("{init_args: {", "{init_args: {path: TRAIN.parquet, "),
    ),
    "SFT": (
        ["configs/sft_arithmetic.yaml"],
        SHORT.replace("trainer:\n", "trainer:\n  enable_checkpointing: true\n  max_epochs: 1\n")
        .replace("limit_val_batches: 1", "limit_train_batches: 12")
        .replace("  val_check_interval: 4\n  check_val_every_n_epoch: null\n", "")
        + SUPERVISED,
    ),
    "reward model": (
        ["configs/reward_model.yaml"],
        SHORT.replace(
            "trainer:\n", "trainer:\n  enable_checkpointing: true\n  max_epochs: 1\n"
        ).replace("limit_val_batches: 1", "limit_val_batches: 1\n  limit_train_batches: 12")
        + SUPERVISED,
    ),
    "bf16-mixed": (
        DEMO,
        SHORT.replace("trainer:\n", "trainer:\n  precision: bf16-mixed\n") + POLICY + DATA,
    ),
    "whitened, with a time limit": (DEMO, SHORT + POLICY + TIMED + DATA),
    "two ranks": (DEMO, SHORT.replace("trainer:\n", "trainer:\n" + RANKS_OF_CPU) + POLICY + DATA),
}
KINDS["one rank of two"] = KINDS["two ranks"]
TWELVE = 12


class RankedRuns(Runs):
    """Runs of two processes; each keeps notes of its own, and dies for itself."""

    def fit(self, *options, kill="never:0:0", other=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
        environments = [
            common | {"LOCAL_RANK": rank, "PHASE_LOG": f"{self.log}.{rank}", "PHASE_KILL": death}
            for rank, death in (("0", other or kill), ("1", kill))
        ]
        ended = self.warm.run_ranks(self.folder, self.arguments(*options), environments)
        assert bool(ended[0].code) == bool(ended[1].code), f"one rank went on alone: {ended}"
        return min(ended)


def kills(kind):
    """A death in each phase that the run has, at moments that the name of its kind draws."""
    draw = random.Random(kind)
    phases = {"update": 4, "save": 2, "rollout": 4, "validation": 1}
    if kind == "SFT":
        del phases["validation"]
    if kind == "one rank of two":
        del phases["save"]  # the other one saves
    return [
        f"{phase}:{draw.randint(1, count)}:{draw.uniform(0, 0.03):.4f}"
        for phase, count in phases.items()
    ]


@pytest.mark.kills
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_of_any_kind_is_the_straight_run_bit_for_bit(warm, tmp_path, kind):
    configs, overlay = KINDS[kind]
    if "TRAIN" in overlay:  # 22 prompts: an epoch of the data ends within the sixth rollout
        rows = pd.read_json("data/arithmetic/train.jsonl", lines=True).head(22)
        rows.to_parquet(tmp_path / "train.parquet")
        overlay = overlay.replace("TRAIN", str(tmp_path / "train"))
    folders = [tmp_path / "straight", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    kinds = RankedRuns if "rank" in kind else Runs
    straight, runs = (kinds(warm, folder, configs, overlay) for folder in folders)
    ended = straight.fit()
    assert ended.code == 0, ended.output
    for kill in kills(kind):
        options = {"other": "never:0:0"} if kind == "one rank of two" else {}
        ended = runs.fit("--ckpt_path=auto", kill=kill, **options)
        assert ended.code == -9, f"{kill} came too late: {ended}"
        assert not [path for path in list_checkpoints(runs.root) if damage(path)], kill
    ended = runs.fit("--ckpt_path=auto")
    assert ended.code == 0, ended.output
    assert_same_run(runs.root, straight.root, TWELVE)


EPISODES = """    rewards: {earned: {fn: {class_path: gspo_lightning.EnvironmentReward}}}
"""


@pytest.mark.kills
def test_a_run_killed_in_the_middle_of_an_episode_is_the_straight_run_bit_for_bit(warm, tmp_path):
    """By its environment, between two steps of a group: an episode leaves nothing to continue."""
    talk = "max_new_tokens: 20, environment: {class_path: support.environments.Mortal}"
    overlay = (SHORT + POLICY).replace("max_new_tokens: 12", talk) + EPISODES + DATA
    overlay = overlay.replace("correct: correct", "correct: earned")
    folders = [tmp_path / "straight", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    straight, runs = (Runs(warm, folder, DEMO, overlay) for folder in folders)
    ended = straight.fit()
    assert ended.code == 0, ended.output
    died = []
    for step in (9, 150, 70):  # counted from the start of each process
        ended = runs.fit("--ckpt_path=auto", TURN_KILL=str(step))
        assert ended.code == -9, ended
        died.append(runs.phase())
    assert died.count("rollout") == 2, died
    assert list_checkpoints(runs.root)
    ended = runs.fit("--ckpt_path=auto")
    assert ended.code == 0, ended.output
    assert_same_run(runs.root, straight.root, TWELVE)
    assert "[environment: " in (straight.root / "samples.jsonl").read_text()


# ---- full disks ----------------------------------------------------------------------------------


# before the sixth rollout is over; the one after three is the best so far
SIX = ["rollout=000002.ckpt", "rollout=000003.ckpt", "rollout=000004.ckpt"]


def assert_one_line(ended, what):
    assert ended.code == 1, ended.output
    assert "Traceback" not in ended.output
    (line,) = [text for text in ended.output.splitlines() if text.startswith("error: ")]
    assert what in line and "intact" in line
    return line


@pytest.mark.slow
def test_a_checkpoint_that_the_system_refuses_is_one_line_and_costs_nothing(
    straight, warm, tmp_path
):
    """A limit on the size of files, as a quota would: no checkpoint fits, all else does."""
    runs = Runs(warm, tmp_path)
    assert runs.fit(kill="rollout:6:0").code == -9
    before = {path: path.read_bytes() for path in list_checkpoints(runs.root)}
    assert names(runs.root) == SIX
    arguments = runs.arguments("--ckpt_path=auto")
    ended = warm.run(tmp_path, *arguments, file_limit=300_000, PHASE_LOG=str(runs.log))
    line = assert_one_line(ended, "rollout=000006.ckpt was not written: file too large")
    assert "GiB free" in line
    assert "rollout=000004.ckpt; continue with: " in ended.output.splitlines()[-1]
    assert {path: path.read_bytes() for path in list_checkpoints(runs.root)} == before
    assert not list(Path(runs.root, "checkpoints").glob(".*"))
    assert runs.fit("--ckpt_path=auto").code == 0
    assert_same_run(runs.root, straight)


def mount(folder, *options):
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr if done.returncode else None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fill", "what"),
    [
        ("save:4", "rollout=000006.ckpt was not written: no space left on device (0.0 of 0.0 GiB"),
        ("end:1", "no space left on device"),  # the export
    ],
)
def test_a_disk_that_is_full_is_one_line_and_costs_nothing(straight, warm, tmp_path, fill, what):
    """A small file system; all that is left of it is taken away at one moment of the run."""
    runs = Runs(warm, tmp_path)
    runs.root.mkdir()
    try:
        refused = mount(runs.root, "size=24m")
    except FileNotFoundError:
        refused = "there is no mount"
    if refused:
        pytest.skip(f"no small file system can be mounted here: {refused.strip()}")
    try:
        assert_one_line(runs.fit(PHASE_FILL=fill, PHASE_FILLER=str(runs.root / "filler")), what)
        left = names(runs.root)
        assert left == names(straight) if fill == "end:1" else left == SIX
        assert not [path for path in list_checkpoints(runs.root) if damage(path)]
        assert not list((runs.root / "checkpoints").glob(".*"))
        (runs.root / "filler").unlink()
        assert runs.fit("--ckpt_path=auto").code == 0
        assert_same_run(runs.root, straight)
    finally:
        subprocess.run(["umount", runs.root], check=True)


# ---- several ranks -------------------------------------------------------------------------------


def two_ranks():
    """The environments of two processes that meet at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0"}
    return [common | {"LOCAL_RANK": str(rank)} for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_rank_stops_all_of_them_at_the_same_boundary(warm, tmp_path, rank):
    """Lightning's handler waits for the other ranks inside the handler, for ever."""
    (tmp_path / "run.yaml").write_text(RANKS)
    root = tmp_path / "run"

    def fit(*options):
        arguments = ["fit", "--config", tmp_path / "run.yaml"]
        arguments += ["--trainer.default_root_dir", root, *options]
        return warm.run_ranks(tmp_path, arguments, two_ranks())

    key = "--trainer.callbacks"
    options = [f"{key}+=support.dummies.Signaller", f"{key}.at=on_before_optimizer_step"]
    options += [f"{key}.number=15", f"{key}.rollout=4", f"{key}.rank={rank}"]
    ended = fit(*options)
    assert [one.code for one in ended] == [143, 143], ended[0].output
    assert names(root) == ["rollout=000004.ckpt"]
    ended = fit("--ckpt_path=last")
    assert [one.code for one in ended] == [0, 0], ended[0].output
    assert names(root)[-1] == "rollout=000006.ckpt"


@pytest.mark.slow
def test_machines_with_run_folders_of_their_own_are_refused_on_every_rank(warm, tmp_path):
    """One of them would go on from a checkpoint and the other begin anew, with exit code 0."""
    (tmp_path / "run.yaml").write_text(RANKS)
    homes = [tmp_path / "a", tmp_path / "b"]
    ranks = [one | {"HOME": str(home)} for one, home in zip(two_ranks(), homes, strict=True)]
    command = ["fit", "--config", tmp_path / "run.yaml", "--trainer.default_root_dir", "~/run"]
    command += ["--trainer.callbacks+=support.folder_events.Impatient"]
    ended = warm.run_ranks(tmp_path, command, ranks)
    assert [one.code for one in ended] == [2, 2], ended[0].output
    for home, seen in zip(homes, ("is seen", "is not seen"), strict=True):
        assert f"{home}/run is not one folder for all 2 ranks" in ended[0].output
        assert f"what rank 0 writes there {seen} by rank" in ended[0].output
    assert not homes[1].exists() and not (homes[0] / "run").exists()


RANKS = """
trainer:
  accelerator: cpu
  devices: 2
  strategy: ddp
  enable_progress_bar: false
  val_check_interval: 3
  callbacks: [{class_path: gspo_lightning.RolloutCheckpoint, init_args: {every_n_rollouts: 99}}]
model: {class_path: support.dummies.DummyModule}
data: {class_path: support.dummies.DummyData, init_args: {num_rollouts: 6}}
"""
