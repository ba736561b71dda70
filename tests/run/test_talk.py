"""`gspo chat`: which weights speak, how a line becomes a prompt, what is shown of an answer."""

import io
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from gspo_lightning.checkpoint.io import AtomicCheckpointIO, seal_of
from gspo_lightning.checkpoint.parts import KEY
from gspo_lightning.engine.texts import Ends
from gspo_lightning.policy import LoRAConfig, PolicyConfig, load_policy
from gspo_lightning.policy.complete import complete
from gspo_lightning.run import chat
from gspo_lightning.run.chat import Aloud, Manner, Talk, find, load, manner
from support.text_tokenizers import byte_level, encode

# the assistant's turn opens with "answer: "
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ '\n' }}{% endfor %}answer: "


def config(model_dir, policy=None, data=None, sampler=None, callbacks=()):
    """What `fit` saves of a run, as far as it matters here."""
    return {
        "trainer": {"callbacks": [*callbacks]},
        "model": {
            "class_path": "gspo_lightning.GSPOModule",
            "init_args": {
                "policy": {"path": str(model_dir), "gradient_checkpointing": True} | (policy or {}),
                "sampler": {
                    "init_args": {"temperature": 0.5, "max_new_tokens": 7} | (sampler or {})
                },
            },
        },
        "data": {"init_args": {"max_prompt_tokens": 32} | (data or {})},
    }


@pytest.fixture
def run(tmp_path, model_dir):
    """A run folder with a config; the policy is exported."""
    folder = tmp_path / "run"
    shutil.copytree(model_dir, folder / "export")
    (folder / "config.yaml").write_text(yaml.safe_dump(config(model_dir)))
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    from support.tiny_models import build_model, build_tokenizer

    folder = tmp_path_factory.mktemp("spoken")
    build_model("qwen3").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return load_policy(PolicyConfig(str(folder)))


# ---- what is shown -------------------------------------------------------------------------------


def test_what_may_become_a_stop_string_is_held_back():
    tokenizer, said = byte_level(), []
    aloud = Aloud(Ends(tokenizer, ["\nQ:"]), [1], said.append)
    ids = encode(tokenizer, "a \nQ4 é\nQ: b")
    ended = [aloud.completed([], ids, count) for count in range(1, len(ids) + 1)]
    # "\n", "\nQ" and "\nQ:" may begin the stop string; half an é is no character
    assert said == ["a", " ", "\nQ4", " ", "é"]
    assert tokenizer.decode(ids[: ended.index(True) + 1]) == "a \nQ4 é\nQ:"


def test_control_characters_of_an_answer_are_shown_not_sent():
    said = []
    Aloud(Ends(byte_level()), [], said.append).hand_on("\x1b]0;title\x07\n\u202e")
    assert said == ["\\x1b]0;title\\x07\n\\u202e"]


def test_an_answer_is_that_of_the_training_sampler_piece_by_piece(policy):
    for temperature in (0.0, 1.0):
        pieces = []
        talk = Talk(policy, Manner(temperature=temperature, max_new_tokens=12), seed=5)
        talk.answer("7+9=", pieces.append)
        expected = complete(policy, ["7+9="], 1, temperature, 12, seed=5)[0][0]
        assert "".join(pieces) == expected and len(pieces) > 1
    pieces.clear()
    talk.answer("7+9=", pieces.append)  # drawn anew
    assert "".join(pieces) == complete(policy, ["7+9="], 1, 1.0, 12, seed=6)[0][0]


