"""LoRA: small matrices beside frozen weights, through peft.

Decides which weights get adapters and what a merged export holds. peft is imported only where a
policy has adapters: it is an extra.
"""

import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gspo_lightning.bounds import check_at_least, check_positive
from gspo_lightning.engine.padded import unwrapped


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
            ``all-linear``: every linear layer but the output head. Experts, whose weights lie in
            one tensor for all, their router and a shared expert beside them get none.
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
        check_at_least(1, "policy.lora.", rank=self.rank)
        check_positive("policy.lora.", alpha=self.alpha)
        names = self.target_modules
        if not names or (isinstance(names, str) and names != "all-linear"):
            raise ValueError(
                "policy.lora.target_modules must be a list of layer names or all-linear, got "
                f"{names!r}"
            )
        if importlib.util.find_spec("peft") is None:
            raise ImportError("policy.lora needs peft: pip install 'gspo_lightning[lora]'")


def add_adapters(model: Any, config: LoRAConfig) -> Any:
    """Freeze a transformers model and put adapters beside its layers, which are replaced in place.

    Returns:
        The peft model around it. Its trainable parameters are the adapters.

    Raises:
        ValueError: If no layer has the given names, or one shares its weight with another layer.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=0.0,
        target_modules=chosen_layers(model, config.target_modules),
    )
    with warnings.catch_warnings():
        # GPT-2 stores its matrices the other way round; peft sees that by itself and says so
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        # peft 0.21 reads what transformers 5.23 has renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        try:
            adapted = get_peft_model(model, settings)
        except ValueError as error:
            raise ValueError(f"policy.lora.target_modules: {str(error).splitlines()[0]}") from error
    # peft 0.21 takes gate_proj and the like in a model with experts for the experts' own tensors
    if getattr(adapted.peft_config["default"], "target_parameters", None):
        raise ValueError(
            "policy.lora.target_modules: peft would put adapters on the experts of this model, "
            f"which is not supported; leave feed-forward layers out of {config.target_modules}"
        )
    return adapted


def chosen_layers(model: Any, wanted: list[str] | str) -> list[str]:
    """The full names of the layers that get adapters, from last parts of names or ``all-linear``.

    Raises:
        ValueError: If a name fits no layer, or one whose weight is another layer's, too.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D, nn.Embedding))
    }
    if wanted == "all-linear":
        blocks = tuple(  # that hold experts: one tensor of three axes, and no layer of torch's own
            f"{name.rpartition('.')[0]}."
            for name, part in model.named_modules()
            if any(p.ndim == 3 for p in part.parameters(recurse=False))
            and not hasattr(part, "weight")
        )
        return [
            name
            for name, layer in layers.items()
            if layer is not head
            and not isinstance(layer, nn.Embedding)
            and not name.startswith(blocks)
        ]
    chosen = []
    for short in wanted:
        fitting = [name for name in layers if f".{name}".endswith(f".{short}")]
        if not fitting:
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise ValueError(
                f"policy.lora.target_modules: no layer is called {short!r}; there are "
                f"{', '.join(known)}"
            )
        tied = head is not None and embedding.weight is head.weight
        if tied and any(layers[name] in (embedding, head) for name in fitting):
            # merged into one of two tied layers, adapters would act on the other, too
            raise ValueError(
                f"policy.lora.target_modules: {short} shares its weight with another layer (tied "
                "embeddings), so adapters cannot be merged into it; leave it out"
            )
        chosen += fitting
    return chosen


def merged_weights(model: Any) -> dict[str, Tensor]:
    """The weights of a plain model that computes what this peft model computes.

    Adapters and weights stay as they are: merging in place and back again would round the weights.

    Returns:
        A state dict under the names that the model had before it got adapters; weights without
        adapters are the model's own tensors.
    """
    from peft.tuners.lora import LoraLayer

    base = unwrapped(model)
    weights = dict(base.state_dict())
    for name in [name for name, layer in base.named_modules() if isinstance(layer, LoraLayer)]:
        layer = base.get_submodule(name)
        own = layer.get_base_layer().weight.detach()
        delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
        weights[f"{name}.base_layer.weight"] = (own.to(delta.dtype) + delta.detach()).to(own.dtype)
    return {
        name.replace(".base_layer.", "."): weight
        for name, weight in weights.items()
        if ".lora_" not in name
    }
