"""Signs that a run learns nothing although nothing fails: said once, with the setting to change."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_warn

from gspo_lightning.objectives import Objective

PATIENCE = 20  # rollouts without one clipped sequence before that is called suspicious
WIDE = 0.05  # a sequence ratio is an average over tokens and stays far closer to 1 than this


class Health:
    """Watches the numbers of each rollout.

    Args:
        objective: Ratio and clip range.
        steps: Optimizer steps per rollout; with one, nothing can be clipped.
    """

    def __init__(self, objective: Objective, steps: int) -> None:
        self.objective = objective
        self.steps = steps
        self.unclipped = 0
        self.said: set[str] = set()
        self.width = min(objective.clip_low, objective.clip_high)

    def check_settings(self) -> None:
        """Warn of a clip range that was meant for another kind of ratio."""
        if self.objective.ratio.startswith("sequence") and self.objective.ratio != "sequence_sum":
            widest = max(self.objective.clip_low, self.objective.clip_high)
            if widest > WIDE:
                self._say(
                    "range",
                    f"a clip range of {widest} never clips a length-normalised ratio; GSPO "
                    "uses clip_low 3e-4 and clip_high 4e-4",
                )

    def check(self, figures: dict[str, float]) -> None:
        """Look at the numbers of one rollout."""
        noise = figures.get("policy/ratio_noise", 0.0)
        if noise > self.width / 3:
            self._say(
                "noise",
                f"the log-ratio carries noise of {noise:.1e} (standard deviation), above a third "
                f"of the clip range {self.width:.1e}; use policy.dtype float32 or a wider range",
            )
        flat = figures.get("rollout/flat_groups_kept", 0.0)
        if flat > 0:
            self._say(
                "flat",
                f"model.max_draws further draws of prompts left {flat:.0f} of a rollout's groups "
                "with rewards that are all equal; if rollout/flat_best_fraction is high the "
                "prompts are too easy, if rollout/flat_worst_fraction is, too hard: choose other "
                "prompts, or raise model.max_draws or the sampler's group_size",
            )
        clipped = figures.get("train/clip_fraction_sequences", 1.0)
        self.unclipped = 0 if clipped > 0 or self.steps == 1 else self.unclipped + 1
        if self.unclipped == PATIENCE:
            self._say(
                "unclipped",
                f"nothing was clipped for {PATIENCE} rollouts of {self.steps} steps each: the clip "
                f"range [{self.objective.clip_low}, {self.objective.clip_high}] does nothing; a "
                "sequence ratio stays close to 1, try clip_low 3e-4 and clip_high 4e-4",
            )

    def _say(self, topic: str, message: str) -> None:
        if topic not in self.said:
            self.said.add(topic)
            rank_zero_warn(message)
