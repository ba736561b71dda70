"""One of two real ranks; the second has a fault and short memory of its own. See test_ddp_faults.

Runs the same training twice: with a NaN in the loss of rank 1, and with that step left out.
"""

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from gspo_lightning import logprobs
from gspo_lightning.data.prompts import PromptData
from support.fault_injection import NAN, every
from support.tiny_run import make_module, make_trainer


class Keep(Callback):
    def __init__(self):
        self.faults, self.sizes = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.faults.append(outputs["metrics"]["optim/faults"])
        checkpoint = {}
        module.on_save_checkpoint(checkpoint)
        self.sizes.append(checkpoint["gspo"]["sizes"]["now"])


def fit(root: Path, model_dir: str, inject: Callback) -> dict:
    keep, module = Keep(), make_module(model_dir, num_minibatches=2, micro_batch_size=4)
    data = PromptData(str(root / "prompts.jsonl"), prompts_per_rollout=4, num_rollouts=3)
    trainer = make_trainer(
        root,
        callbacks=[inject, keep],
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    weights = torch.cat([p.detach().flatten() for p in module.policy.parameters()])
    return {"weights": weights, "faults": keep.faults, "sizes": keep.sizes}


def short_memory() -> None:
    """Above two rows the first forward pass of the first update fails."""
    forward, failed = logprobs.completion_logprobs, []

    def tight(model, prompt_ids, *args, **options):
        if len(prompt_ids) > 2 and torch.is_grad_enabled() and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, prompt_ids, *args, **options)

    logprobs.completion_logprobs = tight


def main(root: Path, model_dir: str, rank: int) -> None:
    torch.set_num_threads(1)
    if rank == 1:
        short_memory()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        broken = fit(root, model_dir, every([(1, 1)] if rank == 1 else [], "loss", NAN))
    lines = [str(w.message) for w in said if "rollout" in str(w.message)]
    if rank == 1:
        short_memory()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        left_out = fit(root, model_dir, every([(1, 1)], "left out"))
    torch.save({"broken": broken, "left out": left_out, "lines": lines}, root / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
