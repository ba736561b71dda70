"""Chat prompts from files to ids: arguments, begun answers, limits, and the date of the run."""

import copy
import json
import re
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import train
from gspo_lightning.checkpoint.fingerprints import differences
from gspo_lightning.data import PromptData
from gspo_lightning.rewards import ExactMatch, MarkedAnswer, TimeLimit
from gspo_lightning.rewards.terms import RewardTerm, row_checks
from support.chat_templates import STYLES, chat_tokenizer
from support.command import instantiated
from support.repository import ROOT
from support.run_folder import assert_same, state
from support.tiny_data import attach, write
from support.tiny_models import build_model
from support.tiny_run import write_prompts

DATED = "{% for m in messages %}{{ m.content }}{% endfor %}{{ strftime_now('%d') }}="


def texts_of(path, tokenizer, key="path", **options):
    """The rendered prompts of a file."""
    data = attach(PromptData(path, **{"chat_template": True} | options), tokenizer)
    data.setup("fit")
    return [tokenizer.decode(ids) for ids, _ in data.examples[key]]


def calendar(monkeypatch, day):
    """Let today be this day of February."""

    class Then(datetime):
        @classmethod
        def now(cls, *_):
            return cls(2024, 2, day, 12, 30)

    monkeypatch.setattr("gspo_lightning.data.prompts.datetime", Then)


@pytest.fixture
def dated(tokenizer):
    """The tokenizer of sums with a template that writes the day."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = DATED
    return tokenizer


# ---- rendering -----------------------------------------------------------------------------------


def test_a_begun_answer_is_the_end_of_the_prompt(tmp_path):
    style = STYLES["chatml"]
    rows = [
        {"prompt": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "= "}]}
    ]
    texts = texts_of(write(tmp_path / "p.jsonl", rows), chat_tokenizer(style))
    assert texts == [f"{style.prompt}= "]


def test_arguments_reach_held_out_prompts_too(tmp_path):
    style = STYLES["qwen3"]
    path = write(tmp_path / "p.jsonl", [{"prompt": "2+3?"}])
    options = {"val_path": path, "chat_template_arguments": {"enable_thinking": False}}
    for key in ("path", "val_path"):
        (text,) = texts_of(path, chat_tokenizer(style), key, **options)
        assert text == f"{style.prompt}<think>\n\n</think>\n\n"


def test_a_system_prompt_that_the_template_refuses_is_named(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "2+3?"}])
    options = {"system_prompt": "be kind"}
    for style in STYLES.values():
        if style.system:
            assert "be kind" in texts_of(path, chat_tokenizer(style), **options)[0]
    for name in ("gemma", "deepseek"):
        tokenizer = chat_tokenizer(STYLES[name])
        tokenizer.chat_template = tokenizer.chat_template.replace("'system' %}{{ m", "'' %}{{ m")
        with pytest.raises(ValueError, match=r"row 1: data.system_prompt: .* no system message \("):
            texts_of(path, tokenizer, **options)


def test_one_of_several_templates_is_taken_by_its_name(tmp_path):
    style = STYLES["several"]
    path = write(tmp_path / "p.jsonl", [{"prompt": "2+3?"}])
    chosen = {"chat_template_arguments": {"chat_template": "tool_use"}}
    tokenizer = chat_tokenizer(style)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "tokenizer_config.json"  # which holds a list, in older folders
    both = [{"name": name, "template": text} for name, text in style.template.items()]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": both}))
    tokenizer = type(tokenizer).from_pretrained(tmp_path / "saved")
    assert texts_of(path, tokenizer) == [style.prompt]
    assert texts_of(path, tokenizer, **chosen) == [style.prompt.replace("2+3?", "#2+3?")]


def test_the_command_line_sets_single_arguments(tmp_path, model_dir, monkeypatch):
    path = write_prompts(tmp_path / "prompts.jsonl")
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(config(model_dir)))
    options = ["--data.chat_template_arguments.enable_thinking=false", f"--data.path={path}"]
    data = instantiated("--config", "run.yaml", *options).datamodule
    assert data.chat_template_arguments == {"enable_thinking": False}


@pytest.mark.parametrize("chat", [False, True])
def test_a_text_that_cannot_fit_is_not_tokenised(tmp_path, tokenizer, dated, chat):
    rows = [{"prompt": "1" * 1025}, {"prompt": "1"}]
    path = write(tmp_path / "p.jsonl", rows)
    options = {"chat_template": chat, "max_prompt_tokens": 4}
    with pytest.raises(ValueError, match=r"row 1.* has?v?e? 1,025 characters.*max_prompt_tokens 4"):
        attach(PromptData(path, **options), dated).setup("fit")
    data = attach(PromptData(path, overlong_prompts="drop", **options), dated)
    data.setup("fit")
    assert data.dropped == {"path": 1}


# ---- answers that no verifier can read -----------------------------------------------------------


@pytest.mark.parametrize("fn", [MarkedAnswer(), ExactMatch(), ExactMatch(missing="skip")])
@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (["3"], r"the list \['3'\]"),
        ({"a": 1}, "the dict {'a': 1}"),
        (float("nan"), "nan, no number"),
    ],
)
def test_an_answer_that_no_text_can_equal_is_refused(tmp_path, tokenizer, fn, answer, line):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"prompt": "1", "answer": answer}])
    table.to_parquet(str(tmp_path / "p.parquet"))  # which holds NaN, unlike JSON
    data = attach(PromptData(str(tmp_path / "p.parquet")), tokenizer)
    data.trainer.lightning_module.row_checks = row_checks({"right": RewardTerm(TimeLimit(fn))})
    with pytest.raises(ValueError, match=rf"row 1: column 'answer' is {line}.*reward 'right'"):
        data.setup("fit")


def test_texts_and_numbers_are_answers():
    for answer in ("3", 3, 3.5, "", None, True):
        assert MarkedAnswer().check_row({"answer": answer}) is None


# ---- the date, and what makes a run the same one -------------------------------------------------


def config(model_dir):
    return {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "default_root_dir": "run",
            "callbacks": [
                {
                    "class_path": "gspo_lightning.RolloutCheckpoint",
                    "init_args": {"every_n_rollouts": 1, "keep_last": 9},
                }
            ],
        },
        "model": {
            "class_path": "gspo_lightning.GSPOModule",
            "init_args": {
                "policy": {"path": str(model_dir)},
                "num_minibatches": 2,
                "sampler": {
                    "class_path": "gspo_lightning.GroupSampler",
                    "init_args": {"group_size": 4, "max_new_tokens": 4},
                },
                "rewards": {"digits": {"fn": "support.reward_functions.digits"}},
            },
        },
        "data": {
            "class_path": "gspo_lightning.PromptData",
            "init_args": {
                "path": "prompts.jsonl",
                "val_path": "prompts.jsonl",
                "chat_template": True,
                "prompts_per_rollout": 4,
                "num_rollouts": 2,
            },
        },
    }


@pytest.fixture
def folder(tmp_path, monkeypatch, dated):
    """A policy whose template writes the day, and ten prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    build_model("qwen3").save_pretrained("policy")
    dated.save_pretrained("policy")
    write_prompts(Path("prompts.jsonl"))
    Path("run.yaml").write_text(yaml.safe_dump(config("policy")))


