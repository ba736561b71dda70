"""`doctor`: examine a config in seconds, on the real model and data, without training.

Decides what is examined and in which order, how it is printed, and the exit code. Everything is set
up by ``fit`` itself, by the same parser, on the same devices, up to the first batch; then a few
prompts are completed and looked at from all sides. Nothing is written, no weight changes. Of
several ranks each examines prompts of its own; the first one speaks for all.
"""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from gspo_lightning.bounds import check_at_least
from gspo_lightning.checkpoint.quoted import printable
from gspo_lightning.doctor import memory, numbers, rewards, text
from gspo_lightning.doctor.clipping import clipping
from gspo_lightning.doctor.engine import engine
from gspo_lightning.doctor.environment import episodes, out_of_turns
from gspo_lightning.doctor.findings import (
    Finding,
    announced,
    as_json,
    as_lines,
    as_list,
    attempt,
    worst,
)
from gspo_lightning.rewards.terms import overlong_penalty
from gspo_lightning.rollout import Samples, join_samples, stream_seed
from gspo_lightning.run.plan import kl_speed, plan_lines, too_slow
from gspo_lightning.run.terminal_log import say
from gspo_lightning.sharding.ranks import weights_of

Checks = dict[str, Callable[[], Finding | list[Finding]]]
DRAWS = ("sample/0", "doctor")  # groups per prompt; the first are drawn as in the first rollout
# passes that ranks make together
TOGETHER = ("engine", "sampling", "kl", "ratio noise", "gradient", "clipping")
WIDTH = 14  # columns of a check's name: lines are printed before all names are known


@dataclass(frozen=True)
class Effort:
    """How much is looked at; what a user asks for is never less, and never more than the run does.

    Attributes:
        num_prompts: Prompts that are completed, ``len(DRAWS)`` groups each.
        max_new_tokens: Longest completion.
        rows: Completions whose noise is measured.
        kl_rows: Completions whose KL is measured, one by one.
        gradient_rows: Completions whose gradient is computed in several cuts.
        trial_rows: Completions of a trial update.
    """

    num_prompts: int = 4
    max_new_tokens: int = 256
    rows: int = numbers.ROWS
    kl_rows: int = numbers.ROWS
    gradient_rows: int = numbers.GRADIENT_ROWS
    trial_rows: int = 64


# What a CPU samples in about a quarter of a minute, in multiplications and additions: two for each
# weight and token. A model that would take longer is looked at on fewer and shorter completions.
AFFORDABLE = 4e11
SHORTEST = 16  # tokens of a completion: fewer say nothing
QUICK = Effort(num_prompts=2, rows=8, kl_rows=4, gradient_rows=2, trial_rows=4)


def effort_for(module: Any, thorough: bool) -> Effort:
    """All there is to look at, or where that would take minutes, what takes less than one."""
    per_token = 2 * sum(p.numel() for p in module.policy.parameters())
    sampler = module.sampler
    completions = Effort.num_prompts * len(DRAWS) * sampler.group_size
    longest = min(Effort.max_new_tokens, sampler.max_new_tokens)
    slow = module.device.type == "cpu" and per_token * completions * longest > AFFORDABLE
    if thorough or not slow:
        return Effort()
    completions = QUICK.num_prompts * len(DRAWS) * sampler.group_size
    tokens = max(SHORTEST, min(longest, int(AFFORDABLE / per_token / completions)))
    return replace(QUICK, max_new_tokens=tokens)


