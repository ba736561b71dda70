"""Frozen models: the reference policy and reward models, on a device of their own.

Plain objects, not modules, so that Lightning never moves, converts, wraps, lists or saves them.
Only (B, T) log-probs and (B,) scores leave them. Decides what the device words mean.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.policy import PolicyConfig
from gspo_lightning.rollout import Samples


def resolve_device(key: str, word: str, policy_device: torch.device) -> torch.device:
    """Turn a device word into a device that is there.

    Args:
        key: The setting, for messages.
        word: ``cuda:1`` (that card), ``cuda:+1`` (the policy's card plus one, for several ranks),
            ``policy`` (the policy's own device) or ``cpu``.
        policy_device: Where the policy is.

    Raises:
        ValueError: If the word is none of these or the device is not there; nothing falls back.
    """
    if word == "policy":
        return policy_device
    if word == "cpu":
        return torch.device("cpu")
    kind, _, number = word.partition(":")
    if kind != "cuda" or not number.removeprefix("+").isdigit():
        raise ValueError(f"{key} must be cuda:N, cuda:+N, policy or cpu, got {word!r}")
    index = int(number)
    if number.startswith("+"):
        index += policy_device.index or 0
    count = torch.cuda.device_count()
    if index >= count:
        seen = f"only cuda:0 to cuda:{count - 1}" if count else "no CUDA device"
        fits = "cpu" if count == 0 else "one_gpu" if count == 1 else "two_gpu"
        raise ValueError(
            f"{key} is {word}, but this machine has {seen}; set {key} to policy (the policy's own "
            f"device) or cpu, or add --config configs/hardware/{fits}.yaml"
        )
    return torch.device("cuda", index)


def fingerprint(model: torch.nn.Module) -> str:
    """A short hash of a model's weights: every tensor's name, shape and first 256 values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def freeze(model: Any, device: torch.device) -> Any:
    """Ready a model for scoring: on its device, dropout off, no gradients."""
    return model.to(device).eval().requires_grad_(False)


@dataclass
class ReferencePolicy:
    """The policy as it was at the start, which the KL penalty holds on to.

    Args:
        path: Model folder or hub name; ``None`` is the policy's own start.
        device: ``cuda:1``, ``cuda:+1``, ``policy`` or ``cpu``; ``None`` is the module's
            ``frozen_device``.
        dtype: Type of the weights; ``None`` is the policy's, so that the KL starts at 0.
        batch_size: Sequences per forward pass.
    """

    path: str | None = None
    device: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    batch_size: int = 32
    model: Any = field(default=None, init=False, repr=False)
    fingerprint: str | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"reference.batch_size must be >= 1, got {self.batch_size}")

    def load(self, policy: PolicyConfig, device: torch.device) -> None:
        """Load the weights.

        Args:
            policy: What ``path: null`` and ``dtype: null`` stand for.
            device: From :func:`resolve_device`.

        Raises:
            ValueError: If the policy starts from random weights, which no folder holds.
        """
        options: dict[str, Any] = {"trust_remote_code": policy.trust_remote_code}
        if policy.attention is not None:  # other kernels would give other log-probs
            options["attn_implementation"] = policy.attention
        if self.path is None:
            if policy.weights == "random":
                raise ValueError("reference.path: a policy with random weights is in no folder")
            options["revision"] = policy.revision
        model = AutoModelForCausalLM.from_pretrained(
            self.path or policy.path, dtype=getattr(torch, self.dtype or policy.dtype), **options
        )
        self.model = freeze(model, device)
        self.fingerprint = fingerprint(self.model)

    def release(self) -> None:
        """Let the weights go."""
        self.model = None

    # no_grad, not inference_mode: the KL term saves these log-probs for its backward pass
    @torch.no_grad()
    def logprobs(self, samples: Samples, temperature: float) -> Tensor:
        """Log-probs of the completions under the reference.

        Args:
            samples: B completions, on any device.
            temperature: The sampling temperature.

        Returns:
            (B, T) float32 nats, on the device of ``samples``.
        """
        device = next(self.model.parameters()).device
        # Groups sorted by length: little padding. Whole ones, as their prompt is computed once.
        size = samples.group_size
        lengths = (samples.prompt_mask.sum(1) + samples.mask.sum(1)).cpu()
        groups = lengths.view(-1, size).amax(1).argsort(stable=True)
        order = (groups[:, None] * size + torch.arange(size)).flatten()
        whole = self.batch_size - self.batch_size % size
        parts = []
        for index in order.split(whole or self.batch_size):
            part = samples.select(index).to(device)
            parts.append(
                completion_logprobs(
                    self.model,
                    part.prompt_ids,
                    part.prompt_mask,
                    part.completion_ids,
                    part.mask,
                    temperature=temperature,
                    group_size=part.group_size,
                ).logprobs
            )
        back = order.argsort().to(device)
        return torch.cat(parts)[back].to(samples.mask.device)


@dataclass
class RewardModel:
    """A frozen sequence classifier that scores prompt and completion with one number.

    A reward function: use it as the ``fn`` of a reward term.

    Args:
        path: Folder or hub name of a model that ``AutoModelForSequenceClassification`` loads.
        device: ``cuda:1``, ``cuda:+1``, ``policy`` or ``cpu``; ``None`` is the module's
            ``frozen_device``.
        dtype: Type of the weights.
        batch_size: Sequences per forward pass.
        label: Which output is the score; needed if the model has more than one.
        separator: Text between prompt and completion.
        prompt_column: Column of the data with the prompt text.
    """

    path: str
    device: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 16
    label: int | None = None
    separator: str = " "
    prompt_column: str = "prompt"
    model: Any = field(default=None, init=False, repr=False)
    tokenizer: Any = field(default=None, init=False, repr=False)
    fingerprint: str | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"a reward model's batch_size must be >= 1, got {self.batch_size}")

    def load(self, device: torch.device) -> None:
        """Load weights and tokenizer.

        Raises:
            ValueError: If the model has several outputs and ``label`` does not choose one.
        """
        self.tokenizer = AutoTokenizer.from_pretrained(self.path, padding_side="right")
        model = AutoModelForSequenceClassification.from_pretrained(
            self.path, dtype=getattr(torch, self.dtype)
        )
        labels = model.config.num_labels
        if labels > 1 and self.label is None:
            raise ValueError(f"the reward model {self.path} has {labels} labels; set label to one")
        if self.label is not None and not 0 <= self.label < labels:
            raise ValueError(f"label {self.label} is not among the {labels} of {self.path}")
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model = freeze(model, device)
        self.fingerprint = fingerprint(self.model)

    def release(self) -> None:
        """Let the weights go."""
        self.model = self.tokenizer = None

    @torch.no_grad()
    def __call__(self, rows: list[dict], completions: list[str]) -> list[float]:
        """Score B completions behind their prompts.

        Raises:
            ValueError: If a row has no ``prompt_column`` or a text is longer than the model reads.
        """
        for row in rows:
            if not isinstance(row.get(self.prompt_column), str):
                raise ValueError(
                    f"the reward model {self.path} reads the text in column "
                    f"{self.prompt_column!r}; a row has {sorted(row)}"
                )
        texts = [
            f"{row[self.prompt_column]}{self.separator}{completion}"
            for row, completion in zip(rows, completions, strict=True)
        ]
        encoded = [self.tokenizer(text)["input_ids"] for text in texts]
        limit = getattr(self.model.config, "max_position_embeddings", None) or max(
            map(len, encoded)
        )
        for text, ids in zip(texts, encoded, strict=True):
            if len(ids) > limit:
                raise ValueError(
                    f"the reward model {self.path} reads {limit} tokens, a text has {len(ids)}: "
                    f"{text[:60]!r}...; lower max_new_tokens or data.max_prompt_tokens"
                )
        # Sorted by length: little padding. Without a pad token a batch holds one length only.
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        scores = [0.0] * len(encoded)
        while order:
            size = self.batch_size
            if self.tokenizer.pad_token_id is None:
                alike = [len(encoded[i]) == len(encoded[order[0]]) for i in order]
                size = min(size, sum(alike))
            chosen, order = order[:size], order[size:]
            for i, value in zip(chosen, self._score([encoded[i] for i in chosen]), strict=True):
                scores[i] = value
        return scores

    def _score(self, encoded: list[list[int]]) -> list[float]:
        length = max(map(len, encoded))
        pad_id = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad_id] * (length - len(row)) for row in encoded])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in encoded])
        device = next(self.model.parameters()).device
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        return logits[:, self.label or 0].float().tolist()


