"""Train a small PPO with dynamic sampling on two real ranks; started by test_critic_ddp.

Writes what each rank ended with, for the test to compare.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from gspo_lightning.critic.critic import CriticConfig
from gspo_lightning.data.prompts import PromptData
from gspo_lightning.objectives import Objective
from gspo_lightning.rewards.terms import RewardTerm
from support.reward_functions import even_prompts_teach
from support.tiny_run import make_module, make_trainer, write_prompts


class Record(Callback):
    """Keeps each rollout and, for the first optimizer step, the critic's gradient."""

    def __init__(self):
        self.kept = {"metrics": [], "rollouts": [], "prompts": [], "gradient": None}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.kept["gradient"] is None:
            self.kept["gradient"] = module.critic.head.weight.grad.clone()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        rollout = outputs["rollout"]
        self.kept["metrics"].append(outputs["metrics"])
        names = ("mask", "values", "returns", "advantages", "rewards")
        self.kept["rollouts"].append({name: getattr(rollout, name) for name in names})
        self.kept["prompts"].append([row["prompt"] for row in rollout.rows])


def main(root: Path, model_dir: str, backbone: str) -> None:
    torch.set_num_threads(1)
    record = Record()
    module = make_module(
        model_dir,
        rewards={"even": RewardTerm(even_prompts_teach)},
        objective=Objective("token", "clip", "token_mean", 0.2, 0.2),
        advantages="gae",
        critic=CriticConfig(backbone=backbone),
        num_minibatches=2,
        micro_batch_size=2,
        drop_flat_groups=True,
        max_draws=8,
        max_grad_norm=None,
    )
    data = PromptData(str(root / "prompts.jsonl"), prompts_per_rollout=3, num_rollouts=3)
    trainer = make_trainer(
        root,
        callbacks=[record],
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    record.kept["weights"] = torch.cat([p.detach().flatten() for p in module.parameters()])
    record.kept["served"] = data.stream.served
    torch.save(record.kept, root / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    write_prompts(Path(sys.argv[1]) / "prompts.jsonl")
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
