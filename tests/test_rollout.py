"""The data that flows: shapes, cutting, completion masks and random streams."""

import dataclasses

import pytest
import torch

from gspo_lightning.rollout import PromptBatch, completion_mask, join_samples, stream_seed

PAD, EOS = 0, 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- completion mask


def test_mask_is_true_up_to_and_including_the_first_end():
    """Fact 22."""
    ids = torch.tensor([[5, EOS, 5, EOS, 5], [5, 5, 5, 5, 5]])
    mask, _ = completion_mask(ids, [EOS])
    assert mask.int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]


def test_every_end_id_ends_a_sequence():
    """Fact 22."""
    mask, finished = completion_mask(torch.tensor([[5, 8, 5], [5, 5, 9]]), [8, 9])
    assert mask.sum(1).tolist() == [2, 3]
    assert finished.tolist() == [True, True]


def test_padding_may_be_the_end_token():
    """Fact 23."""
    mask, finished = completion_mask(torch.tensor([[5, EOS, EOS, EOS]]), [EOS])
    assert mask.int().tolist() == [[1, 1, 0, 0]] and finished.item()


def test_padding_ids_inside_a_completion_count():
    """Fact 23: a sampled padding token is a token like any other."""
    mask, _ = completion_mask(torch.tensor([[5, PAD, 5, EOS]]), [EOS])
    assert mask.all()


def test_truncated_means_no_end_was_generated():
    """Fact 24: an end at the last position is finished, and so is an immediate one."""
    mask, finished = completion_mask(torch.tensor([[5, 5, 5], [5, 5, EOS], [EOS, 5, 5]]), [EOS])
    assert finished.tolist() == [False, True, True]
    assert mask.sum(1).tolist() == [3, 3, 1]


# ---- mini-batches


def test_minibatches_hold_every_row_exactly_once(make_rollout):
    """Fact 20."""
    for count in (1, 2, 3, 6):
        parts = make_rollout().minibatches(count, generator())
        numbers = [row["row"] for part in parts for row in part.rows]
        assert sorted(numbers) == list(range(6))
        assert [len(part) for part in parts] == [6 // count] * count


def test_minibatches_depend_on_the_generator_alone(make_rollout):
    """Fact 20: same seed, same order; among some seeds, more than one order."""

    def order(seed):
        indices = make_rollout().minibatch_indices(2, generator(seed))
        return tuple(torch.cat(indices).tolist())

    assert order(3) == order(3)
    assert len({order(seed) for seed in range(8)}) > 1


def test_groups_stay_together_in_a_minibatch(make_rollout):
    for part in make_rollout().minibatches(2, generator()):
        assert part.group_size == 3
        assert (part.prompt_ids == part.prompt_ids[:1]).all()


def test_every_quantity_travels_with_its_row(make_rollout):
    """Fact 20: stamp each field with the row number and look for it after the shuffle."""
    rollout = make_rollout()
    size, length = rollout.completion_ids.shape
    stamp = torch.arange(size)
    wide = stamp[:, None].expand(size, length)
    rollout = dataclasses.replace(
        rollout,
        prompt_ids=stamp[:, None].expand_as(rollout.prompt_ids),
        completion_ids=wide,
        mask=wide > 2,
        prompt_mask=stamp[:, None].expand_as(rollout.prompt_ids) > 2,
        finished=stamp > 2,
        texts=[str(row) for row in range(size)],
        rows=[{"row": row} for row in range(size)],
        old_logprobs=wide.float(),
        ref_logprobs=wide.float(),
        logprobs=wide.float(),
        rewards=stamp.float(),
        reward_parts={"a": stamp.float(), "b": stamp.float()},
        advantages=wide.float(),
    )
    part = rollout.select(torch.tensor([4, 1, 3]))
    rows = torch.tensor([4, 1, 3])
    assert part.texts == ["4", "1", "3"] and [row["row"] for row in part.rows] == [4, 1, 3]
    wide_fields = ("old_logprobs", "ref_logprobs", "advantages", "logprobs")
    for field in ("prompt_ids", "completion_ids", *wide_fields):
        assert (getattr(part, field) == rows[:, None]).all(), field
    for field in ("mask", "prompt_mask"):
        assert (getattr(part, field) == (rows > 2)[:, None]).all(), field
    assert (part.finished == (rows > 2)).all() and (part.rewards == rows).all()
    assert all((value == rows).all() for value in part.reward_parts.values())


def test_an_uneven_cut_is_refused(make_rollout):
    with pytest.raises(ValueError, match="num_minibatches must divide the 6 rows"):
        make_rollout().minibatches(4, generator())


@pytest.mark.parametrize(
    ("index", "group_size"),
    [
        ([0, 1, 2], 3),
        ([3, 4, 5, 0, 1, 2], 3),
        ([0, 1, 2, 0, 1, 2], 3),
        ([1, 2, 3], 1),
        ([0, 2, 1], 1),
        ([0, 1], 1),
        ([0, 1, 2, 3], 1),
        ([2, 3, 4, 0, 1, 5], 1),
    ],
)
def test_group_size_survives_whole_groups_only(make_rollout, index, group_size):
    assert make_rollout().select(torch.tensor(index)).group_size == group_size


def test_micro_batches_are_consecutive_rows(make_rollout):
    parts = make_rollout().micro_batches(4)
    assert [[row["row"] for row in part.rows] for part in parts] == [[0, 1, 2, 3], [4, 5]]
    assert [part.group_size for part in make_rollout().micro_batches(3)] == [3, 3]


def test_no_micro_batch_size_is_one_piece(make_rollout):
    rollout = make_rollout()
    (piece,) = rollout.micro_batches(None)
    assert torch.equal(piece.completion_ids, rollout.completion_ids)
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1, got 0"):
        rollout.micro_batches(0)


# ---- values


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_ids", torch.zeros(5, 4, dtype=torch.long)),
        ("prompt_mask", torch.ones(6, 4)),
        ("completion_ids", torch.zeros(6, dtype=torch.long)),
        ("mask", torch.ones(6, 4, dtype=torch.bool)),
        ("mask", torch.ones(6, 5)),
        ("finished", torch.ones(6, 1, dtype=torch.bool)),
        ("rows", []),
        ("texts", ["one"]),
        ("group_size", 4),
        ("old_logprobs", torch.zeros(5, 6)),
        ("ref_logprobs", torch.zeros(6)),
        ("logprobs", torch.zeros(6, 4)),
        ("logprobs", torch.zeros(6, 5, dtype=torch.float64)),
        ("rewards", torch.zeros(2, 3)),
        ("reward_parts", {"correct": torch.zeros(5)}),
        ("advantages", torch.zeros(6)),
    ],
)
def test_a_wrong_shape_names_its_field(make_rollout, field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(make_rollout(), **{field: value})


def test_a_prompt_batch_checks_its_rows():
    ids = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="rows must have one entry per prompt, 2, got 1"):
        PromptBatch(ids, ids == 0, [{}])
    with pytest.raises(ValueError, match="prompt_mask"):
        PromptBatch(ids, ids, [{}, {}])


