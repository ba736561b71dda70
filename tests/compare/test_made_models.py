"""The small chat and base models of the page on settings: what they read, and where they end."""

import json
import shutil

import pytest
import yaml
from transformers import AutoTokenizer

import train
from gspo_lightning.compare import made_models, settings
from gspo_lightning.doctor.text import eos
from gspo_lightning.policy import PolicyConfig, load_policy
from gspo_lightning.policy.chat import Chat
from support.repository import ROOT

pytestmark = pytest.mark.usefixtures("at_the_root")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Both models as they stand before their training."""
    root = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for kind in made_models.KINDS:
            tokenizer = made_models.prepare(kind, root / kind)
            shutil.copytree(root / kind / "start", root / kind / "sft" / "export")
            made_models.finish(kind, root / kind, tokenizer)
    return root


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_chat_model_reads_whole_turns_of_its_template(made):
    tokenizer = AutoTokenizer.from_pretrained(made / "chat" / "start")
    demo = rows(made / "chat" / "demos.jsonl")[0]
    question = demo["prompt"].split("\n")[1].removesuffix("<|im_end|>")
    said = [{"role": "user", "content": question}]
    said.append({"role": "assistant", "content": demo["completion"]})
    text = demo["prompt"] + demo["completion"] + tokenizer.eos_token
    assert Chat(tokenizer).conversation(said) == text + "\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text


def test_the_doctor_tells_the_chat_model_from_its_copy_without_the_end_of_turn(made):
    policies = [load_policy(PolicyConfig(str(made / "chat" / n))) for n in ("policy", "open")]
    known, unknown = (eos(policy, None) for policy in policies)
    assert (known.status, unknown.status) == ("ok", "error")
    assert "<|im_end|>" in unknown.text


def test_the_base_model_reads_that_the_next_example_begins_where_one_ends(made):
    start, policy = (AutoTokenizer.from_pretrained(made / "base" / n) for n in ("start", "policy"))
    text = "".join(
        row["prompt"] + row["completion"] for row in rows(made / "base" / "demos.jsonl")[:2]
    )
    assert text.count("Q: ") == 2 * made_models.EXAMPLES
    assert start.eos_token == "Q: " and policy.eos_token == "<eos>"
    ids = policy(text + start.eos_token)["input_ids"]
    assert not {policy.unk_token_id, policy.eos_token_id} & set(ids)
    assert ids == start(text + start.eos_token)["input_ids"]


def test_the_base_models_completions_end_where_it_begins_a_question(made):
    overlay = yaml.safe_load((ROOT / "configs" / "sampler" / "few_shot.yaml").read_text())
    stops = overlay["model"]["init_args"]["policy"]["stop_strings"]
    policy = load_policy(PolicyConfig(str(made / "base" / "policy"), stop_strings=stops))
    prompts = rows(made / "base" / "train.jsonl")
    prompt, ids = (
        policy.tokenizer(text)["input_ids"]
        for text in (prompts[0]["prompt"], "7-1=6, answer: 6\n\nQ: 2+3=")
    )
    ends = [n for n in range(1, len(ids)) if policy.ends.completed(prompt, ids, n)]
    assert policy.tokenizer.decode(ids[: ends[0]]) == "7-1=6, answer: 6\n\nQ: "
    texts = [row["prompt"] for row in prompts]
    assert all(text.startswith(made_models.SHOTS) and text.endswith("=\nA: ") for text in texts)
    longest = max(texts, key=len)
    assert len(policy.tokenizer(longest)["input_ids"]) <= 64  # as the runs allow


@pytest.mark.slow
def test_one_command_makes_models_runs_and_table_once(tmp_path, monkeypatch, capsys):
    made = []

    def short(what, words, log):
        """As the command does, in this process, and over in a moment."""
        made.append(what)
        sft = ["--trainer.max_epochs=1", "--data.num_steps=25", "--data.batch_size=1"]
        fit = ["--trainer.limit_val_batches=1", "--data.val_batch_size=4"]
        fit += ["--data.prompts_per_rollout=2"]
        assert train.main([*words, *(fit if what in settings.TRIED else sft)]) == 0

    name = "base, no stop strings"
    monkeypatch.setattr(settings, "TRIED", {name: settings.TRIED[name]})
    monkeypatch.setattr(settings, "PROMPTS", 2)
    monkeypatch.setattr(settings, "train", short)
    command = ["--runs", str(tmp_path), "--rollouts", "1"]
    assert settings.main(command) == 0
    table = capsys.readouterr().out.split("| settings |")[1]
    assert f"\n| {name} |" in table
    assert made == ["the chat model", "the base model", name]
    assert settings.main(command) == 0
    assert len(made) == 3  # what is complete is not made again
    assert capsys.readouterr().out.split("| settings |")[1] == table
