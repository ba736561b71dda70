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

from gspo_lightning.advantages import SCALED
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


@dataclass(frozen=True)
class ReferenceSync:
    """How a reference follows the policy: ref = mixup * policy + (1 - mixup) * ref.

    Args:
        mixup: Share of the policy's weights, in (0, 1].
        every: Optimizer steps between two moves.

    Raises:
        ValueError: If a value is out of range.

    Source:
        TR-DPO, arXiv:2404.09656, section 3 (soft and hard update).
    """

    mixup: float = 0.6
    every: int = 512

    def __post_init__(self) -> None:
        check_at_least(1, "reference.sync.", every=self.every)
        if not 0 < self.mixup <= 1:
            raise ValueError(f"reference.sync.mixup must be in (0, 1], got {self.mixup}")


@dataclass
class ReferencePolicy:
    """The policy as it was at the start, which the KL penalty holds on to.

    Args:
        path: Model folder or hub name; ``None`` is the policy's own start.
        device: ``cuda:1``, ``cuda:+1``, ``policy`` or ``cpu``.
        dtype: Type of the weights; ``None`` is the policy's, so that the KL starts at 0.
        batch_size: Sequences per forward pass.
        sync: Lets the reference follow the policy; ``None`` keeps it as it is. Checkpoints then
            hold its weights, too.

    Attributes:
        shared: Whether the model is the policy's own with its adapters off. Such a reference must
            not compute while the policy does.
    """

    path: str | None = None
    device: str = "cuda:1"
    dtype: Literal["float32", "bfloat16"] | None = None
    batch_size: int = 32
    sync: ReferenceSync | None = None
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

    def check_follows(self, policy: Any) -> None:
        """Refuse to follow a model with other weights than the reference's own."""
        if self.sync is None:
            return
        own, other = (
            {name: tuple(p.shape) for name, p in model.named_parameters()}
            for model in (self.model, policy)
        )
        if own != other:
            name = sorted(n for n in own.keys() | other.keys() if own.get(n) != other.get(n))[0]
            raise ValueError(
                f"reference.sync: {self.path} cannot follow the policy, as {name} is of another "
                "shape or missing; set reference.path to null, or leave sync out"
            )

    @torch.no_grad()
    def follow(self, policy: Any, steps: int) -> None:
        """Move the weights towards those of the policy's model, if it is time for that.

        Args:
            policy: A model with the same parameters.
            steps: Optimizer steps that were taken.

        >>> from torch import nn
        >>> reference = ReferencePolicy(sync=ReferenceSync(mixup=0.6, every=2))
        >>> policy, reference.model = (
        ...     nn.ParameterList([torch.full((1,), value)]) for value in (1.0, 0.0))
        >>> for steps in (1, 2, 3, 4):
        ...     reference.follow(policy, steps)
        ...     print(steps, round(reference.model[0].item(), 2))
        1 0.0
        2 0.6
        3 0.6
        4 0.84
        """
        if self.sync is None or steps % self.sync.every:
            return
        source = dict(policy.named_parameters())
        for name, weight in self.model.named_parameters():
            wide = torch.promote_types(weight.dtype, torch.float32)
            there = source[name].detach().to(weight.device, wide)
            weight.copy_(weight.to(wide).lerp(there, self.sync.mixup))

    def state(self) -> dict[str, Tensor] | None:
        """The weights as they are, for a checkpoint, where they move."""
        if self.sync is None or self.model is None:
            return None
        return {
            name: weight.detach().cpu().clone() for name, weight in self.model.named_parameters()
        }

    def load_state(self, saved: dict[str, Tensor] | None) -> None:
        """Take weights back from :meth:`state`; one that keeps still has none."""
        if self.sync is not None and self.model is not None and saved is not None:
            with torch.no_grad():
                for name, weight in self.model.named_parameters():
                    weight.copy_(saved[name])

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


def check_reference(kl_coef: float, reference: ReferencePolicy | None, policy: Any) -> None:
    """Refuse a KL penalty that nothing is compared with, and a reference that cannot follow."""
    if kl_coef > 0 and reference is None:
        raise ValueError(f"kl_coef is {kl_coef} but there is no reference; set model.reference")
    if reference is not None and reference.sync is not None and policy.lora is not None:
        raise ValueError(
            "reference.sync with policy.lora: the reference is the policy without its adapters, "
            "which never moves; leave sync or lora out"
        )


def check_kl_in_reward(wanted: bool, advantages: str, critic: Any, reference: Any) -> None:
    """Refuse a KL penalty in the rewards that could not do what it says.

    Args:
        wanted: Whether it is asked for, without a critic.
        advantages: Their kind.
        critic: If there is one: it has a setting of its own.
        reference: If there is one.

    Raises:
        ValueError: Naming the settings and the way out.
    """
    if not wanted:
        return
    if critic is not None:
        raise ValueError(
            "model.kl_in_reward is for runs without a critic; set model.critic.kl_in_reward"
        )
    if reference is None:
        raise ValueError("model.kl_in_reward needs something to compare; set model.reference")
    if advantages in SCALED:
        raise ValueError(
            f"model.kl_in_reward with advantages {advantages}: in a group whose rewards are equal "
            "the penalty alone would be scaled up to the size of a reward; use relative, "
            "leave_one_out, opo or reinforce_plus_plus, or set kl_in_reward to false"
        )


def check_sync(reference: ReferencePolicy | None, cut: bool) -> None:
    """Refuse a reference that would follow a policy of which each rank has a part alone."""
    if cut and reference is not None and reference.sync is not None:
        raise ValueError(
            "reference.sync needs the whole policy on each rank; leave it out with fsdp2, or train "
            "with ddp or on one device"
        )


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
        check_sync(reference, self.mesh is not None)
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
