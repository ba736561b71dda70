"""Preference pairs: read by column name, encoded as the reward model will read them, resumable."""

import pytest
import torch
from transformers import PretrainedConfig

from gspo_lightning.data.preferences import PreferenceData
from gspo_lightning.frozen.models import RewardModel
from support.tiny_data import attach, write

ROWS = [
    {"prompt": "1=", "chosen": "1", "rejected": "11"},
    {"prompt": "1+1=", "chosen": "1+1=2, answer: 2", "rejected": "answer: 2"},
    {"prompt": "2=", "chosen": "2", "rejected": "22"},
    {"prompt": "3=", "chosen": "3", "rejected": "33"},
    {"prompt": "4=", "chosen": "4", "rejected": "44"},
]


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.jsonl", ROWS)


def first_batch(data, tokenizer):
    attach(data, tokenizer).setup("fit")
    return next(iter(data.train_dataloader()))


def texts(batch, tokenizer):
    rows = zip(batch.ids, batch.mask, strict=True)
    return [tokenizer.decode(ids[mask].tolist()) for ids, mask in rows]


def test_chosen_texts_come_first_and_all_are_padded_on_the_right(pairs, tokenizer):
    data = PreferenceData(pairs, pairs, batch_size=2)
    attach(data, tokenizer).setup("fit")
    batch = next(iter(data.val_dataloader())).to("cpu", non_blocking=True)
    expected = ["1= 1", "1+1= 1+1=2, answer: 2", "1= 11", "1+1= answer: 2"]
    assert texts(batch, tokenizer) == expected
    assert batch.mask.sum(1).tolist() == [4, 13, 5, 7] and batch.mask[:, 0].all()
    assert not (batch.mask[:, 1:] & ~batch.mask[:, :-1]).any()  # no hole


@pytest.mark.parametrize("separator", [" ", "", "\n"])
def test_a_text_is_the_one_that_the_reward_model_scores(pairs, tokenizer, monkeypatch, separator):
    data = PreferenceData(pairs, pairs, batch_size=1, separator=separator)
    attach(data, tokenizer).setup("fit")
    scored = []
    model = RewardModel("x", separator=separator)
    model.tokenizer = tokenizer
    model.model = torch.nn.Module()
    model.model.config = PretrainedConfig()
    monkeypatch.setattr(model, "_score", lambda ids: scored.extend(ids) or [0.0] * len(ids))
    model(ROWS[1:2], [ROWS[1]["chosen"]])
    batch = list(data.val_dataloader())[1]
    assert batch.ids[0][batch.mask[0]].tolist() == scored[0]


def test_columns_go_by_name(tmp_path, tokenizer):
    rows = [{"q": "1=", "good": "1", "bad": "2", "prompt": "9=", "chosen": "x", "rejected": "y"}]
    data = PreferenceData(
        write(tmp_path / "p.jsonl", rows),
        batch_size=1,
        prompt_column="q",
        chosen_column="good",
        rejected_column="bad",
    )
    assert texts(first_batch(data, tokenizer), tokenizer) == ["1= 1", "1= 2"]


def test_the_stream_goes_on_where_it_was_saved(pairs, tokenizer):
    def stream():
        data = PreferenceData(pairs, batch_size=2, num_steps=4)
        attach(data, tokenizer).setup("fit")
        return data.train_dataloader()

    straight, stopped, resumed = stream(), stream(), stream()
    batches = iter(straight)
    expected = [next(batches).ids.tolist() for _ in range(4)]
    next(iter(stopped))
    resumed.load_state_dict(stopped.state_dict())
    batches = iter(resumed)
    assert [next(batches).ids.tolist() for _ in range(3)] == expected[1:]
    assert len(straight) == 4


def test_one_pass_is_the_default_length(pairs, tokenizer):
    data = PreferenceData(pairs, batch_size=2)
    attach(data, tokenizer).setup("fit")
    assert data.num_steps == len(data.train_dataloader()) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1=", "chosen": "1"}, "row 2 has no column 'rejected'; it has"),
        ({"chosen": "1", "rejected": "2"}, "row 2 has no column 'prompt'"),
        ({"prompt": "1=", "chosen": ["1"], "rejected": "2"}, "row 2: column 'chosen' is a list"),
        ({"prompt": "1=", "chosen": "1", "rejected": "1"}, "row 2: 'chosen' and 'rejected' are"),
        (
            {"prompt": "1=", "chosen": "1", "rejected": "1" * 9},
            "row 2: prompt and 'rejected' have 12 tokens; at least 1 and at most data.max_tokens 8",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, tokenizer, row, message):
    path = write(tmp_path / "p.jsonl", [ROWS[0], row])
    with pytest.raises(ValueError, match=message):
        attach(PreferenceData(path, max_tokens=8), tokenizer).setup("fit")


def test_a_missing_file_is_named_before_anything_is_read(pairs):
    with pytest.raises(ValueError, match="val_path: there is no file nowhere"):
        PreferenceData(pairs, val_path="nowhere.jsonl")


@pytest.mark.parametrize("name", ["batch_size", "num_steps", "max_tokens"])
def test_sizes_are_positive(pairs, name):
    with pytest.raises(ValueError, match=f"data.{name} must be >= 1, got 0"):
        PreferenceData(pairs, **{name: 0})


def test_validate_needs_heldout_pairs(pairs, tokenizer):
    with pytest.raises(ValueError, match=r"validate needs held-out pairs; set data.val_path"):
        attach(PreferenceData(pairs), tokenizer).setup("validate")


def test_a_fit_without_heldout_pairs_does_not_validate(pairs, tokenizer):
    data = attach(PreferenceData(pairs), tokenizer)
    data.setup("fit")
    assert data.trainer.limit_val_batches == 0 and data.val_dataloader() == []
