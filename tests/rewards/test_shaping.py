"""Running statistics and the shaping of raw rewards."""

import os

import pytest
import torch

from gspo_lightning.checkpoint.io import AtomicCheckpointIO
from gspo_lightning.checkpoint.rollout_checkpoint import RolloutCheckpoint, list_checkpoints
from gspo_lightning.data.prompts import PromptData
from gspo_lightning.rewards.terms import RewardTerm, RunningStatistics, score
from gspo_lightning.rewards.text_rewards import LengthBonus
from support.dummies import Stopper
from support.reward_functions import digits
from support.tiny_run import make_module, make_trainer, outputs_of, run, write_prompts


def values_of(*values):
    return lambda rows, texts: list(values)


def shaped(term, learn=True):
    """Total of one term over as many completions as its function gives values for."""
    size = len(term.fn([], []))
    return score({"x": term}, [{}] * size, [""] * size, learn=learn).total.tolist()


def test_statistics_of_batches_are_those_of_all_values_together():
    generator = torch.Generator().manual_seed(0)
    batches = [1e6 + torch.randn(n, generator=generator).double() for n in (1, 5, 3, 64)]
    seen = RunningStatistics()
    for batch in batches:
        seen.update(batch)
    together = torch.cat(batches)
    assert seen.count == 73
    assert seen.mean == pytest.approx(together.mean().item(), rel=1e-14)
    assert seen.std == pytest.approx(together.std(correction=0).item(), rel=1e-9)


def test_ranks_that_share_a_batch_get_the_statistics_of_the_whole():
    batch = torch.tensor([1.0, 2.0, float("nan"), 5.0, 9.0]).double()
    whole = RunningStatistics()
    whole.update(torch.tensor([3.0]))
    whole.update(batch)
    halves = (batch[:1], batch[1:])
    for own in halves:
        rank = RunningStatistics()
        rank.update(torch.tensor([3.0]))
        valid = batch[~batch.isnan()]
        sums = [
            torch.tensor([len(valid), valid.sum()]).double(),
            ((valid - valid.mean()) ** 2).sum(),
        ]
        rank.update(own, reduce=lambda x, sums=sums: sums.pop(0))
        assert rank.state_dict() == pytest.approx(whole.state_dict())


def test_nan_is_no_value_and_nothing_is_learnt_from_nothing():
    seen = RunningStatistics()
    seen.update(torch.tensor([float("nan")]))
    assert seen.state_dict() == {"count": 0, "mean": 0.0, "squares": 0.0}
    assert seen.whiten(torch.tensor([4.0])).tolist() == [4.0]


def test_state_is_plain_values_and_continues_exactly():
    first, second = RunningStatistics(), RunningStatistics()
    first.update(torch.tensor([0.1, 0.7, 0.3]))
    second.load_state_dict(first.state_dict())
    for seen in (first, second):
        seen.update(torch.tensor([0.9, 0.2]))
    assert first.state_dict() == second.state_dict()
    assert {type(value) for value in first.state_dict().values()} == {int, float}


def test_whitening_uses_the_values_of_the_rollout_itself_and_those_before():
    values = [1.0, 3.0]
    term = RewardTerm(lambda rows, texts: [*values], whiten=True)
    assert shaped(term) == pytest.approx([-1.0, 1.0], abs=1e-5)  # mean 2, std 1
    values[:] = 8.0, 8.0
    # all four: mean 5, squares 16 + 4 + 9 + 9 = 38, std sqrt(9.5)
    assert shaped(term) == pytest.approx([3 / 9.5**0.5] * 2, abs=1e-5)


def test_only_learning_changes_the_statistics():
    term = RewardTerm(values_of(1.0, 3.0), whiten=True)
    assert shaped(term, learn=False) == [1.0, 3.0]  # nothing was seen yet
    shaped(term)
    assert shaped(term, learn=False) == shaped(term, learn=False)
    assert term.statistics.count == 2
    plain = RewardTerm(values_of(1.0, 3.0))
    shaped(plain)
    assert plain.statistics.count == 0


def test_order_is_whiten_scale_clip_weight():
    term = RewardTerm(
        values_of(0.0, 10.0, 5.0), weight=10.0, whiten=True, scale=2.0, clip=(-1, 2.2)
    )
    # whitened +-1.2247 and 0, times 2, cut to [-1, 2.2], times 10
    assert shaped(term) == pytest.approx([-10.0, 22.0, 0.0], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [-3.0, 0.5, 3.0]),
        ({"scale": 2.0}, [-6.0, 1.0, 6.0]),
        ({"clip": (-1.0, 2.0)}, [-1.0, 0.5, 2.0]),
        ({"scale": 2.0, "clip": (-1.0, 2.0)}, [-1.0, 1.0, 2.0]),
        ({"scale": 2.0, "clip": (-1.0, 2.0), "weight": -1.0}, [1.0, -1.0, -2.0]),
    ],
)
def test_scale_and_clip(options, expected):
    assert shaped(RewardTerm(values_of(-3.0, 0.5, 3.0), **options)) == expected


