"""The rules of run health: signs that a run learns nothing, or the wrong thing.

Decides what each sign is, how long it must last, and what is said: the likely cause and the setting
to change. A rule is a function of a rollout's figures and of a short history. Leaves out saying and
stopping (``health``), how a figure is measured (``tally``), and numerical faults, which are errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from gspo_lightning.objectives import Objective

PATIENCE = 20  # rollouts without one clipped sequence before that is called suspicious
MOST = 0.6  # of groups flat, of ratios clipped: what is left to learn from is the smaller part
CUT = 0.5  # of completions that hit the limit: what is learned is mostly what a cut text earns
STEADY = 5  # rollouts in a row: figures of one rollout scatter, five alike are no accident
COLLAPSED = 0.1  # of the entropy at the start: samples of a group are then nearly copies
DETERMINISTIC = 5e-3  # nats per token: an entropy that is collapse wherever it began
FAR = 4.0  # targets: adaptive rules already push at twice the target
START = 3  # rollouts whose mean is "the start"
MEMORY = 0.8  # of the moving average: about the last five rollouts
LONGER = 1.5  # times the length at the start, for nothing: more than sampling explains
MUCH_LONGER = 2.0  # times the length at the start, and near the limit
NEAR_LIMIT = 0.8  # of max_new_tokens
GAIN = 0.1  # of the reward's spread within groups at the start: less is no progress
VANISHED = 0.01  # of the reward's spread at the start; one wrong answer in 1000 still shows

TRACKED = ("train/avg_response_length", "train/reward", "reward/group_std", "policy/entropy")


@dataclass
class History:
    """What the rules know: the run's settings, and the figures condensed to a few numbers.

    Attributes:
        objective: Ratio and clip range.
        steps: Optimizer steps per rollout.
        limit: ``max_new_tokens``; ``None`` where the sampler has none.
        kl_target: Target of the adaptive KL rule, if there is one.
        kl_ceiling: Its largest coefficient, if it has one.
        start: Mean of each tracked figure over the first rollouts.
        recent: Moving average of each.
        seen: How many rollouts had each.
    """

    objective: Objective
    steps: int
    limit: int | None = None
    kl_target: float | None = None
    kl_ceiling: float | None = None
    start: dict[str, float] = field(default_factory=dict)
    recent: dict[str, float] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)

    @property
    def width(self) -> float:
        return self.objective.clip_width

    def add(self, figures: Mapping[str, float]) -> None:
        """Take the figures of a rollout in."""
        for name in TRACKED:
            if (value := figures.get(name)) is None:
                continue
            count = self.seen.get(name, 0)
            self.seen[name] = count + 1
            if count < START:
                self.start[name] = (self.start.get(name, 0.0) * count + value) / (count + 1)
                self.recent[name] = self.start[name]
            else:
                self.recent[name] = MEMORY * self.recent[name] + (1 - MEMORY) * value

    def begun(self, name: str) -> float | None:
        """The figure at the start, once that is over."""
        return self.start[name] if self.seen.get(name, 0) > START else None


# ---- the rules: is the sign there in this rollout? -----------------------------------------------


def unclipped(figures: Mapping[str, float], run: History) -> bool:
    """Not one ratio was clipped, though there was something to learn and several steps."""
    clipped = figures.get("train/clip_fraction_sequences", 1.0)
    return run.steps > 1 and clipped == 0 and figures.get("reward/group_std", 1.0) > 0


def clip_share(figures: Mapping[str, float], run: History) -> float:
    """Share of ratios that were clipped, in the unit that the ratio has."""
    unit = "sequences" if run.objective.ratio.startswith("sequence") else "tokens"
    return figures.get(f"train/clip_fraction_{unit}", 0.0)


def overclipped(figures: Mapping[str, float], run: History) -> bool:
    """Most ratios were clipped."""
    return clip_share(figures, run) > MOST


def truncated(figures: Mapping[str, float], run: History) -> bool:
    """Most completions hit the limit."""
    return figures.get("rollout/truncated_fraction", 0.0) > CUT


def flat_best(figures: Mapping[str, float], run: History) -> bool:
    """Most groups are flat, more of them at the rollout's best reward than at its worst."""
    return _most_flat(figures) and _flat(figures, "best") >= _flat(figures, "worst")


