"""Sampling one rollout ahead: completions are drawn elsewhere while the policy is updated.

Decides which weights draw a rollout, what is waited for, and what a checkpoint keeps of completions
that are under way. That they come from the weights of one rollout before is corrected for by the
loss (``model.mismatch``), not here.
"""

import contextlib
from concurrent.futures import Future
from dataclasses import fields, replace
from threading import Thread
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.profiler import record_function

from gspo_lightning.rollout import PromptBatch, Samples
from gspo_lightning.sampling import Sampler


class Pending(Protocol):
    """Completions that are being drawn, such as a ``Future``."""

    def result(self) -> Samples:
        """Wait for them, or raise what they ended with."""
        ...


class ApartSampler(Sampler, Protocol):
    """A sampler whose engine is in another process and has weights of its own.

    Attributes:
        apart: True where that is so, as the sampler is set up.
    """

    apart: bool

    def begin(self, policy: Any, batch: PromptBatch, *, seed: int) -> Pending:
        """Hand the policy's weights over, let them complete ``batch``, and return at once.

        What is returned is waited for in a thread of its own while the policy is updated, and must
        not read it. Until then the engine takes no other weights: whoever asks for that waits.
        """
        ...


class AsyncSampler:
    """Samples each rollout while the one before is learned from, with the weights before that.

    A training step then takes as long as the slower of the two, and completions come from a policy
    that is the updates of one rollout old: see ``model.mismatch``. The first rollout alone is drawn
    with the newest weights. Behind the last one a further rollout is drawn, for the checkpoint: a
    run that is made longer goes on as if it had been that long from the start.

    Args:
        inner: Draws the completions; its engine is in another process.
        lag: Rollouts that sampling is ahead; 0 is ``inner`` alone.

    Attributes:
        figures: What is logged of the newest rollout, by name, with what ``inner`` has to say.

    Raises:
        ValueError: If ``lag`` is neither 0 nor 1, or ``inner`` cannot sample beside an update, or
            has an environment.
    """

    def __init__(self, inner: Sampler, lag: int = 1) -> None:
        if lag not in (0, 1):
            raise ValueError(f"sampler.lag must be 0 or 1, got {lag}")
        if lag and not getattr(inner, "apart", False):
            raise ValueError(
                f"sampler.inner: {type(inner).__name__} samples in this process, from the very "
                "weights that are being updated; AsyncSampler needs an engine in another one"
            )
        if getattr(inner, "environment", None) is not None:  # its episodes would be lost
            raise ValueError(
                "sampler.inner.environment: AsyncSampler keeps no episodes; take the environment "
                "out, or make the inner sampler the run's sampler"
            )
        self.inner: Any = inner
        self.lag = lag
        self.group_size, self.max_new_tokens = inner.group_size, inner.max_new_tokens
        self.temperature = inner.temperature
        self._lagged = False  # the newest rollout
        self._under_way: tuple[int, Future[Samples]] | None = None  # with the seed of the draw

    def sample(self, policy: Any, batch: PromptBatch, *, seed: int) -> Samples:
        """The completions that were begun for ``batch``, or else new ones."""
        begun, self._under_way = self._under_way, None
        if begun is None:
            samples = self.inner.sample(policy, batch, seed=seed)
        else:
            samples = begun[1].result().to(batch.prompt_ids.device)
            ids = batch.prompt_ids.repeat_interleave(self.group_size, 0)
            if begun[0] != seed or not torch.equal(samples.prompt_ids, ids):
                raise ValueError(
                    "AsyncSampler: the completions that were begun are of other prompts than this "
                    "rollout's; the data of the run has changed, or something else draws from it"
                )
            rows = [row for row in batch.rows for _ in range(self.group_size)]
            samples = replace(samples, rows=rows)
        self._lagged = begun is not None
        return samples

    @property
    def figures(self) -> dict[str, float]:
        own = {"sampler/version_lag": float(self._lagged)}
        return own | getattr(self.inner, "figures", {})

    @property
    def about(self) -> str:
        """What the engine is, in words."""
        return self.inner.about

    def begin(self, policy: Any, batch: PromptBatch, *, seed: int) -> None:
        """Let the completions of the next rollout be drawn with the weights as they are now."""
        self._under_way = seed, _waited_for(self.inner.begin(policy, batch, seed=seed))

    def reach(self, config: Any, longest: int) -> None:
        """Reach the engine, as ``inner`` does."""
        if hasattr(self.inner, "reach"):
            self.inner.reach(config, longest)

    def take_weights(self, policy: Any, steps: int, anew: bool = False) -> None:
        """Hand weights over to draw with now, unless what is drawn next is under way already."""
        if hasattr(self.inner, "take_weights") and (anew or self._under_way is None):
            self.inner.take_weights(policy, steps, anew=anew)

    def like(self, group_size: int, max_new_tokens: int, temperature: float) -> Sampler:
        """A sampler of the same engine with other settings, which is never ahead."""
        return self.inner.like(group_size, max_new_tokens, temperature)

    def state_dict(self) -> list[dict[str, Any]]:
        """Completions that are under way on each rank, waited for, as plain values.

        Every rank must call. A rank has none also if they ended with an error: the next rollout
        raises it, and a run that goes on from this checkpoint draws them anew.
        """
        own: dict[str, Any] = {}
        if self._under_way is not None:
            seed, drawn = self._under_way
            # A checkpoint of what was learned is worth more than completions that failed.
            with contextlib.suppress(Exception):
                samples = drawn.result().to("cpu")
                values = {f.name: getattr(samples, f.name) for f in fields(samples)}
                own = {"seed": seed, "samples": values | {"rows": []}}  # the batch will have them
        if not (dist.is_available() and dist.is_initialized()):
            return [own]
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, own)
        return every

    def load_state_dict(self, states: list[dict[str, Any]], rank: int) -> None:
        """Go on with a rank's completions; one that has none draws the next ones anew."""
        if self.lag and rank < len(states) and states[rank]:
            values = states[rank]["samples"]
            drawn: Future[Samples] = Future()
            drawn.set_result(Samples(**values | {"rows": [{}] * len(values["texts"])}))
            self._under_way = states[rank]["seed"], drawn


