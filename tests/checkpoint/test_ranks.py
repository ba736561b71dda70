"""Ranks that differ on purpose: none trains, or all of them end alike."""

import os
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from gspo_lightning.callbacks import AdaptiveKL
from gspo_lightning.checkpoint import RolloutCheckpoint
from gspo_lightning.checkpoint.ranks import RanksDiffer, check_alike, differing
from gspo_lightning.data.prompts import PromptData
from gspo_lightning.evaluation import Evaluation
from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.kl import MultiplicativeKL
from gspo_lightning.rewards.terms import RewardTerm
from gspo_lightning.sharding import FSDP2
from support.forked import on_ranks
from support.tiny_models import build_model
from support.tiny_run import make_module, make_trainer, write_prompts

DDP = partial(DDPStrategy, process_group_backend="gloo")


def fit(root, model_dir, prompts, callbacks=(), data=None, strategy=DDP, **settings):
    """Train on this rank of two; the module as it ended."""
    torch.set_num_threads(1)
    module = make_module(model_dir, **settings)
    trainer = make_trainer(
        root,
        callbacks=[*callbacks],
        devices=2,
        strategy=strategy(),
        use_distributed_sampler=False,
        enable_checkpointing=any(isinstance(c, RolloutCheckpoint) for c in callbacks),
    )
    sizes = {"prompts_per_rollout": 2, "num_rollouts": 2} | (data or {})
    trainer.fit(module, PromptData(str(prompts), **sizes))
    return module


def refusal(*arguments, **settings):
    try:
        fit(*arguments, **settings)
    except RanksDiffer as error:
        return str(error)
    raise AssertionError("ranks that differ have trained")


class Command(Callback):
    """Knows what a command was told."""

    def __init__(self, checkpoint):
        self.checkpoint = checkpoint

    def flat_config(self):
        return {"trainer.max_epochs": 1}


def refused_ranks(rank, root, model_dir, other_model):
    """What each rank is told in one difference after the other, each before a step is taken."""
    prompts = [write_prompts(root / f"prompts{i}.jsonl", 10 + i) for i in range(2)]
    own, folder = [root / "own", root / "other"][rank], root / "run"
    told = [refusal(folder, model_dir, prompts[rank])]
    told.append(refusal(folder, model_dir, prompts[0], entropy_coef=0.1 * rank))
    os.environ["PL_GLOBAL_SEED"] = str(rank)
    told.append(refusal(folder, model_dir, prompts[0]))
    os.environ["PL_GLOBAL_SEED"] = "0"
    reference = ReferencePolicy(str([model_dir, other_model][rank]), device="cpu")
    told.append(refusal(folder, model_dir, prompts[0], reference=reference))
    told.append(refusal(own, model_dir, prompts[0], [RolloutCheckpoint()]))
    told.append(refusal(folder, model_dir, prompts[0], [Command([prompts[0], None][rank])]))
    # Paths may differ where the content does not, and so may sizes that memory decides.
    same = write_prompts(root / f"same{rank}.jsonl")
    fit(folder, model_dir, same, data={"num_rollouts": 1}, micro_batch_size=1 + rank)
    return told


@pytest.fixture(scope="module")
def refused(tmp_path_factory, model_dir):
    other = tmp_path_factory.mktemp("other")
    build_model("qwen3", seed=1).save_pretrained(other)
    root = tmp_path_factory.mktemp("ranks")
    first, second = on_ranks(refused_ranks, root, model_dir, other)
    for answer in (first, second):
        assert isinstance(answer, list), answer
    return root, first, second


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, 'content of data.path is "'),
        (1, "model.entropy_coef is 0.0 on rank 0 ("),
        (2, "seed_everything is 0 on rank 0 ("),
        (3, 'content of model.reference is "'),
        (5, 'ckpt_path is "prompts0.jsonl (crc32 '),
    ],
)
def test_ranks_that_differ_are_told_in_one_line_and_do_not_train(refused, number, text):
    _, first, second = refused
    assert first[number] == second[number]
    start = "the ranks differ, so none of them trains: "
    assert first[number].startswith(start + text) and "\n" not in first[number]


def test_the_way_out_fits_what_differs(refused):
    _, told, _ = refused
    assert told[0].endswith("start each of them with the same command, files and versions")
    assert told[5].endswith("must be one folder on a file system that all machines share")


def test_ranks_with_folders_of_their_own_are_refused(refused):
    root, first, second = refused
    assert "is seen by rank 0; name one on a file system that all" in first[4]
    assert "is not seen by rank 1; name one" in second[4]
    assert not (root / "other").exists()


