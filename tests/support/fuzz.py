"""Wrong inputs made at random, and what a command must do with each: one line, or what was asked.

A case is plain data, so that one that failed can be kept in `fuzz_corpus.jsonl`:
`{"kind": "config", "text": ...}` YAML laid over a config that works; `{"kind": "words", "words":
[...]}` added to the command; `{"kind": "file", "path": ..., "text": ...}` a file of data, model or
tokenizer (`"bytes"` in Latin-1); `{"kind": "stored", "path": ..., "at": [...], "value": ...}` one
entry of a dump or checkpoint; `{"kind": "environment", "variables": {...}}`.
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.strategies.launchers import subprocess_script

import train
from gspo_lightning.checkpoint.io import AtomicCheckpointIO
from gspo_lightning.run.command import CommandTrainer

CORPUS = Path(__file__).with_name("fuzz_corpus.jsonl")
SECONDS = 20  # that a case may take, on a machine with other things to do
CONFIG = """
seed_everything: 0
trainer:
  default_root_dir: run
  accelerator: cpu
  callbacks:
    - class_path: gspo_lightning.AdaptiveKL
      init_args: {rule: {class_path: gspo_lightning.kl.ProportionalKL, init_args: {target: 0.05}}}
    - class_path: gspo_lightning.RolloutCheckpoint
    - class_path: gspo_lightning.SampleTable
    - class_path: gspo_lightning.CurvePlot
    - class_path: gspo_lightning.HFExport
model:
  class_path: gspo_lightning.GSPOModule
  init_args:
    policy: {path: policy}
    reference: {device: cpu}
    sampler:
      class_path: gspo_lightning.GroupSampler
      init_args: {group_size: 2, max_new_tokens: 3}
    rewards:
      correct: {fn: {class_path: gspo_lightning.rewards.MarkedAnswer}, weight: 1.0}
    evaluation: {correct: correct}
    num_minibatches: 1
data:
  class_path: gspo_lightning.PromptData
  init_args: {path: prompts.jsonl, prompts_per_rollout: 2, num_rollouts: 1, max_prompt_tokens: 32}
