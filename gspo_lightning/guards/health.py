"""Run health: signs that a run learns nothing, or the wrong thing, although nothing fails.

Decides what each sign is, how long it must last, what is said (the likely cause and the setting to
change), and whether that ends the run (``model.stop_when``). The figures are those that every rank
agrees on, so that every rank says and stops alike. Numerical faults are errors and no part of this.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from gspo_lightning.objectives import Objective
from gspo_lightning.start.typed import program

PATIENCE = 20  # rollouts without one clipped sequence before that is called suspicious
MOST = 0.6  # of groups flat, of ratios clipped: what is left to learn from is the smaller part
CUT = 0.5  # of completions that hit the limit: what is learned is mostly what a cut text earns
MORE_TURNS = "raise sampler.max_turns, let the environment end them, or set model.truncated: keep"
STEADY = 5  # rollouts in a row: figures of one rollout scatter, five alike are no accident
COLLAPSED = 0.1  # of the entropy at the start: samples of a group are then nearly copies
DETERMINISTIC = 5e-3  # nats per token: an entropy that is collapse wherever it began
FAR = 4.0  # targets: adaptive rules already push at twice the target
LONG = 10  # rollouts in which a rule that fits the run brings KL back towards its target
START = 3  # rollouts whose mean is "the start"
MEMORY = 0.8  # of the moving average: about the last five rollouts
LONGER = 1.5  # times the length at the start, for nothing: more than sampling explains
MUCH_LONGER = 2.0  # times the length at the start, and near the limit
NEAR_LIMIT = 0.8  # of max_new_tokens
HALF = 0.5  # of the rows' worth: below it, weights from sampler to policy are mostly noise
GAIN = 0.1  # of the reward's spread within groups at the start: less is no progress
VANISHED = 0.01  # of the reward's spread at the start; one wrong answer in 1000 still shows
WIDE = 0.05  # a sequence ratio is an average over tokens and stays far closer to 1 than this

LENGTH, REWARD = "train/avg_response_length", "train/reward"
SPREAD, ENTROPY = "reward/group_std", "policy/entropy"
KL, COEF = "train/kl_divergence", "train/kl_coef"
Figures = Mapping[str, float]


@dataclass
class History:
    """What the rules know: the run's settings, and the figures condensed to a few numbers.

    Attributes:
        objective: Ratio and clip range.
        steps: Optimizer steps per rollout.
        limit: ``max_new_tokens``; ``None`` where the sampler has none.
        kl_target: Target of the adaptive KL rule, if there is one.
        kl_ceiling: Its largest coefficient, if it has one.
        correction: ``Mismatch.correction``.
        start: Mean of each tracked figure over the first rollouts.
        recent: Moving average of each.
        seen: How many rollouts had each.
    """

    objective: Objective
    steps: int
    limit: int | None = None
    kl_target: float | None = None
    kl_ceiling: float | None = None
    correction: str = "none"
    start: dict[str, float] = field(default_factory=dict)
    recent: dict[str, float] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)

    def add(self, figures: Figures) -> None:
        """Take the figures of a rollout in."""
        for name in (LENGTH, REWARD, SPREAD, ENTROPY, COEF):
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

    @property
    def clip_range(self) -> str:
        return f"[{self.objective.clip_low}, {self.objective.clip_high}]"


# ---- the rules: what to say of a rollout that shows the sign, None of any other ------------------


def spread_text(figures: Figures, run: History) -> str:
    """How wide the log-ratio of a sequence spreads, and who says which range suits that."""
    spread = figures.get("policy/sequence_log_ratio_std", 0.0)
    if not spread or run.objective.ratio not in ("sequence", "sequence_token"):
        return ""  # the figure is of means over tokens
    return f" (log s spreads by {spread:.1e}; `{program()} doctor` proposes a range)"


def unclipped(figures: Figures, run: History) -> str | None:
    """Not one ratio was clipped, though there was something to learn and several steps."""
    clipped = figures.get("train/clip_fraction_sequences", 1.0)
    if run.steps > 1 and run.objective.clips and clipped == 0 and figures.get(SPREAD, 1.0) > 0:
        return (
            f"nothing was clipped for {PATIENCE} rollouts of {run.steps} steps each: the clip "
            f"range {run.clip_range} does nothing, or the steps are too small; for a sequence "
            "ratio, which stays close to 1, try clip_low 3e-4 and clip_high 4e-4, else raise "
            f"optimizer.learning_rate{spread_text(figures, run)}"
        )
    return None


def overclipped(figures: Figures, run: History) -> str | None:
    """Most ratios, in the unit that the ratio has, were clipped."""
    unit = "sequences" if run.objective.ratio.startswith("sequence") else "tokens"
    share = figures.get(f"train/clip_fraction_{unit}", 0.0)
    if run.objective.clips and share > MOST:
        return (
            f"{share:.0%} of the ratios are clipped, so most of a rollout teaches nothing: its "
            f"steps are too large for the clip range {run.clip_range}; lower "
            "optimizer.learning_rate, num_epochs or num_minibatches, or widen objective.clip_low "
            f"and clip_high{spread_text(figures, run)}"
        )
    return None


def truncated(figures: Figures, run: History) -> str | None:
    """Most completions hit the limit."""
    if (share := figures.get("rollout/truncated_fraction", 0.0)) > CUT:
        if (turns := figures.get("env/out_of_turns", 0.0)) > share / 2:
            return f"{turns:.0%} of the episodes had no turn left; {MORE_TURNS}"
        return (
            f"{share:.0%} of the completions hit the limit of {run.limit} tokens: it is too short, "
            "or the policy never ends a text; raise sampler.max_new_tokens, set "
            "policy.stop_strings or policy.stop_token_ids (a base model may need them), or see "
            f"what `{program()} doctor` says of eos"
        )
    return None


def _flat(figures: Figures) -> tuple[float, float]:
    """Shares of groups that are flat at the rollout's best and at its worst reward, if most are.

    Zeros where all rewards of a rollout are equal: its best is its worst, and ``variance`` speaks.
    """
    best, worst = (figures.get(f"rollout/flat_{end}_fraction", 0.0) for end in ("best", "worst"))
    most = figures.get(SPREAD, 0.0) > 0 and best + worst > MOST
    return (best, worst) if most else (0.0, 0.0)


def flat_best(figures: Figures, run: History) -> str | None:
    """Most groups are flat, more of them at the rollout's best reward than at its worst."""
    best, worst = _flat(figures)
    if best and best >= worst:
        return (
            f"{best + worst:.0%} of the groups are flat, most of them all best ({best:.0%}): the "
            "prompts are too easy by now; use harder prompts (data.path), or set drop_flat_groups: "
            "true to draw others"
        )
    return None


