"""The policy: a causal language model with its tokenizer, loaded, made deterministic, exported.

Decides what a policy folder must hold, which ids end a completion, that dropout is off, and what a
checkpoint of a policy with adapters holds. Lightning owns the policy's device.
"""

import hashlib
import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from gspo_lightning.engine.attention import open_attention
from gspo_lightning.engine.mode import leave_routers_out, stay_in_eval_mode
from gspo_lightning.engine.norms import fuse_norms
from gspo_lightning.engine.padded import unwrapped
from gspo_lightning.engine.products import speed_up, uses_onednn
from gspo_lightning.engine.texts import ends_of
from gspo_lightning.policy import folder, four_bits
from gspo_lightning.policy.lora import LoRAConfig, add_adapters, merged_weights
from gspo_lightning.policy.shards import reading_parts, whole_tensor
from gspo_lightning.start.shipped import find_data

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LARGEST_FILE = "5GB"  # of weights; what is written of one file may be in memory at once
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "spiece*")


@dataclass(frozen=True)
class PolicyConfig:
    """Where a policy comes from and how it is held.

    Args:
        path: Folder with ``config.json``, a tokenizer and weights, or a model name on the hub.
        dtype: Type of the weights. ``float32`` keeps the ratios exact; see the README on bf16.
        attention: Attention implementation of transformers (``eager``, ``sdpa``,
            ``flash_attention_2``); ``None`` takes the library's choice.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        weights: ``random`` builds the model from ``config.json`` alone, for training from scratch.
        revision: Branch, tag or commit of a model on the hub.
        trust_remote_code: Run Python code that lies beside the weights. Off unless asked.
        lora: Train adapters and leave the weights as they are; ``None`` trains all weights.
        stop_strings: Texts that end a completion, such as ``Question:`` for a base model with
            few-shot prompts, at the token that completes one. The token is trained; rewards see the
            text before the stop string. ``None`` takes those of ``generation_config.json``.
        stop_token_ids: Ids that end a completion beside the end-of-sequence ids.
        include_stop_str_in_output: Whether rewards see the stop string or stop token, too.
        load_in_4bit: Round the weights below the adapters to four bits each as they are loaded, a
            quarter of the memory of bfloat16 (QLoRA). Needs ``lora``, bitsandbytes and a GPU.
    """

    path: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: str | None = None
    gradient_checkpointing: bool = False
    weights: Literal["pretrained", "random"] = "pretrained"
    revision: str | None = None
    trust_remote_code: bool = False
    lora: LoRAConfig | None = None
    stop_strings: list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", find_data(self.path))
        folder.check_model_path("policy.path", self.path)
        if self.load_in_4bit:
            four_bits.check_four_bits(self.lora)
        if self.lora is not None and self.weights == "random":
            raise ValueError(
                "policy.weights is random, but with policy.lora a checkpoint holds the adapters "
                "alone; save the random weights in a folder first"
            )

    def options(self, dtype: str | None = None) -> dict[str, Any]:
        """What a model like this policy is made with; ``dtype`` stands in for the policy's own."""
        options: dict[str, Any] = {"dtype": DTYPES[dtype or self.dtype]}
        options["trust_remote_code"] = self.trust_remote_code
        if self.attention is not None:  # other kernels would give other log-probs
            options["attn_implementation"] = self.attention
        if self.load_in_4bit:
            options["quantization_config"] = four_bits.rounding(options["dtype"])
        return options

    def own(self, mesh: Any = None) -> Any:
        """The model that is trained; for ``mesh`` see :meth:`load`."""
        if self.weights == "random":
            return _random_model(self)
        return self.load("policy.path", AutoModelForCausalLM, mesh=mesh)

    def model_config(self) -> Any:
        """The config of the model, without its weights."""
        trust = self.trust_remote_code
        return folder.read_config("policy.path", self.path, trust, self.revision)

    def check_device(self, key: str, device: torch.device) -> None:
        """Refuse a device that cannot hold such a policy, naming the setting that chose it."""
        if self.load_in_4bit:
            four_bits.check_device(key, device)

    def load(
        self,
        key: str,
        auto: Any,
        path: str | None = None,
        dtype: str | None = None,
        mesh: Any = None,
    ) -> Any:
        """Load a model with this policy's options, its attention open to ours.

        Args:
            key: The setting that names the folder, for messages.
            auto: An auto class of transformers.
            path: Folder or hub name; ``None`` is the policy's own, in its revision.
            dtype: Type of the weights; ``None`` is the policy's own.
            mesh: Ranks that cut the model among them, each of which reads its part alone; ``None``
                reads all.

        Raises:
            ValueError: If the model cannot be loaded, naming key and path.
        """
        options = self.options(dtype) | ({"revision": self.revision} if path is None else {})
        with reading_parts(mesh):
            model = folder.load_weights(key, auto, path or self.path, **options)
        return opened(model)


