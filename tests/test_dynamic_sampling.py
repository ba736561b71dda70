"""Flat groups are replaced by other prompts: as many as are missing, and not for ever."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback

from gspo_lightning.collect import Collector
from gspo_lightning.rewards.terms import RewardTerm
from gspo_lightning.rollout import Samples
from gspo_lightning.run.plan import plan_lines
from support.observers import Outputs
from support.reward_functions import even_prompts_teach, ones
from support.steps import make_step, one_rank
from support.tiny_run import run

EVEN = {"even": RewardTerm(even_prompts_teach)}


class Draws:
    """A stand-in for a collector: prompts are numbers, and one below 50 makes a flat group."""

    def __init__(self, others=(), max_draws=4, group_size=2):
        self.max_draws, self.size = max_draws, group_size
        self.others = iter(others)  # what the other rank lacks, at each question
        self.asked, self.sampled = [], []
        self.step = make_step(ranks=one_rank(gather=self.gather))

    def gather(self, missing):
        return torch.stack([missing, torch.tensor(next(self.others, 0))])

    def draw(self, counts):
        self.asked.append(counts)
        return Batch(counts[0]) if counts[0] else None

    def sample(self, batch, step, draw):
        self.sampled.append(len(batch))
        numbers = self.answers.pop(0)
        assert len(numbers) == len(batch), "more or fewer prompts were sampled than are missing"
        return make_samples(numbers, self.size)

    def score(self, samples, step, draw):
        rewards = torch.tensor([float(r["n"] >= 50 and i % 2) for i, r in enumerate(samples.rows)])
        return rewards, {"part": rewards + 1}

    def run(self, first, *answers):
        self.answers = list(answers)
        samples = make_samples(first, self.size)
        scores = self.score(samples, self.step, 0)
        result = Collector.replace_flat_groups(self, samples, *scores, self.step)
        numbers = [row["n"] for row in result[0].rows][:: self.size]
        assert torch.equal(result[2]["part"], result[1] + 1)  # everything of a row went with it
        return numbers, self.step.tally.compute()["rollout/flat_groups_kept"]


class Batch:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def to(self, device):
        return self


def make_samples(numbers, size):
    rows = [{"n": n} for n in numbers for _ in range(size)]
    ids = torch.ones(len(rows), 1, dtype=torch.long)
    on = ids.bool()
    return Samples(ids, on, ids, on, on[:, 0], rows, [""] * len(rows), size)


def test_only_the_missing_groups_are_sampled():
    draws = Draws()
    numbers, kept = draws.run([60, 1, 61, 2, 3], [4, 62, 5], [63, 64])
    assert numbers == [60, 61, 62, 63, 64] and kept == 0
    assert draws.sampled == [3, 2]  # three were flat, then two still


def test_nothing_is_drawn_where_every_group_has_spread():
    draws = Draws()
    assert draws.run([60, 61]) == ([60, 61], 0)
    assert draws.asked == []


def test_groups_that_stay_flat_fill_what_is_missing_in_the_order_drawn():
    draws = Draws(max_draws=2)
    numbers, kept = draws.run([1, 60, 2, 3], [4, 5, 61], [6, 7])
    assert numbers == [1, 60, 2, 61] and kept == 2
    assert draws.sampled == [3, 2]


def test_a_rank_that_has_all_it_wants_samples_nothing_but_moves_on_in_the_data():
    draws = Draws(others=[2, 1, 0])
    assert draws.run([60, 61]) == ([60, 61], 0)
    assert draws.sampled == [] and draws.asked == [[0, 2], [0, 1]]


def test_a_rank_goes_on_while_it_alone_lacks_groups():
    draws = Draws(others=[3, 0, 0])
    numbers, _ = draws.run([60, 1], [2], [61])
    assert numbers == [60, 61] and draws.asked == [[1, 3], [1, 0]]


def test_the_number_of_prompts_drawn_is_what_was_sampled(tmp_path, model_dir):
    keep = Outputs()
    options = {"rewards": EVEN, "drop_flat_groups": True, "max_draws": 10}
    module = run(tmp_path, model_dir, 3, [keep], **options)
    drawn = [outputs["metrics"]["rollout/prompts_drawn"] for outputs in keep.all]
    assert module.trainer.datamodule.stream.served == sum(drawn) > 3 * 4
    assert all(outputs["metrics"]["rollout/flat_groups_kept"] == 0 for outputs in keep.all)


def test_max_draws_bounds_what_is_drawn(tmp_path, model_dir):
    def drawn(max_draws):
        keep = Outputs()
        options = {"rewards": {"one": RewardTerm(ones)}, "drop_flat_groups": True}
        with pytest.warns(UserWarning, match="raise model.max_draws"):
            run(tmp_path, model_dir, 1, [keep], max_draws=max_draws, **options)
        return keep.all[0]["metrics"]["rollout/prompts_drawn"]

    assert (drawn(1), drawn(3)) == (8, 16)


def test_that_the_cap_was_reached_is_said_once_and_with_the_way_out(tmp_path, model_dir):
    keep = Outputs()
    options = {"rewards": {"one": RewardTerm(ones)}, "drop_flat_groups": True, "max_draws": 1}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(tmp_path, model_dir, 3, [keep], **options)
    texts = [str(w.message) for w in said if "max_draws" in str(w.message)]
    assert len(texts) == 1
    assert "left 4 of a rollout's groups" in texts[0] and "group_size" in texts[0]
    assert all(outputs["metrics"]["rollout/flat_groups_kept"] == 4 for outputs in keep.all)
    assert keep.all[0]["metrics"]["rollout/flat_best_fraction"] == 1


@pytest.mark.parametrize(("drop", "tokens"), [(False, 96), (True, 96 * 4)])
def test_the_plan_counts_the_tokens_that_further_draws_may_take(tmp_path, model_dir, drop, tokens):
    lines = []

    class Plan(Callback):
        def on_train_start(self, trainer, module):
            lines.extend(plan_lines(trainer, module))

    run(tmp_path, model_dir, 1, [Plan()], drop_flat_groups=drop, max_draws=3)
    assert f"at most {tokens} tokens to sample" in lines[0]  # 4 prompts x 4 completions x 6 tokens


def test_without_dynamic_sampling_nothing_is_counted_or_said(tmp_path, model_dir):
    keep = Outputs()
    run(tmp_path, model_dir, 1, [keep], rewards={"one": RewardTerm(ones)})
    assert "rollout/flat_groups_kept" not in keep.all[0]["metrics"]


def test_truncated_completions_left_out_may_make_a_group_flat():
    draws = Draws(group_size=2)
    score = draws.score

    def masked(samples, step, draw):  # `truncated: mask` makes their rewards NaN
        rewards, parts = score(samples, step, draw)
        cut = torch.tensor([row["n"] == 60 for row in samples.rows])
        return rewards.masked_fill(cut, float("nan")), parts

    draws.score = masked
    draws.answers = [[61]]
    samples = make_samples([60, 62], 2)
    scores = masked(samples, draws.step, 0)
    chosen, rewards, _ = Collector.replace_flat_groups(draws, samples, *scores, draws.step)
    assert [row["n"] for row in chosen.rows] == [62, 62, 61, 61] and not rewards.isnan().any()
    assert chosen.group_size == 2
