"""One timed run of GSPOModule, in a process of its own: clocks, memory, and what was computed.

Decides what is timed: the phases of a real ``Trainer.fit``, by wall clock and by CPU time, which a
busy machine does not stretch. Reward, prompts, order and updates are those of
``benchmarks/trl_gspo.py``. Leaves out which runs are made and compared (``bench``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import transformers
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch import __version__ as lightning_version

from gspo_lightning.bench.cases import letters_a_to_m, resident
from gspo_lightning.bench.limits import (
    PHASES,
    Work,
    data_sheet,
    measured_peak,
    products_alone,
    roofline,
    shape_of,
)
from gspo_lightning.bench.samplers import GenerateSampler
from gspo_lightning.data.prompts import PromptData
from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.guards.memory import peaks
from gspo_lightning.module import GSPOModule
from gspo_lightning.optim import OptimizerConfig
from gspo_lightning.policy.policy import PolicyConfig
from gspo_lightning.rewards.terms import RewardTerm
from gspo_lightning.run.one_line import quiet
from gspo_lightning.sampling import GroupSampler
from gspo_lightning.step import Clock, Step

CPU = torch.device("cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a run; names and defaults are those of ``benchmarks/trl_gspo.py``."""
    add_work_arguments(parser)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--kl-coef", type=float, default=0.0)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sampler",
        choices=["group", "one_by_one", "generate"],
        default="group",
        help="this project's; one `generate` call per completion; one per rollout",
    )
    parser.add_argument("--mkl", action="store_true", help="no matrix product by oneDNN")


def add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that a single run and a series of them have in common."""
    parser.add_argument("--steps", type=positive, default=3, help="RL steps timed in each run")
    parser.add_argument("--warmup", type=int, default=1, help="RL steps before them")
    parser.add_argument("--prompts-per-rollout", type=positive, default=8)
    parser.add_argument("--updates", type=positive, default=4, help="optimizer steps per rollout")
    parser.add_argument("--micro-batches", type=positive, default=1, help="per optimizer step")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
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


def print_run(options: argparse.Namespace) -> int:
    """One run, for the process that started this one: JSON on the last line."""
    print(json.dumps(run(options)))
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train for ``warmup + steps`` RL steps.

    Returns:
        Medians over the timed steps of wall and CPU seconds by phase, tokens and lengths, memory
        in MiB, the model's sizes, and the limits of this machine.
    """
    torch.set_num_threads(options.threads)
    if options.mkl:
        torch.backends.mkldnn.set_flags(_enabled=False)
    seed_everything(options.seed, verbose=False)
    settings = dict(options.settings)
    if options.micro_batches > 1:
        completions = options.prompts_per_rollout * options.group_size // options.updates
        settings["micro_batch_size"] = completions // options.micro_batches
    module = TimedModule(
        PolicyConfig(options.model, dtype=options.dtype),
        rewards={"letters": RewardTerm(letters_a_to_m)},
        sampler=build_sampler(options),
        reference=ReferencePolicy(device="policy") if options.kl_coef else None,
        kl_coef=options.kl_coef,
        optimizer=OptimizerConfig(learning_rate=options.learning_rate, betas=(0.9, 0.999)),
        num_minibatches=options.updates,
        **settings,
    )
    data = InFileOrder(
        options.prompts,
        prompts_per_rollout=options.prompts_per_rollout,
        num_rollouts=options.warmup + options.steps,
        max_prompt_tokens=4096,
    )
    steps = Steps(options.warmup)
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = Trainer(
            default_root_dir=folder,
            accelerator="gpu" if options.device == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[steps],
        )
        trainer.fit(module, data)
    timed = steps.records
    return {
        "engine": f"gspo_lightning {options.sampler}",
        "options": {k: v for k, v in vars(options).items() if k not in ("run", "command", "typed")},
        "parameters": sum(p.numel() for p in module.parameters()),
        "wall_seconds": _medians([step["wall"] for step in timed]),
        "cpu_seconds": _medians([step["cpu"] for step in timed]),
        **record([step["work"] for step in timed]),
        "base_mib": steps.base,
        "peak_mib": steps.peak,
        "device_peak_mib": steps.device_peak,
        "limits": limits(module, timed[-1]["work"], options),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lightning": lightning_version,
        },
    }