"""
ROWS = [{"prompt": "1+2=", "answer": "3", "id": "a"}, {"prompt": "2+2=", "answer": "4", "id": "b"}]
CODE = "from pathlib import Path\nPath('exploded').touch()\n"
JSON_FILES = [f"policy/{name}.json" for name in ("config", "generation_config", "tokenizer",
                                                 "tokenizer_config")]  # fmt: skip
NOISE = (  # what a user cannot read, of any input
    "Traceback", "functools.partial(", "NestedArg(", "Not a valid subclass", "NoneType", " at 0x",
    "<class '", "Namespace(", "Errno", "is not iterable", "has no attribute '__", "jsonargparse",
)  # fmt: skip
# Values that stand where another was wanted. A huge number is as likely as a text without an end.
POOL: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 1.5, -0.5, 1e-9, float("nan"), float("inf"), 10**9, 10**30,
    "", " ", "x", ",", "null", "auto", "1e3", "0x1f", "2026-13-45", "[1", "a: b: c", "é\u202e\x1b",
    "\ud800", "a\0b", "x" * 5000, "./gone", "policy", "gspo.yaml", "..", "cuda:7", "cpu", "own.A",
    [], [0], [None], ["x", 1], [[[]]], [0, 0], {}, {"a": 1}, {"": None}, {"class_path": None},
    {"class_path": "gspo_lightning.AdaptiveKL"}, {"class_path": "own.Config", "init_args": 3},
    {"class_path": "gspo_lightning.Objective", "init_args": {"ratio": 1}}, {"init_args": None},
    {"init_args": {"x": 1}}, {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Config", None]},
]  # fmt: skip
SNIPPETS = ["*a", "&a ", "!!python/name:os.system ", "<<: ", "\t", "\0", "- ", ": ", "{", "}", "[",
            "]", "'", '"', "#", "|", "%", "\ufeff", "é", "\n", "  ", "null", "!!binary ", "---\n",
            "? ", "1e999", "\\ud800"]  # fmt: skip
WORDS = """
--help --config --config= --config=gone.yaml -- -x fit x --ckpt_path --ckpt_path=last
--ckpt_path=policy --profile --profile=x --profile=-1 --print_config --print_config=x
--seed_everything= --accept_changes=3 --trainer.help --trainer.callbacks+=x --model= --model=x
--data={} --model.class_path=x --trainer.logger=true --trainer.fast_dev_run=x
--trainer.barebones=true --model.rewards.b.fn=own.Config
"""
NAMES = """
RANK LOCAL_RANK WORLD_SIZE NODE_RANK GROUP_RANK SLURM_NTASKS SLURM_PROCID SLURM_LOCALID
SLURM_NODEID SLURM_JOB_ID MASTER_PORT PL_GLOBAL_SEED LOCAL_WORLD_SIZE JSM_NAMESPACE_RANK
SLURM_NTASKS_PER_NODE
"""

REACHED: list[bool] = []  # whether the command at hand came as far as training
Case = dict[str, Any]


def paths(tree: Any, prefix: tuple = ()) -> list[tuple]:
    """Every place in nested dictionaries and lists."""
    found = [prefix] if prefix else []
    inside = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree if isinstance(tree, list) else ())
    )
    for name, part in inside:
        found += paths(part, (*prefix, name))
    return found


def put(tree: Any, place: tuple, value: Any) -> None:
    """Write a value into nested dictionaries and lists."""
    for name in place[:-1]:
        tree = tree[name]
    tree[place[-1]] = value


def spoiled(text: str, chance: random.Random) -> str:
    """A text with a few places cut, doubled or overwritten."""
    for _ in range(chance.randint(1, 3)):
        start = chance.randrange(len(text) + 1)
        end = min(len(text), start + chance.choice([0, 1, 1, 4, 30, 1000]))
        piece = chance.choice([*SNIPPETS, "", "", text[start:end] * 2])
        text = text[:start] + piece + text[end:]
    return text


class Maker:
    """Makes cases, each from its own number.

    Args:
        settings: The config with all defaults, nested.
        stored: Places of a dump and of a checkpoint, by file.
    """

    def __init__(self, settings: dict, stored: dict[str, list[tuple]]) -> None:
        self.settings, self.places = settings, paths(settings)
        self.stored = stored

    def make(self, seed: int, number: int) -> Case:
        """The case of a number; the same one every time."""
        chance = random.Random(f"{seed}/{number}")
        kinds = [self.value, self.value, self.option, self.option, self.text, self.words]
        kinds += [self.row, self.json, self.bytes, self.entry, self.entry, self.variables]
        return chance.choice(kinds)(chance)

    def value(self, chance: random.Random) -> Case:
        """A wrong value somewhere in the config."""
        place = chance.choice(self.places)
        tree = chance.choice(POOL)
        for name in reversed(place):
            tree = [tree] if isinstance(name, int) else {name: tree}
        return {"kind": "config", "text": yaml.safe_dump(tree, allow_unicode=True)}

    def option(self, chance: random.Random) -> Case:
        """A wrong value of an option."""
        place = [n for n in chance.choice(self.places) if n != "init_args"]
        value = chance.choice(POOL)
        text = value if isinstance(value, str) else json.dumps(value)
        return {"kind": "words", "words": [f"--{'.'.join(map(str, place))}={text}"]}

    def text(self, chance: random.Random) -> Case:
        return {"kind": "config", "text": spoiled(CONFIG, chance)}

    def words(self, chance: random.Random) -> Case:
        picked = [chance.choice(WORDS.split()) for _ in range(chance.randint(1, 3))]
        dotted = [f"--{'.'.join(map(str, place))}" for place in self.places]
        if chance.random() < 0.5:
            picked.append(spoiled(chance.choice(dotted), chance))
        return {"kind": "words", "words": picked}

    def row(self, chance: random.Random) -> Case:
        """A wrong value in a row, or a damaged line."""
        rows = json.loads(json.dumps(ROWS))
        if chance.random() < 0.7:
            put(rows, chance.choice(paths(rows)), chance.choice(POOL))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        text = spoiled(text, chance) if chance.random() < 0.3 else text
        return {"kind": "file", "path": "prompts.jsonl", "text": text}

    def json(self, chance: random.Random) -> Case:
        """A wrong value in a JSON file of the model's folder."""
        path = chance.choice(JSON_FILES)
        tree = json.loads(Path(path).read_text())
        place = chance.choice(paths(tree))
        if chance.random() < 0.2:
            extra = ("auto_map", "attn_implementation", "quantization_config", "tokenizer_class")
            place = (chance.choice(extra),)
        put(tree, place, chance.choice(POOL))
        return {"kind": "file", "path": path, "text": json.dumps(tree)}

    def bytes(self, chance: random.Random) -> Case:
        """A damaged file."""
        path = chance.choice([*JSON_FILES, *["policy/model.safetensors"] * 2, *self.stored])
        text = spoiled(Path(path).read_bytes().decode("latin-1"), chance)
        content = text.encode("latin-1", "ignore").decode("latin-1")
        return {"kind": "file", "path": path, "bytes": content}

    def entry(self, chance: random.Random) -> Case:
        """A wrong entry of a dump or a checkpoint."""
        path = chance.choice([*self.stored])
        value = chance.choice(POOL)
        if chance.random() < 0.3:
            shape = [chance.choice([0, 1, 2, 5]) for _ in range(chance.randint(0, 3))]
            value = {"tensor": shape, "dtype": chance.choice(["float32", "int64", "bool"])}
        return {
            "kind": "stored",
            "path": path,
            "at": chance.choice(self.stored[path]),
            "value": value,
        }

    def variables(self, chance: random.Random) -> Case:
        names = chance.sample(NAMES.split(), chance.randint(1, 2))
        values = ["", "x", "-1", "0", "1", "2", "99999999999999999999", "1.5", "é"]
        return {"kind": "environment", "variables": {n: chance.choice(values) for n in names}}


