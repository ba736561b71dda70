"""Signs that a run learns nothing although nothing fails: said once, with the setting to change.

Decides when a rule of ``health_rules`` has spoken, and whether that ends the run
(``model.stop_when``). The figures are those that every rank agrees on, so that every rank says and
stops alike. Leaves out the rules, and who stops the run (``module``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from gspo_lightning.guards.health_rules import RULES, History
from gspo_lightning.objectives import Objective

WIDE = 0.05  # a sequence ratio is an average over tokens and stays far closer to 1 than this


class HealthWarning(UserWarning):
    """What run health says."""


class Health:
    """Watches the numbers of each rollout.

    Args:
        objective: Ratio and clip range.
        steps: Optimizer steps per rollout; with one, nothing can be clipped.
        stop_when: Names of rules that end the run when they speak.
        limit: ``max_new_tokens``.

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
        self.run = History(objective, steps, limit)
        self.streaks: dict[str, int] = {}
        self.said: set[str] = set()
        self.stopped: str | None = None

    @property
    def width(self) -> float:
        """The narrower side of the clip range."""
        return self.run.width

    def begin(self, callbacks: Iterable[Any]) -> None:
        """Warn of a clip range that was meant for another kind of ratio; look for the KL rule."""
        objective = self.run.objective
        if objective.ratio in ("sequence", "sequence_token"):
            widest = max(objective.clip_low, objective.clip_high)
            if widest > WIDE:
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

    def check(self, figures: Mapping[str, float]) -> str | None:
        """Look at the numbers of one rollout.

        Returns:
            The message with which the run is to end, or ``None``.
        """
        self.run.add(figures)
        for name, rule in RULES.items():
            there = rule.sign(figures, self.run)
            self.streaks[name] = self.streaks.get(name, 0) + 1 if there else 0
            if self.streaks[name] < rule.patience or name in self.said:
                continue
            message = rule.message(figures, self.run)
            if name in self.stop_when:
                message += f"; the run ends here (model.stop_when: {name})"
                self.stopped = self.stopped or message
            self._say_once(name, message)
        return self.stopped

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint: a resumed run says nothing twice and counts on."""
        run = self.run
        return {
            "said": sorted(self.said),
            "streaks": dict(self.streaks),
            "start": dict(run.start),
            "recent": dict(run.recent),
            "seen": dict(run.seen),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""
        self.said = set(state.get("said", ()))  # empty: a checkpoint from before there were rules
        self.streaks = dict(state.get("streaks", {}))
        for name in ("start", "recent", "seen"):
            setattr(self.run, name, dict(state.get(name, {})))

    def _say_once(self, topic: str, message: str) -> None:
        if topic not in self.said:
            self.said.add(topic)
            rank_zero_warn(message, category=HealthWarning)
