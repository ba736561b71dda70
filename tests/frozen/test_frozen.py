"""Frozen models: where they go, what they say, and that a changed one is noticed."""

import copy
import json
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from gspo_lightning.engine.rotary import rotary_limit
from gspo_lightning.frozen.models import (
    FrozenModels,
    ReferencePolicy,
    ReferenceSync,
    RewardModel,
    check_kl_in_reward,
    check_sync,
    fingerprint,
    resolve_device,
)
from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.policy.chat import Chat
from gspo_lightning.policy.policy import PolicyConfig
from gspo_lightning.rewards.terms import RewardTerm
from support.repository import ROOT
from support.tiny_models import build_model, save_reward_model
from support.tiny_run import outputs_of, run

CPU = torch.device("cpu")


def see_cards(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("word", "policy", "expected"),
    [
        ("cpu", "cuda:0", "cpu"),
        ("policy", "cuda:3", "cuda:3"),
        ("policy", "cpu", "cpu"),
        ("cuda:1", "cuda:0", "cuda:1"),
        ("cuda:+1", "cuda:0", "cuda:1"),
        ("cuda:+2", "cuda:1", "cuda:3"),
    ],
)
def test_device_words(monkeypatch, word, policy, expected):
    see_cards(monkeypatch, 4)
    assert resolve_device("reference.device", word, torch.device(policy)) == torch.device(expected)


@pytest.mark.parametrize(
    ("word", "cards", "message"),
    [
        ("cuda:1", 0, "reference.device is cuda:1, but this machine has no CUDA device; set"),
        ("cuda:1", 1, "this machine has only cuda:0 to cuda:0"),
        ("cuda:+1", 1, "reference.device is cuda:\\+1, but"),
        ("gpu", 4, "must be cuda:N, cuda:\\+N, policy or cpu, got 'gpu'"),
        ("cuda", 4, "got 'cuda'"),
    ],
)
def test_a_device_that_is_not_there_is_an_error(monkeypatch, word, cards, message):
    see_cards(monkeypatch, cards)
    with pytest.raises(ValueError, match=message):
        resolve_device("reference.device", word, torch.device("cuda:0"))


@pytest.mark.parametrize(("cards", "overlay"), [(0, "cpu"), (1, "one_gpu"), (2, "two_gpu")])
def test_a_missing_device_names_the_overlay_that_fits_the_machine(monkeypatch, cards, overlay):
    see_cards(monkeypatch, cards)
    with pytest.raises(ValueError, match=f"--config hardware/{overlay}$"):
        resolve_device("reference.device", "cuda:2", torch.device("cpu"))
    assert (ROOT / f"configs/hardware/{overlay}.yaml").is_file()


def test_one_setting_places_all_frozen_models(model_dir, monkeypatch):
    see_cards(monkeypatch, 0)
    policy = PolicyConfig(str(model_dir))
    reference = ReferencePolicy()
    assert reference.device == "cuda:1"
    FrozenModels(reference, {}, device="policy").load(policy, CPU, with_reference=True)
    assert reference.model.device == CPU
    with pytest.raises(ValueError, match=r"^model\.frozen_device is cuda:3, but"):
        FrozenModels(reference, {}, device="cuda:3").load(policy, CPU, with_reference=True)
    with pytest.raises(ValueError, match=r"^model\.reference\.device is cuda:1, but"):
        FrozenModels(reference, {}).load(policy, CPU, with_reference=True)


def test_reference_logprobs_are_those_of_a_plain_forward_pass(model_dir, tiny_policy, make_rollout):
    reference = ReferencePolicy(device="cpu", batch_size=4)  # does not divide the six rows
    reference.load(PolicyConfig(str(model_dir)), CPU)
    rollout = make_rollout()
    expected = completion_logprobs(
        tiny_policy,
        rollout.prompt_ids,
        rollout.prompt_mask,
        rollout.completion_ids,
        rollout.mask,
        temperature=0.7,
    ).logprobs
    found = reference.logprobs(rollout, temperature=0.7)
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)
    assert not found.requires_grad
    assert not any(p.requires_grad for p in reference.model.parameters())


