"""The prompts for looking at group sampling: their files, and that a chat model answers them."""

import json
from fractions import Fraction
from itertools import permutations
from math import comb, factorial, gcd

import pytest

import train
from support.repository import ROOT
from support.tiny_models import build_model, build_tokenizer

FOLDER = ROOT / "data" / "scenarios"
NAMES = ("creative", "reasoning", "dialogue")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MAY_COMPUTE = {
    **{
        "all": all,
        "len": len,
        "list": list,
        "max": max,
        "next": next,
        "range": range,
        "str": str,
        "sum": sum,
    },
    **{"comb": comb, "factorial": factorial, "gcd": gcd, "permutations": permutations},
    "Fraction": Fraction,
}


def rows(name):
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def chinese_share(text):
    letters = [c for c in text if c.isalpha()]
    return sum("\u4e00" <= c <= "\u9fff" for c in letters) / len(letters)


def texts(row):
    prompt = row["prompt"]
    return [prompt] if isinstance(prompt, str) else [m["content"] for m in prompt]


@pytest.mark.parametrize("name", NAMES)
def test_there_are_sixty_different_prompts_half_of_them_chinese(name):
    found = rows(name)
    assert len(found) == 60
    assert len({json.dumps(row["prompt"]) for row in found}) == 60
    assert [row["language"] for row in found].count("zh") == 30
    for row in found:
        share = chinese_share("".join(texts(row)))
        assert share > 0.5 if row["language"] == "zh" else share == 0, row
        assert all(text.strip() == text and text for text in texts(row)), row


def test_conversations_alternate_and_end_with_the_user():
    lengths = set()
    for row in rows("dialogue"):
        roles = [message["role"] for message in row["prompt"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert all(message.keys() == {"role", "content"} for message in row["prompt"])
        lengths.add(len(roles))
    assert lengths == {1, 3}


def test_answers_of_the_reasoning_prompts_are_right():
    found = rows("reasoning")
    for row in found:
        assert isinstance(row["answer"], str) and row["answer"], row
        if "check" in row:
            assert str(eval(row["check"], {"__builtins__": MAY_COMPUTE})) == row["answer"], row
    assert sum("check" not in row for row in found) == 2  # two syllogisms, which a person checked


def test_the_origins_examples_are_among_them():
    assert "时间旅行" in rows("creative")[0]["prompt"]
    assert "x² + 5x + 6 = 0" in rows("reasoning")[0]["prompt"]
    assert "心情特别差" in rows("dialogue")[0]["prompt"][0]["content"]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat")
    build_model("qwen3", max_position_embeddings=512).save_pretrained(path)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_predict_writes_groups_with_scores(name, chat_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = [
        *("predict", "--config", "configs/base.yaml", "--config", f"configs/task/{name}.yaml"),
        *("--config", "configs/hardware/cpu.yaml", "--trainer.default_root_dir", str(tmp_path)),
        *("--model.policy.path", str(chat_model), "--model.sampler.max_new_tokens", "3"),
        *("--model.sampler.group_size", "3", "--model.policy.gradient_checkpointing", "false"),
        *("--data.val_batch_size", "30"),
    ]
    code = train.main(arguments)
    assert code == 0, capsys.readouterr().err
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 60
    terms = {"right", "language"} if name == "reasoning" else {"language", "variety"}
    for line in map(json.loads, lines):
        assert len(line["completions"]) == 3
        for completion in line["completions"]:
            assert completion["parts"].keys() == terms
            assert all(0 <= value <= 1 for value in completion["parts"].values())
            assert 1 <= completion["length"] <= 3
            assert completion["reward"] is not None
