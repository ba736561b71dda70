"""Files in, batches out: order, limits, resume, and what is said of a broken row."""

import pytest
import torch

from gspo_lightning.data import PromptData, SFTData
from gspo_lightning.data.stream import ResumableStream, pad
from gspo_lightning.data.tables import extract, read_rows
from support.tiny_data import attach, write


@pytest.fixture
def prompts(tmp_path):
    """Ten prompts of 2 to 4 tokens, told apart by their column `n`."""
    rows = [{"prompt": "1" * (1 + n % 3) + "=", "n": n, "answer": "x"} for n in range(10)]
    return write(tmp_path / "prompts.jsonl", rows)


def numbers(batch):
    return [row["n"] for row in batch.rows]


def make_stream(**options):
    settings = {"batch_size": 4, "num_batches": 3, "seed": 0} | options
    return ResumableStream(list(range(10)), lambda examples: examples, **settings)


# --- order ---------------------------------------------------------------------------------------


def test_every_example_is_served_once_per_pass():
    stream = make_stream(batch_size=5)
    drawn = [x for _ in range(4) for x in stream.draw(5)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:] != list(range(10))


def test_a_batch_may_span_two_passes():
    stream = make_stream()
    drawn = [x for _ in range(5) for x in stream.draw(4)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))


def test_order_depends_on_the_seed_alone():
    assert make_stream().draw(10) == make_stream().draw(10)
    assert make_stream(seed=1).draw(10) != make_stream().draw(10)


def test_shuffle_off_keeps_the_order_of_the_file():
    stream = make_stream(shuffle=False)
    assert stream.draw(4) + stream.draw(4) + stream.draw(4) == [*range(10), 0, 1]


def test_a_loaded_position_continues_where_it_was_saved():
    straight = make_stream()
    batches = [straight.draw(4) for _ in range(5)]
    stopped = make_stream()
    stopped.draw(4), stopped.draw(4)
    resumed = make_stream()
    resumed.load_state_dict(stopped.state_dict())
    assert [resumed.draw(4) for _ in range(3)] == batches[2:]


def test_position_counts_a_batch_as_served_when_it_is_handed_out():
    # Lightning stops asking after len(loader) batches: code behind the last yield never runs
    stream = make_stream()
    for _ in zip(range(len(stream)), stream, strict=False):
        pass
    assert stream.state_dict()["served"] in (12, 16)
    batches = iter(stream)
    before = stream.served
    next(batches)
    assert stream.served == before + 4


def test_two_ranks_share_the_order_without_overlap():
    one = make_stream(batch_size=4)
    ranks = [make_stream(batch_size=2, rank=r, world_size=2) for r in range(2)]
    for _ in range(4):
        assert one.draw(4) == [x for stream in ranks for x in stream.draw(2)]


def test_ranks_that_need_different_numbers_share_the_order_without_overlap_or_gap():
    one = make_stream()
    ranks = [make_stream(rank=r, world_size=3) for r in range(3)]
    for counts in ([1, 3, 2], [0, 2, 0], [4, 0, 1]):
        shares = [stream.share(counts) for stream in ranks]
        assert [len(share or []) for share in shares] == counts
        assert [x for share in shares for x in share or []] == one.draw(sum(counts))
        assert {stream.served for stream in ranks} == {one.served}


def test_pad_sides():
    ids, mask = pad([[5], [6, 7]], "right")
    assert ids.tolist() == [[5, 0], [6, 7]] and mask.tolist() == [[True, False], [True, True]]
    assert pad([[5], [6, 7]], "left")[1].tolist() == [[False, True], [True, True]]


# --- prompts -------------------------------------------------------------------------------------


def test_prompts_are_left_padded_and_rows_travel_along(prompts, tokenizer):
    data = attach(PromptData(prompts, prompts_per_rollout=4), tokenizer)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    for ids, mask, row in zip(batch.prompt_ids, batch.prompt_mask, batch.rows, strict=True):
        assert tokenizer.decode(ids[mask].tolist()) == row["prompt"]
        assert mask.tolist() == sorted(mask.tolist())  # padding first
        assert row["answer"] == "x"


@pytest.mark.parametrize(("num_rollouts", "length"), [(None, 2), (7, 7)])
def test_length_of_a_run(prompts, tokenizer, num_rollouts, length):
    data = PromptData(prompts, prompts_per_rollout=4, num_rollouts=num_rollouts)
    attach(data, tokenizer).setup("fit")
    assert len(data.train_dataloader()) == data.num_rollouts == length
    assert data.longest_prompt == 4


def test_a_prompt_over_the_limit_is_an_error_that_names_it(prompts, tokenizer):
    data = attach(PromptData(prompts, max_prompt_tokens=3), tokenizer)
    with pytest.raises(ValueError, match=r"prompts.jsonl: row 3 has 4 tokens, above .*tokens 3"):
        data.setup("fit")


