"""The doctor: a healthy config, broken ones, and that it leaves no trace."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from tokenizers.processors import TemplateProcessing

from gspo_lightning.data.prompts import PromptData
from gspo_lightning.doctor import memory as doctor_memory
from gspo_lightning.doctor.examine import set_up_and_examine
from gspo_lightning.doctor.rewards import flat, flat_share, terms, truncation
from gspo_lightning.engine import probe
from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.module import GSPOModule
from gspo_lightning.policy.policy import load_policy
from gspo_lightning.rewards.terms import RewardTerm
from gspo_lightning.run.command import CommandTrainer
from support.command import refused, run
from support.repository import ROOT
from support.tiny_models import EOS, build_model, build_tokenizer
from support.tiny_run import make_module, write_prompts

CONFIG = """
trainer: {accelerator: cpu}
model:
  class_path: gspo_lightning.GSPOModule
  init_args:
    policy: {path: policy}
    reference: {device: cpu}
    sampler:
      class_path: gspo_lightning.GroupSampler
      init_args: {group_size: 4, max_new_tokens: 12}
    rewards: {digits: {fn: support.reward_functions.digits}}
    num_minibatches: 2
data:
  class_path: gspo_lightning.PromptData
  init_args: {path: prompts.jsonl, prompts_per_rollout: 4, num_rollouts: 3}
"""
CHAT = (
    "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def has_digit(rows, completions):
    return [float(any(c.isdigit() for c in text)) for text in completions]


def raises(rows, completions):
    raise KeyError("gold")


@pytest.fixture
def folder(tmp_path, monkeypatch, model_dir):
    """A working folder with a policy, prompts and a config without a mistake."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GSPO_TRACEBACK", raising=False)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    shutil.copytree(model_dir, "policy")
    write_prompts(Path("prompts.jsonl"))
    Path("config.yaml").write_text(CONFIG)
    return tmp_path


def doctor(capsys, options="", code=1):
    """Findings by check of a command that ends with this code."""
    found, out, err = run(capsys, f"doctor --config config.yaml --json {options}")
    assert found == code, out + err
    return {finding["check"]: finding for finding in json.loads(out)}


def test_a_run_with_a_critic_and_one_completion_a_prompt_is_examined_to_its_end(folder, capsys):
    critic = "--model.critic.backbone own --model.advantages gae --model.sampler.group_size 1"
    found = doctor(capsys, f"{critic} --model.num_minibatches 2", code=0)
    assert found["gradient"]["status"] == found["ratio"]["status"] == "ok"
    assert found["gradient"]["value"]["rows"] > 1
    assert "flat groups" not in found and found["reward digits"]["status"] == "ok"


def test_the_config_that_a_run_has_written_is_examined_but_for_its_checkpoint(folder, capsys):
    Path("config.yaml").write_text(f"{CONFIG}ckpt_path: null\n")
    assert errors(doctor(capsys, "--num_prompts 1", code=0)) == []
    line = refused(capsys, "doctor --config config.yaml --ckpt_path last")
    assert line.startswith("ckpt_path: doctor examines what a run starts with")


def errors(findings):
    return [name for name, finding in findings.items() if finding["status"] == "error"]


def files():
    return {path: path.stat().st_mtime_ns for path in sorted(Path().rglob("*")) if path.is_file()}


# ---- the whole command -----------------------------------------------------------------------


