"""LoRA: small matrices beside frozen weights, through peft.

Decides which weights get adapters and what a merged export holds. peft is imported only where a
policy has adapters: it is an extra.
"""

import importlib.util
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gspo_lightning.bounds import check_at_least, check_positive
from gspo_lightning.engine.padded import unwrapped
from gspo_lightning.policy.four_bits import full_weights
from gspo_lightning.policy.shards import standing_in


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
            ``all-linear``: every linear layer that reads text, but the output head. Experts, whose
            weights lie in one tensor for all, get none whatever is named; ``all-linear`` leaves out
            their router and a shared expert beside them, too. Layers without experts get theirs.
        export: ``merged`` writes a model of its own; ``adapter`` writes the adapters alone, which
            peft loads on top of ``policy.path``.
        use_rslora: Scale the product by ``alpha / sqrt(rank)`` (rank-stabilised LoRA), under which
            a larger rank does not make steps smaller.
        modules_to_save: Names of modules that are trained whole beside the adapters, such as
            ``[norm]`` or, where they are not tied, ``[embed_tokens, lm_head]``. Their copies are of
            the policy's own dtype.

    Raises:
        ValueError: If a value is out of range.
        ImportError: If peft is not installed.

    Source:
        LoRA, arXiv:2106.09685, section 4.1; rank-stabilised LoRA, arXiv:2312.03732, section 3.2.
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    export: Literal["merged", "adapter"] = "merged"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by.

        >>> LoRAConfig(rank=16, alpha=8.0).scale, LoRAConfig(16, 8.0, use_rslora=True).scale
        (0.5, 2.0)
        """
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def __post_init__(self) -> None:
        check_at_least(1, "policy.lora.", rank=self.rank)
        check_positive("policy.lora.", alpha=self.alpha)
        names = self.target_modules
        if not names or (isinstance(names, str) and names != "all-linear"):
            raise ValueError(
                "policy.lora.target_modules must be a list of layer names or all-linear, got "
                f"{names!r}"
            )
        if self.modules_to_save is not None and not self.modules_to_save:
            raise ValueError(
                "policy.lora.modules_to_save is empty; name modules, or set it to null"
            )
        if importlib.util.find_spec("peft") is None:
            raise ImportError("policy.lora needs peft: pip install 'gspo_lightning[lora]'")


def add_adapters(model: Any, config: LoRAConfig) -> Any:
    """Freeze a transformers model and put adapters beside its layers, which are replaced in place.

    Returns:
        The peft model around it. Its trainable parameters are the adapters and, of modules that are
        trained whole, copies.

    Raises:
        ValueError: If no layer has the given names, one shares its weight with another layer, or
            adapters that are exported alone would go to other layers when they are loaded.
    """
    from peft import LoraConfig, get_peft_model

    whole = chosen_modules(model, config.modules_to_save or [])
    layers = chosen_layers(model, config.target_modules, tuple(whole))
    if config.export == "adapter":
        _check_reloading(model, layers)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=0.0,
        target_modules=layers,
        use_rslora=config.use_rslora,
        modules_to_save=whole or None,
    )
    inside = standing_in([model.get_submodule(name) for name in layers])
    with warnings.catch_warnings(), _names_as_given(), inside:
        # GPT-2 stores its matrices the other way round; peft sees that by itself and says so
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        # peft 0.21 reads what transformers 5.23 has renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        try:
            return get_peft_model(model, settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"policy.lora.target_modules: {str(error).splitlines()[0]}") from error


@contextmanager
def _names_as_given() -> Iterator[None]:
    """Keep peft from putting adapters on experts in place of the layers that are named.

    For adapters made with transformers 4, where each expert had layers of its own, peft 0.21 takes
    every ``gate_proj`` of a model with experts for theirs, those of its dense layers included.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # a peft that knows no such thing
        yield
        return
    own = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = own


def _check_reloading(model: Any, layers: list[str]) -> None:
    """Refuse adapters that peft, loading them, would put on the experts after all."""
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return

    def taken(name: str) -> bool:
        settings = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(settings, model, None)
        except ValueError:  # one of two that experts have in one tensor
            return True
        return bool(settings.target_parameters)

    short = sorted({name.rpartition(".")[2] for name in layers})
    if lost := [name for name in short if taken(name)]:
        rest = [name for name in short if name not in lost]
        raise ValueError(
            f"policy.lora.export: adapter: peft would load the adapters of {', '.join(lost)} onto "
            f"the experts of this model; set export: merged, or target_modules: [{', '.join(rest)}]"
        )