@pytest.mark.parametrize(
    ("batch_size", "longest"),
    # completions of at most 5, 3, 1, 4, 2, 5 tokens, prompts of 4 and 2: group 1 is the shorter
    [(6, [5]), (3, [5, 5]), (4, [5, 5]), (1, [2, 4, 5, 1, 3, 5])],
)
def test_reference_batches_are_groups_sorted_by_length(
    monkeypatch, model_dir, tiny_policy, make_rollout, batch_size, longest
):
    seen, prompts = [], []

    def spy(model, prompt_ids, prompt_mask, completion_ids, mask, **options):
        seen.append(int(mask.sum(1).max()))
        prompts.append(int(prompt_mask.sum(1).max()))
        assert options["group_size"] == (3 if batch_size >= 3 else 1)
        return completion_logprobs(model, prompt_ids, prompt_mask, completion_ids, mask, **options)

    reference = ReferencePolicy(device="cpu", batch_size=batch_size)
    reference.load(PolicyConfig(str(model_dir)), CPU)
    rollout = make_rollout()
    expected = completion_logprobs(
        tiny_policy,
        rollout.prompt_ids,
        rollout.prompt_mask,
        rollout.completion_ids,
        rollout.mask,
    ).logprobs
    monkeypatch.setattr("gspo_lightning.logprobs.completion_logprobs", spy)
    found = reference.logprobs(rollout, temperature=1.0)
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)  # in the old order
    assert sorted(seen) == sorted(longest)
    assert prompts == sorted(prompts) and prompts[-1] == 4


def test_reference_has_its_own_path_and_dtype(model_dir, tmp_path, make_model, tokenizer):
    other = make_model("qwen3", seed=5)
    other.save_pretrained(tmp_path)
    reference = ReferencePolicy(path=str(tmp_path), device="cpu", dtype="bfloat16")
    reference.load(PolicyConfig(str(model_dir)), CPU)
    assert {p.dtype for p in reference.model.parameters()} == {torch.bfloat16}
    assert fingerprint(reference.model) == fingerprint(other.to(torch.bfloat16))


def test_a_random_policy_has_no_start_to_refer_to(model_dir):
    with pytest.raises(ValueError, match=r"reference.path: a policy with random weights"):
        ReferencePolicy(device="cpu").load(PolicyConfig(str(model_dir), weights="random"), CPU)


def test_devices_are_checked_before_any_weight_is_read(monkeypatch, model_dir):
    see_cards(monkeypatch, 0)
    frozen = FrozenModels(
        ReferencePolicy(), {"model.rewards.taste.fn": RewardModel("nowhere", "cuda:1")}
    )
    with pytest.raises(ValueError, match=r"model.rewards.taste.fn.device is cuda:1, but"):
        frozen.load(PolicyConfig(str(model_dir)), CPU, with_reference=True)


def test_a_changed_model_is_noticed(model_dir, tiny_policy):
    frozen = FrozenModels(ReferencePolicy(device="cpu"), {})
    frozen.load(PolicyConfig(str(model_dir)), CPU, with_reference=True)
    marks = frozen.fingerprints()
    with torch.no_grad():
        tiny_policy.get_input_embeddings().weight[0, 0] += 1e-3
    changed = {"model.reference": fingerprint(tiny_policy)}
    assert changed != marks
    frozen.release()
    assert frozen.fingerprints() == {}


# --- reward models -------------------------------------------------------------------------------


@pytest.fixture
def reward_dir(tmp_path, tokenizer):
    return save_reward_model(tmp_path / "reward", tokenizer, num_labels=1)


ROWS = [{"prompt": "1+2="}, {"prompt": "1+2+3+4="}, {"prompt": "7="}]
TEXTS = ["answer: 3", "1+2=3, answer: 10", "7"]