def test_prompts_over_the_limit_can_be_dropped_and_are_counted(prompts, tokenizer, caplog):
    data = PromptData(prompts, max_prompt_tokens=3, overlong_prompts="drop")
    with caplog.at_level("INFO"):
        attach(data, tokenizer).setup("fit")
    assert len(data.examples["path"]) == 7
    assert "dropped 3 of 10 prompts longer than 3 tokens" in caplog.text


def test_dropping_everything_is_an_error(prompts, tokenizer):
    data = PromptData(prompts, max_prompt_tokens=1, overlong_prompts="drop")
    with pytest.raises(ValueError, match="all 10 prompts are longer"):
        attach(data, tokenizer).setup("fit")


def test_prompt_column_by_name(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", [{"question": "1+1="}])
    data = attach(PromptData(path, prompt_column="question"), tokenizer)
    data.setup("fit")
    assert len(data.examples["path"]) == 1
    with pytest.raises(ValueError, match=r"row 1 has no column 'prompt'; it has \['question'\]"):
        attach(PromptData(path), tokenizer).setup("fit")


def test_chat_template_renders_messages_and_texts_alike(tmp_path, tokenizer):
    import copy

    chat = copy.deepcopy(tokenizer)
    sign = "{{ '*' if m.role == 'system' else '-' }}"
    chat.chat_template = "{% for m in messages %}" + sign + "{{ m.content }}{% endfor %}="
    rows = [{"prompt": "1+2"}, {"prompt": [{"role": "user", "content": "1+2"}]}]
    data = PromptData(write(tmp_path / "p.jsonl", rows), chat_template=True, system_prompt="7")
    attach(data, chat).setup("fit")
    rendered = [chat.decode(ids) for ids, _ in data.examples["path"]]
    assert rendered == ["*7-1+2="] * 2


def test_chat_template_that_is_not_there(prompts, tokenizer):
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        attach(PromptData(prompts, chat_template=True), tokenizer).setup("fit")


def test_messages_without_chat_template(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", [{"prompt": [{"role": "user", "content": "1"}]}])
    with pytest.raises(ValueError, match="row 1: column 'prompt' is a list, not a text"):
        attach(PromptData(path), tokenizer).setup("fit")


def test_an_empty_prompt_is_an_error(tmp_path, tokenizer):
    path = write(tmp_path / "p.jsonl", [{"prompt": "1"}, {"prompt": ""}])
    with pytest.raises(ValueError, match="row 2: the prompt is empty"):
        attach(PromptData(path), tokenizer).setup("fit")


def test_validation_serves_every_held_out_prompt_in_order(prompts, tokenizer):
    data = PromptData(prompts, val_path=prompts, val_batch_size=4)
    attach(data, tokenizer).setup("validate")
    assert [n for batch in data.val_dataloader() for n in numbers(batch)] == list(range(10))


SHARES = [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]


@pytest.mark.parametrize(("ranks", "expected"), [(3, SHARES), (11, [[*range(10)]] * 3)])
def test_ranks_share_held_out_prompts_out_unless_one_would_get_none(
    prompts, tokenizer, ranks, expected
):
    data = attach(PromptData(prompts, val_path=prompts, val_batch_size=2), tokenizer)
    data.setup("validate")
    data.trainer.world_size, served = ranks, []
    for data.trainer.global_rank in range(3):
        served.append([n for batch in data.val_dataloader() for n in numbers(batch)])
    assert served == expected


def test_without_held_out_prompts_validation_is_off_and_validate_is_refused(prompts, tokenizer):
    data = attach(PromptData(prompts), tokenizer)
    data.setup("fit")
    assert data.trainer.limit_val_batches == 0
    with pytest.raises(ValueError, match=r"set data.val_path"):
        attach(PromptData(prompts), tokenizer).setup("validate")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts_per_rollout": 0}, "data.prompts_per_rollout must be >= 1, got 0"),
        ({"num_rollouts": 0}, "data.num_rollouts must be >= 1"),
        ({"max_prompt_tokens": 0}, "data.max_prompt_tokens must be >= 1"),
        ({"val_batch_size": 0}, "data.val_batch_size must be >= 1"),
        ({"system_prompt": "be kind"}, "needs data.chat_template"),
        ({"val_path": "nowhere.jsonl"}, "data.val_path: there is no file nowhere.jsonl"),
        ({"extract": {"answer": "("}}, r"data.extract.answer '\(' is no regular expression"),
    ],
)
def test_prompt_data_names_the_bad_argument(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        PromptData(prompts, **options)


# --- parts of a column ---------------------------------------------------------------------------


def test_a_published_file_is_read_as_it_is(tmp_path, tokenizer):
    rows = [{"question": f"{n}+{n}=", "answer": f"2*{n}={2 * n}\n#### {2 * n} "} for n in (3, 4)]
    path = write(tmp_path / "published.jsonl", rows)
    data = PromptData(path, path, prompt_column="question", extract={"answer": "####(.+)"})
    attach(data, tokenizer).setup("fit")
    (batch,) = data.val_dataloader()
    assert batch.rows == [{"question": "3+3=", "answer": "6"}, {"question": "4+4=", "answer": "8"}]
    assert [row["answer"] for row in data.stream.draw(2).rows] in (["6", "8"], ["8", "6"])


def test_the_last_match_counts_and_a_group_is_not_needed():
    rows = [{"a": "x1 x2\nx3", "b": "y"}, {"a": "x4"}]
    assert [row["a"] for row in extract("k", "f", rows, {"a": r"x\d"})] == ["x3", "x4"]
    assert [row["a"] for row in extract("k", "f", rows, {"a": r"x(\d)"})] == ["3", "4"]
    assert extract("k", "f", rows, {}) == rows and rows[0]["a"] == "x1 x2\nx3"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"a": "3"},
            r"k: f: row 2: data.extract finds no '#\(\.\*\)' in column 'a', which ends in '3'",
        ),
        ({"a": "#  "}, "k: f: row 2: data.extract finds no .* mend the row or the pattern"),
        ({"a": 3}, "k: f: row 2: column 'a' is a int, not a text"),
        ({"b": "#3"}, "k: f: row 2 has no column 'a'"),
    ],
)
def test_a_row_in_which_nothing_is_found_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        extract("k", "f", [{"a": "#1"}, row], {"a": "#(.*)"})


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl has no rows"),
        ("a.jsonl", b"\n\n", "a.jsonl has no rows"),
        ("a.jsonl", b'{"prompt": "1"}\n{"prompt": \n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'["1"]\n', "a.jsonl:1: expected an object .* got a list"),
        ("a.jsonl", b"null\n", "a.jsonl:1: expected an object .* got null"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', "a.jsonl:1: not UTF-8"),
        ("a.csv", b"prompt\n1\n", "a.csv ends in .csv; expected .jsonl"),
        ("a.parquet", b"not parquet", "cannot read .*a.parquet"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"data.path: .*{message}"):
        read_rows("data.path", str(tmp_path / name))


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"data.path: there is no file gone.jsonl"):
        read_rows("data.path", "gone.jsonl")


def test_a_byte_order_mark_is_no_data(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "1"}\n')
    assert read_rows("data.path", str(tmp_path / "a.jsonl")) == [{"prompt": "1"}]


def test_parquet_and_dataset_folders_give_the_rows_of_json_lines(tmp_path, prompts):
    datasets = pytest.importorskip("datasets")
    rows = read_rows("data.path", prompts)
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(tmp_path / "p.parquet"))
    table.save_to_disk(str(tmp_path / "folder"))
    assert read_rows("data.path", str(tmp_path / "p.parquet")) == rows
    assert read_rows("data.path", str(tmp_path / "folder")) == rows