def flat_worst(figures: Figures, run: History) -> str | None:
    """Most groups are flat, more of them at the rollout's worst reward than at its best."""
    best, worst = _flat(figures)
    if worst > best:
        return (
            f"{best + worst:.0%} of the groups are flat, most of them all worst ({worst:.0%}): the "
            "prompts are too hard; use easier ones (data.path), a warm start, a larger "
            "sampler.group_size, or drop_flat_groups: true"
        )
    return None


def draws(figures: Figures, run: History) -> str | None:
    """Dynamic sampling gave up before it had enough groups whose rewards differ."""
    if (kept := figures.get("rollout/flat_groups_kept", 0.0)) > 0:
        return (
            f"model.max_draws further draws of prompts left {kept:.0f} of a rollout's groups with "
            "rewards that are all equal; if rollout/flat_best_fraction is high the prompts are too "
            "easy, if rollout/flat_worst_fraction is, too hard: choose other prompts, or raise "
            "model.max_draws or the sampler's group_size"
        )
    return None


def entropy(figures: Figures, run: History) -> str | None:
    """The policy has become nearly deterministic."""
    start, now = run.begun(ENTROPY), figures.get(ENTROPY)
    if start is not None and now is not None and now < max(COLLAPSED * start, DETERMINISTIC):
        return (
            f"entropy collapsed from {start:.2g} to {now:.2g} nats per token: the completions of a "
            "group are nearly copies; raise objective.clip_high, entropy_coef or kl_coef, or lower "
            "optimizer.learning_rate"
        )
    return None