def test_parts_stay_raw_and_missing_values_stay_missing():
    term = RewardTerm(values_of(None, 1.0, 5.0, 3.0), whiten=True, scale=2.0, clip=(-1.0, 1.0))
    scores = score({"x": term}, [{}] * 4, [""] * 4, learn=True)
    assert scores.parts["x"].tolist()[1:] == [1.0, 5.0, 3.0]
    assert scores.total.tolist()[1:] == pytest.approx([-1.0, 1.0, 0.0], abs=1e-5)
    assert scores.total[0].isnan() and scores.parts["x"][0].isnan()
    other = {"x": term, "y": RewardTerm(values_of(1.0, 1.0, 1.0, 1.0))}
    assert score(other, [{}] * 4, [""] * 4).total[0] == 1.0  # left out of the sum, as raw ones are


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": float("inf")}, "scale must be finite, got inf"),
        ({"weight": "2"}, "weight must be finite, got '2'"),
        ({"clip": 2.0}, r"clip must be \(low, high\), got 2.0"),
        ({"clip": (1.0, 1.0)}, "clip must be \\(low, high\\), low < high, got \\(1.0, 1.0\\)"),
        ({"clip": (1.0, float("nan"))}, "low < high"),
    ],
)
def test_a_bad_shaping_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        RewardTerm(digits, **options)


# --- in a run ------------------------------------------------------------------------------------


def test_a_run_logs_raw_values_and_learns_once_a_rollout(tmp_path, model_dir):
    term = RewardTerm(LengthBonus(4, "characters"), whiten=True, clip=(-0.5, 0.5))
    outputs = outputs_of(tmp_path, model_dir, num_rollouts=2, rewards={"long": term})
    raw = [o["rollout"].reward_parts["long"] for o in outputs]
    for i, output in enumerate(outputs):
        seen = torch.cat(raw[: i + 1]).double()
        assert output["metrics"]["reward/long"] == pytest.approx(raw[i].mean().item())
        whitened = (raw[i] - seen.mean()) / seen.std(correction=0)
        expected = whitened.clamp(-0.5, 0.5).float()
        torch.testing.assert_close(output["rollout"].rewards, expected, atol=1e-4, rtol=0)
    assert term.statistics.count == 32


def test_further_draws_for_flat_groups_do_not_teach_the_statistics(tmp_path, model_dir):
    term = RewardTerm(lambda rows, texts: [1.0] * len(texts), whiten=True)
    run(tmp_path, model_dir, rewards={"one": term}, drop_flat_groups=True, max_draws=3)
    assert term.statistics.state_dict() == {"count": 16, "mean": 1.0, "squares": 0.0}


def test_a_resumed_run_whitens_as_an_uninterrupted_one(tmp_path, model_dir):
    def train(name, checkpoint=None, stop=None):
        root = tmp_path / name
        root.mkdir(exist_ok=True)
        terms = {
            "a": RewardTerm(LengthBonus(6, "characters"), whiten=True, clip=(-1.0, 1.0)),
            "b": RewardTerm(digits),
        }
        os.environ["PL_GLOBAL_SEED"] = "0"
        module = make_module(model_dir, rewards=terms)
        callbacks = [RolloutCheckpoint(every_n_rollouts=1), *([Stopper(stop)] if stop else [])]
        trainer = make_trainer(
            root, callbacks=callbacks, enable_checkpointing=True, plugins=[AtomicCheckpointIO()]
        )
        path = write_prompts(root / "prompts.jsonl")
        data = PromptData(str(path), prompts_per_rollout=4, num_rollouts=4)
        trainer.fit(module, data, ckpt_path=checkpoint)
        return module, list_checkpoints(root)[-1]

    straight, end = train("straight")
    _, stopped = train("stopped", stop=2)
    saved = torch.load(stopped, weights_only=True)["gspo"]["whitening"]
    assert set(saved) == {"a"} and saved["a"]["count"] == 32
    resumed, again = train("stopped", checkpoint=stopped)
    statistics = resumed.rewards["a"].statistics
    assert statistics.count == 64
    assert statistics.state_dict() == straight.rewards["a"].statistics.state_dict()
    first, second = (torch.load(path, weights_only=True) for path in (end, again))
    assert first["gspo"] == second["gspo"]
    for name, tensor in first["state_dict"].items():
        assert torch.equal(tensor, second["state_dict"][name]), name


def test_whitening_and_zero_reward_for_truncated_completions_do_not_fit(tmp_path, model_dir):
    rewards = {"odd": RewardTerm(digits, whiten=True)}
    with pytest.raises(ValueError, match=r"zero_reward gives 0, .* 'odd' is whitened; use keep"):
        run(tmp_path, model_dir, rewards=rewards, truncated="zero_reward")
