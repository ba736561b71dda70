"""What a rank needs of what one device would: for plans, before anything is trained."""

from typing import Any

from gspo_lightning.engine.padded import unwrapped
from gspo_lightning.sharding.cut import decoder_layers

STATE = ("weights", "gradients", "Adam", "optimizer step")  # of which each rank has its part


def per_rank(
    parts: dict[str, float], model: Any, ranks: int, width: int, gathers: bool
) -> dict[str, float]:
    """Bytes by part on each of several ranks.

    Args:
        parts: Bytes by part on one device that has the model alone.
        model: A transformers model.
        ranks: How many share it.
        width: Bytes of a weight as it is gathered.
        gathers: Whether the whole model is gathered while completions are drawn.

    Returns:
        The same parts, the cache with the weights that are whole beside it, and the micro-batch
        with those of the layer under way and the next, and of all that is no layer, each with its
        gradient.
    """
    base = unwrapped(model)
    layers = decoder_layers(base)
    total = sum(p.numel() for p in base.parameters()) * width
    in_layers = sum(p.numel() for layer in layers for p in layer.parameters()) * width
    whole = total - in_layers + 2 * in_layers / len(layers)
    found = {name: size / ranks if name in STATE else size for name, size in parts.items()}
    found["KV cache"] += total if gathers else whole
    found["micro-batch"] += 2 * whole
    return found
