"""Try one type of model in every way that a run uses it, against plain passes of single rows.

Decides what is asked of a type: that it loads, samples, gives log-probs and gradients, trains a
step and takes adapters, each compared with the model as transformers loads it, run on one row
without cache or padding. ``python -m support.model_types TYPE ...`` in ``tests`` tries types,
``--write`` also writes down what is expected of them (``model_table``).
"""

import argparse
import contextlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from gspo_lightning.logprobs import completion_logprobs, samples_logprobs
from gspo_lightning.policy.lora import LoRAConfig
from gspo_lightning.policy.policy import PolicyConfig, load_policy
from gspo_lightning.rewards.terms import RewardTerm
from gspo_lightning.rollout import PromptBatch, Samples
from gspo_lightning.run.plan import plan_lines
from gspo_lightning.sampling import GroupSampler
from support import model_table
from support.model_configs import EOS, FRESH, POLICY, TEXTS, TYPES, UNBUILT, VARIANTS, config_of
from support.observers import Outputs
from support.tiny_models import build_tokenizer
from support.tiny_run import run

GROUP, LENGTH = 3, 8
PROMPTS = (12, 5)  # tokens
COMPLETIONS = (8, 3, 1, 8, 5, 8)
TOLERANCE = 1e-4  # nats, and share of the largest gradient
LIMIT = 30  # seconds of computing a type
EXTRAS = ("causal", "checkpointed", "lora")  # which no run without them needs
REFUSAL = re.compile(r"ValueError: [a-z_.]+: ")  # one line that begins with a setting


def draw_weights(model: Any) -> None:
    """Weights that make every part of a model count: none is left at zero or at one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 0.2)
            else:
                parameter.add_(noise * 0.1)


def make_batch(prompts: tuple[int, ...]) -> tuple[PromptBatch, Samples]:
    """Prompts, padded on the left, and completions of them that nobody sampled."""
    generator = torch.Generator().manual_seed(1)
    width = max(prompts) + 2  # padding that all share
    ids = torch.randint(10, 28, (len(prompts), width), generator=generator)
    mask = torch.arange(width) >= width - torch.tensor(prompts)[:, None]
    batch = PromptBatch(ids.masked_fill(~mask, 0), mask, [{} for _ in prompts])
    count = len(prompts) * GROUP
    completion_ids = torch.randint(10, 28, (count, LENGTH), generator=generator)
    kept = torch.arange(LENGTH) < torch.tensor(COMPLETIONS)[:, None]
    samples = Samples(
        prompt_ids=batch.prompt_ids.repeat_interleave(GROUP, 0),
        prompt_mask=mask.repeat_interleave(GROUP, 0),
        completion_ids=completion_ids.masked_fill(~kept, 0),
        mask=kept,
        finished=torch.zeros(count, dtype=torch.bool),
        rows=[{}] * count,
        texts=[""] * count,
        group_size=GROUP,
    )
    return batch, samples


def plain_row(model: Any, samples: Samples, row: int, longest: int) -> Tensor:
    """Log-probs of one completion by one pass over its text alone, (length,).

    Args:
        longest: Where positions depend on the length of a text: the tokens that every text is made
            long with, by tokens behind its end, which it does not see. 0 elsewhere.
    """
    prompt = samples.prompt_ids[row][samples.prompt_mask[row]]
    completion = samples.completion_ids[row][samples.mask[row]]
    end = len(prompt) + len(completion)
    text = torch.cat([prompt, completion, prompt.new_full((max(0, longest - end),), 3)])
    logits = model(input_ids=text[None], use_cache=False).logits[0, len(prompt) - 1 : end - 1]
    return logits.float().log_softmax(-1).gather(-1, completion[:, None])[:, 0]


@torch.no_grad()
def plain(model: Any, samples: Samples, longest: int) -> Tensor:
    """Log-probs of all completions, row by row, (B, T)."""
    found = torch.zeros(samples.mask.shape)
    for row, kept in enumerate(samples.mask):
        found[row, kept] = plain_row(model, samples, row, longest)
    return found


def plain_gradient(
    model: Any, samples: Samples, weights: Tensor, longest: int
) -> dict[str, Tensor]:
    """The gradient of a weighted sum of all log-probs, row by row."""
    model.zero_grad()
    for row, kept in enumerate(samples.mask):
        (plain_row(model, samples, row, longest) * weights[row, kept]).sum().backward()
    return gradient(model)


def gradient(model: Any) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def gradient_distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, as a share of the largest gradient."""
    if found.keys() != expected.keys():
        raise KeyError(f"other parameters: {sorted(found.keys() ^ expected.keys())[:4]}")
    largest = max(value.abs().max().item() for value in expected.values())
    return max(worst(found[name] - expected[name]) for name in expected) / largest