def load(path, **options):
    model = RewardModel(path, device="cpu", **options)
    model.load(CPU)
    return model


def test_scores_are_those_of_one_text_at_a_time(reward_dir, tokenizer):
    model = load(reward_dir, batch_size=2)
    expected = []
    for row, text in zip(ROWS, TEXTS, strict=True):
        ids = torch.tensor([tokenizer(row["prompt"] + " " + text)["input_ids"]])
        expected.append(model.model(input_ids=ids).logits[0, 0].item())
    assert model(ROWS, TEXTS) == pytest.approx(expected, abs=1e-5)


def test_without_a_pad_token_the_scores_are_the_same(reward_dir):
    expected = load(reward_dir)(ROWS, TEXTS)
    model = load(reward_dir)
    model.tokenizer.pad_token = None
    model.model.config.pad_token_id = None
    assert model(ROWS, TEXTS) == pytest.approx(expected, abs=1e-5)


def test_a_score_does_not_depend_on_the_texts_before(tmp_path, tokenizer):
    """Dynamic scaling keeps the frequencies of the longest text so far."""
    path = Path(save_reward_model(tmp_path, tokenizer, num_labels=1))
    config = AutoConfig.from_pretrained(path)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    config.max_position_embeddings = 8
    config.save_pretrained(path)
    model = load(path)
    model.max_tokens = 64  # beyond where scaling begins
    rows = [{"prompt": "1+2+3+4+5="}, {"prompt": "1+2+3+4+5+6+7+8="}]
    (first,) = model(rows[:1], ["15"])
    model(rows[1:], ["36"])
    assert model(rows[:1], ["15"]) == [first]


def test_a_model_that_asks_for_more_than_ids_scores_one_text_at_once(
    reward_dir, monkeypatch, caplog
):
    expected = load(reward_dir)(ROWS, TEXTS)
    score = RewardModel._score

    def choosy(self, encoded):
        if any(13 not in ids for ids in encoded):  # no plus sign
            raise ValueError("each text must hold a sum")
        return score(self, encoded)

    monkeypatch.setattr(RewardModel, "_score", choosy)
    model = load(reward_dir)
    assert model.batches == "alone" and "one text: each text must hold a sum" in caplog.text
    assert model(ROWS[:2], TEXTS[:2]) == pytest.approx(expected[:2], abs=1e-5)
    monkeypatch.setattr(RewardModel, "_score", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"cannot score a text \(ZeroDivisionError: division by"):
        load(reward_dir)


def test_separator_changes_the_text(reward_dir):
    assert load(reward_dir, separator="\n")(ROWS, TEXTS) != load(reward_dir)(ROWS, TEXTS)


def test_a_label_must_be_chosen_among_several(tmp_path, tokenizer):
    path = save_reward_model(tmp_path / "three", tokenizer, num_labels=3)
    with pytest.raises(ValueError, match="has 3 labels; set label to one"):
        load(path)
    with pytest.raises(ValueError, match="label 3 is not among the 3"):
        load(path, label=3)
    assert load(path, label=0)(ROWS, TEXTS) != load(path, label=2)(ROWS, TEXTS)


TEMPLATE = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}"


def chat_dir(path, tokenizer):
    """A reward model whose tokenizer has a chat template; letters are all unknown to it."""
    tokenizer = copy.deepcopy(tokenizer)  # one that adds tokens of its own to plain texts
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 1)]
    )
    folder = save_reward_model(path, tokenizer, num_labels=1)
    file = Path(folder, "tokenizer_config.json")
    config = json.loads(file.read_text()) | {"chat_template": TEMPLATE}
    file.write_text(json.dumps(config))
    return folder


def alone(model, text, **options):
    """The score of one text, by a plain forward pass."""
    ids = torch.tensor([model.tokenizer(text, **options)["input_ids"]])
    return model.model(input_ids=ids).logits[0, 0].item()