def test_a_conversation_goes_through_the_chat_template(policy, monkeypatch):
    monkeypatch.setattr(policy.tokenizer, "chat_template", TEMPLATE)
    talk = Talk(policy, Manner(system="0-", temperature=0.0, max_new_tokens=3))
    decode = policy.tokenizer.decode
    assert decode(talk.prompt_ids("7+9=")) == "0-\n7+9=\nanswer: "
    pieces = []
    talk.answer("7+9=", pieces.append)
    said = "".join(pieces)
    assert decode(talk.prompt_ids("1=")) == f"0-\n7+9=\n{said}\n1=\nanswer: "
    talk.start_anew()
    assert decode(talk.prompt_ids("1=")) == "0-\n1=\nanswer: "
    raw = Talk(policy, Manner(chat=False, template="7+{sum}="))  # as a run without the template
    assert decode(raw.prompt_ids("1")) == "7+1="


def test_a_conversation_that_the_model_cannot_read_is_refused(policy):
    talk = Talk(policy, Manner(max_new_tokens=125))
    with pytest.raises(ValueError, match=r"has 4 tokens; with 125 .* the 128 .* an empty line"):
        talk.answer("7+9=", print)


def test_an_answer_of_no_given_length_ends_where_the_model_does(policy, monkeypatch):
    monkeypatch.setattr(policy.model.config, "max_position_embeddings", 9)
    talk = Talk(policy, Manner(temperature=0.0))
    ids = talk.prompt_ids("1=")
    assert talk.answer("1=", print) in (None, 9 - len(ids))
    assert talk.room(100) == 1  # which is told to be too long
    monkeypatch.setattr(policy.model.config, "max_position_embeddings", 4096)
    assert talk.room(100) == 256


def test_bytes_that_are_no_text_are_read_as_far_as_they_are(policy):
    talk = Talk(policy, Manner(temperature=0.0))
    escaped = "é=".encode().decode("ascii", "surrogateescape")
    assert talk.prompt_ids(escaped) == talk.prompt_ids("é=")
    assert talk.prompt_ids("1=\udcff") == talk.prompt_ids("1=\ufffd")


# ---- which weights, in which manner --------------------------------------------------------------


def test_the_newest_config_says_how_a_run_reads_and_draws(run, model_dir):
    changed = config(
        model_dir,
        {"stop_strings": ["\n"], "lora": {"rank": 2}, "unknown_to_us": 1},
        {"chat_template": True, "system_prompt": "be brief", "prompt_template": "{q}="},
        {"temperature": 0.9},
        [{"class_path": "gspo_lightning.HFExport", "init_args": {"path": "mine"}}],
    )
    (run / "config.resume-000010.yaml").write_text(yaml.safe_dump(changed))
    assert manner(run) == Manner(
        policy=PolicyConfig(str(model_dir), stop_strings=["\n"], lora=LoRAConfig(rank=2)),
        export="mine",
        chat=True,
        system="be brief",
        template="{q}=",
        temperature=0.9,
        max_new_tokens=7,
        max_prompt_tokens=32,
    )


def test_weights_come_from_the_export_a_checkpoint_or_a_folder(run, model_dir):
    def first(path, weights=None):
        return next(load(*find(path, weights)).parameters()).flatten()[0].item()

    exported = first(run)
    trained = load_policy(PolicyConfig(str(model_dir)))
    with torch.no_grad():
        next(trained.parameters()).fill_(7.0)
    state = {f"policy.{name}": value for name, value in trained.state_dict().items()}
    file = run / "checkpoints" / "rollout=000003.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {**state, "critic.x": torch.ones(1)}}, file)
    trained.export(run / "export_best")
    assert exported != 7.0
    assert first(run / "export") == first(run, "export") == exported
    for weights in ("last", str(file), "export_best", str(run / "export_best")):
        assert first(run, weights) == 7.0
    assert find(run / "export_best", None)[0].temperature == 0.5  # that of the run around it
    assert find(model_dir, None) == (Manner(), model_dir)


