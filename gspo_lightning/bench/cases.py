"""Runs of a benchmark: the work, its models, and one process for each run.

Decides what a case is, how an engine is started on it, what is kept of a run, and what measured
runs have in common.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from lightning.pytorch import Callback, Trainer

from gspo_lightning.bench.report import Run, derived
from gspo_lightning.run.terminal_log import say

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
MODELS = ("S", "M", "0.6B")  # sizes that the script make_models.py knows
# graphs: decode steps recorded, on a GPU; mkl: without oneDNN
ENGINES = ("gspo_lightning", "graphs", "mkl", "trl", "one_by_one", "generate")


class BenchError(Exception):
    """A benchmark that cannot run here; the text says why and what to do."""


@dataclass(frozen=True)
class Case:
    """One kind of work; the help of the command says how it is written.

    >>> Case.parse("S/256/geo/16/kl")
    Case(model='S', prompt=256, length='geo32', limit=128, group=16, kl=True)
    >>> Case.parse("M/32/64/8").length
    'full'
    """

    model: str
    prompt: int
    length: str
    limit: int
    group: int
    kl: bool

    def __str__(self) -> str:
        length = self.limit if self.length == "full" else "geo"
        text = f"{self.model}/{self.prompt}/{length}/{self.group}"
        return f"{text}/kl" if self.kl else text

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a case from the command line; argparse shows the text of an ArgumentTypeError."""
        models = "|".join(map(re.escape, MODELS))
        found = re.fullmatch(rf"({models})/(\d+)/(geo|\d+)/(\d+)(/kl)?", text)
        if not found:
            raise argparse.ArgumentTypeError(
                f"a case is MODEL/PROMPT/LENGTH/GROUP or that and /kl, with a model of "
                f"{', '.join(MODELS)}, such as S/32/geo/8, got {text!r}"
            )
        model, prompt, length, group, kl = found.groups()
        kind, limit = ("geo32", 128) if length == "geo" else ("full", int(length))
        return cls(model, int(prompt), kind, limit, int(group), kl is not None)