def kl(figures: Figures, run: History) -> str | None:
    """KL is far above its target and the coefficient can rise no further."""
    if run.kl_target is None or run.kl_ceiling is None:
        return None
    if figures.get(KL, 0.0) > FAR * run.kl_target and figures.get(COEF, 0.0) >= run.kl_ceiling:
        return (
            f"KL is {figures[KL]:.3g}, far above its target of {run.kl_target:.3g}, and kl_coef "
            f"is at its ceiling of {run.kl_ceiling:.3g}: nothing holds the policy back any more; "
            "raise maximum or target of AdaptiveKL's rule, or lower optimizer.learning_rate"
        )
    return None


def kl_above(figures: Figures, run: History) -> str | None:
    """KL stays far above its target, whatever the rule does with the coefficient."""
    observed, now = figures.get(KL, 0.0), figures.get(COEF, 0.0)
    if run.kl_target is None or observed <= FAR * run.kl_target:
        return None
    if run.kl_ceiling is not None and now >= run.kl_ceiling:
        return None  # what ``kl`` says
    return (
        f"KL has been above {FAR:g} times its target of {run.kl_target:.3g} for {LONG} rollouts "
        f"(now {observed:.3g}), while kl_coef went from {run.start.get(COEF, now):.3g} to "
        f"{now:.3g}: the rule is too slow for this run, or the target forbids what there is to "
        "learn; raise AdaptiveKL's initial or its rule's speed (rollouts or horizon, factor_up), "
        "raise target, or lower optimizer.learning_rate"
    )


def kl_below(figures: Figures, run: History) -> str | None:
    """KL stays far below its target although the coefficient is above the one of the start."""
    observed, now, start = figures.get(KL), figures.get(COEF, 0.0), run.begun(COEF)
    if run.kl_target is None or observed is None or start is None or now <= start * FAR:
        return None
    if observed < run.kl_target / FAR:
        return (
            f"KL has been below a quarter of its target of {run.kl_target:.3g} for {LONG} rollouts "
            f"(now {observed:.3g}) at a kl_coef of {now:.3g}, {now / start:.0f} times that of the "
            "start: the penalty holds the policy back; make AdaptiveKL's rule slower (rollouts or "
            "horizon, factor_up), or lower its maximum"
        )
    return None


def rounding(figures: Figures) -> float:
    """Standard deviation of log-ratios of unchanged weights, of the kind that the objective takes.

    Passes in the same batches round alike while no weight has moved, and no longer after the first
    step. The sampler computes the same log-probs in batches of its own: it shows what is to come.
    """
    return max(figures.get(f"policy/{name}_noise", 0.0) for name in ("ratio", "sampler"))


def what_fits(noise: float, objective: Objective, tokens: float | None = None) -> str:
    """Precision, length and clip range at which noise is a third of the range.

    Args:
        noise: Standard deviation of the log-ratio.
        objective: Ratio and clip range.
        tokens: Length of the completions that it was measured on.

    >>> what_fits(1e-2, Objective(), tokens=12)
    'set trainer.precision 32-true and policy.dtype float32, widen the range (clip_low 0.03, \
clip_high 0.04), or use completions of 120,000 tokens or more instead of 12'
    """
    scale = 3 * noise / objective.clip_width
    wide = ", ".join(
        f"{name} {scale * getattr(objective, name):.2g}" for name in ("clip_low", "clip_high")
    )
    text = f"set trainer.precision 32-true and policy.dtype float32, widen the range ({wide})"
    if tokens is None or not objective.ratio.startswith("sequence"):
        return text.replace(", widen", " or widen")
    if objective.ratio == "sequence_sum":  # it grows with the length
        longer, bound = tokens / scale**2, "less"
    else:  # a mean: errors of tokens cancel with the root of their number
        longer, bound = tokens * scale**2, "more"
    longer = float(f"{longer:.2g}")
    return f"{text}, or use completions of {longer:,.0f} tokens or {bound} instead of {tokens:.0f}"


