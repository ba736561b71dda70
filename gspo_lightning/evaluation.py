"""Held-out evaluation: greedy accuracy, sampled accuracy, unbiased pass@k.

Decides what "correct" means (a reward term at or above a threshold) and how completions are drawn
for it, apart from the settings that training samples with.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torchmetrics import MetricCollection

from gspo_lightning.bounds import check_at_least
from gspo_lightning.environments.episode import COLUMN
from gspo_lightning.metrics import PassAtK, RolloutMetrics
from gspo_lightning.rewards.terms import RewardTerm, Scores, score
from gspo_lightning.rollout import PromptBatch, Samples
from gspo_lightning.sampling import Sampler


@dataclass(frozen=True)
class Evaluation:
    """How held-out prompts are evaluated.

    Args:
        correct: Name of the reward term that tells right from wrong; ``None`` reports rewards only.
        threshold: A completion is correct if that term is at least this.
        num_samples: Completions sampled per prompt, beside one greedy completion.
        temperature: Sampling temperature.
        max_new_tokens: Longest completion; ``None`` takes the training limit.
        ks: The k of each pass@k.

    Raises:
        ValueError: If a value is out of range.
    """

    correct: str | None = None
    threshold: float = 1.0
    num_samples: int = 4
    temperature: float = 1.0
    max_new_tokens: int | None = None
    ks: tuple[int, ...] = (1, 4)

    def __post_init__(self) -> None:
        counts = {"num_samples": self.num_samples, "max_new_tokens": self.max_new_tokens}
        check_at_least(1, "evaluation.", **counts)
        if not math.isfinite(self.threshold):  # nothing would ever count as right, or all
            raise ValueError(f"evaluation.threshold must be finite, got {self.threshold}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"evaluation.temperature must be above 0, got {self.temperature}")
        if any(not 1 <= k <= self.num_samples for k in self.ks):
            raise ValueError(
                f"evaluation.ks must lie in [1, num_samples = {self.num_samples}], got {self.ks}"
            )

    def check_terms(self, terms: Mapping[str, RewardTerm]) -> None:
        """Refuse a ``correct`` that names no reward term."""
        if self.correct is not None and self.correct not in terms:
            raise ValueError(
                f"evaluation.correct is {self.correct!r}, which is no reward; set "
                f"model.evaluation.correct to one of {sorted(terms)}"
            )

    def samplers(self, training: Sampler) -> dict[str, Sampler]:
        """The greedy sampler and the sampling one, with the engine that training samples with."""
        limit = self.max_new_tokens or training.max_new_tokens
        return {
            "greedy": training.like(1, limit, 0.0),
            "sampled": training.like(self.num_samples, limit, self.temperature),
        }


class Evaluator(torch.nn.Module):
    """Adds up an evaluation over batches and ranks.

    Args:
        settings: What to evaluate.
        terms: The reward terms.
    """

    def __init__(self, settings: Evaluation, terms: Mapping[str, RewardTerm]) -> None:
        super().__init__()
        self.settings = settings
        self.terms = terms
        self.means = RolloutMetrics(
            [
                "accuracy_greedy",
                "accuracy_sampled",
                "reward",
                "response_length",
                "truncated_fraction",
                *(f"reward_{name}" for name in terms),
            ]
        )
        self.passes = MetricCollection({f"pass_at_{k}": PassAtK(k) for k in settings.ks})

    def reset(self) -> None:
        """Start a new evaluation."""
        self.means.reset()
        self.passes.reset()

    def update(
        self, policy: Any, batch: PromptBatch, samplers: Mapping[str, Sampler], seed: int
    ) -> None:
        """Complete and score the prompts of one batch."""
        for kind, sampler in samplers.items():
            samples = sampler.sample(policy, batch, seed=seed)
            texts = samples.texts, samples.special_texts
            scores = score(self.terms, samples.rows, texts[0], special=texts[1], seed=seed)
            if self.settings.correct is not None:
                right = (scores.parts[self.settings.correct] >= self.settings.threshold).float()
                self.means.update(f"accuracy_{kind}", right)
                if kind == "sampled":
                    groups = right.view(-1, sampler.group_size)
                    drawn = torch.full((len(groups),), sampler.group_size)
                    self.passes.update(drawn, groups.sum(1).long())
            if kind == "sampled":
                self._count(samples, scores)

    def _count(self, samples: Samples, scores: Scores) -> None:
        self.means.update("reward", scores.total[~scores.total.isnan()])
        self.means.update("response_length", samples.mask.sum(1))
        self.means.update("truncated_fraction", (~samples.finished).float())
        for name, part in scores.parts.items():
            self.means.update(f"reward_{name}", part[~part.isnan()])

    def compute(self) -> dict[str, float]:
        """The figures, by name."""
        figures = self.means.compute()
        if self.settings.correct is not None:
            figures |= {name: value.item() for name, value in self.passes.compute().items()}
        return figures


def describe(samples: Samples, scores: Scores, prompts: list[str]) -> list[dict[str, Any]]:
    """Samples as plain values for JSON, one dict per prompt.

    Args:
        samples: P * G completions.
        scores: Their rewards.
        prompts: The prompt of each group, as text, length P.

    Returns:
        Dicts with ``prompt`` and ``completions``, each completion with text, reward, reward parts
        (``None`` where missing), length in tokens, whether it ended by itself, and its episode
        where it had an environment.
    """

    def number(value: torch.Tensor) -> float | None:
        return None if value.isnan() else value.item()

    completions = [
        {
            "text": text,
            "reward": number(scores.total[i]),
            "parts": {name: number(part[i]) for name, part in scores.parts.items()},
            "length": int(samples.mask[i].sum()),
            "finished": bool(samples.finished[i]),
        }
        | {name: samples.rows[i][name] for name in (COLUMN,) if name in samples.rows[i]}
        for i, text in enumerate(samples.texts)
    ]
    size = samples.group_size
    return [
        {"prompt": prompt, "completions": completions[p * size : (p + 1) * size]}
        for p, prompt in enumerate(prompts)
    ]