def test_the_demo_is_healthy_and_nothing_is_written(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    root = tmp_path / "run"
    code, out, err = run(
        capsys,
        f"doctor --config configs/arithmetic.yaml --trainer.default_root_dir {root} "
        "--trainer.logger true --trainer.profiler AdvancedProfiler --trainer.profiler.filename p "
        f"--trainer.profiler.dirpath {root}",
    )
    assert code == 0, out + err
    *lines, summary = out.splitlines()
    assert {line.split()[0] for line in lines} == {"ok"}, out
    assert summary.startswith(f"0 error, 0 warning, {len(lines)} ok; ")
    assert "exactly 1 before the first step" in out
    assert "'6+9+1+7='" in out and "«<eos>»' (4 tokens)" in out  # as the policy sees them
    assert not root.exists() and list(tmp_path.iterdir()) == []


def test_a_healthy_config_as_json(capsys, folder):
    before = files()
    # the list stays one that can be read whatever a reward prints
    found = doctor(capsys, "--model.rewards.digits.fn support.reward_functions.talks", code=0)
    assert files() == before
    assert errors(found) == []
    assert all(set(f) == {"check", "status", "text", "remedy", "value"} for f in found.values())
    assert all(f["remedy"] for f in found.values() if f["status"] == "warning")
    assert found["ratio"]["value"] == {"largest_difference_from_1": 0.0, "clip_fraction": 0.0}
    assert abs(found["kl"]["value"]["kl"]) < 1e-9
    assert set(found["gradient"]["value"]["differences"]) == {"1"}
    assert found["gradient"]["value"]["differences"]["1"] < 1e-4
    assert found["sampling"]["value"]["completions"] == 4 * 2 * 4  # prompts, draws, G
    assert found["memory cpu"]["status"] == "ok"
    assert "3 rollouts, each 4 prompts x 4 completions" in found["plan"]["text"]
    assert "raise optimizer.learning_rate" in found["clipping"]["remedy"]  # 1e-6 for a tiny model
    page = (ROOT / "docs" / "doctor.md").read_text().partition("| check |")[2].partition("\n\n")[0]
    listed = {n for row in page.splitlines()[2:] for n in row.split("|")[1].strip().split(", ")}
    ours = {name.replace(" cpu", " *device*").replace(" digits", " *term*") for name in found}
    assert ours <= listed


def test_options_change_what_is_drawn(capsys, folder):
    found = doctor(capsys, "--num_prompts 2 --max_new_tokens 3", code=0)
    assert found["sampling"]["value"]["completions"] == 2 * 2 * 4
    assert found["sampling"]["value"]["tokens"] <= 3 * 16
    assert "at most 3 tokens each for speed (--max_new_tokens), not 12" in found["sampling"]["text"]
    assert found["truncated"]["status"] == "warning"  # nothing is known of the run's own limit
    assert "--max_new_tokens 12" in found["truncated"]["remedy"]


def test_the_groups_of_a_prompt_follow_one_another(capsys, monkeypatch, folder):
    seen = []
    monkeypatch.setattr(
        "gspo_lightning.doctor.text.example", lambda _, samples: seen.append(samples) or []
    )
    doctor(capsys, "--num_prompts 2", code=0)
    (samples,) = seen
    assert samples.group_size == 4
    assert [id(row) for row in samples.rows] == [id(samples.rows[0])] * 8 + [
        id(samples.rows[8])
    ] * 8
    assert samples.rows[0] is not samples.rows[8]
    assert samples.texts[:4] != samples.texts[4:8]  # drawn twice, not copied


def test_no_weight_changes_and_no_gradient_stays(tmp_path, model_dir):
    module = make_module(model_dir, reference=ReferencePolicy(device="cpu"), kl_coef=0.1)
    data = PromptData(str(write_prompts(tmp_path / "p.jsonl")), prompts_per_rollout=4)
    trainer = CommandTrainer(
        accelerator="cpu",
        default_root_dir=tmp_path / "run",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    findings = set_up_and_examine(trainer, module, data)
    assert {f.status for f in findings} <= {"ok", "warning"}, findings
    fresh = load_policy(module.policy_config).state_dict()
    assert all(
        torch.equal(fresh[name], value) for name, value in module.policy.state_dict().items()
    )
    assert all(p.grad is None for p in module.policy.parameters())
    assert trainer.global_step == 0 and not (tmp_path / "run").exists()
    assert type(trainer).fit is Trainer.fit  # what sets up is the very fit of a run


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--num_prompts 0", "num_prompts must be >= 1, got 0"),
        ("--num_prompt 3", "unknown key `num_prompt`, did you mean `num_prompts`?"),
        ("--model.sampler.group_sze 3", "model.sampler: unknown key `group_sze`, did you mean"),
        ("--data.path missing.jsonl", "data.path: there is no file missing.jsonl"),
        ("--model.num_minibatches 3", "model.num_minibatches must divide the 16 completions"),
        ("--data.chat_template true", "data.chat_template is true, but the tokenizer has no"),
        ("--ckpt_path last", "ckpt_path: doctor examines what a run starts with, not a checkpoint"),
        (
            "--data.val_path prompts.jsonl --trainer.val_check_interval 9",
            "trainer.val_check_interval is 9, the run has 3 batches",
        ),
    ],
)
def test_a_mistake_is_the_line_that_fit_gives(capsys, folder, option, line):
    code, out, err = run(capsys, f"doctor --config config.yaml {option}")
    assert (code, out) == (2, ""), err
    assert err.startswith(f"error: {line}") and err.count("\n") == 1