def examine(
    trainer: Any, module: Any, effort: Effort, show: Callable[[list[Finding]], None]
) -> list[Finding]:
    """Run every check; one that fails is a finding and does not stop the others.

    Args:
        trainer: Set up for ``fit``, before the first batch.
        module: A GSPOModule.
        effort: How much is looked at: the first prompts of the run, completions no longer than
            those of the run.
        show: Called with the findings of each check as it ends.
    """
    data, policy = trainer.datamodule, module.policy
    examples = data.examples["path"]
    prompts = [ids for ids, _ in examples]
    limit = module.sampler.max_new_tokens
    cap = min(effort.max_new_tokens, limit)
    drawn: list[Samples] = []
    totals: list[torch.Tensor] = []
    environment = getattr(module.sampler, "environment", None)
    checks: Checks = {
        "plan": lambda: plan(trainer, module),
        "memory": lambda: memory.memory(trainer, module),
        "vocabulary": lambda: text.vocabulary(policy, prompts),
        "prompts": lambda: text.lengths(policy, data, prompts, limit),
        "eos": lambda: text.eos(policy, data),
        "pad": lambda: text.padding(policy),
        "bos": lambda: text.bos(policy, data, prompts),
        "prompt end": lambda: text.prompt_end(policy, prompts),
        "template": lambda: [
            text.template(policy, data, examples),
            *([text.history(data.chat)] if environment and data.chat_template else []),
        ],
        "clip range": lambda: clip_range(module),
        "dropout": lambda: numbers.dropout(policy),
        **({"engine": lambda: engine(module, prompts)} if hasattr(module.sampler, "about") else {}),
        "sampling": lambda: sampling(trainer, module, effort.num_prompts, cap, drawn),
    }
    found = run_checks(checks, trainer, show)
    if not drawn:
        return found
    samples = drawn[0]
    checks = {
        **(
            {"environment": lambda: episodes(environment, samples, policy.tokenizer)}
            if environment
            else {}
        ),
        "prompt": lambda: text.example(policy, samples),
        "truncated": lambda: rewards.truncation(
            samples.finished.cpu(), cap, limit, out_of_turns(samples)
        ),
        "rewards": lambda: earned(module, samples, cap, totals),
        "kl": lambda: numbers.start_kl(module, trainer, samples, effort.kl_rows),
        "ratio noise": lambda: numbers.noise(module, data, samples, effort.rows),
        "gradient": lambda: numbers.first_step(
            module, trainer, data, samples, effort.gradient_rows
        ),
        "clipping": lambda: clipping(module, data, samples, totals, effort.trial_rows),
    }
    return found + run_checks(checks, trainer, show)


def run_checks(
    checks: Checks, trainer: Any, show: Callable[[list[Finding]], None]
) -> list[Finding]:
    """One after the other, each named as it begins and shown as it ends."""
    found = []
    for name, check in checks.items():
        with announced(name):
            # An error in passes that ranks make together ends them all: the others wait in one.
            if name in TOGETHER and trainer.world_size > 1:
                part = as_list(check())
            else:
                part = attempt(name, check)
            part = of_all_ranks(trainer, part)
        show(part)
        found += part
    return found


def of_all_ranks(trainer: Any, found: list[Finding]) -> list[Finding]:
    """What rank 0 has found, and what is worse on another one; the same on every rank."""
    if trainer.world_size == 1:
        return found
    everyone: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(everyone, found)
    told = list(everyone[0])
    for rank, part in enumerate(everyone[1:], start=1):
        for finding in part:
            same = [each for each in told if each.check == finding.check]
            if finding.status != "ok" and worst([*same, finding]) != worst(same):
                told.append(replace(finding, text=f"rank {rank}: {finding.text}"))
    return told


def plan(trainer: Any, module: Any) -> list[Finding]:
    """The lines with which a run begins, but those that are examined by themselves."""
    pairs = [line.split(maxsplit=1) for line in plan_lines(trainer, module)]
    said = {name: said for name, said in pairs if name not in ("memory", "clip", "run")}
    found = [Finding(name, "ok", line) for name, line in said.items()]
    speed = kl_speed(trainer, module)
    if speed is None or not (slow := too_slow(trainer, speed[2])):
        return found
    line = said["penalty"].removesuffix(f"; {slow}")
    return [f if f.check != "penalty" else Finding(f.check, "warning", line, slow) for f in found]


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
    own = module.sampler
    sampler = own.like(own.group_size, cap, own.temperature)
    batch = trainer.datamodule.draw([num_prompts] * trainer.world_size).to(module.device)
    seeds = [stream_seed(module.seed, 0, module.global_rank, purpose) for purpose in DRAWS]
    start = time.perf_counter()
    with weights_of(trainer).apart():
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