def worst(difference: Tensor) -> float:
    """The largest absolute value; NaN counts as infinite."""
    return difference.abs().nan_to_num(nan=torch.inf).max().item() if difference.numel() else 0.0


def places(rows: list[dict], completions: list[str]) -> list[float | None]:
    """A reward that differs within every group."""
    return [float(place) for place in range(len(rows))]


class Plan(Callback):
    """Makes the lines that a run shows before it trains."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        plan_lines(trainer, module)


class Said(logging.Handler):
    """Keeps the lines that the package says."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line not in self.lines:
            self.lines.append(line)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError within, once so many seconds of this process's computing are over."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


class Trial:
    """One type; ``checks`` holds a number or an error's first line for each check."""

    def __init__(self, name: str, folder: Path, said: Said) -> None:
        self.name = name
        self.listener = said
        self.folder = folder
        self.checks: dict[str, Any] = {}
        self.said: list[str] = []  # of a run as usual: of the ways that it takes
        self.seconds: dict[str, float] = {}
        prompts = TEXTS.get(name, PROMPTS)
        self.longest = max(prompts) + LENGTH if name in TEXTS else 0
        self.prompts, self.samples = make_batch(prompts)
        generator = torch.Generator().manual_seed(2)
        self.weights = torch.randn(self.samples.mask.shape, generator=generator)

    def check(self, name: str, function: Any, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            self.checks[name] = function(*args)
        except TimeoutError:
            raise
        except Exception as error:
            self.checks[name] = first_line(error)
        self.seconds[name] = time.perf_counter() - start

    def build(self) -> None:
        """Write the policy's folder, and load the plain model from it."""
        model = AutoModelForCausalLM.from_config(config_of(self.name))
        if self.name not in FRESH:
            draw_weights(model)
        model.generation_config.eos_token_id = EOS
        model.save_pretrained(self.folder)
        build_tokenizer().save_pretrained(self.folder)
        self.config = PolicyConfig(str(self.folder), **POLICY.get(self.name, {}))
        self.oracle = AutoModelForCausalLM.from_pretrained(self.folder).eval()
        self.kind = type(model).__name__

    def plain(self) -> None:
        """Run the plain model, which fails where texts are longer than its positions."""
        self.expected = plain(self.oracle, self.samples, self.longest)

    def causal(self) -> float:
        """How far a token's log-prob depends on what comes after it."""
        text = self.samples.prompt_ids[0][self.samples.prompt_mask[0]]
        with torch.no_grad():
            whole = self.oracle(input_ids=text[None], use_cache=False).logits[0, -5]
            part = self.oracle(input_ids=text[None, :-4], use_cache=False).logits[0, -1]
        return worst(whole.log_softmax(-1) - part.log_softmax(-1))

    def loaded(self, **options: Any) -> Any:
        """A policy as a run has it."""
        policy = load_policy(replace(self.config, **options))
        if self.longest:
            from gspo_lightning.engine.rotary import fix_rotary

            fix_rotary(policy.model, self.longest)
        return policy.train()

    def load(self) -> None:
        self.policy = self.loaded()

    def sample(self, at_once: int | None) -> float:
        sampler = GroupSampler(GROUP, LENGTH, batch_size=at_once)
        samples = sampler.sample(self.policy, self.prompts, seed=0)
        assert samples.logprobs is not None
        return worst((plain(self.oracle, samples, self.longest) - samples.logprobs)[samples.mask])

    @torch.no_grad()
    def logprobs(self, packed: bool, group_size: int) -> float:
        batch = self.samples
        found = completion_logprobs(
            self.policy.model,
            batch.prompt_ids,
            batch.prompt_mask,
            batch.completion_ids,
            batch.mask,
            group_size=group_size,
            packed=packed,
        )
        return worst((found.logprobs - self.expected)[batch.mask])

    @torch.no_grad()
    def twice(self) -> float:
        """What train mode adds by chance."""
        first, second = (samples_logprobs(self.policy.model, self.samples, 1.0) for _ in range(2))
        return worst(first.logprobs - second.logprobs)

    def gradients(self, size: int) -> float:
        if not hasattr(self, "gradient"):
            self.gradient = plain_gradient(self.oracle, self.samples, self.weights, self.longest)
        self.policy.model.zero_grad()
        for rows in self.samples.micro_batch_indices(size):
            micro = self.samples.select(rows)
            found = samples_logprobs(self.policy.model, micro, 1.0)
            (found.logprobs * self.weights[rows]).sum().backward()
        return gradient_distance(gradient(self.policy.model), self.gradient)

    def checkpointed(self) -> float:
        """The gradient while activations are computed again in the backward pass."""
        self.policy = self.loaded(gradient_checkpointing=True)
        return self.gradients(GROUP)

    def step(self) -> float:
        """One rollout and one optimizer step of a whole run; how far its ratios are from 1."""
        keep = Outputs()
        root = self.folder / "run"
        root.mkdir()
        run(
            root,
            self.folder,
            1,
            [keep, Plan()],
            policy=self.config,
            sampler=GroupSampler(GROUP, 3 * LENGTH if self.longest else LENGTH),
            rewards={"place": RewardTerm(places)},
            num_minibatches=1,
            micro_batch_size=GROUP,
            old_logprobs="recompute",
        )
        metrics = keep.all[0]["metrics"]
        if not 0 < metrics["policy/grad_norm"] < torch.inf:
            raise ValueError(f"gradient norm {metrics['policy/grad_norm']}")
        return max(worst(keep.all[0]["ratios"] - 1), metrics["policy/ratio_noise"])

    def adapters(self) -> float:
        """Train adapters a step, and compare with a plain pass of what is exported."""
        lora = self.loaded(lora=LoRAConfig(rank=2))
        found = samples_logprobs(lora.model, self.samples, 1.0).logprobs
        start = worst((found.detach() - self.expected)[self.samples.mask])
        (found * self.weights).sum().backward()
        with torch.no_grad():
            moved = [p for p in lora.parameters() if p.requires_grad and p.grad is not None]
            for parameter in moved:
                parameter.add_(parameter.grad.sign() * 0.05)
            if not any(p.grad.abs().max() > 0 for p in moved):
                raise ValueError("no adapter has a gradient")
            found = samples_logprobs(lora.model, self.samples, 1.0).logprobs
        lora.export(self.folder / "export")
        merged = AutoModelForCausalLM.from_pretrained(self.folder / "export").eval()
        expected = plain(merged, self.samples, self.longest)
        if worst((expected - self.expected)[self.samples.mask]) < 1e-3:
            raise ValueError("the export is the model without its adapters")
        return max(start, worst((found - expected)[self.samples.mask]))

    def all(self) -> None:
        self.check("build", self.build)
        if self.checks["build"] is not None:
            return
        self.check("plain", self.plain)
        self.check("causal", self.causal)
        self.check("load", self.load)
        if self.checks["load"] is None:
            self.check("sample", self.sample, None)
            self.check("sample 2", self.sample, 2)  # rows come in as others end
            self.check("packed 1", self.logprobs, True, 1)
            self.check(f"packed {GROUP}", self.logprobs, True, GROUP)
            for size in (1, GROUP, len(self.samples)):
                self.check(f"gradient {size}", self.gradients, size)
            self.check("twice", self.twice)
            self.check("step", self.step)
            self.said = list(self.listener.lines)
            self.check("padded 1", self.logprobs, False, 1)
            self.check(f"padded {GROUP}", self.logprobs, False, GROUP)
            self.check("checkpointed", self.checkpointed)
        self.check("lora", self.adapters)


@contextlib.contextmanager
def _quiet(said: Said) -> Iterator[None]:
    """Only the package speaks, and only to ``said``."""
    log = logging.getLogger("gspo_lightning")
    others = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels = [other.level for other in others]
    verbosity, propagate = transformers_logging.get_verbosity(), log.propagate
    try:
        log.addHandler(said)
        log.propagate = False
        for other in others:
            other.setLevel(logging.ERROR)
        transformers_logging.set_verbosity(transformers_logging.CRITICAL)
        transformers_logging.disable_progress_bar()
        yield
    finally:
        log.removeHandler(said)
        log.propagate = propagate
        for other, level in zip(others, levels, strict=True):
            other.setLevel(level)
        transformers_logging.set_verbosity(verbosity)


def try_type(name: str) -> dict[str, Any]:
    """Run all checks on one type or variant.

    Returns:
        ``outcome`` (unbuilt, refused, dies, wrong, fallback, ok), ``said``, ``checks``.
    """
    torch.set_num_threads(1)
    start, said = time.perf_counter(), Said()
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        _quiet(said),
    ):
        torch.manual_seed(0)
        warnings.simplefilter("ignore")
        trial = Trial(name, Path(folder), said)
        try:
            with time_limit(LIMIT):
                trial.all()
        except TimeoutError as error:
            trial.checks["time"] = first_line(error)
    return {
        "name": name,
        "model": getattr(trial, "kind", ""),
        "outcome": outcome(trial.checks, trial.said),
        "said": trial.said,
        "reason": UNBUILT.get(name, trial.checks["build"]),
        "checks": trial.checks,
        "tolerance": TOLERANCE,
        "seconds": time.perf_counter() - start,
        "parts": trial.seconds,
    }


