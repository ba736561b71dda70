"""What can be refused before a model is loaded, though Lightning would find it later or never."""

import math
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.environments import LightningEnvironment
from safetensors import safe_open

from gspo_lightning.checkpoint.io import read_without_tensors
from gspo_lightning.policy.folder import weight_files


def check_checkpoint(path: Path, module: Any) -> None:
    """Refuse a file that is no checkpoint of such a module; no tensor is read.

    ``module.checkpoint_key``, if there is one, names an entry that only its own checkpoints have.
    The ValueError names the file and the way out.
    """
    way_out = "give one that a run of this config wrote, or last"
    found = read_without_tensors("ckpt_path", path, way_out)
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


def check_options(config: Any) -> None:
    """Raise ValueError for options of a trainer that no run here can have."""
    if config.barebones:
        raise ValueError(
            "trainer.barebones leaves out curves, checkpoints and progress, which a run here has; "
            "set it to false (`--profile` shows where the time goes)"
        )
    if not isinstance(config.devices, list):
        return
    if config.accelerator == "cpu":
        raise ValueError(
            f"trainer.devices is {config.devices}: a CPU has no devices to choose from; give the "
            "number of processes"
        )
    if len({*config.devices}) < len(config.devices):
        raise ValueError(f"trainer.devices names a device twice, got {config.devices}")


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


def set_timeout(strategy: Any, seconds: float | None) -> None:
    """Let ranks wait for each other no longer than this; None leaves the strategy's own time."""
    if seconds is None:
        return
    if not 0 < seconds < math.inf:
        raise ValueError(f"rank_timeout must be above 0 seconds, got {seconds}")
    if hasattr(strategy, "_timeout"):  # a single device waits for nobody
        strategy._timeout = timedelta(seconds=seconds)


def say_whom_it_waits_for(trainer: Any) -> None:
    """Name the nodes that a run cannot begin without: each is started by itself."""
    strategy = trainer.strategy
    environment = getattr(strategy, "cluster_environment", None)
    if trainer.num_nodes < 2 or environment is None or environment.local_rank() > 0:
        return
    address, port = environment.main_address, environment.main_port
    node, nodes = environment.node_rank(), trainer.num_nodes
    others = ", ".join(str(other) for other in range(nodes) if other != node)
    text = f"node {node} of {nodes} waits at {address} port {port} for node {others}"
    if isinstance(environment, LightningEnvironment):  # others start the processes themselves
        text += (
            f" (trainer.num_nodes {nodes}): start the same command on each with MASTER_ADDR="
            f"{address} MASTER_PORT={port} NODE_RANK=0 to {nodes - 1}"
        )
        if "MASTER_ADDR" not in os.environ:
            text += "; MASTER_ADDR is not set here, so only this machine can reach it"
    print(text, file=sys.stderr, flush=True)  # on each node: `say` is for rank 0