def test_other_modules_are_refused(capsys, folder):
    Path("dummy.yaml").write_text(
        "model: {class_path: support.dummies.DummyModule}\n"
        "data: {class_path: support.dummies.DummyData}\n"
    )
    code, out, err = run(capsys, "doctor --config dummy.yaml --trainer.accelerator cpu")
    assert (code, out) == (2, "")
    assert err == "error: doctor examines GSPOModule, and the model is DummyModule\n"


# ---- broken configs --------------------------------------------------------------------------


def test_a_wrong_end_of_sequence(capsys, folder):
    config = json.loads(Path("policy/generation_config.json").read_text())
    Path("policy/generation_config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    found = doctor(capsys)
    assert errors(found) == ["eos"]
    assert "the tokenizer ends texts with '<eos>' (1)" in found["eos"]["text"]
    assert "generation_config.json" in found["eos"]["remedy"]


def save_tokenizer(chat=None, bos=False, adds_eos=False, close="<eos>"):
    tokenizer = build_tokenizer()
    if bos:
        tokenizer.bos_token = "<unk>"  # any token of the vocabulary will do
    pieces = [*(["<unk>"] if bos else []), "$A", *(["<eos>"] if adds_eos else [])]
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=" ".join(pieces), special_tokens=[("<unk>", 2), ("<eos>", EOS)]
    )
    tokenizer.chat_template = None if chat is None else chat.replace("<eos>", close)
    tokenizer.save_pretrained("policy")


def test_a_prompt_that_begins_twice(capsys, folder):
    save_tokenizer(bos=True)
    assert doctor(capsys, code=0)["bos"]["text"] == "prompts begin with '<unk>' (2), once"
    rows = [{"prompt": "<unk>1+2="}, {"prompt": "3+4="}] * 2
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = doctor(capsys)
    assert errors(found) == ["bos"]
    assert found["bos"]["text"] == "2 of 4 prompts begin with '<unk>' (2) twice"
    assert "data.chat_template: true" in found["bos"]["remedy"]


def test_a_template_that_forgets_the_beginning_and_one_that_is_not_used(capsys, folder):
    save_tokenizer(chat=CHAT, bos=True)
    found = doctor(capsys, "--data.chat_template true", code=0)
    assert found["template"]["status"] == "ok"
    assert found["bos"]["status"] == "warning"
    assert "{{ bos_token }}" in found["bos"]["remedy"]
    found = doctor(capsys, code=0)
    assert found["bos"]["status"] == "ok"
    assert found["template"]["status"] == "warning"
    assert found["template"]["remedy"].startswith("set data.chat_template: true")


def test_a_turn_that_ends_with_another_token(capsys, folder):
    save_tokenizer(chat=CHAT, close="<unk>")
    found = doctor(capsys, "--data.chat_template true")
    assert errors(found) == ["eos"]
    assert "the chat template ends a turn with '<unk>' (2)" in found["eos"]["text"]
    save_tokenizer(chat=CHAT, close="\n")  # ordinary text, which can end no completion
    found = doctor(capsys, "--data.chat_template true", code=0)
    assert found["eos"]["status"] == found["template"]["status"] == "ok"


def test_a_template_that_opens_no_turn_for_the_answer(capsys, folder):
    save_tokenizer(chat=CHAT.partition("{% if")[0])
    found = doctor(capsys, "--data.chat_template true")
    assert errors(found) == ["prompt end"]  # the last thing of a prompt is then the end of a turn
    assert "add_generation_prompt" in found["template"]["text"]


