"""The conversations of a rollout in tokens: what rows drew as texts, messages as ids, the mask.

Decides how the decoder's turns and the environment's episodes meet.
"""

from typing import Any

import torch

from gspo_lightning.engine.texts import Read, Watch
from gspo_lightning.engine.turns import Turns
from gspo_lightning.environments.conversations import Conversations
from gspo_lightning.environments.episode import COLUMN, Turn
from gspo_lightning.rollout import PromptBatch


class Talk:
    """Between a decoder and an environment.

    Args:
        sampler: Has ``environment``, ``group_size``, ``max_new_tokens``, ``max_turns``,
            ``environment_seconds`` and ``messages``.
        policy: Has ``tokenizer``, ``eos_ids`` and ``ends``.
        batch: P prompts.
        seed: Of the call of the sampler.

    Attributes:
        turns: What a decoder asks for tokens.
    """

    def __init__(self, sampler: Any, policy: Any, batch: PromptBatch, seed: int) -> None:
        self.policy, self.messages = policy, sampler.messages
        size = sampler.group_size
        pairs = zip(batch.prompt_ids, batch.prompt_mask, strict=True)
        prompts = [ids[mask].tolist() for ids, mask in pairs]
        self.rows = [row for row in batch.rows for _ in range(size)]
        self.before = [prompt for prompt in prompts for _ in range(size)]  # a row's turn
        self.conversations = Conversations(
            sampler.environment,
            self.rows,
            size,
            seed,
            sampler.max_turns,
            sampler.environment_seconds,
            self._texts,
            self._tokens,
        )
        watch = Watch(policy.ends, list(self.before)) if policy.ends.strings else None
        limits = len(self.rows), sampler.max_new_tokens
        self.turns = Turns(self.conversations.answers, *limits, policy.eos_ids, watch)

    def _texts(self, row: int, ids: list[int]) -> tuple[str, str]:
        """What a row drew in a turn, without and with special tokens."""
        eos_ids = self.policy.eos_ids
        read = self.policy.ends.read([self.before[row]], torch.tensor([ids]), eos_ids, 1)
        return read.texts[0], read.special_texts[0]

    def _tokens(self, row: int, turn: Turn, ids: list[int]) -> list[int]:
        """A message behind what a row drew."""
        eos_ids = self.policy.eos_ids
        drawn = ids[-1] if ids[-1] in eos_ids else None
        given = self.messages.ids(self.policy.tokenizer, turn, eos_ids, drawn)
        self.before[row] = given or ids
        return given

    def read(self, device: torch.device) -> tuple[Read, list[dict]]:
        """What was drawn and said, once all rows are over, and their rows with their episodes."""
        talk = self.conversations
        for row, ids in enumerate(self.turns.open):
            talk.leave(row, ids)
        finished = torch.tensor(talk.finished, device=device)
        texts = ["\n".join(own) for own in talk.texts]
        special = ["\n".join(turn["policy"] for turn in r["turns"]) for r in talk.records]
        rows = [row | {COLUMN: r} for row, r in zip(self.rows, talk.records, strict=True)]
        return Read(self.turns.mask().to(device), finished, texts, special), rows
