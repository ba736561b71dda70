"""What is taken as data: rows that a program has, splits, datasets of the hub, templates."""

import json
import socket

import datasets
import pytest

from gspo_lightning import PromptData
from gspo_lightning.data.sources import read_source
from gspo_lightning.data.template import with_prompts
from support.tiny_data import attach, write

ROWS = [{"prompt": "1=", "answer": "1"}, {"prompt": "1+1=", "answer": "2"}]
CONFIGS = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: train.jsonl}
  - {split: test, path: test.jsonl}
- config_name: other
  data_files:
  - {split: train, path: test.jsonl}
---
"""


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of a dataset of the hub, with two splits and two configurations."""
    folder = tmp_path_factory.mktemp("copied")
    (folder / "README.md").write_text(CONFIGS)
    for split, count in (("train", 5), ("test", 3)):
        write(folder / f"{split}.jsonl", [{"q": f"{split} {i}", "a": i} for i in range(count)])
    return str(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The datasets library keeps what it reads: here, not in the home of whoever tests."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def read(data, tokenizer, stage="fit"):
    attach(data, tokenizer).setup(stage)
    return data


@pytest.mark.parametrize(
    "given",
    [
        ROWS,
        tuple(ROWS),
        datasets.Dataset.from_list(ROWS),
    ],
    ids=["list", "tuple", "Dataset"],
)
def test_rows_in_memory_are_those_of_a_file(tmp_path, tokenizer, given):
    file = read(PromptData(write(tmp_path / "p.jsonl", ROWS), prompts_per_rollout=2), tokenizer)
    memory = read(PromptData(given, prompts_per_rollout=2), tokenizer)
    assert memory.examples == file.examples
    assert memory.fingerprints() == file.fingerprints()  # so a run may go on with either
    assert memory.hparams["path"] == f"a {type(given).__name__} of 2 rows in memory".replace(
        "tuple", "list"
    )
    other = [ROWS[0], ROWS[1] | {"answer": "3"}]
    assert read(PromptData(other), tokenizer).fingerprints() != file.fingerprints()


def test_texts_and_chats_of_a_list_are_prompts():
    chat = [{"role": "user", "content": "1+1="}]
    rows = read_source("data.path", ["1=", chat, {"question": "2="}], prompt_column="question")
    assert rows == [{"question": "1="}, {"question": chat}, {"question": "2="}]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (3, "data.path: expected a file, a folder, .* got int"),
        ({"prompt": ["1="]}, "expected a file, .* got dict"),
        ([], "data.path: a list of 0 rows in memory: there are no rows"),
        (["1=", 3], "row 2 of the list: expected a prompt .* or a mapping of columns, got int"),
        ([{"prompt": "1=", "f": [len]}], "column 'f' holds a builtin_function_or_method; a column"),
        ([{3: "1="}], "a column is named by a text, got 3"),
        ([{"id": 1}, {"id": 1}], "row 2 has the id 1 of row 1 again"),
        ([{"question": "1="}], r"row 1 has no column 'prompt'; .*or set data.prompt_template, or"),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "got IterableDataset; take"),
        ("data-of-mine", "there is no file data-of-mine .*hub is named like openai/gsm8k"),
    ],
)
def test_what_is_no_data_is_one_line(tokenizer, given, line):
    with pytest.raises(ValueError, match=line) as caught:
        read(PromptData(given), tokenizer)
    assert "\n" not in str(caught.value)


def test_a_split_and_a_configuration_are_found_by_name(copied, tokenizer):
    data = PromptData(copied, name="main", split="train[1:4]", val_split="test", prompt_column="q")
    read(data, tokenizer)
    rows = {key: [row for _, row in examples] for key, examples in data.examples.items()}
    assert rows["path"] == [{"q": f"train {i}", "a": i} for i in (1, 2, 3)]
    assert rows["val_path"] == [{"q": f"test {i}", "a": i} for i in range(3)]
    assert data.hparams["val_path"] is None and data.hparams["val_split"] == "test"
    # without held-out prompts those of training are predicted: of the same split
    data = PromptData(copied, name="other", split="train", prompt_column="q")
    assert len(read(data, tokenizer, "predict").examples["predict_path"]) == 3