class Place:
    """A folder in which everything is right, and where one case at a time is tried.

    Args:
        sound: The folder as it is kept.
        root: Where it is copied to; the working folder meanwhile.
    """

    def __init__(self, sound: Path, root: Path) -> None:
        self.sound, self.root = sound, root
        self.environment = dict(os.environ)
        self.restore()

    def restore(self) -> None:
        """Copy the folder as it was."""
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.copytree(self.sound, self.root, dirs_exist_ok=True)
        self.facts = self.look()

    def look(self) -> dict[str, Any]:
        """Every file with what changes when it is written to."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            facts = path.lstat()
            same = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
            if "__pycache__" not in path.parts:
                found[str(path)] = None if path.is_dir() else same
        return found

    def command(self, case: Case) -> list[str]:
        """Change what the case says; the command to try."""
        command = ["fit", "--config", "gspo.yaml"]
        if case["kind"] == "config":
            text = case["text"].encode("utf-8", "surrogatepass")
            Path("overlay.yaml").write_bytes(text)
            command += ["--config", "overlay.yaml"]
        elif case["kind"] == "words":
            command += case["words"]
        elif case["kind"] == "environment":
            os.environ.update(case["variables"])
        else:
            path = Path(case["path"])
            if case["kind"] == "stored":
                content = torch.load(path, weights_only=True)
                value = case["value"]
                if isinstance(value, dict) and "tensor" in value:
                    value = torch.ones(value["tensor"], dtype=getattr(torch, value["dtype"]))
                put(content, tuple(case["at"]), value)
                AtomicCheckpointIO().save_checkpoint(content, path)
            elif "bytes" in case:
                path.write_bytes(case["bytes"].encode("latin-1"))
            else:
                path.write_bytes(case["text"].encode("utf-8", "surrogatepass"))
            command = ["replay", case["path"]] if path.name == "dump.pt" else command
            command += ["--ckpt_path", case["path"]] if path.suffix == ".ckpt" else []
        return command

    def fault(self, case: Case) -> str | None:
        """What is wrong with the answer to a case; None where nothing is."""
        out, err = io.StringIO(), io.StringIO()
        started = time.perf_counter()
        REACHED.clear()
        try:
            command = self.command(case)
            before = self.look()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    code = train.main(command)
                except SystemExit as error:
                    code = error.code
            exploded = Path("exploded").exists()
            Path("exploded").unlink(missing_ok=True)
            after = self.look()
        finally:
            os.environ.clear()
            os.environ.update(self.environment)
            torch.use_deterministic_algorithms(False)
        seconds = time.perf_counter() - started
        # torch says some things itself, once a process, where no filter is asked
        said = re.sub(r"(?m)^(continuing from|UserWarning: ).*\n", "", err.getvalue())
        if after != self.facts:
            self.restore()
        if exploded and case["kind"] in ("file", "stored"):  # in a config it may be asked for
            return "code was run"
        if seconds > SECONDS:
            return f"took {seconds:.0f} s"
        if REACHED and "Traceback" not in said:
            return None
        if code == 2:
            if said.count("\n") != 1 or not said.startswith("error: "):
                return f"not one line: {said[-1500:]!r}"
            noise = [word for word in NOISE if word in said]
            if noise or len(said) > 700:
                return f"shows {noise or 'much'}: {said[:1500]!r}"
            return None if after == before else f"wrote {sorted(after.keys() ^ before.keys())}"
        allowed = (0, 1) if command[0] == "replay" else (0,)
        if code not in allowed or "Traceback" in said:
            return f"exit code {code}: {said[-1500:]!r}"
        return None


@contextlib.contextmanager
def short_of_training(monkeypatch: Any) -> Any:
    """Let `fit` end where the first batch would come or other processes would be started."""

    def stop(self: Any, *_: Any, **__: Any) -> Any:
        REACHED.append(True)
        raise SystemExit(0)

    monkeypatch.setattr(CommandTrainer, "_run_stage", stop)
    monkeypatch.setattr(subprocess_script._SubprocessScriptLauncher, "launch", stop)
    yield


def corpus() -> list[Case]:
    """The cases that once failed."""
    return [json.loads(line) for line in CORPUS.read_text().splitlines()]