class Policy(nn.Module):
    """A causal language model and its tokenizer.

    Attributes:
        model: The transformers model; its parameters are the policy's parameters.
        tokenizer: The tokenizer, padding on the left.
        eos_ids: Every id that ends a completion (``generation_config.eos_token_id``, and stop ids).
        ends: What ends a completion beside an end of sequence, and the text that it leaves.
        pad_id: Id written into padded positions. Masks come from lengths, so it may equal an EOS.
    """

    def __init__(self, model: Any, tokenizer: Any, config: PolicyConfig | None = None) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        generation = model.generation_config
        self.ends = ends_of(tokenizer, config, getattr(generation, "stop_strings", None))
        own = eos_ids(model, tokenizer, needed=not self.ends.strings and not self.ends.token_ids)
        self.eos_ids = list(dict.fromkeys([*own, *self.ends.token_ids]))
        pad = tokenizer.pad_token_id
        self.pad_id: int = (self.eos_ids or [0])[0] if pad is None else pad
        if config is not None and (config.stop_strings is not None or self.ends.token_ids):
            generation.eos_token_id = self.eos_ids or None  # an export ends where the policy did
            generation.stop_strings = self.ends.strings or None
        check_special_ids(model, {"eos_token_id": self.eos_ids, "pad_token": [self.pad_id]})
        make_ready(model)

    def export(self, path: str | Path, state: dict[str, Any] | None = None) -> None:
        """Write model and tokenizer as a folder that ``from_pretrained`` loads.

        Args:
            path: The folder.
            state: Copies of the model's weights, where this rank has but a part of them.
        """
        self.model.save_pretrained(path, state_dict=state, max_shard_size=LARGEST_FILE)
        self.tokenizer.save_pretrained(path)


