"""FSDP2 as a strategy of Lightning's: a policy larger than one card.

Decides that all ranks share one policy, when it is cut, and that a checkpoint holds what one of DDP
holds, so that either continues the other, on any number of ranks.
"""

from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch.distributed.constants import default_pg_timeout
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from gspo_lightning.checkpoint.io import AtomicCheckpointIO, CheckpointError, seal_of
from gspo_lightning.checkpoint.parts import KEY, free_folder, tensors_of
from gspo_lightning.guards.out_of_memory import MICRO, REFERRED, SAMPLED
from gspo_lightning.sharding.cut import cut, part_of, try_ways, whole_state
from gspo_lightning.sharding.memory import LARGEST_FILE
from gspo_lightning.sharding.ranks import Sharded


class FSDP2(ModelParallelStrategy):
    """Every rank holds a part of the policy's weights, gradients and moments.

    Args:
        rollout: ``gathered`` keeps the whole policy on each card while completions are drawn and
            scored, in the type that it computes in: quick, but it must fit there once. ``in_step``
            gathers one layer after the other for every token, on all ranks at once: slow, for
            policies that do not fit.
        reshard_after_forward: Whether a layer's weights are let go between forward and backward;
            False saves sending them again, for memory.
        checkpoints: ``file`` writes one file, gathered on rank 0; ``parts`` a file of each rank, in
            a folder beside the checkpoint; ``auto`` is parts above 32 GiB of weights and moments.
            With parts an export is gathered on the disk, too, not in the memory of rank 0.
        cpu_offload: Keep weights, gradients and moments in host memory, and update there.
        timeout: How long a rank waits for the others, as of Lightning's other strategies; the
            option --rank_timeout of a command sets it for each of them.
        process_group_backend: ``nccl`` on GPUs and ``gloo`` on CPUs, unless said otherwise.
    """

    def __init__(
        self,
        rollout: Literal["gathered", "in_step"] = "gathered",
        reshard_after_forward: bool = True,
        checkpoints: Literal["auto", "file", "parts"] = "auto",
        cpu_offload: bool = False,
        timeout: timedelta = default_pg_timeout,
        process_group_backend: str | None = None,
    ) -> None:
        if rollout not in ("gathered", "in_step"):
            raise ValueError(f"FSDP2.rollout must be gathered or in_step, got {rollout!r}")
        if checkpoints not in ("auto", "file", "parts"):
            raise ValueError(f"FSDP2.checkpoints must be auto, file or parts, got {checkpoints!r}")
        if not timeout > timedelta(0):
            raise ValueError(f"FSDP2.timeout must be > 0, got {timeout}")
        super().__init__(
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.rollout = rollout
        self.reshard_after_forward = reshard_after_forward
        self.checkpoints = checkpoints
        self.cpu_offload = cpu_offload
        self.weights: Sharded | None = None
        self._apart = ExitStack()  # entered while an evaluation calls the policy

    # The policy is cut in `configure_model`, so a checkpoint can be restored when it is under DDP:
    # before callbacks and module begin to fit, which read what it holds.
    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True

    def setup_environment(self) -> None:
        """Make one group of all ranks; Lightning's own choice would be a policy per node."""
        self._check()
        module: Any = self.lightning_module
        if self.cpu_offload:
            self._process_group_backend = self._process_group_backend or "cpu:gloo,cuda:nccl"
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()
        module.frozen.mesh = self.device_mesh["data_parallel"]

    def _check(self) -> None:
        """Refuse what cannot be cut, before anything is loaded."""
        module: Any = self.lightning_module
        if not hasattr(module, "critic_config"):  # each rank would train all of it by itself
            raise ValueError(
                f"trainer.strategy fsdp2 shares out the policy of GSPOModule alone, not what "
                f"{type(module).__name__} trains; set trainer.strategy to auto or ddp"
            )
        if module.critic_config is not None:
            raise ValueError(
                "model.critic: fsdp2 shares out no critic; set trainer.strategy to ddp, or train "
                "without one (model.init_args.advantages: normalized)"
            )
        if module.policy_config.load_in_4bit:
            raise ValueError(
                "policy.load_in_4bit: weights of four bits cannot be cut into parts; leave it out, "
                "or set trainer.strategy to ddp"
            )
        if self.cpu_offload and self.root_device.type == "cpu":
            raise ValueError("FSDP2.cpu_offload: the policy is on the CPU already; leave it out")
        backend = self._process_group_backend
        if self.cpu_offload and backend is not None and "gloo" not in backend:
            raise ValueError(
                f"FSDP2.process_group_backend is {backend}, which adds up nothing in host memory, "
                "where FSDP2.cpu_offload has the gradients; leave it out, or set cpu:gloo,cuda:nccl"
            )

    def model_to_device(self) -> None:
        """Move what has not been cut: parts stay where they were put."""
        module: Any = self.lightning_module
        policy, module.policy = module.policy, None
        try:
            module.to(self.root_device)  # whole: the module's own device is set by it, too
        finally:
            module.policy = policy

    def share_out(self, policy: Any) -> None:
        """Leave this rank its part of a policy, and of a reference on the same device."""
        module: Any = self.lightning_module
        self.weights = Sharded(self.root_device)
        gathers = self.rollout == "gathered"
        self._cut(policy.model, gather=gathers, cpu_offload=self.cpu_offload)
        # A pass that ranks share cannot be done again by one of them.
        module.sizes.shared = () if gathers else (SAMPLED, MICRO)
        if (model := module.frozen.model_to_cut) is not None:
            self._cut(model, gather=False)
            module.sizes.shared += (REFERRED,)
        self.weights.large = self._in_parts()

    def _cut(self, model: Any, gather: bool, cpu_offload: bool = False) -> None:
        assert self.lightning_module is not None and self.weights is not None
        mixed = str(self.lightning_module.trainer.precision) == "bf16-mixed"
        computed = torch.bfloat16 if mixed else None
        mesh = self.device_mesh["data_parallel"]
        cut(model, mesh, computed, self.reshard_after_forward, cpu_offload)
        trained = any(p.requires_grad for p in model.parameters())
        try_ways(model, sampled=trained, gather=gather)
        self.weights.add(model, gather)

    def optimizer_step(self, optimizer: Optimizer, *arguments: Any, **options: Any) -> Any:
        """Take a step, unless a backward pass has left whole gradients, which no rank has shared.

        Raises:
            RuntimeError: If it has, as after a pass of an earlier step that ended half done.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if any(not isinstance(p, DTensor) for p in parameters):
            raise RuntimeError("fsdp2: weights are still gathered as the optimizer takes its step")
        return super().optimizer_step(optimizer, *arguments, **options)

    # --- evaluation ----------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """Gather the policy for a whole evaluation: ranks may have fewer batches than others."""
        assert self.weights is not None
        self._apart.enter_context(self.weights.apart())

    def on_validation_end(self) -> None:
        """Let the other parts go."""
        self._apart.close()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    # --- what ranks do together ----------------------------------------------------------------

    def _meet(self) -> None:
        if self.weights is not None:
            self.weights.meet()

    def reduce(self, *arguments: Any, **options: Any) -> Any:
        """Reduce over all ranks, once none of them calls the policy any more."""
        self._meet()
        return super().reduce(*arguments, **options)

    def all_gather(self, *arguments: Any, **options: Any) -> Any:
        """Gather from all ranks, once none of them calls the policy any more."""
        self._meet()
        return super().all_gather(*arguments, **options)

    def broadcast(self, *arguments: Any, **options: Any) -> Any:
        """Send from one rank, once none of them calls the policy any more."""
        self._meet()
        return super().broadcast(*arguments, **options)

    def barrier(self, *arguments: Any, **options: Any) -> None:
        """Wait for all ranks, and for their calls of the policy."""
        self._meet()
        super().barrier(*arguments, **options)

    # --- checkpoints ---------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What DDP would save, on rank 0; the others have the names alone."""
        self._apart.close()  # callbacks save at the end of a validation, before its last hook here
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict(keep_vars=True)
        return state if self._in_parts() else whole_state(state, wanted=self.global_rank == 0)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """What DDP would save: Lightning's own way numbers parameters in the model's order."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        # the entries are the optimizer's own
        state["state"] = {number: dict(entry) for number, entry in state["state"].items()}
        return state if self._in_parts() else whole_state(state, wanted=self.global_rank == 0)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write one file on rank 0, or before it a part of each rank.

        Raises:
            CheckpointError: On every rank, if any could not write its part.
        """
        path = Path(filepath)
        if self._in_parts():
            folder = Path(self.broadcast(free_folder(path)))
            checkpoint[KEY] = self._write_part(checkpoint, folder)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def _write_part(self, checkpoint: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Move this rank's tensors out of a checkpoint into a file; say what all have written."""
        parts: dict[str, Any] = {}
        here: dict[int, torch.Tensor] = {}  # tied weights are one tensor, and written once
        for name, (holder, key) in tensors_of(checkpoint).items():
            tensor: Any = holder[key]
            if isinstance(tensor, DTensor):
                parts[name] = here.setdefault(id(tensor), tensor.to_local().detach().cpu())
                # of no device, so that nobody takes it for the values
                holder[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            elif isinstance(tensor, torch.Tensor):
                holder[key] = tensor.detach()
        file = folder / f"rank{self.global_rank:05d}.pt"
        reason = None
        try:
            AtomicCheckpointIO().save_checkpoint(parts, file)
        except CheckpointError as error:
            reason = error
        if not self.reduce_boolean_decision(reason is None, all=True):
            raise reason or CheckpointError(f"checkpoint {folder} was not written: by another rank")
        seals = {}
        if self.is_global_zero:
            seals = {part.name: seal_of(part) for part in sorted(folder.glob("rank*.pt"))}
        return {"folder": folder.name, "files": seals, "tensors": list(parts)}

    def _in_parts(self) -> bool:
        if self.checkpoints != "auto":
            return self.checkpoints == "parts"
        assert self.lightning_module is not None
        parameters = list(self.lightning_module.parameters())
        trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
        return 3 * trained > LARGEST_FILE  # weights and two moments

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Read a checkpoint that any number of ranks, or DDP, wrote."""
        if isinstance(self.checkpoint_io, AtomicCheckpointIO):
            return self.checkpoint_io.load_checkpoint(checkpoint_path, whole=False)
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Take this rank's part of each weight."""
        module: Any = self.lightning_module
        own = dict(module.named_parameters(remove_duplicate=False))
        saved = checkpoint["state_dict"]
        parts = {name: part_of(value, own.get(name)) for name, value in saved.items()}
        module.load_state_dict(parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Take this rank's part of each moment."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [n for group in saved["param_groups"] for n in group["params"]]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            of = dict(zip(numbers, parameters, strict=True))
            state = {
                number: {name: part_of(value, of[number]) for name, value in entry.items()}
                for number, entry in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


StrategyRegistry.register("fsdp2", FSDP2, "A part of the policy on each rank", override=True)