def flat_worst(figures: Mapping[str, float], run: History) -> bool:
    """Most groups are flat, more of them at the rollout's worst reward than at its best."""
    return _most_flat(figures) and _flat(figures, "worst") > _flat(figures, "best")


def _flat(figures: Mapping[str, float], end: str) -> float:
    return figures.get(f"rollout/flat_{end}_fraction", 0.0)


def _most_flat(figures: Mapping[str, float]) -> bool:
    # where all rewards of a rollout are equal, its best is its worst: `variance` speaks of that
    varied = figures.get("reward/group_std", 0.0) > 0
    return varied and _flat(figures, "best") + _flat(figures, "worst") > MOST


def draws(figures: Mapping[str, float], run: History) -> bool:
    """Dynamic sampling gave up before it had enough groups whose rewards differ."""
    return figures.get("rollout/flat_groups_kept", 0.0) > 0


def entropy(figures: Mapping[str, float], run: History) -> bool:
    """The policy has become nearly deterministic."""
    start, now = run.begun("policy/entropy"), figures.get("policy/entropy")
    if start is None or now is None:
        return False
    return now < max(COLLAPSED * start, DETERMINISTIC)


def kl(figures: Mapping[str, float], run: History) -> bool:
    """KL is far above its target and the coefficient can rise no further."""
    if run.kl_target is None or run.kl_ceiling is None:
        return False
    far = figures.get("train/kl_divergence", 0.0) > FAR * run.kl_target
    return far and figures.get("train/kl_coef", 0.0) >= run.kl_ceiling


def noise(figures: Mapping[str, float], run: History) -> bool:
    """Rounding alone moves the ratio by a third of what the clip allows."""
    return figures.get("policy/ratio_noise", 0.0) > run.width / 3


def length(figures: Mapping[str, float], run: History) -> bool:
    """Completions grow without a gain in reward, or up to the limit whatever they gain."""
    start = run.begun("train/avg_response_length")
    reward, spread = run.begun("train/reward"), run.begun("reward/group_std")
    if not start or reward is None or spread is None:
        return False
    growth = run.recent["train/avg_response_length"] / start
    gained = run.recent["train/reward"] - reward
    for_nothing = growth > LONGER and gained <= GAIN * spread
    limit = run.limit or float("inf")
    at_limit = run.recent["train/avg_response_length"] > NEAR_LIMIT * limit
    return for_nothing or (growth > MUCH_LONGER and at_limit)


def variance(figures: Mapping[str, float], run: History) -> bool:
    """Rewards no longer differ within groups."""
    now = figures.get("reward/group_std")
    return now is not None and now <= VANISHED * run.start.get("reward/group_std", 0.0)


class Rule(NamedTuple):
    """A sign, the rollouts in a row that it takes, and what is then said."""

    sign: Callable[[Mapping[str, float], History], bool]
    patience: int
    message: Callable[[Mapping[str, float], History], str]


def _growth(run: History) -> str:
    name = "train/avg_response_length"
    return f"completions grew from {run.start[name]:.0f} to {run.recent[name]:.0f} tokens"