def noise(figures: Figures, run: History) -> str | None:
    """Rounding alone moves the ratio by a third of what the clip allows."""
    width, spread = run.objective.clip_width, rounding(figures)
    if spread > width / 3:
        return (
            f"the log-ratio carries noise of {spread:.1e} (standard deviation for unchanged "
            f"weights), {spread / width:.2g} times the clip range of {width:.1e}: the clip follows "
            f"rounding; {what_fits(spread, run.objective, figures.get(LENGTH))}"
        )
    return None


def length(figures: Figures, run: History) -> str | None:
    """Completions grow without a gain in reward, or up to the limit whatever they gain."""
    start, reward, spread = run.begun(LENGTH), run.begun(REWARD), run.begun(SPREAD)
    if not start or reward is None or spread is None:
        return None
    now, growth = run.recent[LENGTH], run.recent[LENGTH] / start
    for_nothing = growth > LONGER and run.recent[REWARD] - reward <= GAIN * spread
    at_limit = growth > MUCH_LONGER and now > NEAR_LIMIT * (run.limit or float("inf"))
    if for_nothing or at_limit:
        return (
            f"completions grew from {start:.0f} to {now:.0f} tokens while the reward went from "
            f"{reward:.3g} to {run.recent[REWARD]:.3g}: length runs away; set overlong_ramp or "
            "kl_coef, add a reward term for length, or lower optimizer.learning_rate"
        )
    return None


def variance(figures: Figures, run: History) -> str | None:
    """Rewards no longer differ within groups."""
    start, now = run.start.get(SPREAD, 0.0), figures.get(SPREAD)
    if now is None or now > VANISHED * start:
        return None
    mend = "use other prompts (data.path), or a reward term that tells these apart"
    if (share := figures.get("rollout/truncated_fraction", 0.0)) > CUT:
        what = "hit the limit"
        more = "set policy.stop_strings or policy.stop_token_ids, or raise sampler.max_new_tokens"
        if figures.get("env/out_of_turns", 0.0) > share / 2:
            what, more = "had no turn left", MORE_TURNS
        mend = (
            f"{share:.0%} of the completions {what}, and model.truncated makes them alike: {more}"
        )
    return (
        f"the rewards do not differ within groups any more (standard deviation {now:.1e}, at the "
        f"start {start:.1e}): nothing is left to learn from; {mend}"
    )


def mismatch(figures: Figures, run: History) -> str | None:
    """The sampler is so far from the policy that few rows would bear an exact correction."""
    worth, spread = figures.get("sampler/ess", 1.0), figures.get("sampler/log_ratio_std", 0.0)
    if run.correction == "mean" or worth >= HALF:  # weights of means do not spread like that
        return None
    cause = (
        "sampler and policy give the completions such different probabilities (a token's log-ratio "
        f"spreads by {spread:.1e} nats) that weights between them leave {worth:.0%} of their worth"
    )
    if run.correction == "sequence":
        return (
            f"{cause}: model.mismatch.correction sequence is for shorter completions, or for a "
            "sampler closer to the policy (the same precision, fewer steps behind); set it to mean"
        )
    return (
        f"{cause}, and nothing corrects for that: set model.mismatch.correction to mean and its "
        "limits, or bring the sampler closer (the same precision, fewer steps behind)"
    )


class Rule(NamedTuple):
    """The rollouts in a row that a sign takes, and what is then said."""

    patience: int
    message: Callable[[Figures, History], str | None]


