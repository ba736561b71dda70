"""What a run will do, and how it is continued.

Decides which lines a plan has. Modules and trainers are read by attribute, so a warm start, or a
module of one's own, gets the lines that apply.
"""

import contextlib
import math
from collections.abc import Mapping
from datetime import timedelta
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch.callbacks import Timer

from gspo_lightning.checkpoint.files import checkpoint_number, list_checkpoints
from gspo_lightning.critic.critic import decoder
from gspo_lightning.engine.probe import plainer_ways, reading
from gspo_lightning.optim import OptimizerConfig, learning_rate_factor
from gspo_lightning.policy.policy import multiplies_by_onednn
from gspo_lightning.policy.shards import compute_device
from gspo_lightning.run.memory import cuts, memory_line, needs
from gspo_lightning.sampling import GroupSampler
from gspo_lightning.start.short import SHORT
from gspo_lightning.start.typed import again

# Nats by which half precision rounds the log-prob of a token: 7e-3 (the demo's policy) to 3e-2 (270
# million parameters).
HALF_ROUNDING = 1e-2


def plan_lines(trainer: Any, module: Any) -> list[str]:
    """At most ten lines of a name and a text: what is known of a run before the first batch.

    ``trainer`` is set up, so that data and devices are known; ``module`` may be of any kind.
    """
    lines = {
        "plan": _work(trainer, module),
        "updates": _updates(trainer, module) if hasattr(module, "sampler") else None,
        "policy": _policy(trainer, module),
        "passes": _passes(trainer, module),
        "critic": _critic(module) if getattr(module, "critic", None) is not None else None,
        "scoring": _frozen(module) or None,
        "clip": _clip(trainer, module) if hasattr(module, "objective") else None,
        "penalty": _penalty(trainer, module) if hasattr(module, "sampler") else None,
        "memory": memory_line(module, needs(trainer, module)),
        "run": trainer.default_root_dir,
    }
    return [f"{name:<9} {text}" for name, text in lines.items() if text is not None]


def total_batches(trainer: Any) -> int | None:
    """Rollouts (or batches) of the whole run; None if nothing bounds it.

    ``trainer.num_training_batches`` is infinite until training starts, so the data is asked first.
    """
    data = trainer.datamodule
    batches = getattr(data, "num_rollouts", None) or getattr(data, "num_steps", None)
    batches = min(batches or math.inf, trainer.num_training_batches)
    if isinstance(trainer.limit_train_batches, int):
        batches = min(batches, trainer.limit_train_batches)
    if trainer.max_epochs is None or trainer.max_epochs < 0:
        batches = math.inf
    total = batches * trainer.max_epochs if math.isfinite(batches) else math.inf
    total = min(total, _batches_to_max_steps(trainer))
    return int(total) if math.isfinite(total) else None


def max_steps(trainer: Any) -> int:
    """`trainer.max_steps`, also while a RolloutCheckpoint lifts it; -1 without such a limit."""
    lifted = (getattr(c, "lifted_max_steps", None) for c in getattr(trainer, "callbacks", ()))
    return next((limit for limit in lifted if limit is not None), trainer.max_steps)


