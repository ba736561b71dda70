"""LoRA: small matrices beside frozen weights, through peft.

Decides which weights get adapters, what a merged export holds and how the adapters are switched
off. Leaves out loading (``policy``) and who is allowed to borrow the weights (``frozen``). peft is
imported only where a policy has adapters: it is an extra.
"""

from __future__ import annotations

import importlib.util
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class LoRAConfig:
    """Train adapters instead of the weights.

    Each chosen matrix W becomes W + (alpha / rank) B A with B = 0 at the start, so that training
    starts from the policy as it is. There is no dropout: it would move the ratios off 1. In a
    bfloat16 policy the adapters are float32, so that small steps are not rounded away.

    Args:
        rank: Rows of A and columns of B.
        alpha: The product is scaled by ``alpha / rank``.
        target_modules: Names of the layers that get adapters (``[q_proj, v_proj]``), or
            ``all-linear``: all but the output head.
        export: ``merged`` writes a model of its own; ``adapter`` writes the adapters alone, which
            peft loads on top of ``policy.path``.

    Raises:
        ValueError: If a value is out of range.
        ImportError: If peft is not installed.

    Source:
        LoRA, arXiv:2106.09685, section 4.1.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    export: Literal["merged", "adapter"] = "merged"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"policy.lora.rank must be >= 1, got {self.rank}")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"policy.lora.alpha must be above 0, got {self.alpha}")
        names = self.target_modules
        if not names or (isinstance(names, str) and names != "all-linear"):
            raise ValueError(
                "policy.lora.target_modules must be a list of layer names or all-linear, got "
                f"{names!r}"
            )
        if importlib.util.find_spec("peft") is None:
            raise ImportError("policy.lora needs peft: pip install 'gspo_lightning[lora]'")


def add_adapters(model: Any, config: LoRAConfig) -> Any:
    """Freeze a model and put adapters beside its layers.

    Args:
        model: A transformers model; its layers are replaced in place.
        config: Which layers, and how large.

    Returns:
        The peft model around it. Its trainable parameters are the adapters.

    Raises:
        ValueError: If no layer has the given names, or a layer shares its weight with another one.
    """
    from peft import LoraConfig, get_peft_model

    names = config.target_modules
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=0.0,
        target_modules=names if isinstance(names, str) else list(names),
    )
    with warnings.catch_warnings():
        # GPT-2 stores its matrices the other way round; peft sees that by itself and says so
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        # peft 0.21 reads what transformers 5.23 has renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # said again, for the user's own names, below
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        try:
            adapted = get_peft_model(model, settings)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"policy.lora.target_modules {names}: {reason}") from error
    refuse_tied(adapted)
    return adapted


def refuse_tied(model: Any) -> None:
    """Refuse adapters on a weight that two layers share: merged, they would act on both.

    Raises:
        ValueError: Naming the layer.
    """
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None or embedding.weight is not head.weight:
        return
    for name, layer in adapted_layers(base):
        if layer is embedding or layer is head:
            raise ValueError(
                f"policy.lora.target_modules: {name} shares its weight with another layer (tied "
                "embeddings), so adapters cannot be merged into it; leave it out"
            )


def adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers with adapters, by name."""
    from peft.tuners.lora import LoraLayer

    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]


def adapters_off(model: Any) -> AbstractContextManager[Any]:
    """A context in which a peft model computes what it did before it had adapters, bit for bit.

    Within it the adapters do not require gradients, so nothing may be trained in it.
    """
    return model.disable_adapter()


def merged_weights(model: Any) -> dict[str, Tensor]:
    """The weights of a plain model that computes what this peft model computes.

    Adapters and weights stay as they are: merging in place and back again would round the weights.

    Args:
        model: From :func:`add_adapters`.

    Returns:
        A state dict under the names that the model had before it got adapters; weights without
        adapters are the model's own tensors.
    """
    base = model.get_base_model()
    weights = dict(base.state_dict())
    for name, layer in adapted_layers(base):
        own = layer.get_base_layer().weight.detach()
        delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
        weights[f"{name}.base_layer.weight"] = (own.to(delta.dtype) + delta.detach()).to(own.dtype)
    return {
        name.replace(".base_layer.", "."): weight
        for name, weight in weights.items()
        if ".lora_" not in name
    }