def test_a_chat_template_renders_prompt_and_completion(tmp_path, tokenizer):
    model = load(chat_dir(tmp_path / "chat", tokenizer), chat_template=True, batch_size=2)
    expected = [
        alone(model, f"u: {row['prompt']}\na: {text}\n", add_special_tokens=False)
        for row, text in zip(ROWS, TEXTS, strict=True)
    ]
    assert model(ROWS, TEXTS) == pytest.approx(expected, abs=1e-5)
    assert load(model.path)(ROWS, TEXTS) != pytest.approx(expected, abs=1e-3)


def test_a_chat_template_takes_a_list_of_messages(tmp_path, tokenizer):
    model = load(chat_dir(tmp_path / "chat", tokenizer), chat_template=True)
    messages = [{"role": "system", "content": "1"}, {"role": "user", "content": "2+2="}]
    expected = alone(model, "s: 1\nu: 2+2=\na: 4\n", add_special_tokens=False)
    assert model([{"prompt": messages}], ["4"]) == pytest.approx([expected], abs=1e-5)
    plain = load(model.path)
    with pytest.raises(ValueError, match="a list of chat messages, which needs chat_template"):
        plain([{"prompt": messages}], ["4"])


def test_a_begun_answer_and_its_end_are_one_turn_and_no_message_gets_lost(tmp_path, tokenizer):
    model = load(chat_dir(tmp_path / "chat", tokenizer), chat_template=True)
    asked = {
        "role": "user",
        "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2="}],
    }
    messages = [asked, {"role": "assistant", "content": "1+"}]
    expected = alone(model, "u: 2+2=\na: 1+3\n", add_special_tokens=False)
    assert model([{"prompt": messages}], ["3"]) == pytest.approx([expected], abs=1e-5)
    model.tokenizer.chat_template = TEMPLATE.replace("in messages", "in messages[-1:]")
    model.chat = Chat(model.tokenizer)
    with pytest.raises(ValueError, match=r"cannot read column 'prompt': .* of message 1, of role"):
        model([{"prompt": "2+2="}], ["4"])


def test_a_chat_template_that_is_not_there_is_one_line_before_training(tmp_path, reward_dir):
    term = RewardModel(reward_dir, device="cpu", chat_template=True)
    message = r"^model.rewards.taste.fn: chat_template of .* is true, but the tokenizer has no chat"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, reward_dir, rewards={"taste": RewardTerm(term)})


def test_several_labels_without_a_choice_name_the_term_before_training(
    tmp_path, model_dir, tokenizer
):
    path = save_reward_model(tmp_path / "three", tokenizer, num_labels=3)
    rewards = {"taste": RewardTerm(RewardModel(path, device="cpu"))}
    with pytest.raises(ValueError, match=r"^model.rewards.taste.fn: .* has 3 labels; set label"):
        run(tmp_path, model_dir, rewards=rewards)


def test_a_model_without_a_trained_head_is_refused(model_dir):
    with pytest.raises(ValueError, match=r"no trained sequence classifier: .* for score.weight"):
        load(str(model_dir))


def test_a_text_that_is_too_long_loses_its_beginning_if_asked(reward_dir):
    long = "+".join("123456789" * 2) + "="  # 36 tokens, of which the model reads 32
    model = load(reward_dir, overlong="truncate_left")
    rows = [*ROWS, {"prompt": long}]
    text = f"{long} answer: 9"
    ids = model.tokenizer(text)["input_ids"]
    assert len(ids) > 32
    expected = model.model(input_ids=torch.tensor([ids[-32:]])).logits[0, 0].item()
    scores = model(rows, [*TEXTS, "answer: 9"])
    assert scores[3] == pytest.approx(expected, abs=1e-5)
    assert scores[:3] == pytest.approx(load(reward_dir)(ROWS, TEXTS), abs=1e-5)
    assert model.counts == {"truncated": 1}
    model(ROWS, TEXTS)
    assert model.counts == {"truncated": 0}