def earned(module: Any, samples: Samples, cap: int, totals: list[torch.Tensor]) -> list[Finding]:
    """Each term, their sum as group statistics would see it, also into ``totals``, and flat groups.

    Where most completions are cut below the run's limit, rewards that are all alike are no error:
    a term that looks for an answer has seen none.
    """
    found, scores = rewards.terms(module.rewards, samples)
    if worst(found) == "error":
        return found  # the sum would not be the one of the run
    total, finished, lost = scores.total, samples.finished.cpu(), 0.0
    if cap == module.sampler.max_new_tokens:  # else a cut completion is none that hit the limit
        if module.overlong_ramp is not None:
            lengths = samples.lengths.cpu()
            total = total + overlong_penalty(lengths, cap, module.overlong_ramp)
        if module.truncated != "keep":
            cut = 0.0 if module.truncated == "zero_reward" else torch.nan
            total = torch.where(finished, total, cut)
            lost = (~finished).float().mean().item()
    totals.append(total)
    size = samples.group_size
    if size == 1:  # with a critic a completion is not compared with others of its prompt
        return found
    limit = module.sampler.max_new_tokens
    unknown = cap < limit and (~finished).float().mean() > rewards.MOST
    compared = [rewards.total(total, size, lost), rewards.flat(total, size, len(DRAWS))]
    if unknown:
        remedy = f"most completions were cut for speed: use --max_new_tokens {limit}"
        compared = [
            each if each.status == "ok" else replace(each, status="warning", remedy=remedy)
            for each in compared
        ]
    return [*found, *compared]


def set_up_and_examine(
    trainer: Any,
    model: Any,
    datamodule: Any,
    num_prompts: int | None = None,
    max_new_tokens: int | None = None,
    thorough: bool = False,
    show: Callable[[list[Finding]], None] = lambda found: None,
) -> list[Finding]:
    """Let ``fit`` set everything up, and examine it where training would begin.

    ValueError if a number is below 1, or module and data are of another kind.
    """
    wanted = {"num_prompts": num_prompts, "max_new_tokens": max_new_tokens}
    asked = {name: number for name, number in wanted.items() if number is not None}
    check_at_least(1, **asked)
    if not (hasattr(model, "sampler") and hasattr(model, "objective")):
        raise ValueError(f"doctor examines GSPOModule, and the model is {type(model).__name__}")
    if not (hasattr(datamodule, "draw") and hasattr(datamodule, "examples")):
        raise ValueError(f"doctor needs PromptData, and the data is {type(datamodule).__name__}")
    found: list[Finding] = []

    def look() -> None:
        module = trainer.lightning_module
        effort = replace(effort_for(module, thorough), **asked)
        with trainer.strategy.precision_plugin.train_step_context():  # as around a training step
            found.extend(examine(trainer, module, effort, show))

    first = memory.First(found, show, of_all_ranks)
    trainer.instead_of_training = look
    trainer.callbacks.append(first)
    try:
        trainer.fit(model, datamodule=datamodule)
    finally:
        trainer.instead_of_training = None
        trainer.callbacks.remove(first)
    return found


def main(
    trainer: Any,
    model: Any,
    datamodule: Any,
    num_prompts: int | None,
    max_new_tokens: int | None,
    thorough: bool,
    json: bool,
) -> int:
    """Examine and print what was found; returns the exit code, 1 after an error, else 0."""
    started = time.perf_counter()

    def show(found: list[Finding]) -> None:
        lines = as_lines(found, WIDTH)
        if lines and trainer.is_global_zero and not json:
            for line in lines:
                say(printable(line), sys.stdout)  # one line each, whatever they quote

    wanted = num_prompts, max_new_tokens, thorough
    # What rewards print is no part of the list that a program reads.
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        findings = set_up_and_examine(trainer, model, datamodule, *wanted, show)
    code = int(worst(findings) == "error")
    if not trainer.is_global_zero:
        return code
    if json:
        print(as_json(findings))
        return code
    counts = Counter(finding.status for finding in findings)
    said = ", ".join(f"{counts[status]} {status}" for status in ("error", "warning", "ok"))
    say(f"{said}; {time.perf_counter() - started:.1f} s", sys.stdout)
    return code
