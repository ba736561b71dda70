"""What must hold for every family of models, on tiny random instances.

Windows are shorter than the texts, logits are capped or scaled, positions are learned, experts are
chosen by token: all that could make a prompt that is shared, padded or cached mean something else.
"""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from gspo_lightning.data.prompts import PromptData
from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.policy.policy import Policy, PolicyConfig, checkpoint_activations, load_policy
from gspo_lightning.rollout import PromptBatch
from gspo_lightning.sampling import GroupSampler
from support.model_configs import config_of
from support.observers import Outputs
from support.passes import inputs, loop, tokens_of_passes
from support.tiny_run import make_module, make_trainer, run

# the six of the promise
PROMISED = ("qwen3", "llama", "gpt2", "gemma2", "mistral", "qwen3_moe")
# scaled logits (two ways), attention sinks; recurrent layers of two kinds
FURTHER = ("cohere", "granite", "gpt_oss")
HYBRID = ("qwen3_next", "lfm2")
EVERY = (*PROMISED, *FURTHER, *HYBRID)
TRAINED = (*PROMISED, "granite", "qwen3_next")


@pytest.fixture(params=EVERY)
def model(request, make_model):
    return make_model(request.param)


def save(model, tokenizer, path):
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def gradient_of(model, rollout, **options):
    model.zero_grad()
    result = completion_logprobs(model, *inputs(rollout), with_entropy=True, **options)
    (result.logprobs.exp().sum() + (result.entropy**2).sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def prompts_of(rollout):
    """The P = 2 prompts of unequal length, padded on the left by 5 more."""
    ids = torch.nn.functional.pad(rollout.prompt_ids[::3], (5, 0))
    mask = torch.nn.functional.pad(rollout.prompt_mask[::3], (5, 0))
    return PromptBatch(ids, mask, [{"i": 0}, {"i": 1}])


# --- log-probs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [1, 3])
def test_logprobs_are_those_of_plain_forward_passes(model, make_rollout, group_size):
    """One row and one token at a time, without padding and without cache; float32."""
    rollout = make_rollout()
    expected, entropy = loop(model, rollout, temperature=0.7)
    assert expected[rollout.mask].std() > 0.1  # logits that differ, or nothing is tested
    model.train()
    result = completion_logprobs(
        model, *inputs(rollout), temperature=0.7, group_size=group_size, with_entropy=True
    )
    torch.testing.assert_close(result.logprobs.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.entropy.double(), entropy, atol=1e-5, rtol=0)


def test_a_longer_prompt_in_the_batch_changes_nothing(model, make_rollout):
    rollout = make_rollout()
    ids, mask, completion_ids, keep = inputs(rollout)
    alone = completion_logprobs(model, ids, mask, completion_ids, keep, group_size=3).logprobs
    long_ids = torch.arange(3, 14).expand(3, -1)
    pad = torch.nn.functional.pad
    together = completion_logprobs(
        model,
        torch.cat([pad(ids, (7, 0)), long_ids]),
        torch.cat([pad(mask, (7, 0)), torch.ones(3, 11, dtype=torch.bool)]),
        torch.cat([completion_ids, completion_ids[:3]]),
        torch.cat([keep, keep[:3]]),
        group_size=3,
    ).logprobs
    torch.testing.assert_close(together[:6], alone, atol=1e-5, rtol=0)


def test_gradients_do_not_depend_on_sharing_the_prompt(model, make_rollout):
    """A cache that is written in place would cut the gradient or make it wrong."""
    rollout = make_rollout()
    plain = gradient_of(model, rollout)
    shared = gradient_of(model, rollout, group_size=3)
    assert plain.keys() == shared.keys()
    largest = max(value.abs().max().item() for value in plain.values())
    for name, value in plain.items():
        error = (shared[name] - value).abs().max().item()
        assert error < 1e-5 * largest, name  # float32


@pytest.mark.parametrize(
    ("architecture", "passes"),
    [
        *((name, [2 * 3, 6 * 5]) for name in (*PROMISED, *FURTHER)),
        *((name, [2 * 3, 6 * 8]) for name in HYBRID),  # the prompt showed a recurrent state
    ],
)
def test_a_prompt_is_shared_unless_the_model_is_recurrent(
    make_model, make_rollout, architecture, passes
):
    model, rollout = make_model(architecture), make_rollout()
    assert tokens_of_passes(model, rollout, group_size=3) == passes


def test_while_activations_are_checkpointed_the_prompt_is_not_read_in_vain(
    make_model, make_rollout
):
    """Models drop their cache then, so there is nothing to share."""
    model, rollout = make_model("qwen3").train(), make_rollout()
    checkpoint_activations(model)
    assert tokens_of_passes(model, rollout, group_size=3) == [6 * 8]


# --- rollouts ------------------------------------------------------------------------------------


def test_greedy_completions_are_those_of_plain_forward_passes(model, make_rollout, tokenizer):
    """Through cache, repeated prompt, padding and rows that leave the batch."""
    policy = Policy(model, tokenizer)
    samples = GroupSampler(2, 9, temperature=0.0).sample(policy, prompts_of(make_rollout()), seed=0)
    with torch.no_grad():
        for i in (0, 3):
            ids = samples.prompt_ids[i][samples.prompt_mask[i]]
            for token in samples.completion_ids[i][samples.mask[i]]:
                assert model(ids[None]).logits[0, -1].argmax() == token
                ids = torch.cat([ids, token[None]])


def test_rows_that_leave_the_batch_do_not_change_the_others(model, make_rollout, tokenizer):
    policy = Policy(model, tokenizer)
    policy.eos_ids = [1, 5, 9, 13, 17, 21]  # rows end early, at different lengths
    batch = prompts_of(make_rollout())
    whole = GroupSampler(6, 9).sample(policy, batch, seed=7)
    assert len(set(whole.mask.sum(1).tolist())) > 2
    single = GroupSampler(6, 9, batch_size=1).sample(policy, batch, seed=7)
    assert torch.equal(whole.completion_ids[whole.mask], single.completion_ids[single.mask])


def test_gradient_checkpointing_keeps_the_cache_in_rollouts(model, make_rollout, tokenizer):
    policy, batch = Policy(model, tokenizer), prompts_of(make_rollout())
    plain = GroupSampler(3, 9).sample(policy, batch, seed=0)
    checkpoint_activations(model)
    policy.train()
    seen = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    again = GroupSampler(3, 9).sample(policy, batch, seed=0)
    assert torch.equal(plain.completion_ids, again.completion_ids)
    assert max(seen[1:]) <= 6  # one new token a row and step: the rest was in the cache


@pytest.mark.parametrize("architecture", TRAINED)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_ratios_are_one_before_the_first_step(
    tmp_path, make_model, tokenizer, architecture, gradient_checkpointing
):
    """Fact 18: one rollout and one step, of a whole module."""
    path = save(make_model(architecture), tokenizer, tmp_path / architecture)
    keep = Outputs()
    run(
        tmp_path,
        path,
        1,
        [keep],
        policy=PolicyConfig(str(path), gradient_checkpointing=gradient_checkpointing),
        num_minibatches=1,
        micro_batch_size=4,
        old_logprobs="recompute",
    )
    (outputs,) = keep.all
    assert torch.equal(outputs["ratios"], torch.ones(16))
    assert outputs["metrics"]["policy/ratio_noise"] == 0.0
    assert outputs["metrics"]["policy/grad_norm"] > 0


def test_models_without_a_key_value_cache_are_refused(
    tmp_path, make_model, make_rollout, tokenizer
):
    path = save(make_model("mamba"), tokenizer, tmp_path / "mamba")
    with pytest.raises(ValueError, match="MambaForCausalLM takes no past_key_values; only"):
        load_policy(PolicyConfig(str(path)))
    # takes one and gives none, which only shows when it runs
    policy = Policy(make_model("recurrent_gemma"), tokenizer)
    with pytest.raises(ValueError, match="cannot be sampled from: it gives no past_key_values"):
        GroupSampler(2, 4).sample(policy, prompts_of(make_rollout()), seed=0)


def test_a_model_that_cannot_recompute_its_activations_says_which_setting(tmp_path, tokenizer):
    model = AutoModelForCausalLM.from_config(config_of("ctrl"))
    model.generation_config.eos_token_id = 1
    path = save(model, tokenizer, tmp_path / "ctrl")
    with pytest.raises(
        ValueError, match="gradient_checkpointing: CTRLLMHeadModel cannot recompute"
    ):
        load_policy(PolicyConfig(str(path), gradient_checkpointing=True))


# --- what a policy folder may be like ------------------------------------------------------------


def rollout_of(tmp_path, path, **options):
    keep = Outputs()
    module = run(tmp_path, path, 2, [keep], **options)
    return module, keep.all[0]


def test_several_end_of_sequence_ids_end_rollouts(tmp_path, make_model, tokenizer):
    model = make_model("qwen3")
    model.generation_config.eos_token_id = [1, 4, 9]
    module, outputs = rollout_of(tmp_path, save(model, tokenizer, tmp_path / "p"))
    rollout = outputs["rollout"]
    last = rollout.completion_ids.gather(1, rollout.mask.sum(1, keepdim=True) - 1)[:, 0]
    assert set(last[rollout.finished].tolist()) <= {1, 4, 9}
    assert len(set(last[rollout.finished].tolist())) > 1
    module.policy.export(tmp_path / "out")
    again = load_policy(PolicyConfig(str(tmp_path / "out")))
    assert again.eos_ids == [1, 4, 9]  # an export ends where the policy did


@pytest.mark.parametrize("pad", ["<eos>", None])
def test_padding_that_is_no_token_of_its_own_changes_no_rollout(
    tmp_path, make_model, tokenizer, pad
):
    """Pad == EOS, and no pad token at all: masks come from lengths, never from ids."""
    changed = copy.deepcopy(tokenizer)
    changed.pad_token = pad
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    usual = save(make_model("qwen3"), tokenizer, tmp_path / "usual")
    other = save(make_model("qwen3"), changed, tmp_path / "other")
    passes = {"old_logprobs": "recompute"}
    _, expected = rollout_of(tmp_path / "a", usual, **passes)
    module, found = rollout_of(tmp_path / "b", other, **passes)
    assert module.policy.pad_id == 1
    assert found["rollout"].texts == expected["rollout"].texts
    assert torch.equal(found["rollout"].mask, expected["rollout"].mask)
    assert torch.equal(found["rollout"].old_logprobs, expected["rollout"].old_logprobs)
    assert found["metrics"]["policy/grad_norm"] == expected["metrics"]["policy/grad_norm"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_trained_once_and_exported_as_it_is(tmp_path, make_model, tokenizer, tied):
    """Tied: one tensor in the optimizer and in the export; untied: two that move apart."""
    path = save(make_model("llama", tie_word_embeddings=tied), tokenizer, tmp_path / "p")
    module, _ = rollout_of(tmp_path, path)
    trained = [id(p) for g in module.configure_optimizers().param_groups for p in g["params"]]
    model = module.policy.model
    assert len(trained) == len(set(trained)) == len(list(model.parameters()))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    module.policy.export(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_prompts_go_through_the_chat_template(tmp_path, make_model, tokenizer):
    """The policy sees the template's tokens, with the opening of its own turn behind them."""
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}*{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}-{% endif %}"
    )
    path = save(make_model("qwen3"), chatty, tmp_path / "p")
    prompts = tmp_path / "chat.jsonl"
    prompts.write_text('{"prompt": "1+2="}\n{"prompt": [{"role": "user", "content": "7="}]}\n')
    keep = Outputs()
    data = PromptData(str(prompts), prompts_per_rollout=2, num_rollouts=1, chat_template=True)
    make_trainer(tmp_path, callbacks=[keep]).fit(make_module(path), data)
    rollout = keep.all[0]["rollout"]
    pairs = zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
    found = {tokenizer.decode(ids[mask].tolist()) for ids, mask in pairs}
    assert found == {"*1+2=\n-", "*7=\n-"}
