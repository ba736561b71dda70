"""What a program may give as the policy: a config, a path, or a model that it has loaded.

Decides where the tokenizer of a loaded model comes from, and that the model itself is trained: what
stays as it was, a reference or the start of a critic, is a copy.
"""

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModel, PreTrainedModel

from gspo_lightning.engine.texts import ends_of
from gspo_lightning.policy import folder
from gspo_lightning.policy.policy import DTYPES, PolicyConfig, load_tokenizer, opened

if TYPE_CHECKING:  # on the command line a policy is its config, and a tokenizer a path
    GivenPolicy = PolicyConfig | str | Path | PreTrainedModel
    GivenTokenizer = Any
else:
    GivenPolicy, GivenTokenizer = PolicyConfig, str | None


class LoadedPolicy(PolicyConfig):
    """The config of a model that is loaded: `path` is where the model says that it is from.

    Attributes:
        model: The model; no field, since fields are plain values that checkpoints hold.
    """

    model: Any

    def own(self, mesh: Any = None) -> Any:
        """The model itself."""
        return opened(self.model)

    def load(
        self,
        key: str,
        auto: Any,
        path: str | None = None,
        dtype: str | None = None,
        mesh: Any = None,
    ) -> Any:
        """A copy of the model, or of its body alone; a path leads to another model."""
        if path is not None:
            return super().load(key, auto, path, dtype, mesh)
        model = deepcopy(self.model.base_model if auto is AutoModel else self.model)
        return opened(model).to(DTYPES[dtype or self.dtype])

    def model_config(self) -> Any:
        """The model's own."""
        return self.model.config


def as_policy(given: GivenPolicy) -> PolicyConfig:
    """The config of a policy that is given as it is at hand.

    Raises:
        ValueError: For anything else, and for a loaded model that cannot be trained as it is.
    """
    if isinstance(given, str | Path):
        return PolicyConfig(str(given))
    if not isinstance(given, torch.nn.Module):
        return given  # a config, or refused with all other arguments of a wrong kind
    kind = type(given).__name__
    if hasattr(given, "peft_config"):
        raise ValueError(
            f"model.policy: a {kind} has adapters already; give the path of the model below them, "
            "which gets its own: PolicyConfig(path, lora=LoRAConfig())"
        )
    if not isinstance(given, PreTrainedModel) or given.get_output_embeddings() is None:
        raise ValueError(
            f"model.policy: expected a causal language model of transformers, got {kind}"
            f"{'; its own is module.policy.model' if hasattr(given, 'policy_config') else ''}"
        )
    dtype = next((name for name, one in DTYPES.items() if one == given.dtype), None)
    if dtype is None or getattr(given, "is_quantized", False):
        raise ValueError(
            f"model.policy: the {kind} is loaded in {str(given.dtype).removeprefix('torch.')}"
            f"{', quantized' if getattr(given, 'is_quantized', False) else ''}; load it with "
            "dtype=torch.float32 or torch.bfloat16, or give its path"
        )
    folder.check_values(f"model.policy: the {kind}", given)
    config = LoadedPolicy(_origin(given) or f"loaded-{kind}", dtype)  # type: ignore[arg-type]
    object.__setattr__(config, "model", given)
    return config


def given_tokenizer(config: PolicyConfig, given: GivenTokenizer = None) -> Any:
    """The tokenizer that goes with a policy, padding on the left.

    Args:
        config: The policy.
        given: Folder or hub name of a tokenizer, or a loaded one; ``None`` is the policy's own.

    Raises:
        ValueError: If there is none.
    """
    if given is None:
        if isinstance(config, LoadedPolicy) and _origin(config.model) is None:
            raise ValueError(
                "model.tokenizer: the loaded model comes from no folder that has one; give it, "
                "too: GSPOModule(policy=model, tokenizer=tokenizer, ...)"
            )
        return load_tokenizer(config)
    if isinstance(given, str | Path):
        try:
            trust = config.trust_remote_code
            given = folder.read_tokenizer(str(given), trust_remote_code=trust)
        except ValueError as error:
            raise ValueError(f"model.tokenizer: {error}") from error
    elif not hasattr(given, "get_vocab"):
        raise ValueError(
            f"model.tokenizer: expected a tokenizer of transformers, or a path, got "
            f"{type(given).__name__}"
        )
    tokenizer = deepcopy(given)  # the program's own keeps its side
    tokenizer.padding_side = "left"
    ends_of(tokenizer, config)
    return tokenizer


def _origin(model: Any) -> str | None:
    """Folder or hub name that a model was loaded from, None if it was made or that is gone."""
    path = str(getattr(model.config, "name_or_path", "") or "")
    try:
        folder.check_model_path("policy.path", path)
    except ValueError:
        return None
    return path or None