def chosen_layers(model: Any, wanted: list[str] | str, whole: tuple[str, ...] = ()) -> list[str]:
    """The full names of the layers that get adapters, from last parts of names or ``all-linear``.

    Args:
        whole: Full names of the modules that are trained whole.

    Raises:
        ValueError: If a name fits no layer, or one whose weight is another layer's, too.
    """
    head = model.get_output_embeddings()
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
        inside = set(model.get_decoder().modules())  # not the eyes of a model that also sees
        if model.get_input_embeddings() not in inside:  # some call their output embedding so
            inside = set(model.modules())
        return [
            name
            for name, layer in layers.items()
            if layer in inside
            and layer is not head
            and not isinstance(layer, nn.Embedding)
            and not name.startswith(blocks)
            and not f"{name}.".startswith(tuple(f"{part}." for part in whole))
            and not _read_by_kernels(model, name)
        ]
    chosen = _named(model, "target_modules", "layer", list(wanted), layers)
    for name in chosen:
        if f"{name}.".startswith(tuple(f"{part}." for part in whole)):
            raise ValueError(
                f"policy.lora.target_modules: {name} is trained whole (modules_to_save); leave it "
                "out of one of the two"
            )
    return chosen


def _read_by_kernels(model: Any, name: str) -> bool:
    """Whether peft refuses a layer: kernels of Mamba read its weight past any adapter."""
    from peft import LoraConfig
    from peft.tuners import tuners_utils

    check = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    try:
        return check is not None and bool(check(LoraConfig(), model, name.rpartition(".")[2]))
    except ValueError:
        return True


def chosen_modules(model: Any, wanted: list[str]) -> list[str]:
    """The full names of the modules that are trained whole, from last parts of names."""
    modules = {
        name: module
        for name, module in model.named_modules()
        if name and any(True for _ in module.parameters()) and type(module) is not nn.ModuleList
    }
    return _named(model, "modules_to_save", "module", wanted, modules)


def _named(model: Any, key: str, what: str, wanted: list[str], known: dict[str, Any]) -> list[str]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and embedding.weight is head.weight
    chosen = []
    for short in wanted:
        fitting = [name for name in known if f".{name}".endswith(f".{short}")]
        if not fitting:
            names = sorted({name.rpartition(".")[2] for name in known})
            raise ValueError(
                f"policy.lora.{key}: no {what} is called {short!r}; there are {', '.join(names)}"
            )
        if tied and any(
            part in (embedding, head) for name in fitting for part in known[name].modules()
        ):
            # merged into one of two tied layers, adapters would act on the other, too
            raise ValueError(
                f"policy.lora.{key}: {short} shares its weight with another layer (tied "
                "embeddings), so what is trained cannot be merged into it; leave it out"
            )
        chosen += fitting
    return chosen


class _Change(nn.Module):
    """What a layer's adapters add to its weight, as a forward that can be given other tensors."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return sum(map(self.layer.get_delta_weight, self.layer.active_adapters))


def merged_weights(model: Any, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of a plain model that computes what this peft model computes.

    Adapters and weights stay as they are: merging in place and back again would round the weights.

    Args:
        model: A causal language model with adapters.
        state: Copies of its state dict's tensors, which are merged in place, where its own are but
            parts of weights.

    Returns:
        A state dict under the names that the model had before it got adapters; weights without
        adapters are the model's own tensors.
    """
    from peft.tuners.lora import LoraLayer

    base, copied = unwrapped(model), state is not None
    state = base.state_dict() if state is None else state
    named = {name.removeprefix("base_model.model."): weight for name, weight in state.items()}
    weights = full_weights(base, named)
    for name in [name for name, layer in base.named_modules() if isinstance(layer, LoraLayer)]:
        layer = base.get_submodule(name)
        own = weights[f"{name}.base_layer.weight"]
        inside = [n for n, _ in layer.named_parameters() if n.startswith("lora_")]
        adapters = {f"layer.{n}": weights[f"{name}.{n}"] for n in inside}
        delta = torch.func.functional_call(_Change(layer), adapters, ())
        merged = (own.to(delta.dtype) + delta.detach()).to(own.dtype)
        weights[f"{name}.base_layer.weight"] = own.copy_(merged) if copied else merged
    return {
        re.sub(r"\.base_layer\.|\.modules_to_save\.[^.]+\.", ".", name): weight
        for name, weight in weights.items()
        if not re.search(r"\.lora_|\.original_module\.", name)
    }
