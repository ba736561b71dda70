"""Callbacks of experiments: the record of a run, and experts that change."""

import json

import pytest
import torch

from gspo_lightning.checkpoint.rollout_checkpoint import RolloutCheckpoint, list_checkpoints
from gspo_lightning.compare.experiment import (
    ExpertShift,
    RunRecord,
    recorded,
    routers,
    share_changed,
)
from gspo_lightning.data.prompts import PromptData
from support.tiny_models import build_model, build_tokenizer
from support.tiny_run import make_module, make_trainer, write_prompts


@pytest.fixture(scope="module")
def moe_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("moe")
    build_model("qwen3_moe").save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def fit(root, model_dir, callbacks, num_rollouts, resume=None, **options):
    root.mkdir(exist_ok=True)
    path = str(write_prompts(root / "prompts.jsonl"))
    data = PromptData(path, path, prompts_per_rollout=4, num_rollouts=num_rollouts)
    trainer = make_trainer(root, callbacks=callbacks, enable_checkpointing=True, **options)
    trainer.fit(make_module(model_dir), data, ckpt_path=resume, weights_only=True)
    return trainer


def test_a_run_ends_with_its_share_of_completions_and_leaves_a_record(tmp_path, model_dir):
    record = RunRecord(completions=33)  # 16 a rollout: ends with the third
    fit(tmp_path, model_dir, [record, RolloutCheckpoint()], 9, val_check_interval=2)
    written = json.loads((tmp_path / "record.json").read_text())
    assert [r["completions"] for r in written["rollouts"]] == [16, 32, 48]
    assert [v["rollouts"] for v in written["validations"]] == [2, 3]
    assert written["trained"] == written["parameters"] > 0
    assert written["kl"] is False


def test_a_run_that_falls_short_of_its_share_leaves_none(tmp_path, model_dir):
    fit(tmp_path, model_dir, [RunRecord(completions=100), RolloutCheckpoint()], 2)
    assert not (tmp_path / "record.json").exists()


def test_a_continued_run_has_the_record_of_a_straight_one(tmp_path, moe_dir):
    def callbacks():
        return [ExpertShift(), RunRecord(64), RolloutCheckpoint(every_n_rollouts=1)]

    options = {"val_check_interval": 2}
    fit(tmp_path / "straight", moe_dir, callbacks(), 4, **options)
    fit(tmp_path / "stopped", moe_dir, callbacks(), 4, **options)
    (tmp_path / "stopped" / "record.json").unlink()
    after_two = next(p for p in list_checkpoints(tmp_path / "stopped") if "000002" in p.name)
    fit(tmp_path / "stopped", moe_dir, callbacks(), 4, resume=after_two, **options)

    def figures(name):
        rollouts = json.loads((tmp_path / name / "record.json").read_text())["rollouts"]
        measured = ("time/", "memory/")
        return [{k: v for k, v in r.items() if not k.startswith(measured)} for r in rollouts]

    assert figures("stopped") == figures("straight")
    assert all("moe/expert_change" in r for r in figures("straight")[1:])  # none before the first


# --- experts -------------------------------------------------------------------------------------


def test_the_share_is_of_choices_that_are_gone_whatever_their_order():
    before = [torch.tensor([[0, 3], [1, 2]]), torch.tensor([[0, 1], [0, 1]])]
    after = [torch.tensor([[3, 0], [1, 7]]), torch.tensor([[4, 5], [0, 1]])]
    assert share_changed(before, after) == 3 / 8


def test_every_router_is_read_and_reading_leaves_no_trace():
    model = build_model("qwen3_moe").eval()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad(), recorded(model) as choices:
        plain = model(ids).logits
    assert len(choices) == len(routers(model)) == 2
    assert all(c.shape == (3, 2) for c in choices)  # tokens, top k
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)
    assert len(choices) == 2


def test_experts_change_when_the_router_does(tmp_path, moe_dir):
    seen = []

    class Shake(RunRecord):
        """Turns the router's choices around behind the last step of the second rollout."""

        def on_before_optimizer_step(self, trainer, module, optimizer):
            if trainer.fit_loop.total_batch_idx == 1:
                seen.append(len(seen))
                if len(seen) == 2:  # between the second step's look and the end of the rollout
                    for router in routers(module.policy.model):
                        router.weight.data.neg_()

    fit(tmp_path, moe_dir, [ExpertShift(), Shake(32), RolloutCheckpoint()], 2)
    first, second = json.loads((tmp_path / "record.json").read_text())["rollouts"]
    assert "moe/expert_change" not in first
    # two of four experts are chosen, and negated logits choose the other two
    assert second["moe/expert_change_rollout"] > 0.9
    assert 0.4 < second["moe/expert_change"] < 0.6  # of two steps one changed all


def test_a_model_without_experts_is_refused(tmp_path, model_dir):
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no router"):
        fit(tmp_path, model_dir, [ExpertShift()], 1)