def test_a_tokenizer_that_ends_prompts(capsys, folder):
    save_tokenizer(adds_eos=True)
    found = doctor(capsys)
    assert errors(found) == ["prompt end"]
    assert "add_eos_token" in found["prompt end"]["remedy"]


def test_prompts_of_another_models_chat(capsys, folder):
    rows = [{"prompt": "<|im_start|>user 1+2="}] * 4
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = doctor(capsys, code=0)
    assert found["template"]["status"] == "warning"
    assert "<|im_start|> is ordinary text here" in found["template"]["text"]
    assert found["vocabulary"]["status"] == "warning"  # letters are unknown to this tokenizer
    Path("prompts.jsonl").write_text(json.dumps({"prompt": "<|\x1b[2J|>1+2="}) + "\n")
    _, out, _ = run(capsys, "doctor --config config.yaml --num_prompts 1")
    assert "<|\\x1b[2J|> is ordinary text here" in out  # shown, not obeyed


@pytest.mark.filterwarnings("ignore:policy.path. prompts of data.path have up to 8 tokens")
def test_texts_longer_than_the_models_positions(capsys, folder):
    found = doctor(capsys, "--model.sampler.max_new_tokens 121 --max_new_tokens 8", code=0)
    assert found["prompts"]["status"] == "warning"  # 8 and 121 tokens, 128 positions
    assert "more than the 128 the model reads" in found["prompts"]["text"]
    assert "sampler.max_new_tokens to 120" in found["prompts"]["remedy"]
    found = doctor(capsys, "--model.sampler.max_new_tokens 120 --max_new_tokens 8", code=0)
    assert found["prompts"]["status"] == "ok"


def test_dropped_prompts_are_counted(capsys, folder):
    options = "--data.overlong_prompts drop --data.max_prompt_tokens 3"  # 3 of 10 are that short
    found = doctor(capsys, options, code=0)
    assert found["prompts"]["status"] == "warning"
    assert found["prompts"]["value"]["dropped_share"] == 0.7


def test_a_reference_that_is_another_model(capsys, folder):
    build_model(seed=1).save_pretrained("other")
    found = doctor(capsys, "--model.reference.path other")
    assert errors(found) == ["kl"]
    assert "the reference is another model (other)" in found["kl"]["text"]
    assert found["kl"]["value"]["kl"] > 0.01
    assert doctor(capsys, "--model.reference.path policy", code=0)["kl"]["status"] == "ok"


def test_a_constant_reward(capsys, folder):
    found = doctor(capsys, "--model.rewards.digits.fn gspo_lightning.rewards.terms.MarkedAnswer "
                   "--model.rewards.digits.fn.column prompt")  # fmt: skip
    assert errors(found) == ["rewards"]
    assert found["reward digits"]["status"] == "warning"
    assert "always 0" in found["reward digits"]["text"]
    assert found["flat groups"]["value"]["measured"] == 1.0


def test_rewards_of_completions_that_were_cut_for_speed_are_no_error(capsys, folder):
    marked = "--model.rewards.digits.fn gspo_lightning.rewards.terms.MarkedAnswer"
    options = f"{marked} --model.rewards.digits.fn.column prompt --max_new_tokens 2"
    found = doctor(capsys, options, code=0)
    for name in ("rewards", "flat groups"):
        assert found[name]["status"] == "warning", found[name]
        assert found[name]["remedy"].endswith("use --max_new_tokens 12")


def test_a_kl_rule_that_cannot_answer_within_the_run(capsys, folder):
    callback = "--trainer.callbacks+ gspo_lightning.AdaptiveKL --trainer.callbacks.rule"
    rule = f"{callback} gspo_lightning.kl.ProportionalKL --trainer.callbacks.rule.target 0.05"
    found = doctor(capsys, f"{rule} --trainer.callbacks.rule.horizon 2000", code=0)["penalty"]
    assert found["status"] == "warning"
    assert found["remedy"].startswith("too slow for 3 rollouts, x1")
    found = doctor(capsys, f"{rule} --data.num_rollouts 30", code=0)["penalty"]
    assert found["status"] == "ok"


