"""Completions that a reward term could not score: kept in a file of the run, for a look at them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gspo_lightning.checkpoint.quoted import json_line
from gspo_lightning.rewards.calls import RewardError
from gspo_lightning.rewards.terms import RewardTerm, Scores, score
from gspo_lightning.rollout import Samples


def score_or_keep(
    terms: Mapping[str, RewardTerm], samples: Samples, file: Path, **options: Any
) -> Scores:
    """Score B completions as ``score`` does; if a term cannot, keep all of them in ``file``.

    One completion a line, with its row of the data.

    Raises:
        RewardError: As ``score`` does, with the name of the file.
    """
    try:
        return score(terms, samples.rows, samples.texts, special=samples.special_texts, **options)
    except RewardError as error:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8") as lines:
            texts = terms[error.term].texts(samples.texts, samples.special_texts)
            for i, text in enumerate(texts):
                record = {
                    "completion": i,
                    "term": error.term,
                    "error": str(error) if error.row in (i, None) else None,
                    "row": samples.rows[i],
                    "text": text,
                    "finished": bool(samples.finished[i]),
                }
                lines.write(json_line(record))
        raise RewardError(
            f"{error}; all {len(samples)} completions are in {file}", error.term, error.row
        ) from error