def test_joined_samples_have_logprobs_where_all_parts_have_them(make_rollout):
    plain = make_rollout()
    short = dataclasses.replace(
        plain,
        completion_ids=plain.completion_ids[:, :2],
        mask=plain.mask[:, :2],
        old_logprobs=plain.old_logprobs[:, :2],
        ref_logprobs=None,
        advantages=plain.advantages[:, :2],
        logprobs=torch.full((6, 2), -1.0),
    )
    full = dataclasses.replace(plain, logprobs=torch.full((6, 5), -2.0))
    joined = join_samples([short, full]).logprobs
    assert joined[:6].tolist() == [[-1.0, -1.0, 0.0, 0.0, 0.0]] * 6
    assert (joined[6:] == -2).all()
    assert join_samples([short, plain]).logprobs is None


def test_a_rollout_cannot_be_assigned_into(make_rollout):
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_rollout().rewards = torch.zeros(6)


def test_to_moves_every_tensor(make_rollout):
    """The meta device stands in for another one."""
    rollout = dataclasses.replace(make_rollout(), logprobs=torch.zeros(6, 5))
    moved = rollout.to("meta", non_blocking=True)
    for field in dataclasses.fields(rollout):
        value = getattr(moved, field.name)
        if isinstance(value, torch.Tensor):
            assert value.device.type == "meta", field.name
    assert moved.reward_parts["correct"].device.type == "meta"
    assert moved.rows == rollout.rows and moved.texts == rollout.texts
    assert make_rollout(with_ref=False).to("meta").ref_logprobs is None
    ids = torch.zeros(2, 4, dtype=torch.long)
    assert PromptBatch(ids, ids == 0, [{}, {}]).to("meta").prompt_mask.device.type == "meta"


# ---- random streams


def test_each_part_of_a_stream_name_changes_the_seed():
    names = [(0, 0, 0, "a"), (1, 0, 0, "a"), (0, 1, 0, "a"), (0, 0, 1, "a"), (0, 0, 0, "b")]
    seeds = {stream_seed(*name) for name in names}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))  # torch takes all of them


def test_a_stream_seed_is_the_same_in_every_process():
    """``hash`` of a string is not; a resumed run draws from the streams of the first one."""
    assert stream_seed(1, 2, 3, "sample") == 7116932144563660211
