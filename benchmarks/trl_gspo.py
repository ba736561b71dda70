"""Time TRL's GRPOTrainer with GSPO settings; the last line of output is one JSON object.

OMP_NUM_THREADS=1 python benchmarks/trl_gspo.py --model runs/bench/assets/S-geo32 \
    --prompts runs/bench/assets/S-32.jsonl

An RL step is a rollout (prompts x group completions), rewards, old log-probs, with ``--beta`` those
of the reference, and ``--updates`` optimizer steps on disjoint parts of the rollout. Step k takes
the prompts k*P to k*P+P-1 of the file, around its end.

Decides how TRL's phases are timed: by clocks around its own methods, which change nothing of its
work. Settings are its fastest on the machine at hand: no gradient checkpointing (its default is
on), no logging, no saving. Takes nothing from gspo_lightning, so that memory is TRL's alone.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

PHASES = ("total", "rollout", "reward", "old_logprobs", "reference", "optimise", "other")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; names and defaults are those of ``gspo_lightning.bench worker``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--steps", type=int, default=3, help="RL steps that are timed")
    parser.add_argument("--warmup", type=int, default=1, help="RL steps before them")
    parser.add_argument("--prompts-per-rollout", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--updates", type=int, default=4, help="optimizer steps per rollout")
    parser.add_argument("--micro-batches", type=int, default=1, help="per optimizer step")
    parser.add_argument("--kl-coef", type=float, default=0.0)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    completions, parts = options.prompts_per_rollout * options.group_size, options.updates
    if completions % (parts * options.micro_batches):
        parser.error(f"{completions} completions cannot be cut into {parts} equal mini-batches")
    return options


def letters_a_to_m(completions: list[str], **_: Any) -> list[float]:
    """Share of the characters a to m: cheap, deterministic and different within a group."""
    return [sum("a" <= c <= "m" for c in text) / max(len(text), 1) for text in completions]


class Clock:
    """Wall and CPU seconds by name, one record per RL step."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.steps: list[dict[str, Any]] = []
        self.now: dict[str, Any] = defaultdict(lambda: [0.0, 0.0])

    def read(self) -> tuple[float, float]:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def add(self, name: str, start: tuple[float, float]) -> None:
        end = self.read()
        self.now[name] = [self.now[name][i] + end[i] - start[i] for i in (0, 1)]

    def close(self) -> None:
        self.steps.append(dict(self.now))
        self.now.clear()

    def around(self, cls: type, method: str, name: Any, after: Any = None) -> None:
        """Time a method of a class; ``name`` is a text or a function of its arguments."""
        plain = getattr(cls, method)

        @functools.wraps(plain)
        def timed(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            start = self.read()
            result = plain(trainer, *args, **kwargs)
            self.add(name if isinstance(name, str) else name(trainer, *args, **kwargs), start)
            if after is not None:
                after(args, result)
            return result

        setattr(cls, method, timed)


def watch(clock: Clock, trainer_class: type, group_size: int) -> None:
    """Put the clock around TRL's phases."""
    import torch

    def whose(trainer: Any, model: Any, *_: Any, **__: Any) -> str:
        if trainer.ref_model is not None and model is trainer.ref_model:
            return "reference"
        return "policy_forward" if torch.is_grad_enabled() else "old_logprobs"

    def count(args: tuple[Any, ...], result: Any) -> None:
        clock.now["lengths"] = [len(ids) for ids in result[0]]
        clock.now["prompts"] = [len(ids) for ids in args[0]][::group_size]

    clock.around(trainer_class, "_generate_single_turn", "rollout", after=count)
    clock.around(trainer_class, "_generate_and_score_completions", "collect")
    clock.around(trainer_class, "_calculate_rewards", "reward")
    clock.around(trainer_class, "_get_per_token_logps_and_entropies", whose)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train for ``warmup + steps`` RL steps and return what the module docstring promises."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(options.threads)
    import datasets
    import transformers
    import trl

    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, padding_side="left")
    rows = [json.loads(line) for line in Path(options.prompts).read_text().splitlines()]
    num_steps = options.warmup + options.steps
    wanted = num_steps * options.prompts_per_rollout
    clock = Clock(options.device)
    watch(clock, trl.GRPOTrainer, options.group_size)

    class Steps(transformers.TrainerCallback):
        done = 0
        start: Any = None

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.start = clock.read()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.done += 1
            if self.done % options.updates == 0:
                clock.add("total", self.start)
                clock.close()
                self.start = clock.read()

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            model=options.model,
            reward_funcs=letters_a_to_m,
            args=settings(options, folder, num_steps),
            train_dataset=datasets.Dataset.from_list([rows[i % len(rows)] for i in range(wanted)]),
            processing_class=tokenizer,
            callbacks=[Steps()],
        )
        gc.collect()
        base = resident("VmRSS")
        trainer.train()
    timed = clock.steps[options.warmup :]
    return {
        "engine": f"trl {trl.__version__}",
        "options": vars(options),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        **{unit: seconds(timed, i) for i, unit in enumerate(("wall_seconds", "cpu_seconds"))},
        **work(timed),
        "base_mib": base,
        "peak_mib": resident("VmHWM"),
        "device_peak_mib": device_peak(options.device),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl)},
    }