def test_a_difference_names_all_ranks_of_a_value_and_their_machines():
    marks = [{"a": 1, "b": [0] * 40}, {"a": 1, "b": [0] * 39 + [1]}, {"b": [0] * 40}, {"a": 1}]
    lines = differing(marks, ["x", "x", "y", "z"])
    assert lines[0] == "a is 1 on ranks 0-1, 3 (x, z), null on rank 2 (y)"
    assert lines[1].count("[0, 0, 0") == 2 and "null on rank 3 (z)" in lines[1]


def test_one_rank_compares_nothing():
    check_alike({"seed": object()})


# ---- ranks that train unequally ------------------------------------------------------------------


class Uneven(Callback):
    """Keeps what must be the same on all ranks, and stops one of them alone."""

    def __init__(self, stop_after):
        self.metrics, self.stop_after = [], stop_after

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        kept = outputs["metrics"].items()
        self.metrics.append({k: v for k, v in kept if not k.startswith(("time/", "memory/"))})
        trainer.should_stop = trainer.global_rank == 1 and len(self.metrics) == self.stop_after


def uneven(rows, completions, **_):
    """Rank 1: flat groups first, so that it alone draws further prompts, then no rewards at all."""
    uneven.calls += 1
    if os.environ["RANK"] == "0":
        return [float(i % 4) for i in range(len(completions))]
    return [0.0 if uneven.calls < 3 else None] * len(completions)


uneven.calls = 0


def uneven_ranks(rank, root, model_dir):
    prompts = write_prompts(root / f"prompts{rank}.jsonl")
    held_out = write_prompts(root / f"held_out{rank}.jsonl", 5)  # two batches for rank 0, one for 1
    keep = Uneven(stop_after=2)
    kl = AdaptiveKL(MultiplicativeKL(target=1e-4), initial=0.1)
    module = fit(
        root / "run",
        model_dir,
        prompts,
        [keep, kl, RolloutCheckpoint(every_n_rollouts=1)],
        {"num_rollouts": 4, "val_path": str(held_out), "val_batch_size": 2},
        rewards={"uneven": RewardTerm(uneven, whiten=True)},
        micro_batch_size=[3, 1][rank],
        drop_flat_groups=True,
        max_draws=2,
        reference=ReferencePolicy(device="policy"),
        evaluation=Evaluation(correct="uneven", num_samples=2, ks=(1,)),
    )
    weights = torch.cat([p.detach().flatten() for p in module.policy.parameters()])
    return keep.metrics, weights.tolist(), uneven.calls


def halfway_ranks(rank, root, model_dir):
    """Rank 1 raises what Lightning takes for the end of the training."""

    class Halfway(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if rank == 1:
                raise StopIteration

    prompts = write_prompts(root / f"prompts{rank}.jsonl")
    fit(root / "run", model_dir, prompts, [Halfway(), RolloutCheckpoint()])


def ending_ranks(rank, root, model_dir):
    """Rank 1 is stopped alone, without a checkpoint that all would meet at; then it fails alone."""

    def fails(rows, completions):
        if rank == 1:
            raise KeyError("gold")
        return [0.0] * len(completions)

    prompts = write_prompts(root / f"prompts{rank}.jsonl")
    held_out = write_prompts(root / f"held_out{rank}.jsonl", 1)  # fewer than there are ranks
    data = {"num_rollouts": 3, "val_path": str(held_out)}
    stop = Uneven(stop_after=1)
    trainer = fit(root / "run", model_dir, prompts, [stop], data, strategy=FSDP2).trainer
    figures = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    told = [trainer.fit_loop.total_batch_idx + 1, figures]
    try:
        fit(root / "run", model_dir, prompts, rewards={"fails": RewardTerm(fails)}, strategy=FSDP2)
    except Exception as error:
        return [*told, str(error)]


@pytest.mark.slow
def test_ranks_of_which_one_is_stopped_or_fails_end_together(tmp_path, model_dir):
    first, second = on_ranks(ending_ranks, tmp_path, model_dir)
    assert first[:2] == second[:2] and first[0] == 1 and first[1]["val/response_length"] > 0
    assert "gold" in second[2] and "gloo" in first[2]


@pytest.mark.slow
def test_unequal_ranks_meet_in_every_collective_and_stop_together(tmp_path, model_dir):
    first, second = on_ranks(uneven_ranks, tmp_path, model_dir)
    assert first[0] == second[0] and len(first[0]) == 2
    assert first[1] == second[1]
    assert first[2] != second[2]  # one rank alone has drawn more
    assert os.listdir(tmp_path / "run/checkpoints")[-1:] != []


@pytest.mark.slow
def test_a_rank_whose_training_ends_alone_ends_all(tmp_path, model_dir):
    first, second = on_ranks(halfway_ranks, tmp_path, model_dir)
    assert "has ended the training of this rank alone" in str(second)
    assert "gloo" in str(first)
