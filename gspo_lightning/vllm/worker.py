"""What a vLLM server does beside its own work: say what it serves, and take new weights.

Decides when a server has half of an update. vLLM imports this file into each of its workers
(``--worker-extension-cls``) and calls it by ``/collective_rpc``. It needs torch, safetensors and
vLLM alone: on a machine without the trainer a copy of this one file will do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Extension:
    """Methods that each worker of a server has, beside vLLM's own."""

    gspo_half = False  # whether an update has begun and has not ended
    gspo_group: Any = None
    gspo_device: Any = None
    model_runner: Any
    rank: int
    device: torch.device

    def gspo_describe(self, names: str) -> dict[str, Any]:
        """What is served: the given entries of the model's config, and whether it is whole."""
        text = self.model_runner.model_config.hf_text_config
        shape = {name: getattr(text, name, None) for name in names.split(",")}
        return {"half": self.gspo_half, "shape": shape}

    def gspo_load(self, folder: str) -> None:
        """Take the weights of a folder."""
        from safetensors import safe_open

        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:  # said before anything is overwritten
            raise FileNotFoundError(f"no weights in {folder} on the server's machine")

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for file in files:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - no dict
                        yield name, opened.get_tensor(name)

        with self._gspo_updating():
            self.model_runner.reload_weights(weights_iterator=tensors())

    def gspo_join(
        self, host: str, port: int, first: int, count: int, timeout: float, device: str
    ) -> None:
        """Join the trainer's group; this server's workers are the ranks from ``first`` on."""
        self.gspo_device = device if device == "cpu" else self.device
        store = dist.TCPStore(host, port, count, timeout=timedelta(seconds=timeout))
        self.gspo_group = own_group(store, first + self.rank, count, timeout, device)

    def gspo_receive(self, names: list[str], dtypes: list[str], shapes: list[list[int]]) -> None:
        """Take the weights that the trainer is about to send."""

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.gspo_device)
                self.gspo_group.broadcast([tensor], dist.BroadcastOptions()).wait()
                yield name, tensor

        with self._gspo_updating():
            self.model_runner.reload_weights(weights_iterator=tensors())

    @contextmanager
    def _gspo_updating(self) -> Iterator[None]:
        if self.gspo_half:
            raise RuntimeError("half of an earlier update is in this server; restart it")
        self.gspo_half = True  # and stays so, if the update fails
        yield
        self.gspo_half = False


def own_group(store: Any, rank: int, count: int, timeout: float, device: str) -> Any:
    """A group beside the default one, which vLLM and trainers have for themselves."""
    store, limit = dist.PrefixStore("gspo", store), timedelta(seconds=timeout)
    if device == "cpu":
        return dist.ProcessGroupGloo(store, rank, count, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(store, rank, count, options)
