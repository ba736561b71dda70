"""Frozen weights in four bits under adapters (QLoRA), through bitsandbytes.

Decides what such a policy needs, how its weights are rounded, and how they become a plain model
again. bitsandbytes is an extra, and multiplies on a GPU.
"""

import copy
import re
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

KEY = "policy.load_in_4bit"


def check_four_bits(lora: Any) -> None:
    """Refuse a policy in four bits that cannot be trained here, before anything is loaded.

    Raises:
        ValueError: If it has no adapters, or this machine has no GPU.
        ImportError: If bitsandbytes is not installed.
    """
    if lora is None:
        raise ValueError(
            f"{KEY} needs policy.lora: weights in four bits stay as they are, and adapters are "
            "trained; set policy.lora: {}, or load_in_4bit: false"
        )
    if not torch.cuda.is_available():
        raise ValueError(
            f"{KEY}: this machine has no CUDA device; use one that has, or set it to false"
        )
    if find_spec("bitsandbytes") is None:
        raise ImportError(f"{KEY} needs bitsandbytes: pip install 'gspo_lightning[qlora]'")


def check_device(key: str, device: torch.device) -> None:
    """Refuse a device where weights in four bits cannot be multiplied by."""
    if device.type != "cuda":
        raise ValueError(f"{KEY} needs a CUDA device, and {key} is {device}; set one of the two")


def rounding(dtype: torch.dtype) -> Any:
    """How transformers rounds weights as it loads them; products are made in ``dtype``.

    Source:
        QLoRA, arXiv:2305.14314, section 3: NF4, and the scales rounded in turn.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def is_rounded(weight: Any) -> bool:
    """Whether a weight is in four bits."""
    return hasattr(weight, "quant_state")


def full_weights(base: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose weights in four bits are full ones, without the scales beside them."""
    from peft.utils.integrations import dequantize_module_weight

    for name, module in base.named_modules():
        # its own: a layer with adapters shows the weight of the layer in it
        if is_rounded(module._parameters.get("weight")):
            weights[f"{name}.weight"] = dequantize_module_weight(module).detach()
    return {name: weight for name, weight in weights.items() if not re.search(r"\.weight\.", name)}


def plain_model(model: Any, dtype: torch.dtype) -> Any:
    """The same architecture in full precision and without weights, to save a state dict by."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config).to(dtype)
    plain.generation_config = model.generation_config
    return plain