def settings(options: argparse.Namespace, folder: str, num_steps: int) -> Any:
    """TRL's configuration: GSPO's ratio, clip range and normaliser, and nothing beside training."""
    from trl import GRPOConfig

    parts = options.updates * options.micro_batches
    completions = options.prompts_per_rollout * options.group_size
    return GRPOConfig(
        output_dir=folder,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=options.device == "cpu",
        bf16=False,  # the dtype of the weights decides, in both engines
        fp16=False,
        seed=options.seed,
        shuffle_dataset=False,
        importance_sampling_level="sequence",
        loss_type="grpo",
        epsilon=3e-4,
        epsilon_high=4e-4,
        beta=options.kl_coef,
        num_generations=options.group_size,
        steps_per_generation=parts,
        gradient_accumulation_steps=options.micro_batches,
        per_device_train_batch_size=completions // parts,
        num_iterations=1,
        max_completion_length=options.max_new_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        weight_decay=0.0,
        gradient_checkpointing=options.gradient_checkpointing,
        max_steps=num_steps * options.updates,
        model_init_kwargs={"dtype": options.dtype},
    )


def seconds(steps: list[dict[str, Any]], unit: int) -> dict[str, float]:
    """Medians over RL steps; ``unit`` is 0 for wall seconds, 1 for CPU seconds."""

    def phases(step: dict[str, Any]) -> dict[str, float]:
        part = {name: step.get(name, (0.0, 0.0))[unit] for name in (*PHASES, "collect")}
        part["optimise"] = part["total"] - part["collect"]  # TRL collects inside its first step
        scored = sum(part[name] for name in ("rollout", "reward", "old_logprobs", "reference"))
        part["other"] = part["collect"] - scored
        return part

    all_steps = [phases(step) for step in steps]
    return {name: statistics.median(step[name] for step in all_steps) for name in PHASES}


def work(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """What was computed, so that a reader sees that two engines did the same."""
    lengths = [length for step in steps for length in step["lengths"]]
    return {
        "tokens": sum(lengths) / len(steps),
        "mean_length": statistics.fmean(lengths),
        "prompt_tokens": sum(sum(step["prompts"]) for step in steps) / len(steps),
        "rollouts": [{name: step[name] for name in ("prompts", "lengths")} for step in steps],
    }


def resident(field: str) -> float:
    """Resident memory of this process, MiB: ``VmRSS`` now, ``VmHWM`` at its highest.

    Not ``ru_maxrss``, which a process inherits from the one that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def device_peak(device: str) -> float | None:
    """Highest memory that tensors held on the GPU, MiB."""
    if device == "cpu":
        return None
    import torch

    return torch.cuda.max_memory_allocated() / 2**20


if __name__ == "__main__":
    print(json.dumps(run(arguments())))