def add_run_arguments(part: argparse.ArgumentParser) -> None:
    """What holds for every run of an engine on a case."""
    part.add_argument("--steps", type=positive, default=3, help="RL steps timed in each run")
    part.add_argument("--warmup", type=int, default=1, help="RL steps before them")
    part.add_argument("--prompts-per-rollout", type=positive, default=8)
    part.add_argument("--updates", type=positive, default=4, help="optimizer steps per rollout")
    part.add_argument("--micro-batches", type=positive, default=1, help="per optimizer step")
    part.add_argument("--threads", type=positive, default=1)
    part.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    part.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    part.add_argument(
        "--settings",
        type=json_object,
        default={},
        help="further arguments of GSPOModule, such as '{\"micro_batch_size\": 8}'",
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {text}")
    return number


def json_object(text: str) -> dict[str, Any]:
    """A JSON object; anything else is a ValueError."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


def one_run(case: Case, name: str, options: argparse.Namespace) -> Run:
    """One run in a process of its own; BenchError if it failed, its output in standard error."""
    model, prompts = assets(case, options)
    work = {"model": model, "prompts": prompts, "max_new_tokens": case.limit}
    work |= {"group_size": case.group, "kl_coef": 0.05 if case.kl else 0.0}
    same = ("steps", "warmup", "prompts_per_rollout", "updates", "micro_batches", "threads")
    work |= {key: getattr(options, key) for key in (*same, "device", "dtype")}
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in work.items()]
    if name == "trl":
        return in_process([str(SCRIPTS / "trl_gspo.py"), *arguments], options.threads)
    sampler = "group" if name in ("gspo_lightning", "graphs", "mkl") else name
    worker = ["-m", "gspo_lightning.bench", "worker", f"--sampler={sampler}"]
    # transformers' sampling is measured as it comes, without this project's matrix products
    worker += ["--cuda-graphs"] if name == "graphs" else []
    worker += [] if name in ("gspo_lightning", "graphs") else ["--mkl"]
    worker += [f"--settings={json.dumps(options.settings)}"]
    return in_process([*worker, *arguments], options.threads)


def in_process(arguments: list[str], threads: int) -> dict[str, Any]:
    """Run Python with these arguments and read the JSON object of its last line."""
    return json.loads(output_of(arguments, threads).splitlines()[-1])


def output_of(arguments: list[str], threads: int) -> str:
    """What Python prints with these arguments; BenchError if it fails, after what it said."""
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command, environment = [sys.executable, *arguments], os.environ | limits | offline
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        say(done.stdout + done.stderr)
        raise BenchError(f"{shlex.join(command)} ended with exit code {done.returncode}")
    return done.stdout


def assets(case: Case, options: argparse.Namespace) -> tuple[Path, Path]:
    """The model and the prompts of a case, made on first use."""
    folder = Path(options.assets) / options.dtype
    model = folder / f"{case.model}-{case.length}"
    prompts = folder / f"{case.model}-{case.prompt}.jsonl"
    if not (model.is_dir() and prompts.is_file()):
        say(f"making {model} and {prompts}")
        command = [sys.executable, str(SCRIPTS / "make_models.py"), f"--out={folder}"]
        command += [f"--models={case.model}", f"--lengths={case.length}"]
        command += [f"--prompts={case.prompt}", f"--dtype={options.dtype}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return model, prompts


def check(options: argparse.Namespace, cases: list[tuple[Case, int]]) -> None:
    """Refuse before the first run what would fail in the middle; prompts stand beside their case.

    Raises:
        BenchError: If scripts, an engine or a device are not there, or a rollout cannot be cut.
    """
    for case, prompts in cases:
        if prompts * case.group % (options.updates * options.micro_batches):
            raise BenchError(
                f"{case}: {prompts} prompts x {case.group} completions cannot be cut into "
                f"{options.updates} updates of {options.micro_batches} micro-batches"
            )
    if not SCRIPTS.is_dir():
        raise BenchError(f"there is no folder {SCRIPTS}; run from a checkout of the repository")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device cuda: this machine has no CUDA device; leave it out")
    if "trl" in options.engines and importlib.util.find_spec("trl") is None:
        raise BenchError(
            "engine trl: the package trl is not installed; pip install 'gspo_lightning[peers]', or "
            "leave it out with --engines gspo_lightning"
        )


def keep(run: Run, runs: list[Run], place: str, out: Path) -> None:
    """Add a run and what follows from it to ``runs`` and to a file, and say how long it took."""
    runs.append(run | derived(run, runs))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(runs[-1]) + "\n")
    say(f"{place}: {run['wall_seconds']['total']:.2f} s per RL step")


def heading(options: argparse.Namespace, runs: list[Run]) -> str:
    """What stands above every table: the command, the machine and the versions."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {name: version for run in runs for name, version in run["versions"].items()}
    parts = [machine(getattr(options, "device", "cpu")), f"{options.threads} thread(s)"]
    parts += [f"{name} {version}" for name, version in versions.items()]
    return f"    {options.typed}\n\n{', '.join(parts)}\n"


def machine(device: str) -> str:
    """The machine, in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def bare_trainer(folder: str | Path, callbacks: list[Callback], **settings: Any) -> Trainer:
    """A trainer of one epoch on one device that logs, draws and, unless asked to, keeps nothing."""
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = {"devices": 1, "max_epochs": 1, **dict.fromkeys(off, False), **settings}
    return Trainer(default_root_dir=folder, callbacks=callbacks, **settings)


def letters_a_to_m(rows: list[dict], completions: list[str]) -> list[float | None]:
    """Share of the characters a to m: cheap, deterministic and different within a group."""
    return [sum("a" <= c <= "m" for c in text) / max(len(text), 1) for text in completions]


def resident() -> float:
    """Resident memory of this process now, MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
