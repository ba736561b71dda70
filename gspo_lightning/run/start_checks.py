"""What can be refused before a model is loaded, though Lightning would find it later or never."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open

from gspo_lightning.policy.folder import weight_files


def check_checkpoint(path: Path, module: Any) -> None:
    """Refuse a file that is no checkpoint of such a module; no tensor is read.

    ``module.checkpoint_key``, if there is one, names an entry that only its own checkpoints have.
    The ValueError names the file and the way out.
    """
    way_out = "give one that a run of this config wrote, or last"
    try:
        found = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"ckpt_path: {path} holds more than plain values and tensors, such as code, so it is "
            f"not loaded; {way_out}"
        ) from error
    except Exception as error:  # any, from a file that is made to break its reader
        line = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"ckpt_path: cannot read {path}: {line}; {way_out}") from error
    whole = isinstance(found, dict) and {"state_dict", "loops"} <= found.keys()
    if not whole or not all(isinstance(found[key], dict) for key in ("state_dict", "loops")):
        raise ValueError(f"ckpt_path: {path} is no checkpoint of a training run; {way_out}")
    for name, value in found["state_dict"].items():
        if not isinstance(value, torch.Tensor) and not str(name).endswith("_extra_state"):
            raise ValueError(f"ckpt_path: {path}: {name} of its weights is no tensor; {way_out}")
    key = getattr(module, "checkpoint_key", None)
    if key is not None and key not in found:
        raise ValueError(
            f"ckpt_path: {path} is no checkpoint of {type(module).__name__}; {way_out}. To start "
            "from a model that was exported, set model.init_args.policy.path"
        )
    config = getattr(module, "policy_config", None)
    if config is not None and config.weights == "pretrained":
        check_shapes(path, found["state_dict"], config.path)


def check_shapes(path: Path, saved: dict[str, Any], folder: str) -> None:
    """Refuse a checkpoint whose policy has other shapes than the folder it is to be loaded over."""
    if not Path(folder).is_dir():
        return  # a name on the hub: compared when the weights are there
    for file in weight_files("policy.path", Path(folder)):
        if file.suffix != ".safetensors":
            continue
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                tensor = saved.get(f"policy.model.{name}")
                here = tuple(tensors.get_slice(name).get_shape())
                if tensor is not None and tuple(tensor.shape) != here:
                    raise ValueError(
                        f"ckpt_path: {path} is of another model: {name} has the shape "
                        f"{tuple(tensor.shape)}, in {folder} {here}; set "
                        "model.init_args.policy.path to the model it was made with"
                    )


def check_interval(trainer: Any) -> None:
    """Raise ValueError for a validation that would never come; Lightning loads the model first."""
    interval = trainer.val_check_interval
    batches = getattr(getattr(trainer, "datamodule", None), "stream", None)
    counted = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches != 0
    if counted and batches is not None and isinstance(interval, int) and interval > len(batches):
        raise ValueError(
            f"trainer.val_check_interval is {interval}, the run has {len(batches)} batches; lower "
            "it, or set trainer.check_val_every_n_epoch to null"
        )


def check_trainer(config: Any) -> None:
    """Raise ValueError for strategies and precisions that would train wrongly."""
    strategy = config.strategy
    name = strategy if isinstance(strategy, str) else strategy.class_path.rpartition(".")[2]
    if name.startswith(("fsdp", "deepspeed", "FSDP", "DeepSpeed", "ModelParallel")):
        # FSDP and DeepSpeed allow one backward pass per batch, and a rollout has many.
        raise ValueError(
            f"trainer.strategy {name}: the policy must fit on one device here; use auto or ddp"
        )
    if isinstance(config.devices, list) and config.accelerator == "cpu":
        raise ValueError(
            f"trainer.devices is {config.devices}: a CPU has no devices to choose from; give the "
            "number of processes"
        )
    if isinstance(config.devices, list) and len({*config.devices}) < len(config.devices):
        raise ValueError(f"trainer.devices names a device twice, got {config.devices}")
    precision = str(config.precision)
    if precision in ("16-mixed", "16"):
        raise ValueError(
            "trainer.precision 16-mixed: its loss scaling skips optimizer steps silently; use "
            "bf16-mixed or 32-true"
        )
    if precision.endswith("-true") and precision not in ("32-true", "64-true"):
        raise ValueError(
            f"trainer.precision {precision}: the dtype of the weights is the policy's own setting; "
            "set model.init_args.policy.dtype instead"
        )


def check_seed(seed: Any) -> None:
    """Raise ValueError for a seed that numpy does not take."""
    if isinstance(seed, int) and not 0 <= seed < 2**32:
        raise ValueError(f"seed_everything must be >= 0 and below 2**32, got {seed}")


def check_length(config: Any) -> None:
    """Raise ValueError for a training that would end, without an error, before its first batch."""
    for name in ("limit_train_batches", "max_steps", "max_epochs"):
        value = getattr(config, name)
        if value == 0:
            what = f"trainer.{name} is {value}, which trains nothing"
            raise ValueError(f"{what}; leave it out, or run validate")


def check_manual(config: Any) -> None:
    """Raise ValueError for trainer options whose work the module does itself."""
    if config.gradient_clip_val is not None or config.gradient_clip_algorithm is not None:
        raise ValueError(
            "trainer.gradient_clip_val: the module clips; set model.init_args.max_grad_norm instead"
        )
    if config.accumulate_grad_batches not in (None, 1):
        raise ValueError(
            "trainer.accumulate_grad_batches: the module splits its mini-batches itself; set "
            "model.init_args.micro_batch_size instead"
        )