def test_max_tokens_is_a_limit_of_ones_own(reward_dir):
    model = load(reward_dir, overlong="truncate_left", max_tokens=3)
    ids = model.tokenizer("1+2= answer: 3")["input_ids"][-3:]
    expected = model.model(input_ids=torch.tensor([ids])).logits[0, 0].item()
    assert model(ROWS[:1], TEXTS[:1]) == pytest.approx([expected], abs=1e-5)
    with pytest.raises(ValueError, match=r"reads 3 tokens, a text has 7.*or set its overlong to"):
        load(reward_dir, max_tokens=3)(ROWS[:1], TEXTS[:1])
    with pytest.raises(ValueError, match="max_tokens 33 is more than the 32 tokens"):
        load(reward_dir, max_tokens=33)


def test_a_run_logs_how_many_texts_were_cut(tmp_path, model_dir, reward_dir):
    term = RewardModel(reward_dir, device="cpu", overlong="truncate_left", max_tokens=8)
    (outputs,) = outputs_of(tmp_path, model_dir, rewards={"taste": RewardTerm(term)})
    tokenizer = AutoTokenizer.from_pretrained(reward_dir)
    rollout = outputs["rollout"]
    lengths = [
        len(tokenizer(f"{row['prompt']} {text}")["input_ids"])
        for row, text in zip(rollout.rows, rollout.texts, strict=True)
    ]
    cut = sum(length > 8 for length in lengths)
    assert 0 < cut < 16
    assert outputs["metrics"]["reward/taste_truncated"] == cut


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_scores_of_other_architectures_are_those_of_one_text_at_a_time(
    tmp_path, tokenizer, architecture
):
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"initializer_range": 0.3, "num_labels": 1, "pad_token_id": 0, "intermediate_size": 32}
    config = AutoConfig.for_model(architecture, **sizes)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load(str(tmp_path), batch_size=3)
    pairs = zip(ROWS, TEXTS, strict=True)
    expected = [alone(model, f"{row['prompt']} {text}") for row, text in pairs]
    assert model(ROWS, TEXTS) == pytest.approx(expected, abs=1e-5)


def test_scores_do_not_depend_on_a_rotary_embedding_of_the_longest_text(tmp_path, tokenizer):
    """Texts of 5, 7 and 12 tokens; beyond 9 the frequencies are others."""
    parameters = {"rope_type": "longrope", "rope_theta": 10_000.0, "factor": 4.0}
    parameters |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    parameters |= {"original_max_position_embeddings": 9}
    config = build_model("llama", rope_parameters=parameters, num_labels=1).config
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts, rows = ["3", "1+2+3+4+", "3+4", "56789+12"], [{"prompt": "1+2="}] * 4
    scorer = load(str(tmp_path), separator="")
    assert rotary_limit(scorer.model) == 9
    expected = [load(str(tmp_path), separator="")(rows[:1], [text])[0] for text in texts]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0]):
        found = scorer([rows[i] for i in order], [texts[i] for i in order])
        assert found == pytest.approx([expected[i] for i in order], abs=1e-5)


REMOTE = """
import torch
from transformers import PreTrainedModel, Qwen3Config


class OwnConfig(Qwen3Config):
    model_type = "own"


class Own(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.own_head = torch.nn.Linear(2, 1)
        self.post_init()
"""


