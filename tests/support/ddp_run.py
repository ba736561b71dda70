"""Train the tiny run on two real ranks; started by test_ddp, one process per rank.

Writes what each rank ended with, for the test to compare.
"""

import copy
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from gspo_lightning.callbacks.files import AdaptiveKL
from gspo_lightning.data.prompts import PromptData
from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.kl import MultiplicativeKL
from gspo_lightning.optim import OptimizerConfig
from gspo_lightning.policy.lora import LoRAConfig
from gspo_lightning.policy.policy import PolicyConfig
from gspo_lightning.rewards.terms import RewardTerm
from support.reward_functions import digits
from support.tiny_run import make_module, make_trainer, write_prompts


class Record(Callback):
    """Keeps each rollout and, for the first optimizer step, the gradient."""

    def __init__(self):
        self.kept = {"metrics": [], "rollouts": [], "gradient": None}

    def on_train_start(self, trainer, module):
        state = module.policy.state_dict()
        self.kept["start"] = {k: copy.deepcopy(value) for k, value in state.items()}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.kept["gradient"] is None:
            grads = [p.grad.flatten() for p in module.policy.parameters() if p.requires_grad]
            self.kept["gradient"] = torch.cat(grads).clone()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.kept["metrics"].append(outputs["metrics"])
        rollout = outputs["rollout"]
        self.kept["rollouts"].append(
            {
                "mask": rollout.mask,
                "prompts": [row["prompt"] for row in rollout.rows],
                "completion_ids": rollout.completion_ids,
                "prompt_ids": rollout.prompt_ids,
                "prompt_mask": rollout.prompt_mask,
                "advantages": rollout.advantages,
                "kl_coef": module.kl_coef,
                "digits": rollout.reward_parts["digits"],
            }
        )


def main(root: Path, model_dir: str, lora: LoRAConfig | None) -> None:
    torch.set_num_threads(1)
    record = Record()
    kl = AdaptiveKL(MultiplicativeKL(target=1e-4), initial=0.1)
    module = make_module(
        model_dir,
        policy=PolicyConfig(model_dir, lora=lora),
        rewards={"digits": RewardTerm(digits, whiten=True)},
        num_minibatches=1,
        micro_batch_size=4,
        reference=ReferencePolicy(device="policy"),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        max_grad_norm=None,
    )
    data = PromptData(str(root / "prompts.jsonl"), prompts_per_rollout=2, num_rollouts=3)
    trainer = make_trainer(
        root,
        callbacks=[record, kl],
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    record.kept["whitening"] = module.rewards["digits"].statistics.state_dict()
    record.kept["weights"] = torch.cat([p.detach().flatten() for p in module.policy.parameters()])
    torch.save(record.kept, root / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    write_prompts(Path(sys.argv[1]) / "prompts.jsonl")
    main(Path(sys.argv[1]), sys.argv[2], LoRAConfig(rank=3) if "adapters" in sys.argv else None)