@pytest.mark.parametrize("saved", [True, False], ids=["folder", "object"])
def test_the_splits_of_a_dataset_dict(tmp_path, tokenizer, saved):
    table = datasets.Dataset.from_list(ROWS)
    source = datasets.DatasetDict(train=table, dev=table.select([1]))
    if saved:
        source.save_to_disk(tmp_path / "saved")
        source = str(tmp_path / "saved")
    data = read(PromptData(source, split="train", val_split="dev"), tokenizer)
    assert [len(data.examples[key]) for key in ("path", "val_path")] == [2, 1]
    with pytest.raises(ValueError, match=r"several splits \['train', 'dev'\]; set data.split"):
        read(PromptData(source), tokenizer)
    with pytest.raises(ValueError, match=r"data.val_split: .* no split 'test'; it has \['train'"):
        read(PromptData(source, split="train", val_split="test"), tokenizer)
    one = datasets.DatasetDict(train=table)
    assert len(read(PromptData(one), tokenizer).examples["path"]) == 2


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"split": "dev"}, r"data.split: .* has no split 'dev'; it has \['train', 'test'\]"),
        ({"split": "train", "val_split": "dev"}, r"data.val_split: .* has no split 'dev'"),
        ({"name": "man"}, r"data.name: .* no configuration 'man'; it has \['main', 'other'\]"),
        ({"name": None}, r"several configurations; set data.name; it has \['main', 'other'\]"),
        ({}, r"holds several splits \['train', 'test'\]; set data.split"),
    ],
)
def test_what_a_dataset_lacks_names_the_key(copied, tokenizer, settings, line):
    with pytest.raises(ValueError, match=line) as caught:
        read(PromptData(copied, prompt_column="q", **{"name": "main"} | settings), tokenizer)
    assert "\n" not in str(caught.value)


def test_a_file_and_a_list_have_no_splits(tmp_path, tokenizer):
    for source in (write(tmp_path / "p.jsonl", ROWS), ROWS):
        with pytest.raises(ValueError, match=r"data.split: .* no splits; leave it out"):
            read(PromptData(source, split="train"), tokenizer)
    with pytest.raises(ValueError, match=r"data.name: .* no configurations; leave it out"):
        read(PromptData(str(tmp_path / "p.jsonl"), name="main"), tokenizer)


def test_a_name_on_the_hub_is_fetched(tokenizer, monkeypatch):
    asked = []

    def load(path, name, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    read(PromptData("openai/gsm8k", name="main", split="train", val_split="test"), tokenizer)
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]

    def fail(*_, **__):
        raise ConnectionError("Couldn't reach the hub.\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"openai/gsm8k is no file .*: Couldn't reach the hub; "):
        read(PromptData("openai/gsm8k"), tokenizer)


def test_offline_a_dataset_is_refused_at_once_unless_it_was_kept(cache, monkeypatch):
    def offline(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"data.path: openai/gsm8k is no file .*; go online, or "):
        PromptData("openai/gsm8k", name="main", split="train")
    (cache / "openai___gsm8k").mkdir()
    PromptData("openai/gsm8k", name="main", split="train")


# --- templates -----------------------------------------------------------------------------------


def test_a_template_makes_prompts_of_columns(tmp_path, tokenizer):
    path = write(tmp_path / "q.jsonl", [{"a": 1, "b": "2"}])
    data = read(PromptData(path, prompt_template="{a}+{b}="), tokenizer)
    assert data.examples["path"] == [
        (tokenizer("1+2=")["input_ids"], {"a": 1, "b": "2", "prompt": "1+2="})
    ]
    rows = [{"a b": "x"}]
    template = json.loads(r'"{{{a b}}}\nAnswer: {a b}"')
    assert with_prompts("k", "f", rows, template, "p") == [{"a b": "x", "p": "{x}\nAnswer: x"}]
    assert rows == [{"a b": "x"}]


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("{a", r"data.prompt_template '\{a': expected '\}'.*a brace of the text is written twice"),
        ("a}", r"Single '\}' encountered.*written twice: \{\{ or \}\}"),
        ("{}", r"\{\} is no column; write its name alone, such as \{question\}"),
        ("{a:>3}", r"\{a:>3\} is no column"),
        ("{a!r}", r"\{a!r\} is no column"),
        ("no columns", r"names no column; write one as \{question\}"),
        ("{b}", r"row 1 has no column 'b', which data.prompt_template names; it has \['a', 'l'\]"),
        ("{a.__class__}", r"row 1 has no column 'a.__class__', which"),
        ("{l}", r"column 'l' is a list, and data.prompt_template takes texts and numbers"),
    ],
)
def test_a_broken_template_is_one_line(tokenizer, template, line):
    with pytest.raises(ValueError, match=line) as caught:
        read(PromptData([{"a": "1", "l": [1]}], prompt_template=template), tokenizer)
    assert "\n" not in str(caught.value)