def test_a_checkpoint_in_parts_is_put_together(run):
    """As ranks write it that share the policy: the file names the parts, and has no values."""
    trained = load_policy(PolicyConfig(str(run / "export")))
    state = {f"policy.{name}": value for name, value in trained.state_dict().items()}
    file, part = run / "checkpoints/rollout=000003.ckpt", "rollout=000003.parts0/rank00000.pt"
    part = file.parent / part
    AtomicCheckpointIO().save_checkpoint({f"weights/{k}": v for k, v in state.items()}, part)
    named = {"folder": part.parent.name, "files": {part.name: seal_of(part)}}
    named["tensors"] = [f"weights/{name}" for name in state]
    empty = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    AtomicCheckpointIO().save_checkpoint({"state_dict": empty, KEY: named}, file)
    found = load(*find(run, "last")).state_dict()
    assert all(torch.equal(found[name], value) for name, value in trained.state_dict().items())


@pytest.mark.parametrize(
    ("words", "prepare", "said"),
    [
        (["none"], None, "none is no run folder"),
        (["run/checkpoints"], None, "neither a run (config.yaml) nor a model (config.json)"),
        (["run", "--weights", "gone"], None, "--weights: no file"),
        (["run", "--weights", "best"], None, "--weights: best needs"),
        (["run", "--temperature", "-1"], None, "--temperature must be >= 0"),
        (["run", "--max-new-tokens", "0"], None, "--max-new-tokens must be >= 1"),
        (["run", "--system", "x"], None, "no chat template, so no system message"),
        (["run"], "no export", "--weights last takes the newest checkpoint, rollout=000001.ckpt"),
        (["run"], "nothing", "wait for its first checkpoint"),
        (["run"], "adapters", "run/export holds adapters alone"),
        (["run", "--weights", "auto"], "nothing", "no checkpoint in run/checkpoints; last, best, "),
        (["run", "--weights", "last"], "no export", "rollout=000001.ckpt holds no policy"),
        (["run", "--device", "cuda:77"], None, "--device cuda:77: "),
        (["run", "--device", "abacus"], None, "--device abacus: "),
        (["run"], "judge", "run/export holds a BertForSequenceClassification, which judges"),
        (["run"], "damaged", "config.yaml is no config of a run with a policy"),
    ],
)
def test_what_cannot_speak_is_refused_in_one_line(run, monkeypatch, capsys, words, prepare, said):
    monkeypatch.chdir(run.parent)
    (run / "checkpoints").mkdir()
    if prepare in ("no export", "nothing"):
        shutil.rmtree(run / "export")
    if prepare == "no export":
        file = run / "checkpoints/rollout=000001.ckpt"
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, file)
    if prepare == "judge":
        (run / "export/config.json").write_text(
            '{"architectures":["BertForSequenceClassification"]}'
        )
    if prepare == "adapters":
        (run / "export/adapter_config.json").touch()
    if prepare == "damaged":
        Path("run/config.yaml").write_text("model: [")
    assert chat.main([*words, "--prompt", "1="]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_the_command_answers_one_prompt_or_line_by_line(run, monkeypatch, capsys):
    greedy = ["--temperature", "0", "--device", "cpu"]
    assert chat.main([str(run), "--prompt", "7+9=", *greedy]) == 0
    out, err = capsys.readouterr()
    expected = complete(load_policy(PolicyConfig(str(run / "export"))), ["7+9=", "1="], 1, 0.0, 7)
    assert out == f"{expected[0][0]}\n"
    assert err == "[cut at 7 tokens; --max-new-tokens raises that]\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("7+9=\n\n1=\n" + "1" * 200 + "=\n7+9="))
    assert chat.main([str(run), *greedy]) == 0
    out, err = capsys.readouterr()
    assert out == "".join(f"{expected[i][0]}\n" for i in (0, 1, 0))
    assert "error: the conversation has 201 tokens" in err


def test_ctrl_c_ends_an_answer_and_then_the_talk(monkeypatch, capsys):
    lines = iter(["7+9=", KeyboardInterrupt])

    def read(_):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", read)
    assert chat.converse(SimpleNamespace(answer=interrupted)) == 130
    assert capsys.readouterr().out == "\n[stopped]\n\n"
