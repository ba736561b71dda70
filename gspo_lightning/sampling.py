"""Draw G completions for each prompt, all in one batch.

Decides which engine decodes, and what a seed means: one uniform number per (seed, row, position),
so that a row's completion does not depend on which rows share its batch.
"""

import copy
import logging
from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from gspo_lightning.bounds import check_at_least
from gspo_lightning.engine.group_decoder import GroupDecoder, Wanted
from gspo_lightning.engine.mode import mode_kept
from gspo_lightning.engine.padded import unwrapped
from gspo_lightning.engine.plain_decoder import decode_plainly
from gspo_lightning.engine.probe import decoding
from gspo_lightning.engine.products import ordered_weights
from gspo_lightning.engine.rotary import check_rotary
from gspo_lightning.engine.step_graphs import cuda_graph_recorder
from gspo_lightning.engine.texts import Watch
from gspo_lightning.engine.turns import Turns
from gspo_lightning.environments.episode import Environment
from gspo_lightning.environments.messages import Messages
from gspo_lightning.environments.start import MAX_TURNS, check_turns
from gspo_lightning.environments.talk import Talk
from gspo_lightning.rollout import PromptBatch, Samples

log = logging.getLogger(__name__)


class Sampler(Protocol):
    """Anything that completes prompts.

    ``policy`` has ``model``, ``tokenizer``, ``eos_ids``, ``ends`` and ``pad_id``. One whose engine
    is apart from the policy also has ``reach`` and ``take_weights``, see ``VLLMSampler``.

    Attributes:
        group_size: G, completions per prompt.
        max_new_tokens: Longest completion, in tokens, end of sequence included.
        temperature: Divides the logits.
    """

    group_size: int
    max_new_tokens: int
    temperature: float

    def sample(self, policy: Any, batch: PromptBatch, *, seed: int) -> Samples:
        """Complete every prompt of ``batch`` G times; the same seed gives the same completions."""
        ...

    def like(self, group_size: int, max_new_tokens: int, temperature: float) -> Any:
        """A sampler with other settings and the same engine, which evaluations draw with."""
        ...