def test_a_reward_that_raises_stops_no_other_check(capsys, folder):
    before = files()
    found = doctor(capsys, "--model.rewards.digits.fn test_doctor.raises")
    assert errors(found) == ["reward digits"]
    assert "KeyError: 'gold' (test_doctor.py:" in found["reward digits"]["text"]
    assert found["gradient"]["status"] == "ok"
    assert files() == before  # not even failed_rollout.jsonl


def test_bfloat16_under_the_clip_range_of_the_paper(capsys, folder):
    policy = f"--model.policy.dtype bfloat16 --model.policy.path {ROOT}/data/arithmetic/policy"
    found = doctor(capsys, policy, code=0)
    assert found["ratio noise"]["status"] == "warning", found["ratio noise"]
    assert "policy.dtype float32" in found["ratio noise"]["remedy"]
    assert found["ratio noise"]["value"]["other_batches"] > 1e-4
    wide = "--model.objective.ratio token --model.objective.clip_low 0.2"
    found = doctor(capsys, f"{policy} {wide} --model.objective.clip_high 0.2", code=0)
    assert found["ratio noise"]["status"] == "ok"


def test_too_little_memory(capsys, monkeypatch, folder):
    monkeypatch.setattr(doctor_memory, "available", lambda device: 2**16)
    found = doctor(capsys)
    assert errors(found) == ["memory cpu"]
    assert "micro_batch_size" in found["memory cpu"]["remedy"]
    parts = found["memory cpu"]["value"]["parts"]
    assert {"gradients", "Adam", "logits of the reference"} < set(parts)
    need = sum(parts.values())
    for left, status in ((need / 0.79, "ok"), (need / 0.81, "warning"), (need - 1, "error")):
        monkeypatch.setattr(doctor_memory, "available", lambda device, left=left: left)
        assert doctor_memory.device_memory(torch.device("cpu"), parts).status == status
    monkeypatch.setattr(doctor_memory, "available", lambda device: None)
    assert doctor_memory.device_memory(torch.device("cpu"), parts).status == "warning"


def after_loading(monkeypatch, change):
    """Change the policy behind everything that loading makes right."""
    plain = GSPOModule.configure_model

    def configure_model(self):
        plain(self)
        change(self.policy.model)

    monkeypatch.setattr(GSPOModule, "configure_model", configure_model)


def test_dropout(capsys, monkeypatch, folder):
    after_loading(monkeypatch, lambda model: setattr(model, "lm_head", torch.nn.Sequential(
        torch.nn.Dropout(0.5), model.lm_head)))  # fmt: skip
    found = doctor(capsys)
    assert {"dropout", "gradient", "kl"} <= set(errors(found))
    assert found["ratio noise"]["status"] == "warning"
    assert found["dropout"]["text"].endswith("the first is lm_head.0")


def test_a_model_that_mixes_the_rows_of_a_batch(capsys, monkeypatch, folder):
    """One that the trial at load does not find out."""

    def mix(module, args, logits):
        return logits + 0.1 * logits.flatten(0, -2).mean(0)

    monkeypatch.setattr(probe, "_try_reading", lambda *_: probe.Found("packed"))
    monkeypatch.setattr(probe, "_try_decoding", lambda *_: probe.Found("grouped"))
    after_loading(monkeypatch, lambda model: model.lm_head.register_forward_hook(mix))
    found = doctor(capsys, "--model.micro_batch_size 2 --model.reference null")
    assert errors(found) == ["gradient"]
    assert set(found["gradient"]["value"]["differences"]) == {"1", "2"}
    assert found["gradient"]["value"]["rows"] == 4


def test_no_gradient(capsys, monkeypatch, folder):
    def cut(module, args, logits):
        return logits.detach() + 0 * logits

    after_loading(monkeypatch, lambda model: model.lm_head.register_forward_hook(cut))
    found = doctor(capsys)
    assert errors(found) == ["gradient"]
    assert "0.0 everywhere" in found["gradient"]["text"]