class FrozenModels:
    """The frozen models of a run, kept where Lightning does not look.

    Args:
        reference: The reference policy, if there is one.
        reward_models: Reward models by the setting that holds them.
        device: Device word of every model that names none itself.
    """

    def __init__(
        self,
        reference: ReferencePolicy | None,
        reward_models: dict[str, RewardModel],
        device: str = "cuda:1",
    ) -> None:
        self.reference = reference
        self.reward_models = reward_models
        self.device = device
        self.devices: dict[str, torch.device] = {}  # of the loaded models, by setting
        self.policy_device = torch.device("cpu")

    def apart(self, part: str) -> bool:
        """Whether a loaded model, its setting beginning with ``part``, has a device of its own."""
        places = [place for key, place in self.devices.items() if key.startswith(part)]
        return any(place != self.policy_device for place in places)

    def load(self, policy: PolicyConfig, device: torch.device, with_reference: bool) -> None:
        """Load every model onto the device that its setting names.

        Args:
            policy: The policy, for the reference.
            device: Where the policy is.
            with_reference: Evaluation needs none.

        Raises:
            ValueError: If a device is not there, before any weight is read.
        """
        places = {key: model.device for key, model in self.reward_models.items()}
        if self.reference is not None and with_reference:
            places["model.reference"] = self.reference.device
        devices = {
            key: resolve_device("model.frozen_device", self.device, device)
            if word is None
            else resolve_device(f"{key}.device", word, device)
            for key, word in places.items()
        }
        self.devices, self.policy_device = devices, device
        for key, model in self.reward_models.items():
            model.load(devices[key])
        if self.reference is not None and with_reference:
            self.reference.load(policy, devices["model.reference"])

    def release(self) -> None:
        """Let all weights go."""
        for model in self.reward_models.values():
            model.release()
        if self.reference is not None:
            self.reference.release()

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the models that are loaded, by setting."""
        models: dict[str, Any] = dict(self.reward_models)
        if self.reference is not None:
            models["model.reference"] = self.reference
        return {key: model.fingerprint for key, model in models.items() if model.model is not None}

    def check(self, saved: dict[str, str]) -> None:
        """Refuse models that are not the ones whose fingerprints were saved.

        Raises:
            ValueError: Naming the setting whose model has changed.
        """
        for key, mark in self.fingerprints().items():
            if saved.get(key, mark) != mark:
                raise ValueError(
                    f"{key}: the weights are not those that the checkpoint was made with; restore "
                    "them, or start a new run"
                )
