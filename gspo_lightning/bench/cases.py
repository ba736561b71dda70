"""Runs of a benchmark: the work, its models, and one process for each run.

Decides what a case is and how an engine is started on it. Leaves out which runs are made
(``bench``, ``bench_scaling``) and how they are timed (``bench_worker``, the script for TRL).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
MODELS = ("S", "M", "0.6B")  # sizes in benchmarks/make_models.py
ENGINES = ("gspo_lightning", "mkl", "trl", "one_by_one", "generate")  # mkl: without oneDNN


class BenchError(Exception):
    """A benchmark that cannot run here; the text says why and what to do."""


@dataclass(frozen=True)
class Case:
    """One kind of work; ``bench`` says how it is written.

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
    def parse(cls, text: str) -> Case:
        """Read a case.

        Raises:
            ValueError: If it is not of that form.
        """
        parts = text.split("/")
        kl = parts[4:] == ["kl"]
        sized = len(parts) == 4 + kl and parts[1].isdigit() and parts[3].isdigit()
        if not sized or not (parts[2] == "geo" or parts[2].isdigit()) or parts[0] not in MODELS:
            raise ValueError(
                f"a case is MODEL/PROMPT/LENGTH/GROUP or that and /kl, with a model of "
                f"{', '.join(MODELS)}, such as S/32/geo/8, got {text!r}"
            )
        geometric = parts[2] == "geo"
        return cls(
            model=parts[0],
            prompt=int(parts[1]),
            length="geo32" if geometric else "full",
            limit=128 if geometric else int(parts[2]),
            group=int(parts[3]),
            kl=kl,
        )


def one_run(case: Case, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own.

    Raises:
        BenchError: If it failed; its output has gone to standard error.
    """
    model, prompts = assets(case, options)
    arguments = [f"--model={model}", f"--prompts={prompts}", f"--max-new-tokens={case.limit}"]
    arguments += [f"--group-size={case.group}", f"--kl-coef={0.05 if case.kl else 0.0}"]
    for key in ("steps", "warmup", "prompts_per_rollout", "updates", "micro_batches", "threads"):
        arguments.append(f"--{key.replace('_', '-')}={getattr(options, key)}")
    arguments += [f"--device={options.device}", f"--dtype={options.dtype}"]
    if name == "trl":
        return in_process([str(SCRIPTS / "trl_gspo.py"), *arguments], options.threads)
    sampler = "group" if name in ("gspo_lightning", "mkl") else name
    settings = f"--settings={json.dumps(options.settings)}"
    worker = ["-m", "gspo_lightning.bench", "worker", f"--sampler={sampler}", settings]
    # sampling by transformers is measured as it comes
    worker += [] if name == "gspo_lightning" else ["--mkl"]
    return in_process([*worker, *arguments], options.threads)


def in_process(arguments: list[str], threads: int) -> dict[str, Any]:
    """Run Python with these arguments and read the JSON object of its last line."""
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *arguments]
    environment = {**os.environ, **limits, **quiet}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        remark(done.stdout + done.stderr)
        raise BenchError(f"{shlex.join(command)} ended with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def assets(case: Case, options: argparse.Namespace) -> tuple[Path, Path]:
    """The model and the prompts of a case, made on first use."""
    folder = Path(options.assets) / options.dtype
    model = folder / f"{case.model}-{case.length}"
    prompts = folder / f"{case.model}-{case.prompt}.jsonl"
    if not (model.is_dir() and prompts.is_file()):
        remark(f"making {model} and {prompts}")
        command = [sys.executable, str(SCRIPTS / "make_models.py"), f"--out={folder}"]
        command += [f"--models={case.model}", f"--lengths={case.length}"]
        command += [f"--prompts={case.prompt}", f"--dtype={options.dtype}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return model, prompts


def check(options: argparse.Namespace, cases: list[tuple[Case, int]]) -> None:
    """Refuse before the first run what would fail in the middle.

    Args:
        options: With the engines and the device.
        cases: What is to be run, and with how many prompts per rollout.

    Raises:
        BenchError: If the scripts of the benchmarks, an engine or a device is not there, or a
            rollout cannot be cut into as many parts as are asked for.
    """
    for case, prompts in cases:
        completions, parts = prompts * case.group, options.updates * options.micro_batches
        if completions % parts:
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


def write_line(path: Path, result: dict[str, Any]) -> None:
    """Append a run to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")


def heading(options: argparse.Namespace, runs: list[dict[str, Any]]) -> str:
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
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    return f"{name}, {os.cpu_count()} cores"


def letters_a_to_m(rows: list[dict], completions: list[str]) -> list[float | None]:
    """Share of the characters a to m: cheap, deterministic and different within a group."""
    return [sum("a" <= c <= "m" for c in text) / max(len(text), 1) for text in completions]


def resident() -> float:
    """Resident memory of this process now, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def remark(text: str) -> None:
    """A line for the person who waits; tables alone go to standard output."""
    print(text, file=sys.stderr, flush=True)