def test_a_check_that_breaks_is_an_error_and_the_others_run(capsys, monkeypatch, folder):
    def broken(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("gspo_lightning.doctor.numbers.noise", broken)
    found = doctor(capsys)
    assert errors(found) == ["ratio noise"]
    assert "lower model.micro_batch_size" in found["ratio noise"]["remedy"]
    assert found["gradient"]["status"] == "ok"


def test_rewards_with_two_values_tell_what_other_group_sizes_would_do(capsys, folder):
    found = doctor(capsys, "--model.rewards.digits.fn test_doctor.has_digit", code=0)
    assert set(found["flat groups"]["value"]["expected"]) == {"2", "4", "8"}
    found = doctor(capsys, code=0)
    assert found["flat groups"]["value"]["expected"] == {}
    assert "more than two values" in found["flat groups"]["text"]


def test_every_broken_term_is_named_and_the_others_are_measured(make_rollout):
    calls = []

    def counted(rows, completions):
        calls.append(len(completions))
        return [float(i % 2) for i in range(len(completions))]

    found, scores = terms(
        {name: RewardTerm(fn) for name, fn in (("a", raises), ("b", counted), ("c", raises))},
        make_rollout(),
    )
    assert [(f.check, f.status) for f in found] == [
        *(("reward a", "error"), ("reward c", "error"), ("reward b", "ok")),
    ]
    assert list(scores.parts) == ["b"] and scores.parts["b"].sum() == 3
    calls.clear()
    terms({"b": RewardTerm(counted)}, make_rollout())
    assert calls == [6]  # a judge that is asked costs money


# ---- the estimators --------------------------------------------------------------------------


def test_the_flat_share_is_unbiased():
    """Its mean over binomial counts is p^G + (1 - p)^G exactly; the plug-in's is larger."""
    from math import comb

    for p, n, size in ((0.3, 5, 3), (0.9, 8, 4), (0.5, 4, 4)):
        chances = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
        drawn = torch.full((1,), n)
        mean = sum(
            chance * flat_share(torch.tensor([c]), drawn, size) for c, chance in enumerate(chances)
        )
        plug_in = sum(
            chance * ((c / n) ** size + (1 - c / n) ** size) for c, chance in enumerate(chances)
        )
        assert mean == pytest.approx(p**size + (1 - p) ** size, abs=1e-12)
        assert plug_in > mean + 0.01


def test_prompts_with_too_few_rewards_are_left_out_of_the_share():
    # 1 of 3 prompts has 4 rewards: C(3, 3) / C(4, 3) = 1/4
    shares = flat_share(torch.tensor([1, 0, 2]), torch.tensor([4, 2, 2]), 3)
    assert shares == 0.25


@pytest.mark.parametrize(
    ("rewards", "status", "advice"),
    [
        # two prompts, two groups of 2 each: half of the pairs alike
        ([0, 1, 0, 1, 0, 1, 1, 0], "ok", ""),
        ([0, 0, 0, 0, 0, 0, 0, 1], "warning", "raise sampler.group_size to 4, or use easier"),
        ([1, 1, 1, 1, 1, 1, 1, 1], "warning", "raise sampler.group_size"),
        ([0.0, 0.1, 0.5, 0.7, 0.2, 0.2, 0.3, 0.4], "ok", ""),
    ],
)
def test_flat_groups_come_with_advice(rewards, status, advice):
    found = flat(torch.tensor(rewards, dtype=torch.float32), 2, 2)
    assert found.status == status
    assert found.remedy.startswith(advice) and bool(found.remedy) == bool(advice)


def test_where_larger_groups_would_not_help_other_prompts_are_advised():
    solved = torch.ones(8 * 8)
    solved[0] = 0  # one of eight prompts is not always solved
    found = flat(solved, 4, 2)
    assert found.status == "warning"
    assert found.remedy.startswith("use harder prompts: 98% earn the better reward")


def test_truncation_is_known_only_at_the_limit():
    finished = torch.tensor([True, False, False])
    assert truncation(finished, 8, 8).status == "warning"
    assert "raise sampler.max_new_tokens" in truncation(finished, 8, 8).remedy
    assert "is not known" in truncation(finished, 8, 9).text
    assert truncation(~finished, 8, 8).status == "ok"
    assert "raise sampler.max_turns" in truncation(finished, 8, 8, out_of_turns=0.9).remedy