def fit(*options):
    return train.main(["fit", "--config", "run.yaml", *options])


def test_a_run_that_goes_on_the_next_day_is_the_same_run(folder, monkeypatch, capsys):
    calendar(monkeypatch, 28)
    assert fit("--trainer.default_root_dir=straight") == 0
    assert fit("--data.num_rollouts=1") == 0
    calendar(monkeypatch, 29)
    assert fit("--ckpt_path=last") == 0
    left, right = state("straight", 2), state("run", 2)
    assert left["PromptData"] == {"started": "2024-02-28T12:30:00"}
    assert_same(left, right)
    capsys.readouterr()
    assert train.main(["predict", "--config", "run.yaml", "--ckpt_path=last"]) == 0
    assert '28=", "' in Path("run", "predictions.jsonl").read_text()  # the end of a prompt


def test_all_ranks_take_the_date_of_the_first_one(tmp_path, dated, monkeypatch):
    calendar(monkeypatch, 29)  # after midnight
    path = write(tmp_path / "p.jsonl", [{"prompt": "1"}])
    data = attach(PromptData(path, chat_template=True), dated, rank=1, world_size=2)
    first = datetime(2024, 2, 28, 23, 59)
    data.trainer.strategy = SimpleNamespace(broadcast=lambda mine: first)
    # the other rank is not there to be compared with
    monkeypatch.setattr("gspo_lightning.data.prompts.check_start", lambda _: None)
    monkeypatch.setattr(PromptData, "_check_alike", lambda *_, **__: None)
    data.setup("fit")
    assert dated.decode(data.examples["path"][0][0]) == "128="
    assert data.state_dict() == {"started": "2024-02-28T23:59:00"}


def test_rows_and_their_rendering_have_marks_of_their_own(tmp_path, dated, monkeypatch):
    rows = [{"prompt": "1+2="}, {"prompt": "3="}]

    def marks(rows=rows, **options):
        options = {"chat_template": True} | options
        data = attach(PromptData(write(tmp_path / "p.jsonl", rows), **options), dated)
        data.setup("fit")
        return data.fingerprints()

    calendar(monkeypatch, 28)
    before = marks()
    calendar(monkeypatch, 29)
    assert differences(before, marks()) == []
    assert differences(before, marks(rows[::-1])) == ["data.path has other content"]
    dated.chat_template = DATED + "{{ end }}"
    for option in ({"system_prompt": "1"}, {"chat_template_arguments": {"end": "="}}):
        assert differences(before, marks(**option)) == [
            "data.system_prompt or data.chat_template_arguments are others"
        ]
    plain = marks(chat_template=False)  # and the mark that earlier versions gave to renderings
    assert list(plain) == ["data.path"]
    for pair in ((plain, before), (before, plain)):
        (line,) = differences(*pair)
        assert line.startswith("data.path cannot be compared: prompts of a chat template are told")


def test_a_run_of_before_is_told_so_on_continuing(folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        old = "gspo_lightning.data.prompts.PromptData.fingerprints"
        patch.setattr(old, lambda self: {"data.path": "0123456789abcdef"})
        assert fit("--data.num_rollouts=1") == 0
    capsys.readouterr()
    assert fit("--ckpt_path=last") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--accept_changes true" in error and "data.path cannot be compared" in error


# ---- the page of the docs ------------------------------------------------------------------------


def test_the_example_of_the_docs_is_what_comes_out(tmp_path):
    page = (ROOT / "docs" / "prompts.md").read_text()
    rows, settings, shown = (
        re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("json", "yaml", "text")
    )
    (tmp_path / "prompts.jsonl").write_text(rows)
    options = yaml.safe_load(settings)["data"]["init_args"]
    options["path"] = str(tmp_path / options["path"])
    texts = texts_of(tokenizer=chat_tokenizer(STYLES["qwen3"]), **options)
    assert texts[2] == shown.removesuffix("\n")
    assert texts[3] == texts[0] and "Be brief." in texts[1]