class LoRAPolicy(Policy):
    """A policy whose adapters are trained and whose weights stay as they were loaded.

    Its state dict holds the adapters and a fingerprint of the weights, which come from
    ``policy.path`` again: checkpoints are small, and adapters never meet other weights.

    Attributes:
        start: Fingerprint of the weights without adapters.
    """

    def __init__(
        self, model: Any, tokenizer: Any, lora: LoRAConfig, config: PolicyConfig | None = None
    ) -> None:
        self.start = fingerprint(model)
        super().__init__(add_adapters(model, lora), tokenizer, config)
        self.lora = lora
        base = Path(self.model.config.name_or_path)
        if base.is_dir():  # a relative path would lead peft from this working folder alone
            self.model.peft_config["default"].base_model_name_or_path = str(base.resolve())
        self.adapter_names = {name for name, p in self.named_parameters() if p.requires_grad}
        self.register_state_dict_post_hook(_keep_adapters)
        self.register_load_state_dict_post_hook(_expect_adapters)

    def export(self, path: str | Path, state: dict[str, Any] | None = None) -> None:
        """Write a merged model, or the adapters for ``PeftModel.from_pretrained``."""
        if self.lora.export == "adapter":
            # the embedding has no adapters; without the argument peft would ask the hub about it
            self.model.save_pretrained(path, save_embedding_layers=False, state_dict=state)
        else:
            base, weights = unwrapped(self.model), merged_weights(self.model, state)
            if any(map(four_bits.is_rounded, base.parameters())):
                base = four_bits.plain_model(base, base.get_input_embeddings().weight.dtype)
            base.save_pretrained(path, state_dict=weights, max_shard_size=LARGEST_FILE)
        self.tokenizer.save_pretrained(path)

    def get_extra_state(self) -> dict[str, Any]:
        """What the state dict holds beside the adapters: what they were trained on and for."""
        return {"start": self.start, "scale": self.lora.scale}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Refuse adapters that were trained on other weights or for another scale.

        Raises:
            ValueError: If the weights or the scale differ.
        """
        own = self.get_extra_state()
        if state["start"] != own["start"]:
            raise ValueError(
                "policy.path: these are not the weights that the checkpoint's adapters were "
                "trained on; restore them, or start a new run"
            )
        if state["scale"] != own["scale"]:
            raise ValueError(
                f"policy.lora.alpha: the checkpoint's adapters were trained for a scale of "
                f"{state['scale']:g}, here it is {own['scale']:g} (alpha / rank, or alpha / "
                "sqrt(rank) with use_rslora)"
            )


def _keep_adapters(policy: LoRAPolicy, state: dict[str, Any], prefix: str, _: Any) -> None:
    kept = {f"{prefix}{name}" for name in (*policy.adapter_names, "_extra_state")}
    for name in [name for name in state if name.startswith(prefix) and name not in kept]:
        del state[name]


def _expect_adapters(policy: LoRAPolicy, incompatible: Any) -> None:
    # endings: the missing keys begin with a prefix that this hook is not told
    ends = tuple(policy.adapter_names)
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if k.endswith(ends)]


def fingerprint(model: nn.Module) -> str:
    """A short hash of a model's weights: every tensor's name, shape and all its values.

    Values count as float32, so that weights which were only stored wider are the same ones. Of
    weights that were read in parts one after the other is gathered: all ranks must call.
    """
    digest = hashlib.blake2b(digest_size=8)  # fast on every CPU: about a second per GiB
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        values = whole_tensor(tensor).flatten()
        for part in values.split(2**22):  # 16 MiB at a time leave the device
            digest.update(part.float().cpu().numpy())
    return digest.hexdigest()


def load_tokenizer(config: PolicyConfig) -> Any:
    """Load the tokenizer of a policy folder, set to pad on the left, and look at the rest of it.

    Raises:
        ValueError: If there is no tokenizer, or it, the folder's config or weights are broken, or a
            stop string or stop id is none of this tokenizer.
    """
    path, pretrained = Path(os.path.expanduser(config.path)), config.weights == "pretrained"
    trust = config.trust_remote_code
    folder.check_model_folder("policy.path", config.path, trust, pretrained)
    if path.is_dir() and not any(any(path.glob(name)) for name in TOKENIZER_FILES):
        # transformers would make an empty one up
        raise ValueError(f"policy.path: no tokenizer in {config.path}; save one beside the weights")
    source: Any = {"revision": config.revision, "trust_remote_code": trust}
    try:
        tokenizer = folder.read_tokenizer(config.path, padding_side="left", **source)
    except ValueError as error:
        raise ValueError(f"policy.path: {error}") from error
    ends_of(tokenizer, config)
    return tokenizer


def load_policy(config: PolicyConfig, tokenizer: Any = None, mesh: Any = None) -> Policy:
    """Load a policy in the dtype and with the attention that ``config`` asks for.

    Without a tokenizer, :func:`load_tokenizer` loads the policy's own. Of a ``mesh`` of ranks each
    reads its part, which is left to the caller to cut; see :meth:`PolicyConfig.load`.

    Raises:
        ValueError: If weights or tokenizer cannot be read, no end-of-sequence id is known or the
            model lacks it, or the model has no key-value cache.
    """
    if tokenizer is None:
        tokenizer = load_tokenizer(config)
    model = config.own(mesh)
    # Recurrent models (Mamba, RWKV) have no cache to sample with; some also read the padding on the
    # left as text, so every log-prob would be wrong. Sampling sees what no signature shows.
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"policy.path: {type(model).__name__} takes no past_key_values; only models with a "
            "key-value cache can be sampled from here"
        )
    lora = config.lora
    if lora is None:
        policy = Policy(model, tokenizer, config)
    else:
        policy = LoRAPolicy(model, tokenizer, lora, config)
    if config.gradient_checkpointing:
        checkpoint_activations(policy.model)
    return policy


def _random_model(config: PolicyConfig) -> Any:
    try:
        # trust_remote_code in both calls: where it is missing, transformers asks on the terminal
        trust = {"trust_remote_code": config.trust_remote_code}
        model_config = AutoConfig.from_pretrained(config.path, revision=config.revision, **trust)
        model = AutoModelForCausalLM.from_config(model_config, **config.options())
        if (Path(config.path) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(config.path)
    except Exception as error:  # whatever a model's code raises for sizes that do not fit
        raise folder.unloadable("policy.path", config.path, error) from error
    return opened(model)


def opened(model: Any) -> Any:
    """The model, its attention open to ours and its norms in one kernel where a card has one."""
    open_attention(model)
    fuse_norms(model)
    return model


def checkpoint_activations(model: Any) -> None:
    """Switch gradient checkpointing on, by the name that this transformers has for it.

    Raises:
        ValueError: If the model's code has no gradient checkpointing.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    try:
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError as error:
        raise ValueError(
            f"gradient_checkpointing: {type(unwrapped(model)).__name__} cannot recompute its "
            "activations; set it to false"
        ) from error


