"""Preference pairs: how two texts of one prompt become batches for training a reward model."""

from dataclasses import dataclass

from torch import Tensor

from gspo_lightning.data.demonstrations import SupervisedData
from gspo_lightning.data.stream import pad
from gspo_lightning.data.tables import read_rows, text_column
from gspo_lightning.policy.settings import settings_of
from gspo_lightning.rollout import Movable


@dataclass(frozen=True, eq=False)
class PreferenceBatch(Movable):
    """B pairs as 2B texts, right-padded: ids and mask (2B, T), first all chosen, then all rejected.

    Padded ids are 0. Sequence classifiers look for the last id that is not their padding, so the
    module writes its own padding id in.
    """

    ids: Tensor
    mask: Tensor


def collate_pairs(pairs: list[tuple[list[int], list[int]]]) -> PreferenceBatch:
    """Stack B pairs: the chosen texts, then the rejected ones, padded to one length.

    >>> collate_pairs([([5, 6], [7]), ([8], [9])]).ids.tolist()
    [[5, 6], [8, 0], [7, 0], [9, 0]]
    """
    texts = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    return PreferenceBatch(*pad(texts, "right"))


class PreferenceData(SupervisedData):
    """Pairs of completions for a reward model: one prompt, the better text and the worse one.

    A text goes in as ``prompt + separator + completion`` through the tokenizer as it is, which is
    what ``RewardModel`` does; give both the same separator.

    Args:
        path: Pairs: JSON lines, Parquet, or a ``datasets`` folder.
        val_path: Held-out pairs.
        batch_size: Pairs per optimizer step and rank.
        num_steps: Batches per epoch; ``None`` is one pass over the pairs.
        prompt_column: Column with the prompt text.
        chosen_column: Column with the better completion.
        rejected_column: Column with the worse completion.
        separator: Text between prompt and completion.
        max_tokens: Longest prompt and completion together, in tokens; a longer row is an error.

    Raises:
        ValueError: For a missing or broken file, row, column or value, naming it.
    """

    collate = staticmethod(collate_pairs)

    def __init__(
        self,
        path: str,
        val_path: str | None = None,
        batch_size: int = 32,
        num_steps: int | None = None,
        prompt_column: str = "prompt",
        chosen_column: str = "chosen",
        rejected_column: str = "rejected",
        separator: str = " ",
        max_tokens: int = 1024,
    ) -> None:
        super().__init__(path, val_path, batch_size, num_steps, max_tokens)
        self.save_hyperparameters(settings_of(PreferenceData, locals()), logger=False)
        self.columns = (prompt_column, chosen_column, rejected_column)
        self.separator = separator

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit" and not self.val_examples:
            raise ValueError(
                f"{getattr(stage, 'value', stage)} needs held-out pairs; set data.val_path "
                "(from Python PreferenceData(..., val_path=))"
            )

    def _read(self, key: str, path: str) -> list[tuple[list[int], list[int]]]:
        rows = read_rows(key, path)
        for kind, name in zip(("prompt", "chosen", "rejected"), self.columns, strict=True):
            text_column(key, path, rows, name, f"data.{kind}_column")
        return [
            self._encode(f"{key}: {path}: row {number}", row) for number, row in enumerate(rows, 1)
        ]

    def _encode(self, where: str, row: dict) -> tuple[list[int], list[int]]:
        prompt, chosen, rejected = (row[name] for name in self.columns)
        if chosen == rejected:
            raise ValueError(
                f"{where}: {self.columns[1]!r} and {self.columns[2]!r} are one text; take the pair "
                "out"
            )
        self._check_size(where, prompt, max(chosen, rejected, key=len))
        encoded = []
        for name, text in zip(self.columns[1:], (chosen, rejected), strict=True):
            ids = self.tokenizer(f"{prompt}{self.separator}{text}")["input_ids"]
            if not 1 <= len(ids) <= self.max_tokens:
                raise ValueError(
                    f"{where}: prompt and {name!r} have {len(ids)} tokens; at least 1 and at most "
                    f"data.max_tokens {self.max_tokens} may be; raise it, or shorten the row"
                )
            self.check_readable(where, ids)
            encoded.append(ids)
        return encoded[0], encoded[1]