def _batches_to_max_steps(trainer: Any) -> float:
    """Batches at whose end the limit of optimizer steps is reached; infinite if nothing tells."""
    module, limit = trainer.lightning_module, max_steps(trainer)
    if limit < 0:
        return math.inf
    if module.automatic_optimization:
        return limit * trainer.accumulate_grad_batches
    steps = getattr(module, "num_epochs", 0) * getattr(module, "num_minibatches", 0)
    if not steps:  # a module of one's own
        return math.inf
    # from here on: steps that were skipped for a fault do not count
    left = max(0, -(-(limit - trainer.global_step) // steps))
    return trainer.fit_loop.total_batch_idx + 1 + left


def reached(trainer: Any) -> bool:
    """Whether a run has its planned length."""
    # not total_batch_idx: that counts a batch that a hook has refused, too
    done, total = trainer.fit_loop.epoch_loop.batch_progress.total.started, total_batches(trainer)
    if total is not None and done >= total:
        return True
    return 0 <= max_steps(trainer) <= trainer.global_step


def time_limits(trainer: Any) -> list[tuple[timedelta, timedelta]]:
    """Time in training, over all parts of the run, and its limit, of each Timer with a limit."""
    timers = [c for c in getattr(trainer, "callbacks", ()) if isinstance(c, Timer)]
    known = [(t.time_elapsed(), t.time_remaining()) for t in timers]
    return [
        (timedelta(seconds=spent), timedelta(seconds=round(spent + left, 3)))
        for spent, left in known
        if left is not None
    ]


def _limits(trainer: Any) -> str:
    """What ends a run before its data does, as the rest of a sentence."""
    texts = []
    if (limit := max_steps(trainer)) >= 0:
        texts.append(f"up to {limit:,} optimizer steps (trainer.max_steps)")
    for _, longest in time_limits(trainer):
        texts.append(f"for at most {longest} in all (trainer.max_time or Timer)")
    return f", {' and '.join(texts)}" if texts else ""


def _work(trainer: Any, module: Any) -> str:
    total, data = total_batches(trainer), trainer.datamodule
    done = trainer.fit_loop.total_batch_idx + 1
    count = "any number of" if total is None else f"{total:,}"
    if not hasattr(module, "sampler"):
        batch = getattr(data, "batch_size", None)
        text = f"{count} batches" + (f" of {batch * trainer.world_size}" if batch else "")
        text += f", {done:,} of them done" if done else ""
        return text + _limits(trainer)
    prompts = data.prompts_per_rollout * trainer.world_size
    group_size, longest = module.sampler.group_size, module.sampler.max_new_tokens
    tokens = prompts * group_size * longest
    if getattr(module, "drop_flat_groups", False):  # every group may have to be replaced each time
        tokens *= 1 + module.max_draws
    bound = f"{tokens:,} tokens each"
    if total is not None:
        bound = f"{tokens * (total - done):,} tokens to sample"
    return (
        f"{count} rollouts{f' ({done:,} done)' if done else ''}, each {prompts} prompts x "
        f"{group_size} completions of at most {longest} tokens; at most {bound}{_limits(trainer)}"
    )


def _updates(trainer: Any, module: Any) -> str:
    steps = module.num_epochs * module.num_minibatches
    sequences = trainer.datamodule.prompts_per_rollout * module.sampler.group_size
    size = sequences // module.num_minibatches
    micro = min(module.micro_batch_size or size, size)
    epochs = f"{module.num_epochs} epoch{'s' if module.num_epochs > 1 else ''}"
    parts = [f"{epochs} x {module.num_minibatches} mini-batches of {size}"]
    group_size = module.sampler.group_size
    if micro < size:
        again = f", each prompt read {-(-group_size // micro)} times"
        shared = micro < group_size and shares_prompts(module)
        parts.append(f"{micro} at a time" + (again if shared else ""))
    if module.micro_batch_tokens is not None:
        parts.append(f"at most {module.micro_batch_tokens:,} tokens at a time")
    text = f"{steps} optimizer steps per rollout ({', '.join(parts)})"
    total = total_batches(trainer)
    if total is None:
        return text
    text = f"{text}, {steps * total:,} in all"
    config = getattr(module, "optimizer_config", None)
    if config is None:
        return text
    # the schedule is laid out over all rollouts, also where another limit ends the run before
    rollouts = getattr(trainer.datamodule, "num_rollouts", None) or total
    whole = max(total, rollouts * max(1, trainer.max_epochs or 1))
    return f"{text}; they move a weight by at most {steps * furthest(config, total, whole):.1e}"


def furthest(config: OptimizerConfig, total: int, whole: int | None = None) -> float:
    """How far AdamW moves a weight at most, decay apart, with one step in each unit of a schedule.

    A step is at most the learning rate, or (1 - beta1) / sqrt(1 - beta2) of it where that is more.

    Args:
        config: The settings.
        total: Units that the run takes.
        whole: Units that the schedule is laid out over; as many if None.

    Source:
        Adam, arXiv:1412.6980, section 2.1.

    >>> round(furthest(OptimizerConfig(learning_rate=1e-6, warmup=4), total=5) * 1e6, 6)
    3.5
    """
    beta1, beta2 = config.betas
    factor = learning_rate_factor(config, whole or total)
    rates = sum(factor(index) for index in range(total)) * config.learning_rate
    return rates * max(1.0, (1 - beta1) / math.sqrt(1 - beta2))


def shares_prompts(module: Any) -> bool:
    """Whether rows of a group that share a pass share their prompt, too."""
    model = module.policy.model
    return reading(model, compute_device(model)) in ("packed", "shared")


def _clip(trainer: Any, module: Any) -> str:
    """The clip range, and whether rounding is of its size: measured is that later, by `doctor`."""
    objective, limit = module.objective, module.sampler.max_new_tokens
    low, high = objective.clip_low, objective.clip_high
    bounds = f"capped at 1 + {high:g}"
    if objective.surrogate == "clip":
        bounds = f"within [1 - {low:g}, 1 + {high:g}]"
    text = f"{objective.ratio} ratio {bounds}"
    if module.num_epochs * module.num_minibatches == 1:
        return f"{text}; never clipped: one optimizer step per rollout"
    mean = objective.ratio in ("sequence", "sequence_token")
    rounding = HALF_ROUNDING / math.sqrt(limit) if mean else HALF_ROUNDING
    parameter = next(iter(module.policy.parameters()))
    half = "16" in str(trainer.precision) or parameter.element_size() < 4
    if half and rounding > objective.clip_width / 3:
        text += f"; half precision rounds it by some {rounding:.0e}"
        text += f" at {limit} tokens, more at fewer" if mean else ""
        return f"{text}: see `ratio noise` of doctor, or set trainer.precision 32-true"
    return f"{text}; `doctor` proposes one from a trial update"


def kl_speed(trainer: Any, module: Any) -> tuple[Any, float, float] | None:
    """The KL rule, its first coefficient, and the factor by which a rollout raises that at most.

    None without a rule, or where the first coefficient is already the largest.
    """
    for callback in getattr(trainer, "callbacks", ()):
        rule: Any = getattr(callback, "rule", None)
        coef = getattr(callback, "initial", None)
        if coef is not None and hasattr(rule, "next_coef"):
            prompts = trainer.datamodule.prompts_per_rollout * trainer.world_size
            largest = rule.next_coef(coef, 1e6 * rule.target, prompts * module.sampler.group_size)
            return None if largest <= coef else (rule, coef, largest / coef)
    return None


def _penalty(trainer: Any, module: Any) -> str | None:
    found = kl_speed(trainer, module)
    if found is None:
        return f"KL coefficient {module.kl_coef:g}" if getattr(module, "kl_coef", 0.0) > 0 else None
    rule, coef, factor = found
    text = (
        f"KL coefficient from {coef:g}, aims at {rule.target:g} nats per token, rises by at most "
        f"{factor - 1:.2g} of itself a rollout"
    )
    return text + (f"; {slow}" if (slow := too_slow(trainer, factor)) else "")


def too_slow(trainer: Any, factor: float) -> str:
    """What to say of a KL rule that cannot even double its coefficient in the run; else nothing."""
    total = total_batches(trainer)
    if total is None or total * math.log(factor) >= math.log(2):
        return ""
    return (
        f"too slow for {total:,} rollouts, x{factor**total:.2g} in all: lower rollouts or horizon "
        "of AdaptiveKL's rule, or raise its initial"
    )


def _policy(trainer: Any, module: Any) -> str:
    model = getattr(module, "policy", module)
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    share = "all trained" if trained == count else f"{trained:,} trained"
    types = "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
    place = str(trainer.strategy.root_device)
    if trainer.world_size > 1:
        place += f" and {trainer.world_size - 1} more"
    place += ", a part on each" if cuts(trainer.strategy) else ""
    text = f"{count:,} parameters, {share}, {types} on {place}, precision {trainer.precision}"
    text += _surplus(model)
    exact = trainer.precision == "32-true" and trainer.strategy.root_device.type == "cpu"
    return text + (", products by oneDNN" if exact and multiplies_by_onednn(model) else "")


def _passes(trainer: Any, module: Any) -> str | None:
    """Where models are not run in the best way; they are tried here, before the first batch."""
    model = getattr(getattr(module, "policy", None), "model", None)
    if model is None:
        return None
    critic = getattr(module, "critic", None)
    others = {
        "reference": getattr(getattr(module, "reference", None), "model", None),
        "critic": critic and (decoder(model) if critic.backbone is None else critic.backbone),
    }

    def found(model: Any, sampled: bool) -> list[str]:
        return plainer_ways(model, compute_device(model), sampled=sampled)

    reasons = found(model, isinstance(getattr(module, "sampler", None), GroupSampler))
    for name, other in others.items():
        if other is not None:
            reasons += [f"{name}: {why}" for why in found(other, False) if why not in reasons]
    return "; ".join(reasons) or None


def _surplus(policy: Any) -> str:
    """Ids that the tokenizer has and the model lacks; the data has refused prompts with them."""
    if not hasattr(getattr(policy, "tokenizer", None), "__len__"):
        return ""
    ids, rows = len(policy.tokenizer), policy.model.get_input_embeddings().weight.shape[0]
    return f", {ids - rows} of the tokenizer's {ids:,} ids unknown to it" if ids > rows else ""


def _critic(module: Any) -> str:
    """What values come from; parameters are those of its own layers, not the policy's."""
    count = sum(p.numel() for p in module.critic.parameters())
    config = module.critic.config
    layers = "layers of its own" if module.critic.backbone is not None else "the policy's layers"
    rate = f"learning rate {config.learning_rate_ratio:g} x the policy's"
    return f"{count:,} parameters, {layers}, {rate}"


def _frozen(module: Any) -> str:
    parts = []
    moved = getattr(getattr(module, "frozen", None), "device", None)
    if getattr(module, "reference", None) is not None:
        shared = " (its adapters off)" if getattr(module.reference, "shared", False) else ""
        parts.append(f"reference on {moved or module.reference.device}{shared}")
    for name, term in (getattr(module, "rewards", None) or {}).items():
        place = f" on {moved or term.fn.device}" if hasattr(term.fn, "device") else ""
        parts.append(f"reward {name}{place}")
    return ", ".join(parts)


def weights_in_use(trainer: Any, module: Any) -> str:
    """Which weights an evaluation or a prediction is of: their file, and how far they were trained.

    With WeightAveraging a checkpoint holds two sets; all but training takes the average.
    """
    done = trainer.fit_loop.total_batch_idx + 1
    if trainer.ckpt_path is not None:
        number = checkpoint_number(trainer.ckpt_path)
        parts = [] if number is None else [f"after {number:,} {unit(module)}"]
        # one in pieces is a folder, and what others saved may be no file that can be mapped
        with contextlib.suppress(OSError, RuntimeError, UnpicklingError):
            found = torch.load(trainer.ckpt_path, map_location="cpu", mmap=True, weights_only=True)
            parts.append("averaged" if "averaging_state" in found else "not averaged")
        return f"{trainer.ckpt_path} ({', '.join(parts)})" if parts else str(trainer.ckpt_path)
    if done:
        return f"those in memory, after {done:,} {unit(module)}"
    path = getattr(getattr(module, "policy_config", None), "path", None)
    text = f"{'those of the config' if path is None else path}, untrained by this run"
    if list_checkpoints(trainer.default_root_dir):
        text += f"; --ckpt_path last takes the newest of {trainer.default_root_dir}"
    return text


def unit(module: Any) -> str:
    """What a run of a module is counted in."""
    return "rollouts" if hasattr(module, "sampler") else "steps"


def longer_run(trainer: Any) -> dict[str, int]:
    """The options that make a finished run twice as long."""
    done = trainer.fit_loop.total_batch_idx + 1
    longer = {}
    if 0 <= trainer.max_steps <= trainer.global_step:
        longer["--trainer.max_steps"] = 2 * trainer.max_steps
        if trainer.max_epochs < 0 or not trainer.is_last_batch:
            return longer  # the data has more
    if trainer.max_epochs > 1:
        return longer | {"--trainer.max_epochs": 2 * trainer.max_epochs}
    unit = "num_rollouts" if hasattr(trainer.datamodule, "num_rollouts") else "num_steps"
    return longer | {f"--data.{unit}": 2 * done}


def resume_command(words: list[str], longer: Mapping[str, int]) -> str:
    """The command that continues a run, from the one that started it.

    Args:
        words: Those behind the program's name.
        longer: An option to raise, for a run that has reached its end.
    """
    nested = [name.replace("--data.", "--data.init_args.") for name in longer]
    short = [f"--{flag}" for flag, (key, _) in SHORT.items() if f"--{key}" in longer]
    # accepted once is enough
    replaced = ["--ckpt_path", "--accept_changes", *longer, *nested, *short]
    arguments, skip = [], False
    for argument in words:
        if not skip and argument.partition("=")[0] not in replaced:
            arguments.append(argument)
        skip = not skip and argument in replaced  # its value is the next argument
    arguments += [text for name, value in longer.items() for text in (name, str(value))]
    return again([*arguments, "--ckpt_path", "last"])