RULES: dict[str, Rule] = {
    "unclipped": Rule(PATIENCE, unclipped),
    "overclipped": Rule(STEADY, overclipped),
    "truncated": Rule(STEADY, truncated),
    "flat_best": Rule(STEADY, flat_best),
    "flat_worst": Rule(STEADY, flat_worst),
    "draws": Rule(1, draws),
    "entropy": Rule(STEADY, entropy),
    "kl": Rule(STEADY, kl),
    "kl_above": Rule(LONG, kl_above),
    "kl_below": Rule(LONG, kl_below),
    "noise": Rule(1, noise),
    "length": Rule(STEADY, length),
    "variance": Rule(STEADY, variance),
    "mismatch": Rule(STEADY, mismatch),
}


class HealthWarning(UserWarning):
    """What run health says."""


class Health:
    """Watches the numbers of each rollout.

    Args:
        objective: Ratio and clip range.
        steps: Optimizer steps per rollout; with one, nothing can be clipped.
        stop_when: Names of rules that end the run when they speak.
        limit: ``max_new_tokens``.
        correction: ``Mismatch.correction``.

    Attributes:
        stopped: Why the run is to end: the message of the rule that ended it, else ``None``.

    Raises:
        ValueError: If ``stop_when`` names no rule.
    """

    def __init__(
        self,
        objective: Objective,
        steps: int,
        stop_when: Iterable[str] = (),
        limit: int | None = None,
        correction: str = "none",
    ) -> None:
        self.stop_when = list(stop_when)
        for name in self.stop_when:
            if name not in RULES:
                close = difflib.get_close_matches(name, RULES, n=1)
                hint = f", did you mean {close[0]!r}?" if close else ""
                raise ValueError(
                    f"model.stop_when: there is no rule {name!r}{hint or ';'} "
                    f"there are {', '.join(RULES)}"
                )
        self.run = History(objective, steps, limit, correction=correction)
        self.streaks: dict[str, int] = {}
        self.said: set[str] = set()
        self.stopped: str | None = None

    @property
    def width(self) -> float:
        """The narrower side of the clip range."""
        return self.run.objective.clip_width

    def begin(self, callbacks: Iterable[Any]) -> None:
        """Warn of a clip range that was meant for another kind of ratio; look for the KL rule."""
        objective = self.run.objective
        widest = max(objective.clip_low, objective.clip_high)
        mean = objective.ratio in ("sequence", "sequence_token")
        if mean and objective.surrogate == "clip" and widest > WIDE:
            self._say_once(
                "range",
                f"a clip range of {widest} never clips a length-normalised ratio; GSPO "
                "uses clip_low 3e-4 and clip_high 4e-4",
            )
        for callback in callbacks:
            rule = getattr(callback, "rule", None)
            if rule is not None and hasattr(rule, "next_coef"):
                self.run.kl_target = rule.target
                self.run.kl_ceiling = getattr(rule, "maximum", None)

    def check(self, figures: Figures) -> str | None:
        """Look at the numbers of one rollout.

        Returns:
            The message with which the run is to end, or ``None``.
        """
        self.run.add(figures)
        for name, rule in RULES.items():
            message = rule.message(figures, self.run)
            self.streaks[name] = 0 if message is None else self.streaks.get(name, 0) + 1
            if message is None or self.streaks[name] < rule.patience or name in self.said:
                continue
            if name in self.stop_when:
                message += f"; the run ends here (model.stop_when: {name})"
                self.stopped = self.stopped or message
            self._say_once(name, message)
        return self.stopped

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint: a resumed run says nothing twice and counts on."""
        return {
            "said": sorted(self.said),
            "streaks": dict(self.streaks),
            "start": dict(self.run.start),
            "recent": dict(self.run.recent),
            "seen": dict(self.run.seen),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``; checkpoints older than a field lack it."""
        self.said = set(state.get("said", ()))
        self.streaks = dict(state.get("streaks", {}))
        self.run.start = dict(state.get("start", {}))
        self.run.recent = dict(state.get("recent", {}))
        self.run.seen = dict(state.get("seen", {}))

    def _say_once(self, topic: str, message: str) -> None:
        if topic not in self.said:
            self.said.add(topic)
            rank_zero_warn(message, category=HealthWarning)