RULES: dict[str, Rule] = {
    "unclipped": Rule(
        unclipped,
        PATIENCE,
        lambda f, run: (
            f"nothing was clipped for {PATIENCE} rollouts of {run.steps} steps each: the clip "
            f"range [{run.objective.clip_low}, {run.objective.clip_high}] does nothing, or the "
            "steps are too small; for a sequence ratio, which stays close to 1, try clip_low 3e-4 "
            "and clip_high 4e-4, else raise optimizer.learning_rate"
        ),
    ),
    "overclipped": Rule(
        overclipped,
        STEADY,
        lambda f, run: (
            f"{clip_share(f, run):.0%} of the ratios are clipped, so most of a rollout teaches "
            "nothing: its steps are too large for the clip range "
            f"[{run.objective.clip_low}, {run.objective.clip_high}]; lower "
            "optimizer.learning_rate, num_epochs or num_minibatches, or widen objective.clip_low "
            "and clip_high"
        ),
    ),
    "truncated": Rule(
        truncated,
        STEADY,
        lambda f, run: (
            f"{f['rollout/truncated_fraction']:.0%} of the completions hit the limit of "
            f"{run.limit} tokens: it is too short, or the policy never ends a text; raise "
            "sampler.max_new_tokens, or see what `python train.py doctor` says of eos"
        ),
    ),
    "flat_best": Rule(
        flat_best,
        STEADY,
        lambda f, run: (
            f"{_flat(f, 'best') + _flat(f, 'worst'):.0%} of the groups are flat, most of them all "
            f"best ({_flat(f, 'best'):.0%}): the prompts are too easy by now; use harder prompts "
            "(data.path), or set drop_flat_groups: true to draw others"
        ),
    ),
    "flat_worst": Rule(
        flat_worst,
        STEADY,
        lambda f, run: (
            f"{_flat(f, 'best') + _flat(f, 'worst'):.0%} of the groups are flat, most of them all "
            f"worst ({_flat(f, 'worst'):.0%}): the prompts are too hard; use easier ones "
            "(data.path), a warm start, a larger sampler.group_size, or drop_flat_groups: true"
        ),
    ),
    "draws": Rule(
        draws,
        1,
        lambda f, run: (
            f"model.max_draws further draws of prompts left {f['rollout/flat_groups_kept']:.0f} of "
            "a rollout's groups with rewards that are all equal; if rollout/flat_best_fraction is "
            "high the prompts are too easy, if rollout/flat_worst_fraction is, too hard: choose "
            "other prompts, or raise model.max_draws or the sampler's group_size"
        ),
    ),
    "entropy": Rule(
        entropy,
        STEADY,
        lambda f, run: (
            f"entropy collapsed from {run.start['policy/entropy']:.2g} to "
            f"{f['policy/entropy']:.2g} nats per token: the completions of a group are nearly "
            "copies; raise objective.clip_high, entropy_coef or kl_coef, or lower "
            "optimizer.learning_rate"
        ),
    ),
    "kl": Rule(
        kl,
        STEADY,
        lambda f, run: (
            f"KL is {f['train/kl_divergence']:.3g}, far above its target of {run.kl_target:.3g}, "
            f"and kl_coef is at its ceiling of {run.kl_ceiling:.3g}: nothing holds the policy back "
            "any more; raise maximum or target of AdaptiveKL's rule, or lower "
            "optimizer.learning_rate"
        ),
    ),
    "noise": Rule(
        noise,
        1,
        lambda f, run: (
            f"the log-ratio carries noise of {f['policy/ratio_noise']:.1e} (standard deviation), "
            f"above a third of the clip range {run.width:.1e}; use policy.dtype float32 or a wider "
            "range"
        ),
    ),
    "length": Rule(
        length,
        STEADY,
        lambda f, run: (
            f"{_growth(run)} while the reward went from {run.start['train/reward']:.3g} to "
            f"{run.recent['train/reward']:.3g}: length runs away; set overlong_ramp or "
            "kl_coef, add a reward term for length, or lower optimizer.learning_rate"
        ),
    ),
    "variance": Rule(
        variance,
        STEADY,
        lambda f, run: (
            "the rewards do not differ within groups any more (standard deviation "
            f"{f['reward/group_std']:.1e}, at the start "
            f"{run.start.get('reward/group_std', 0.0):.1e}): nothing is left to learn "
            "from; use other prompts (data.path), or a reward term that tells these apart"
        ),
    ),
}
