"""One timed run of GSPOModule, in a process of its own: clocks, memory, and what was computed.

Decides what is timed: the phases of a real ``Trainer.fit``, by wall clock and by CPU time, which a
busy machine does not stretch. Reward, prompts, order and updates are those of the script for TRL.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

import lightning
import torch
import transformers
from lightning.pytorch import Callback, Trainer, seed_everything

import gspo_lightning as gspo
from gspo_lightning.bench import limits
from gspo_lightning.bench.cases import add_run_arguments, bare_trainer, letters_a_to_m, resident
from gspo_lightning.bench.report import PHASES
from gspo_lightning.bench.samplers import GenerateSampler
from gspo_lightning.guards.memory import peaks
from gspo_lightning.run.one_line import quiet
from gspo_lightning.step import CPU, Clock, Step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a run; names and defaults are those of the script for TRL."""
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
    parser.add_argument("--cuda-graphs", action="store_true", help="decode steps recorded")
    parser.add_argument("--mkl", action="store_true", help="no matrix product by oneDNN")
    add_run_arguments(parser)


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
    if "objective" in settings:
        settings["objective"] = gspo.Objective(**settings["objective"])
    if options.micro_batches > 1:
        completions = options.prompts_per_rollout * options.group_size // options.updates
        settings["micro_batch_size"] = completions // options.micro_batches
    sizes = {"group_size": options.group_size, "max_new_tokens": options.max_new_tokens}
    sampler: Any = gspo.GroupSampler(**sizes, cuda_graphs=options.cuda_graphs)
    if options.sampler != "group":
        sampler = GenerateSampler(**sizes, one_by_one=options.sampler == "one_by_one")
    module = TimedModule(
        gspo.PolicyConfig(options.model, dtype=options.dtype),
        rewards={"letters": gspo.RewardTerm(letters_a_to_m)},
        sampler=sampler,
        reference=gspo.ReferencePolicy(device="policy") if options.kl_coef else None,
        kl_coef=options.kl_coef,
        optimizer=gspo.OptimizerConfig(learning_rate=options.learning_rate, betas=(0.9, 0.999)),
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
        accelerator = "gpu" if options.device == "cuda" else "cpu"
        bare_trainer(folder, [steps], accelerator=accelerator).fit(module, data)
    timed = steps.timed
    works: list[limits.Work] = [step["work"] for step in timed]
    lengths = [length for work in works for length in work.lengths]
    return {
        "engine": f"gspo_lightning {options.sampler}",
        "options": {k: v for k, v in vars(options).items() if k not in ("run", "command", "typed")},
        "parameters": sum(p.numel() for p in module.parameters()),
        "wall_seconds": _medians([step["wall"] for step in timed]),
        "cpu_seconds": _medians([step["cpu"] for step in timed]),
        # what was computed, so that a reader sees that two engines did the same
        "tokens": sum(lengths) / len(works),
        "mean_length": fmean(lengths),
        "prompt_tokens": sum(sum(work.prompts) for work in works) / len(works),
        "rollouts": [{"prompts": work.prompts, "lengths": work.lengths} for work in works],
        "base_mib": steps.base,
        "peak_mib": steps.peak,
        "device_peak_mib": steps.device_peak,
        "limits": limits_here(module, works[-1], options),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, lightning)},
    }


class InFileOrder(gspo.PromptData):
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


class TimedModule(gspo.GSPOModule):
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
        self.timed: list[dict[str, Any]] = []
        self.base = self.peak = 0.0  # MiB
        self.device_peak: float | None = None
        self._start = (0.0, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.base = resident()
        self.peak = 1024 * peaks([CPU])[CPU]
        self._start = (time.perf_counter(), time.process_time())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        clock, on_gpu = pl_module.clock, pl_module.device.type == "cuda"
        if trainer.fit_loop.total_batch_idx >= self.warmup:
            rollout = outputs["rollout"]
            prompts = rollout.prompt_mask.sum(1)[:: rollout.group_size].tolist()
            step: dict[str, Any] = {"wall": _phases(clock.seconds, wall - self._start[0])}
            step["cpu"] = _phases(clock.cpu_seconds, cpu - self._start[1])
            step["work"] = limits.Work(tuple(prompts), tuple(outputs["lengths"].tolist()))
            self.timed.append(step)
        # each phase has reset the peak, so that the highest of the phases counts; a phase's name
        # ends with the device where that is not the policy's
        phases = clock.peak_memory.items()
        in_ram = [gib for name, gib in phases if name.endswith("_gib_cpu" if on_gpu else "_gib")]
        self.peak = 1024 * max(self.peak / 1024, *in_ram, peaks([CPU])[CPU])
        if on_gpu:
            highest = max(gib for name, gib in phases if name.endswith("_gib"))
            self.device_peak = max(self.device_peak or 0.0, 1024 * highest)
        self._start = (time.perf_counter(), time.process_time())


def limits_here(
    module: gspo.GSPOModule, work: limits.Work, options: argparse.Namespace
) -> dict[str, Any]:
    """What this machine could do at best with the last rollout.

    On the CPU the matrix products alone, measured; on a known GPU what its data sheet allows.
    """
    # the trainer has taken the model back to the CPU
    model = module.policy.model.to(options.device)  # type: ignore[union-attr]
    device, dtype = model.device, model.dtype
    shape = limits.shape_of(model)
    found = {**asdict(shape), "measured_flops": limits.measured_peak(device, dtype)}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if sheet := limits.data_sheet(name, dtype):
        flops, _ = sheet
        return found | {"sheet_flops": flops} | limits.roofline(shape, work, dtype.itemsize, *sheet)
    return found | limits.products_alone(model, work, options.updates)


def _phases(seconds: dict[str, float], total: float) -> dict[str, float]:
    parts = {name: seconds.get(name, 0.0) for name in PHASES[1:-1]}
    return {"total": total, **parts, "other": total - sum(parts.values())}


def _medians(steps: list[dict[str, float]]) -> dict[str, float]:
    return {name: median(step[name] for step in steps) for name in PHASES}
