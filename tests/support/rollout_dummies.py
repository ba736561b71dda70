"""A module that hands callbacks the rollouts that GSPOModule hands them, in milliseconds."""

from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gspo_lightning.checkpoint.files import find_checkpoint
from gspo_lightning.checkpoint.io import AtomicCheckpointIO
from gspo_lightning.checkpoint.rollout_checkpoint import RolloutCheckpoint
from gspo_lightning.rollout import Rollout
from support.dummies import DummyData, DummyModule

P, G, L, T = 2, 3, 4, 5
B = P * G


class Words:
    """A tokenizer whose ids are letters: 1 is a, 2 is b."""

    def decode(self, ids):
        return "".join(chr(ord("a") + i - 1) for i in ids)


def make_rollout(index: int, reward_of_first: float = 0.0) -> Rollout:
    """B = 6 rows; prompt 0 is "abc" behind one pad, prompt 1 is "bcde"; row 2 never finished."""
    prompt_ids = torch.tensor([[9, 1, 2, 3], [2, 3, 4, 5]]).repeat_interleave(G, 0)
    prompt_mask = torch.tensor([[False, True, True, True], [True] * 4]).repeat_interleave(G, 0)
    lengths = torch.tensor([1, 2, 5, 3, 4, 5])
    rewards = torch.arange(B) / 10 + index
    rewards[0] = reward_of_first
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=torch.ones(B, T, dtype=torch.long),
        mask=torch.arange(T) < lengths[:, None],
        finished=torch.tensor([True, True, False, True, True, True]),
        rows=[{} for _ in range(B)],
        texts=[f"text {index}.{i}" for i in range(B)],
        group_size=G,
        old_logprobs=torch.zeros(B, T),
        ref_logprobs=None,
        rewards=rewards,
        reward_parts={"correct": rewards, "style": torch.full((B,), 0.25)},
        advantages=torch.arange(B)[:, None].expand(B, T) / 10,
    )


def make_outputs(index: int, **metrics: float) -> dict:
    rollout = make_rollout(index)
    values = {
        "train/reward": 0.5 + index / 100,
        "train/policy_loss": -0.001,
        "train/entropy_loss": 0.0,
        "train/relative_advantage": 0.0,
        "train/avg_response_length": 18.25,
        "train/clip_fraction_sequences": 0.125,
        "time/rollout": 0.411,
        "time/score": 0.012,
        "time/optimise": 1.25,
        "time/tokens_per_second": 1840.4,
    }
    return {
        "rollout": rollout,
        "index": index,
        "metrics": values | {name.replace("__", "/"): v for name, v in metrics.items()},
        "lengths": torch.tensor([1, 2, 5, 3, 4, 5]),
        "ratios": 1 + torch.arange(B) / 1000,
    }


class RolloutDummy(DummyModule):
    """As GSPOModule to its callbacks: outputs, phases, coefficient, export, accuracies."""

    def __init__(self, reference: bool = True, **options):
        super().__init__(**options)
        self.policy.tokenizer = Words()
        self.reference = SimpleNamespace(device="cpu") if reference else None
        self.sampler = SimpleNamespace(group_size=G, max_new_tokens=T)
        self.rewards = {"correct": SimpleNamespace(fn=len, weight=1.0)}
        self.num_epochs = 1
        self.num_minibatches = 2
        self.micro_batch_size = None
        self.micro_batch_tokens = None

    def training_step(self, batch, batch_idx: int):
        index = self.trainer.fit_loop.total_batch_idx
        for phase in ("rollout", "score"):
            self.phase(phase, index)
        metrics = {}
        if self.reference:
            metrics = {"train__kl_divergence": 0.006 * index, "train__kl_coef": self.kl_coef}
        self.phase("optimise", index)
        super().training_step(batch, batch_idx)
        return make_outputs(index, **metrics)

    def phase(self, name: str, index: int) -> None:
        bar = self.trainer.progress_bar_callback
        if hasattr(bar, "on_phase"):
            bar.on_phase(name, index)

    def validation_step(self, batch, batch_idx: int):
        done = self.trainer.fit_loop.total_batch_idx + 1
        for name, value in {"accuracy_greedy": 0.1 * done, "pass_at_4": 0.5, "reward": 1}.items():
            self.log(f"val/{name}", float(value), batch_size=2)

    def predict_step(self, batch, batch_idx: int):
        reward = float("nan") if batch_idx else 1.0
        completion = {"text": "7 € x", "reward": reward, "parts": {}, "length": 3, "finished": True}
        return [{"prompt": f"p{batch_idx}", "completions": [completion]}]

    def export(self, path) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        Path(path, "weight.txt").write_text(f"{self.policy.weight[0, 0].item():.9f}")


class RolloutData(DummyData):
    prompts_per_rollout = P
    longest_prompt = L


def make_trainer(folder, callbacks=(), **settings) -> Trainer:
    """A trainer as train.py makes one: TensorBoard in the run folder, atomic checkpoints."""
    settings = {
        "max_epochs": 1,
        "val_check_interval": 3,
        "default_root_dir": folder,
        "logger": TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
        "log_every_n_steps": 1,
        "plugins": [AtomicCheckpointIO()],
        "enable_model_summary": False,
        "accelerator": "cpu",
        "num_sanity_val_steps": -1,
        "callbacks": list(callbacks),
        "enable_progress_bar": any(type(c).__name__ == "RolloutProgress" for c in callbacks),
    } | settings
    return Trainer(**settings)


def fit(folder, callbacks=(), *, num_rollouts=6, ckpt=None, module=None, **settings):
    """Train the dummy in ``folder`` with a checkpoint after every rollout."""
    module = module or RolloutDummy()
    checkpoint = RolloutCheckpoint(every_n_rollouts=1, keep_last=99)
    trainer = make_trainer(folder, [*callbacks, checkpoint], **settings)
    path = find_checkpoint(folder, ckpt)
    trainer.fit(module, datamodule=RolloutData(num_rollouts), ckpt_path=path)
    return trainer, module


def events(folder, kind: str) -> dict:
    """TensorBoard events of one kind (scalars, images, tensors), by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    log.Reload()
    read = {"scalars": log.Scalars, "images": log.Images, "tensors": log.Tensors}[kind]
    return {tag: read(tag) for tag in log.Tags()[kind]}
