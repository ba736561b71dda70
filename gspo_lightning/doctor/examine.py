"""`doctor`: examine a config in seconds, on the real model and data, without training.

Decides what is examined and in which order, how it is printed, and the exit code. Everything is set
up by ``fit`` itself, by the same parser, on the same devices, up to the first batch; then a few
prompts are completed and looked at from all sides. Nothing is written, no weight changes.
"""

import copy
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from gspo_lightning.bounds import check_at_least
from gspo_lightning.doctor import memory, numbers, rewards, text
from gspo_lightning.doctor.findings import Finding, as_json, as_lines, attempt, worst
from gspo_lightning.rewards.terms import overlong_penalty
from gspo_lightning.rollout import Samples, join_samples, stream_seed
from gspo_lightning.run.one_line import printable
from gspo_lightning.run.plan import plan_lines

Checks = dict[str, Callable[[], Finding | list[Finding]]]
DRAWS = ("sample/0", "doctor")  # groups per prompt; the first are drawn as in the first rollout


def examine(trainer: Any, module: Any, num_prompts: int, max_new_tokens: int) -> list[Finding]:
    """Run every check; one that fails is a finding and does not stop the others.

    Args:
        trainer: Set up for ``fit``, before the first batch.
        module: A GSPOModule.
        num_prompts: Prompts to complete, the first of the run.
        max_new_tokens: Longest completion here; the run's own limit, if that is lower.
    """
    data, policy = trainer.datamodule, module.policy
    examples = data.examples["path"]
    prompts = [ids for ids, _ in examples]
    limit = module.sampler.max_new_tokens
    cap = min(max_new_tokens, limit)
    drawn: list[Samples] = []
    checks: Checks = {
        "plan": lambda: plan(trainer, module),
        "memory": lambda: memory.memory(trainer, module),
        "vocabulary": lambda: text.vocabulary(policy, prompts),
        "prompts": lambda: text.lengths(policy, data, prompts, limit),
        "eos": lambda: text.eos(policy, data),
        "pad": lambda: text.padding(policy),
        "bos": lambda: text.bos(policy, data, prompts),
        "prompt end": lambda: text.prompt_end(policy, prompts),
        "template": lambda: text.template(policy, data, examples),
        "clip range": lambda: clip_range(module),
        "dropout": lambda: numbers.dropout(policy),
        "sampling": lambda: sampling(trainer, module, num_prompts, cap, drawn),
    }
    found = [finding for check in checks.items() for finding in attempt(*check)]
    if not drawn:
        return found
    samples = drawn[0]
    checks = {
        "prompt": lambda: text.example(policy, samples),
        "truncated": lambda: rewards.truncation(samples.finished.cpu(), cap, limit),
        "rewards": lambda: earned(module, samples, cap),
        "kl": lambda: numbers.start_kl(module, trainer, samples),
        "ratio noise": lambda: numbers.noise(module, data, samples),
        "gradient": lambda: numbers.first_step(module, trainer, data, samples),
    }
    return found + [finding for check in checks.items() for finding in attempt(*check)]


def plan(trainer: Any, module: Any) -> list[Finding]:
    """The lines with which a run begins; memory and folder have no place here."""
    pairs = [line.split(maxsplit=1) for line in plan_lines(trainer, module)]
    return [Finding(name, "ok", text) for name, text in pairs if name not in ("memory", "run")]


def clip_range(module: Any) -> Finding:
    """Whether the clip range was meant for another kind of ratio, as run health sees it."""
    low, high, ratio = (getattr(module.objective, n) for n in ("clip_low", "clip_high", "ratio"))
    said = f"[1 - {low:g}, 1 + {high:g}] for a {ratio} ratio"
    if "range" in module.health.said:
        remedy = "a length-normalised ratio stays inside it; use clip_low 3e-4 and clip_high 4e-4"
        return Finding("clip range", "warning", said, remedy)
    return Finding("clip range", "ok", said)


