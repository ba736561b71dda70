"""One of several real processes that share a mini-batch; see test_objectives.

A file of its own, so that a new process imports torch and the maths, not the tests and Lightning.
"""

import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

if "gspo_lightning" not in sys.modules:  # the package without the imports of its __init__
    package = ModuleType("gspo_lightning")
    package.__path__ = [str(Path(__file__).parents[2] / "gspo_lightning")]
    sys.modules["gspo_lightning"] = package

from gspo_lightning.objectives import Objective, policy_loss, token_weights


def loss_gradient(scale, batch, aggregation, reduce=None):
    """Gradient of the loss with respect to a parameter that all rows share, float64."""
    lp, old, advantages, mask = batch
    weights = token_weights(mask, aggregation, 5, reduce=reduce, dtype=torch.float64)
    objective = Objective("token", aggregation=aggregation)
    loss = policy_loss(scale * lp, old, advantages, mask, weights, objective).loss
    return torch.autograd.grad(loss, scale)[0]


def run_rank(rank: int, folder: str, aggregations: tuple[str, ...]) -> None:
    """Compute half of the rows; rank 0 saves the gradients summed over two ranks."""
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)

    def summed(tensor):
        dist.all_reduce(tensor)
        return tensor

    rows = slice(3 * rank, 3 * rank + 3)
    batch = [tensor[rows] for tensor in torch.load(f"{folder}/batch.pt", weights_only=True)]
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    result = {name: summed(loss_gradient(scale, batch, name, summed)) for name in aggregations}
    if rank == 0:
        torch.save(result, f"{folder}/gradients.pt")
    dist.destroy_process_group()
