"""Frozen models: the reference policy and reward models, on a device of their own.

Plain objects, not modules, so that Lightning never moves, converts, wraps, lists or saves them.
Only (B, T) log-probs and (B,) scores leave them. Decides what the device words mean.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gspo_lightning.bounds import check_at_least
from gspo_lightning.checkpoint.ranks import check_alike
from gspo_lightning.frozen.reward_model import RewardModel, freeze
from gspo_lightning.logprobs import samples_logprobs
from gspo_lightning.policy.folder import check_model_folder, check_model_path, reason
from gspo_lightning.policy.policy import LoRAPolicy, Policy, PolicyConfig, fingerprint
from gspo_lightning.policy.shards import compute_device
from gspo_lightning.rollout import Samples
from gspo_lightning.start.shipped import find_data


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
            f"device) or cpu, or add --config hardware/{fits}"
        )
    return torch.device("cuda", index)


@dataclass
class ReferencePolicy:
    """The policy as it was at the start, which the KL penalty holds on to.

    Args:
        path: Model folder or hub name; ``None`` is the policy's own start.
        device: ``cuda:1``, ``cuda:+1``, ``policy`` or ``cpu``.
        dtype: Type of the weights; ``None`` is the policy's, so that the KL starts at 0.
        batch_size: Sequences per forward pass.

    Attributes:
        shared: Whether the model is the policy's own with its adapters off. Such a reference must
            not compute while the policy does.
    """

    path: str | None = None
    device: str = "cuda:1"
    dtype: Literal["float32", "bfloat16"] | None = None
    batch_size: int = 32
    shared: bool = field(default=False, init=False, repr=False)
    model: Any = field(default=None, init=False, repr=False)
    fingerprint: str | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_at_least(1, "reference.", batch_size=self.batch_size)
        if self.path is not None:
            self.path = find_data(self.path)
            check_model_path("reference.path", self.path)

    def can_share(self, policy: PolicyConfig) -> bool:
        """Whether the policy with its adapters off, where it is, would be this very reference."""
        return policy.lora is not None and self.path is None and self.dtype in (None, policy.dtype)

    def share(self, policy: LoRAPolicy) -> None:
        """Take the policy's own weights, without a copy."""
        self.shared, self.model, self.fingerprint = True, policy.model, policy.start

    def load(self, policy: PolicyConfig, device: torch.device, mesh: Any = None) -> None:
        """Load the weights.

        Args:
            policy: What ``path: null`` and ``dtype: null`` stand for.
            device: From :func:`resolve_device`.
            mesh: See :meth:`PolicyConfig.load`.

        Raises:
            ValueError: If the policy starts from random weights, which no folder holds.
        """
        if self.path is None and policy.weights == "random":
            raise ValueError("reference.path: a policy with random weights is in no folder")
        policy.check_device("reference.device", device)
        key = "policy.path" if self.path is None else "reference.path"
        model = policy.load(key, AutoModelForCausalLM, self.path, self.dtype, mesh)
        self.model = freeze(model, device)
        self.fingerprint = fingerprint(self.model)

    def release(self) -> None:
        self.model, self.shared = None, False

    # no_grad, not inference_mode: the KL term saves these log-probs for its backward pass
    @torch.no_grad()
    def logprobs(
        self, samples: Samples, temperature: float, batch_size: int | None = None
    ) -> Tensor:
        """Log-probs of the completions under the reference.

        Args:
            samples: B completions, on any device.
            temperature: The sampling temperature.
            batch_size: Sequences per forward pass, where memory does not suffice for the setting.

        Returns:
            (B, T) float32 nats, on the device of ``samples``.
        """
        device = compute_device(self.model)
        # Groups sorted by length: little padding. Whole ones, as their prompt is computed once.
        size, batch_size = samples.group_size, batch_size or self.batch_size
        lengths = (samples.prompt_mask.sum(1) + samples.lengths).cpu()
        groups = lengths.view(-1, size).amax(1).argsort(stable=True)
        order = (groups[:, None] * size + torch.arange(size)).flatten()
        whole = batch_size - batch_size % size
        parts = []
        with self.model.disable_adapter() if self.shared else nullcontext():
            for index in order.split(whole or batch_size):
                part = samples.select(index).to(device)
                parts.append(samples_logprobs(self.model, part, temperature).logprobs)
        back = order.argsort().to(device)
        return torch.cat(parts)[back].to(samples.mask.device)