class InFileOrder(PromptData):
    """Rollout k takes the prompts k*P to k*P+P-1 of the file, around its end."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        assert self.stream is not None
        self.stream.shuffle = False


class TimedClock(Clock):
    """Also measures the CPU seconds of everything that a step times."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.cpu_seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str, *args: Any) -> Iterator[None]:
        start = time.process_time()
        with super().timed(name, *args):
            yield
        spent = time.process_time() - start
        self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + spent


class TimedModule(GSPOModule):
    """Keeps the clock of its last step, which measures CPU seconds, too."""

    clock: TimedClock

    def begin_step(self) -> Step:
        step = super().begin_step()
        plain = step.clock
        step.clock = self.clock = TimedClock(plain.device, plain.devices, plain.on_phase)
        return step


class Steps(Callback):
    """Notes each RL step, from the end of the one before to its own end, and the memory."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.records: list[dict[str, Any]] = []
        self.base = self.peak = 0.0  # MiB
        self.device_peak: float | None = None
        self._start = (0.0, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.base = resident()
        self.peak = 1024 * peaks([CPU])[CPU]
        self._start = (time.perf_counter(), time.process_time())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any
    ) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        if trainer.fit_loop.total_batch_idx >= self.warmup:
            rollout = outputs["rollout"]
            prompts = rollout.prompt_mask.sum(1)[:: rollout.group_size].tolist()
            self.records.append(
                {
                    "wall": _phases(pl_module.clock.seconds, wall - self._start[0]),
                    "cpu": _phases(pl_module.clock.cpu_seconds, cpu - self._start[1]),
                    "work": Work(tuple(prompts), tuple(outputs["lengths"].tolist())),
                }
            )
        # the module looks for the peak of each phase anew
        self.peak = 1024 * max(self.peak / 1024, *_on_the_cpu(pl_module), peaks([CPU])[CPU])
        if pl_module.device.type == "cuda":
            highest = max(v for k, v in pl_module.clock.peak_memory.items() if k.endswith("_gib"))
            self.device_peak = max(self.device_peak or 0.0, 1024 * highest)
        self._start = (time.perf_counter(), time.process_time())


def build_sampler(options: argparse.Namespace) -> Any:
    """The sampler that ``--sampler`` names."""
    sizes = {"group_size": options.group_size, "max_new_tokens": options.max_new_tokens}
    if options.sampler == "group":
        return GroupSampler(**sizes)
    return GenerateSampler(**sizes, one_by_one=options.sampler == "one_by_one")


def limits(module: GSPOModule, work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """What this machine could do at best with the last rollout.

    On the CPU the matrix products alone, measured; on a known GPU what its data sheet allows.
    """
    model = module.policy.model  # type: ignore[union-attr]
    model = model.to(options.device)  # the trainer has taken it back
    device, dtype = model.device, model.dtype
    shape, found = shape_of(model), {"measured_flops": measured_peak(model.device, model.dtype)}
    sheet = data_sheet(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
    if sheet is not None:
        found |= {"sheet_flops": sheet[0], **roofline(shape, work, dtype.itemsize, *sheet)}
    else:
        found |= products_alone(model, work, options.updates)
    return {**asdict(shape), **found}


def record(works: list[Work]) -> dict[str, Any]:
    """What was computed, so that a reader sees that two engines did the same."""
    lengths = [length for work in works for length in work.lengths]
    return {
        "tokens": sum(lengths) / len(works),
        "mean_length": statistics.fmean(lengths),
        "prompt_tokens": sum(sum(work.prompts) for work in works) / len(works),
        "rollouts": [{"prompts": work.prompts, "lengths": work.lengths} for work in works],
    }


def _phases(seconds: dict[str, float], total: float) -> dict[str, float]:
    parts = {name: seconds.get(name, 0.0) for name in PHASES}
    parts["total"] = total
    parts["other"] = total - sum(parts[name] for name in PHASES[1:-1])
    return parts


def _medians(steps: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(step[name] for step in steps) for name in PHASES}


def _on_the_cpu(module: TimedModule) -> list[float]:
    """Peaks of the phases in the process's resident memory, GiB."""
    ending = "_gib" if module.device.type == "cpu" else "_gib_cpu"
    return [gib for name, gib in module.clock.peak_memory.items() if name.endswith(ending)]