# --- demonstrations ------------------------------------------------------------------------------


def test_demonstrations_end_and_are_padded_on_the_outer_sides(tmp_path, tokenizer):
    rows = [{"prompt": "1=", "completion": "1"}, {"prompt": "1+1=", "completion": "answer: 2"}]
    data = SFTData(write(tmp_path / "d.jsonl", rows), batch_size=2, shuffle=False)
    attach(data, tokenizer).setup("fit")
    batch = next(iter(data.train_dataloader())).to("cpu", non_blocking=True)
    assert batch.prompt_mask.tolist() == [[False, False, True, True], [True] * 4]
    assert batch.mask.tolist() == [[True, True, False], [True] * 3]
    ends = batch.completion_ids[torch.arange(2), batch.mask.sum(1) - 1]
    assert ends.tolist() == [tokenizer.eos_token_id] * 2
    assert tokenizer.decode(batch.completion_ids[1][:2].tolist()) == "answer: 2"


def test_a_demonstration_over_the_limit_is_an_error(tmp_path, tokenizer):
    path = write(tmp_path / "d.jsonl", [{"prompt": "1=", "completion": "111"}])
    with pytest.raises(ValueError, match="row 1 has 2 prompt tokens and 6 in all"):
        attach(SFTData(path, max_tokens=5), tokenizer).setup("fit")


def test_a_demonstration_without_completion_is_named(tmp_path, tokenizer):
    path = write(tmp_path / "d.jsonl", [{"prompt": "1="}])
    with pytest.raises(ValueError, match="row 1 has no column 'completion'"):
        attach(SFTData(path), tokenizer).setup("fit")


def test_prompts_tokenised_together_are_those_tokenised_alone(monkeypatch, tokenizer):
    monkeypatch.setattr("gspo_lightning.data.prompts.AT_ONCE", 3)  # the last batch is a part
    texts = ["1+2=", "3=", "1" * 40, "7+9+4=", "5", "1+2=", "22=", "0+0="]
    data = PromptData(texts, max_prompt_tokens=20, overlong_prompts="drop", prompts_per_rollout=1)
    attach(data, tokenizer)
    kept = [text for text in texts if len(text) < 40]
    data.setup("fit")
    found = data.examples["path"]
    assert [ids for ids, _ in found] == [tokenizer(text)["input_ids"] for text in kept]
    assert [row["prompt"] for _, row in found] == kept and data.dropped["path"] == 1