class GroupSampler:
    """Sample in process, with the transformers model and its KV cache.

    Each prompt is read once, and the G completions of its group share its keys and values. Rows
    that end leave the batch, and where ``batch_size`` bounds it, rows that wait come in. Only
    temperature shapes the distribution: top-p, top-k and penalties would sample from a
    distribution whose log-probs are not the ones that are trained.

    Args:
        group_size: G, completions per prompt.
        max_new_tokens: Longest completion, in tokens, end of sequence included.
        temperature: Divides the logits; 0 takes the most likely token (evaluation only).
        batch_size: Completions decoded at once, which bounds the KV cache; ``None`` is all. It
            changes no completion, up to the rounding of the model's own matrix products.
        cuda_graphs: Record decode steps on a GPU and play them again, which draws the same tokens
            and saves launches: a step of a model of 0.6 billion parameters takes a quarter of the
            time. Sizes are then rounded up to powers of two; every rollout records each anew, at
            the cost of some three steps. Off a GPU, or where a recording fails, steps are computed
            one by one, and one line says so.
        environment: Answers where the policy ends a turn, and its words become part of the
            completion, which do not train; ``None`` is one turn. ``rewards`` needs an
            ``EnvironmentReward`` then.
        max_turns: Turns of the policy in a completion at most; one that has no more of them is
            truncated.
        environment_seconds: Longest time for the answers that are asked for at one time, in
            seconds; a later one is an error of its completion. Then a run is no longer a function
            of its seed alone, as the clock has a say. ``None`` waits.

    Attributes:
        messages: How the environment's messages become tokens.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        group_size: int = 8,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        batch_size: int | None = None,
        cuda_graphs: bool = False,
        environment: Environment | None = None,
        max_turns: int = MAX_TURNS,
        environment_seconds: float | None = None,
    ) -> None:
        counts = {"group_size": group_size, "max_new_tokens": max_new_tokens}
        check_at_least(1, "sampler.", **counts, batch_size=batch_size)
        check_at_least(0, "sampler.", temperature=temperature)
        check_turns(environment, max_turns, environment_seconds)
        self.group_size = group_size
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.batch_size = batch_size
        self.cuda_graphs = cuda_graphs
        self.environment = environment
        self.max_turns = max_turns
        self.environment_seconds = environment_seconds
        self.messages = Messages()
        self._told: set[str] = set()

    def like(self, group_size: int, max_new_tokens: int, temperature: float) -> Self:
        """The same sampler with other settings, its environment included."""
        other = copy.copy(self)
        other.group_size, other.max_new_tokens = group_size, max_new_tokens
        other.temperature = temperature
        return other

    @torch.no_grad()
    def sample(self, policy: Any, batch: PromptBatch, *, seed: int) -> Samples:
        """Complete every prompt of ``batch`` G times.

        Args:
            policy: Has ``model``, ``tokenizer``, ``eos_ids``, ``ends`` and ``pad_id``.
            batch: The prompts, on the model's device.
            seed: The completions are a function of it, of the prompts and of the weights.

        Returns:
            Samples of B = P * G rows; T is the length of the longest completion drawn.

        Raises:
            FloatingPointError: If the policy's logits are not finite.
            ValueError: If the model has no key-value cache.
        """
        shape = (len(batch) * self.group_size, self.max_new_tokens)
        uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        uniform = uniform.to(batch.prompt_ids.device)
        talk = None if self.environment is None else Talk(self, policy, batch, seed)
        with mode_kept(policy.model), ordered_weights(policy.model) as computed:
            policy.model.eval()  # gradient checkpointing would switch the KV cache off otherwise
            turns = None if talk is None else talk.turns
            ids, logprobs = self._decode(policy, batch, uniform, computed, turns)
        # at temperature 0 nothing is drawn from a distribution
        found = logprobs if self.temperature else None
        return completed(policy, batch, ids, self.group_size, found, talk)

    def _decode(
        self,
        policy: Any,
        batch: PromptBatch,
        uniform: Tensor,
        computed: Callable[[int], int],
        turns: Turns | None,
    ) -> tuple[Tensor, Tensor]:
        """Token ids and log-probs, (B, T) each, by the engine that the model allows."""
        num_rows = min(self.batch_size or len(uniform), len(uniform))
        record = None
        if self.cuda_graphs and uniform.device.type == "cuda":
            record = cuda_graph_recorder()
        elif self.cuda_graphs:
            self._tell(f"sampler.cuda_graphs: the policy is on {uniform.device}, without a GPU")
        prompts = _prompts(batch)
        group = torch.arange(len(batch), device=uniform.device).repeat_interleave(self.group_size)

        def watch(groups: Tensor) -> Watch | None:
            if turns is not None or not policy.ends.strings:
                return None
            return Watch(policy.ends, [prompts[g].tolist() for g in groups.tolist()])

        check_rotary(unwrapped(policy.model), max(map(len, prompts)) + self.max_new_tokens)
        way = decoding(policy.model, uniform.device)
        if way == "grouped":
            wanted = Wanted(
                prompts=prompts,
                group_size=self.group_size,
                uniform=uniform,
                temperature=self.temperature,
                eos_ids=policy.eos_ids,
                pad_id=policy.pad_id,
                num_rows=num_rows,
                stopped=watch(group),
                computed=computed,
                record=record,
                turns=turns,
            )
            return GroupDecoder(policy.model, wanted).run()
        known = policy, batch.prompt_ids, batch.prompt_mask
        alone = way == "alone"
        size = 1 if alone else num_rows
        parts = []
        for first in range(0, len(group), size):
            rows = group[first : first + size]
            numbers, stopped = uniform[first : first + size], watch(rows)
            ways: dict[str, Any] = {"alone": alone, "turns": turns, "first_row": first}
            parts.append(decode_plainly(*known, rows, numbers, self.temperature, stopped, **ways))
        ids, logprobs = zip(*parts, strict=True)
        return torch.cat(ids), torch.cat(logprobs)

    def _tell(self, line: str) -> None:
        """Say a line once."""
        if line not in self._told:
            self._told.add(line)
            log.warning(line)


def completed(
    policy: Any,
    batch: PromptBatch,
    ids: Tensor,
    group_size: int,
    logprobs: Tensor | None = None,
    talk: Talk | None = None,
) -> Samples:
    """The samples that tokens make, cut behind the longest completion.

    Args:
        policy: Has ``eos_ids`` and ``ends``.
        batch: P prompts.
        ids: Tokens of P * G rows, padded on the right, (B, T) int64.
        group_size: G.
        logprobs: Of the tokens, (B, T) float32, arbitrary behind the end.
        talk: The episodes of the rows, which say what was drawn; ``None`` where all was.
    """
    group = torch.arange(len(batch)).repeat_interleave(group_size)
    if talk is None:
        prompts = [prompt.tolist() for prompt in _prompts(batch)]
        read = policy.ends.read(prompts, ids, policy.eos_ids, group_size)
        rows = [batch.rows[i] for i in group.tolist()]
    else:
        read, rows = talk.read(ids.device)
    longest = int(read.mask.any(0).nonzero().max()) + 1
    ids, mask = ids[:, :longest], read.mask[:, :longest]
    index = group.to(batch.prompt_ids.device)
    return Samples(
        prompt_ids=batch.prompt_ids[index],
        prompt_mask=batch.prompt_mask[index],
        completion_ids=ids,
        mask=mask,
        finished=read.finished,
        rows=rows,
        texts=read.texts,
        group_size=group_size,
        logprobs=None if logprobs is None else logprobs[:, :longest].masked_fill(~mask, 0),
        special_texts=read.special_texts,
        waited=None if talk is None else talk.conversations.seconds,
    )


def _prompts(batch: PromptBatch) -> list[Tensor]:
    """Ids of each prompt, without padding."""
    pairs = zip(batch.prompt_ids, batch.prompt_mask, strict=True)
    return [ids[keep] for ids, keep in pairs]
