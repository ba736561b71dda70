"""Examines the environment of a rollout: its errors, and whether it answers the same again.

Decides what of it would spoil a run: a continued one is exact only if answers are a function of
row, seed and what the policy wrote.
"""

import copy
from functools import partial
from typing import Any

import torch

from gspo_lightning.doctor.findings import Finding
from gspo_lightning.environments.conversations import outcome
from gspo_lightning.environments.episode import COLUMN, Environment
from gspo_lightning.rollout import Samples


def played(environment: Environment, row: dict) -> list[Any]:
    """What an episode answers to the turns that the policy has had in it."""
    bare = copy.deepcopy({name: value for name, value in row.items() if name != COLUMN})
    begun = outcome(lambda: environment.begin(bare, 0))
    if begun.error is not None:
        return [begun.error]
    texts = [turn["policy"] for turn in row[COLUMN]["turns"]]
    return [outcome(partial(begun.value.step, text)) for text in texts]


def out_of_turns(samples: Samples) -> float:
    """Share of the rows whose episode ended as there were no more turns."""
    ends = [row[COLUMN]["end"] for row in samples.rows if COLUMN in row]
    return ends.count("turns") / len(samples.rows)


def unread(samples: Samples, tokenizer: Any) -> float:
    """Share of the environment's tokens of which the tokenizer knows no more than that."""
    columns = torch.arange(samples.mask.shape[1], device=samples.mask.device)
    given = ~samples.mask & (columns < samples.lengths[:, None])
    unknown = samples.completion_ids == getattr(tokenizer, "unk_token_id", None)
    return (unknown & given).sum().item() / max(1, given.sum().item())


def episodes(environment: Environment, samples: Samples, tokenizer: Any = None) -> Finding:
    """Count how the episodes ended, and play those of the first prompt again, twice."""
    records = [row[COLUMN] for row in samples.rows]
    size = len(records)
    errors = [record["error"] for record in records if record["error"] is not None]
    turns = sum(len(record["turns"]) for record in records) / size
    done = sum(record["end"] == "done" for record in records) / size
    value = {"turns": turns, "errors": len(errors), "done": done}
    if errors:
        text = f"{len(errors)} of {size} episodes failed: {errors[0]}"
        return Finding("environment", "error", text, "mend the environment", value)
    if (share := unread(samples, tokenizer)) > 0:
        text = f"{share:.0%} of its tokens are unknown to the tokenizer: the policy cannot read it"
        return Finding("environment", "warning", text, "use words that the policy knows", value)
    for row in samples.rows[: samples.group_size]:
        if played(environment, row) != played(environment, row):
            text = "asked the same again, it answers otherwise: a continued run will not be exact"
            remedy = "let its answers depend on row, seed and texts alone"
            return Finding("environment", "warning", text, remedy, value)
    text = f"{turns:.1f} turns on average, {done:.0%} of the episodes ended by themselves"
    return Finding("environment", "ok", f"{text}; asked again, it answers the same", value=value)