def sampling(
    trainer: Any, module: Any, num_prompts: int, cap: int, drawn: list[Samples]
) -> Finding:
    """Complete the first prompts of the run, twice ``group_size`` times, into ``drawn``.

    Twice, so that n = 2 G completions of a prompt tell what groups of G are like. The groups of a
    prompt follow one another.
    """
    sampler = copy.copy(module.sampler)  # not deep: an engine behind it stays the same one
    sampler.max_new_tokens = cap
    batch = trainer.datamodule.draw([num_prompts] * trainer.world_size).to(module.device)
    seeds = [stream_seed(module.seed, 0, module.global_rank, purpose) for purpose in DRAWS]
    start = time.perf_counter()
    parts = [sampler.sample(module.policy, batch, seed=seed) for seed in seeds]
    seconds = time.perf_counter() - start
    rows = torch.arange(len(DRAWS) * num_prompts * sampler.group_size)
    order = rows.view(len(DRAWS), num_prompts, sampler.group_size).transpose(0, 1).flatten()
    drawn.append(join_samples(parts).select(order))
    tokens = int(drawn[0].mask.sum())
    value = {"completions": len(rows), "tokens": tokens, "seconds": seconds, "cap": cap}
    said = f"{len(rows)} completions of {num_prompts} prompts, {tokens} tokens in {seconds:.1f} s"
    limit = module.sampler.max_new_tokens
    if cap < limit:
        said += f"; at most {cap} tokens each for speed (--max_new_tokens), not {limit}"
    return Finding("sampling", "ok", said, value=value)


def earned(module: Any, samples: Samples, cap: int) -> list[Finding]:
    """Each term, their sum as group statistics would see it, and flat groups."""
    found, scores = rewards.terms(module.rewards, samples)
    if worst(found) == "error":
        return found  # the sum would not be the one of the run
    total, finished, lost = scores.total, samples.finished.cpu(), 0.0
    if cap == module.sampler.max_new_tokens:  # else a cut completion is none that hit the limit
        if module.overlong_ramp is not None:
            lengths = samples.mask.sum(1).cpu()
            total = total + overlong_penalty(lengths, cap, module.overlong_ramp)
        if module.truncated != "keep":
            cut = 0.0 if module.truncated == "zero_reward" else torch.nan
            total = torch.where(finished, total, cut)
            lost = (~finished).float().mean().item()
    size = samples.group_size
    if size == 1:  # with a critic a completion is not compared with others of its prompt
        return found
    return [*found, rewards.total(total, size, lost), rewards.flat(total, size, len(DRAWS))]


def set_up_and_examine(
    trainer: Any, model: Any, datamodule: Any, num_prompts: int, max_new_tokens: int
) -> list[Finding]:
    """Let ``fit`` set everything up, and examine it where training would begin.

    ValueError if a number is below 1, or module and data are of another kind.
    """
    check_at_least(1, num_prompts=num_prompts, max_new_tokens=max_new_tokens)
    if not (hasattr(model, "sampler") and hasattr(model, "objective")):
        raise ValueError(f"doctor examines GSPOModule, and the model is {type(model).__name__}")
    if not (hasattr(datamodule, "draw") and hasattr(datamodule, "examples")):
        raise ValueError(f"doctor needs PromptData, and the data is {type(datamodule).__name__}")
    found: list[Finding] = []

    def look() -> None:
        with trainer.strategy.precision_plugin.train_step_context():  # as around a training step
            found.extend(examine(trainer, trainer.lightning_module, num_prompts, max_new_tokens))

    trainer.instead_of_training = look
    try:
        trainer.fit(model, datamodule=datamodule)
    finally:
        trainer.instead_of_training = None
    return found


def main(
    trainer: Any, model: Any, datamodule: Any, num_prompts: int, max_new_tokens: int, json: bool
) -> int:
    """Examine and print what was found; returns the exit code, 1 after an error, else 0."""
    started = time.perf_counter()
    findings = set_up_and_examine(trainer, model, datamodule, num_prompts, max_new_tokens)
    code = int(worst(findings) == "error")
    if not trainer.is_global_zero:
        return code
    if json:
        print(as_json(findings))
        return code
    counts = Counter(finding.status for finding in findings)
    said = ", ".join(f"{counts[status]} {status}" for status in ("error", "warning", "ok"))
    lines = [*as_lines(findings), f"{said}; {time.perf_counter() - started:.1f} s"]
    # Prompts and tokens are quoted in the lines, and not every terminal can print them.
    print("\n".join(map(printable, lines)), flush=True)
    return code
