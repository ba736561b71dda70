"""A way into the attention of Hugging Face models as they are.

Decides how one forward pass brings an attention of its own (tokens packed without padding, a prompt
shared by its group) while every other call of the same model stays as it was. Transformers' public
``AttentionInterface`` is the way in: the model's attention implementation is replaced by one that
looks for the argument ``attend``, which travels through the model's ``**kwargs``, so that layers
recomputed by gradient checkpointing find it, too.
"""

import inspect
import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gspo_lightning.engine.packed_attention import PREFIX
from gspo_lightning.engine.padded import unwrapped

NAME_ASKED = re.compile(r"_attn_implementation in [(\[{]")


class Attend(Protocol):
    """What a forward pass gives as ``attend``."""

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor:
        """Attend in one layer; called for every layer of the pass.

        Args:
            module: The attention layer; ``layer_idx`` says which.
            query: (N, heads, Q, head size).
            key: (N, key-value heads, S, head size), from the cache where there is one.
            value: Likewise.
            options: ``scaling`` multiplies the scores. Where the model has them:
                ``sliding_window``, the tokens that a token sees, itself included; ``softcap``,
                within plus and minus which scores are bent to stay; ``s_aux``, attention sinks, a
                score per head that takes weight and gives nothing, (heads,).

        Returns:
            (N, Q, heads, head size).
        """
        ...


def open_attention(model: Any) -> bool:
    """Let forward passes of a model bring an attention of their own, as ``attend=...``.

    Without that argument the transformers model, also within peft, computes what it computed
    before, bit for bit.

    Returns:
        Whether the model can; models that do not call the interface cannot, nor can those whose
        implementation is neither ``eager`` nor ``sdpa``, nor those whose own code asks which of the
        two it is: sparse attention would lose its mask under another name.
    """
    base = unwrapped(model)
    config = getattr(base, "config", None)
    name = getattr(config, "_attn_implementation", None) or ""
    if name.startswith(PREFIX):
        return True
    if not getattr(base, "_supports_attention_backend", False) or name not in ("eager", "sdpa"):
        return False
    if any(map(_asks_for_name, {type(part).__module__ for part in base.modules()})):
        return False
    if PREFIX + name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(PREFIX + name, _either_way(name))
        AttentionMaskInterface.register(PREFIX + name, ALL_MASK_ATTENTION_FUNCTIONS[name])
    config._attn_implementation = PREFIX + name  # type: ignore[union-attr]
    return True


@cache
def _asks_for_name(module: str) -> bool:
    """Whether the code of a model looks its attention's name up in a list of names."""
    return NAME_ASKED.search(inspect.getsource(sys.modules[module])) is not None


def _either_way(name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that takes ``attend`` if it is given, and ``name`` otherwise."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attend: Attend | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if attend is not None:
            return attend(module, query, key, value, **options), None
        # transformers has no common "eager": each model's own file defines one
        own: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(name, own)
        return function(module, query, key, value, attention_mask, **options)

    return attention