def outcome(checks: dict[str, Any], said: list[str]) -> str:
    if checks["build"] is not None:
        return "unbuilt"
    for stage in ("load", "step"):  # where a user meets a model
        if isinstance(checks.get(stage), str):
            return "refused" if REFUSAL.match(checks[stage]) else "dies"
    own = {name: value for name, value in checks.items() if name not in EXTRAS}
    if any(isinstance(value, str) for value in own.values()):
        return "dies"
    if any(value is not None and value > TOLERANCE for value in own.values()):
        return "wrong"
    return "fallback" if said else "ok"


def show(record: dict[str, Any], details: bool) -> None:
    """Print a line of what is off, and what was said."""
    off = {
        name: value
        for name, value in record["checks"].items()
        if isinstance(value, str) or (value or 0) > TOLERANCE
    }
    print(f"{record['outcome']:8} {record['name']:28} {record['seconds']:5.1f} s")
    for name, value in off.items():
        print(f"{'':9}{name}: {value if isinstance(value, str) else f'{value:.1e}'}")
    for line in record["said"]:
        print(f"{'':9}said: {line}")
    if details:
        print(json.dumps(record, indent=1))
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="types or variants; all without any")
    parser.add_argument("--json", type=Path, help="write all records here")
    parser.add_argument("--write", action="store_true", help="write the table and docs/models.md")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--details", action="store_true")
    options = parser.parse_args()
    names = options.names or [*TYPES, *VARIANTS]
    records = []
    if len(names) < 3:
        for name in names:
            records.append(try_type(name))
            show(records[-1], options.details)
    else:
        with ProcessPoolExecutor(options.workers) as pool:
            for record in pool.map(try_type, names):
                records.append(record)
                show(record, options.details)
    if options.write:
        model_table.write(records)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