def eos_ids(model: Any, tokenizer: Any, needed: bool = True) -> list[int]:
    """Every end-of-sequence id: the generation config's, else the tokenizer's."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = tokenizer.eos_token_id if ids is None else ids
    if ids in (None, []) and not needed:
        return []
    if ids is None or ids == []:
        raise ValueError(
            "policy.path: neither generation_config.json nor the tokenizer has an eos_token_id, "
            "so a completion could never end; add one to generation_config.json, or set "
            "policy.stop_strings"
        )
    found = list(ids) if isinstance(ids, (list, tuple)) else [ids]
    if not all(type(i) is int for i in found):
        raise ValueError(
            f"policy.path: generation_config.json: eos_token_id is {ids!r}, must be an id or a "
            "list of ids, such as 2 or [2, 5]"
        )
    return found


def check_special_ids(model: Any, used: dict[str, list[int]]) -> None:
    """Refuse ids of the tokenizer's that a run needs and the model does not embed.

    Others may be beyond the model's vocabulary: published pairs exist whose last id is that of a
    picture, which no text holds.

    Args:
        used: Ids by the name under which a user finds them.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    for name, ids in used.items():
        if beyond := [i for i in ids if not 0 <= i < rows]:
            raise ValueError(
                f"policy.path: {name} is {beyond[0]}, and the model embeds ids 0 to {rows - 1}; "
                f"set another {name} beside the weights, or save model and tokenizer as a pair"
            )


def make_ready(model: nn.Module) -> None:
    """What every model is given before its first pass: one mode, and the faster products."""
    stay_in_eval_mode(model)
    leave_routers_out(model)
    speed_up(model)


def multiplies_by_onednn(model: nn.Module) -> bool:
    """Whether oneDNN multiplies by any of a model's weights, given rows enough."""
    return any(map(uses_onednn, model.parameters()))
