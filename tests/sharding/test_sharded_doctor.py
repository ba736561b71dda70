"""The doctor on two ranks that each hold a part of the policy."""

import copy
from dataclasses import asdict
from functools import partial

import pytest
import torch

from gspo_lightning.data.prompts import PromptData
from gspo_lightning.doctor.examine import set_up_and_examine
from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.rewards.terms import RewardTerm
from gspo_lightning.run.command import CommandTrainer
from gspo_lightning.sharding import FSDP2, whole_state
from support.forked import on_ranks
from support.tiny_run import make_module, write_prompts

STRATEGIES = {
    "fsdp2": FSDP2,
    "in step": partial(FSDP2, rollout="in_step"),
}


def examined(rank, root, model_dir, strategy):
    """What a rank of two has found, and whether its weights are those from before."""
    torch.set_num_threads(1)

    def fails_on_rank_1(rows, completions):
        if rank == 1 and strategy == "in step":
            raise KeyError("gold")
        return [len(text) * 0.1 for text in completions]

    module = make_module(
        model_dir,
        reference=ReferencePolicy(device="policy"),
        rewards={"length": RewardTerm(fails_on_rank_1)},
        micro_batch_size=1 + rank,  # ranks must make as many passes all the same
    )
    options = {"accelerator": "cpu", "devices": 2, "use_distributed_sampler": False}
    options |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = CommandTrainer(
        default_root_dir=root, strategy=STRATEGIES[strategy](), max_epochs=1, **options
    )
    before = []

    def show(found):
        if not before and module.policy is not None:  # something is found before it is loaded
            before.append(copy.deepcopy(state(module)))

    data = PromptData(str(root / "prompts.jsonl"), prompts_per_rollout=2, num_rollouts=2)
    found = set_up_and_examine(trainer, module, data, num_prompts=2, show=show)
    after = state(module)
    same = [name for name, value in after.items() if torch.equal(value, before[0][name])]
    return [asdict(finding) for finding in found], len(same) == len(after) > 0


def state(module):
    return {n: whole_state(p.detach(), wanted=True) for n, p in module.policy.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_examine_together_and_the_first_one_speaks(tmp_path, model_dir, strategy):
    write_prompts(tmp_path / "prompts.jsonl")
    answers = on_ranks(examined, tmp_path, model_dir, strategy, seconds=60)
    assert all(isinstance(answer, tuple | list) for answer in answers), answers
    (first, kept), (second, also_kept) = answers
    assert kept and also_kept
    assert first == second
    found = {finding["check"]: finding for finding in first}
    assert found["ratio"]["value"] == {"largest_difference_from_1": 0, "clip_fraction": 0}
    assert found["gradient"]["status"] == found["kl"]["status"] == "ok"
    assert 0 < found["gradient"]["value"]["differences"][1] < 1e-4
    assert found["clipping"]["value"]["log_s_std"] > 0
    errors = [f["text"] for f in first if f["status"] == "error"]
    if strategy == "in step":
        assert len(errors) == 1 and errors[0].startswith("rank 1: ") and "gold" in errors[0]
    else:
        assert errors == []