def is_ahead(sampler: Any) -> bool:
    """Whether completions come from other weights than those that learn from them."""
    return isinstance(sampler, AsyncSampler) and sampler.lag > 0


def check_apart(sampler: Any, weighs: bool, old_logprobs: str, drop_flat_groups: bool) -> bool:
    """Whether sampler and policy are told apart, so that all old log-probs must be the policy's.

    Args:
        sampler: Draws the completions.
        weighs: Whether ``model.mismatch`` does.
        old_logprobs: Where the old log-probs come from.
        drop_flat_groups: Whether rewards decide which prompts are drawn.

    Raises:
        ValueError: If one of the settings rules out another.
    """
    apart = weighs or is_ahead(sampler)
    if apart and old_logprobs == "sampler":
        raise ValueError(
            "model.old_logprobs cannot be sampler with model.mismatch or AsyncSampler: they tell "
            "sampler and policy apart by their log-probs; set it to auto or recompute"
        )
    if is_ahead(sampler) and drop_flat_groups:
        raise ValueError(
            "model.drop_flat_groups draws prompts by their rewards, which AsyncSampler cannot know "
            "one rollout ahead; set drop_flat_groups to false, or sampler.lag to 0"
        )
    return apart


def _waited_for(pending: Pending) -> Future[Samples]:
    """The completions, or their error, once they are there; a run that is stopped does not wait."""
    done: Future[Samples] = Future()

    def run() -> None:
        try:
            with record_function("ahead"):  # its range in a trace
                done.set_result(pending.result())
        except BaseException as error:  # told to whoever asks for the result
            done.set_exception(error)

    Thread(target=run, name="ahead", daemon=True).start()
    return done