def check_reference(kl_coef: float, reference: ReferencePolicy | None) -> None:
    """Refuse a KL penalty that nothing is compared with."""
    if kl_coef > 0 and reference is None:
        raise ValueError(f"kl_coef is {kl_coef} but there is no reference; set model.reference")


@dataclass(eq=False)
class FrozenModels:
    """The frozen models of a run, kept where Lightning does not look.

    Args:
        reference: The reference policy, if there is one.
        reward_models: Reward models by the setting that holds them.
        device: Device word for all of them, whatever they say themselves; ``None`` leaves it to
            each.

    Attributes:
        mesh: Ranks that share out a reference on the policy's device among them; ``None`` if each
            has its own.
        model_to_cut: Such a reference, in host memory until that is done.
    """

    reference: ReferencePolicy | None
    reward_models: dict[str, RewardModel]
    device: str | None = None
    mesh: Any = None
    model_to_cut: Any = field(default=None, init=False, repr=False)
    awaits_policy: bool = False  # the reference is to be the policy with its adapters off
    devices: dict[str, torch.device] = field(default_factory=dict)  # of loaded models, by setting
    policy_device: torch.device = field(default=torch.device("cpu"))

    def apart(self, part: str) -> bool:
        """Whether a loaded model, its setting beginning with ``part``, has a device of its own."""
        places = [place for key, place in self.devices.items() if key.startswith(part)]
        return any(place != self.policy_device for place in places)

    def load(self, policy: PolicyConfig, device: torch.device, with_reference: bool) -> None:
        """Load every model onto the device that its setting names.

        Args:
            device: Where the policy is.
            with_reference: Evaluation needs none.

        Raises:
            ValueError: If a device is not there or a folder is broken, before any weight is read.
        """
        reference = self.reference if with_reference else None
        places = {key: model.device for key, model in self.reward_models.items()}
        if reference is not None:
            places["model.reference"] = reference.device
        devices = {
            key: resolve_device(f"{key}.device", word, device)
            if self.device is None
            else resolve_device("model.frozen_device", self.device, device)
            for key, word in places.items()
        }
        self.devices, self.policy_device = devices, device
        policy.check_device("trainer.accelerator", device)
        for key, model in self.reward_models.items():
            check_model_folder(f"{key}.path", model.path, model.trust_remote_code)
        if reference is not None and reference.path is not None:
            check_model_folder("reference.path", reference.path, policy.trust_remote_code)
        for key, model in self.reward_models.items():
            try:
                model.load(devices[key])
            except (OSError, ValueError) as error:
                raise ValueError(f"{key}: {reason(error)}") from error
        if reference is not None:
            place = devices["model.reference"]
            self.awaits_policy = place == device and reference.can_share(policy)
            if not self.awaits_policy:
                if self.mesh is not None and place == device:
                    reference.load(policy, torch.device("cpu"), self.mesh)
                    self.model_to_cut = reference.model
                else:
                    reference.load(policy, place)
        check_alike({f"content of {key}": mark for key, mark in self.fingerprints().items()})

    def share(self, policy: Policy) -> None:
        """Let the reference use a policy's weights, if :meth:`load` has left that to it."""
        if self.reference is not None and self.awaits_policy and isinstance(policy, LoRAPolicy):
            self.reference.share(policy)

    def release(self) -> None:
        for model in (*self.reward_models.values(), self.reference):
            if model is not None:
                model.release()
        self.model_to_cut = None

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the models that are loaded, by setting."""
        models: dict[str, Any] = dict(self.reward_models)
        if self.reference is not None:
            models["model.reference"] = self.reference
        return {key: model.fingerprint for key, model in models.items() if model.model is not None}