def test_code_beside_the_weights_runs_only_if_asked(monkeypatch, tmp_path, reward_dir):
    modules = tmp_path / "modules"  # else such code is copied to the home folder
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    file = Path(reward_dir, "config.json")
    config = json.loads(file.read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.Own"}
    file.write_text(json.dumps(config | {"auto_map": auto, "model_type": "own"}))
    Path(reward_dir, "own.py").write_text(REMOTE)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(reward_dir)
    with pytest.raises(ValueError, match="it has no weights for own_head"):  # the code ran
        load(reward_dir, trust_remote_code=True)


def test_revision_is_asked_for(monkeypatch, reward_dir):
    asked = []

    def remember(self, **options):
        asked.append(options)
        raise ValueError("enough")

    monkeypatch.setattr("gspo_lightning.policy.folder.AutoTokenizer.from_pretrained", remember)
    for options in ({}, {"revision": "v2"}):
        with pytest.raises(ValueError, match="enough"):
            load(reward_dir, **options)
    assert [options["revision"] for options in asked] == [None, "v2"]
    assert not any(options["trust_remote_code"] for options in asked)


@pytest.mark.parametrize("name", ["batch_size", "max_tokens"])
def test_a_bad_argument_of_a_reward_model_is_named(name):
    with pytest.raises(ValueError, match=f"a reward model's {name} must be >= 1, got 0"):
        RewardModel("somewhere", **{name: 0})


def test_a_text_that_the_reward_model_cannot_read_is_an_error(reward_dir):
    with pytest.raises(ValueError, match=r"reads 32 tokens, a text has 4[0-9]"):
        load(reward_dir)(ROWS[:1], ["1" * 40])


def test_a_row_without_prompt_text_is_an_error(reward_dir):
    with pytest.raises(ValueError, match=r"reads the text in column 'prompt'; a row has \['q'\]"):
        load(reward_dir)([{"q": "1"}], ["1"])


# ---- a reference that follows the policy


def test_a_reference_moves_towards_the_policy_every_so_many_steps():
    """0.75 * 2 + 0.25 * 1 = 1.75."""
    reference = ReferencePolicy(device="cpu", sync=ReferenceSync(mixup=0.75, every=4))
    reference.model, policy = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for model, value in ((reference.model, 1.0), (policy, 2.0)):
        for parameter in model.parameters():
            parameter.data.fill_(value)
    for steps in (1, 3, 5):
        reference.follow(policy, steps)
        assert reference.model.weight.item() == 1.0
    reference.follow(policy, 8)
    assert reference.model.weight.item() == 1.75 and policy.weight.item() == 2.0
    saved = reference.state()
    reference.follow(policy, 12)
    reference.load_state(saved)
    assert reference.model.weight.item() == 1.75
    assert ReferencePolicy(device="cpu").state() is None  # one that keeps still is in no checkpoint


def test_a_reference_that_cannot_follow_is_refused():
    reference = ReferencePolicy(device="cpu", path=None, sync=ReferenceSync())
    with pytest.raises(ValueError, match=r"reference\.sync needs the whole policy on each rank"):
        check_sync(reference, cut=True)
    check_sync(ReferencePolicy(device="cpu"), cut=True)
    check_sync(reference, cut=False)
    reference.model = torch.nn.Linear(1, 2)
    with pytest.raises(ValueError, match="cannot follow the policy, as bias is of another shape"):
        reference.check_follows(torch.nn.Linear(1, 3))
    with pytest.raises(ValueError, match=r"reference.sync.mixup must be in \(0, 1\], got 1.5"):
        ReferenceSync(mixup=1.5)
    with pytest.raises(ValueError, match=r"sync\.every must be >= 1, got 0"):
        ReferenceSync(every=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("relative", object(), object()), "set model.critic.kl_in_reward"),
        (("relative", None, None), "needs something to compare; set model.reference"),
        (
            ("normalized", None, object()),
            "kl_in_reward with advantages normalized",
        ),
        (("pass_at_k", None, object()), "kl_in_reward with advantages pass_at_k"),
    ],
)
def test_a_penalty_in_the_rewards_that_could_not_do_what_it_says_is_refused(given, message):
    check_kl_in_reward(False, *given)
    with pytest.raises(ValueError, match=message):
        check_kl_in_reward(True, *given)
    check_kl_in_reward(True, "leave_one_out", None, object())
