"""What a model is tried for: every way against plain passes, and what a fault leads to."""

import copy
import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gspo_lightning.critic.critic import CriticConfig
from gspo_lightning.engine import probe
from gspo_lightning.engine.attention import open_attention
from gspo_lightning.engine.mode import mode_kept, raise_flags
from gspo_lightning.engine.rotary import fix_rotary, rotary_limit
from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.objectives import Objective
from gspo_lightning.policy.policy import Policy, checkpoint_activations, make_ready
from gspo_lightning.sampling import GroupSampler
from support.model_configs import config_of
from support.observers import Outputs
from support.passes import inputs, loop
from support.prompts import PROMPTS, batch_of
from support.tiny_run import run

CPU = torch.device("cpu")
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 9,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}


RECOMPUTING = {False: set(), True: {"MixtralModel", "MixtralDecoderLayer"}}


def ready(model):
    make_ready(model)
    open_attention(model)
    return model


@pytest.fixture
def llama(make_model):
    return ready(make_model("llama"))


def samples_and_plain_logprobs(model, tokenizer):
    """Completions of prompts of unlike lengths; their log-probs by the sampler and one by one."""
    samples = GroupSampler(3, 6).sample(Policy(model, tokenizer), batch_of(PROMPTS), seed=3)
    return samples, loop(model, samples)[0]


# --- ways ----------------------------------------------------------------------------------------


def test_a_plain_model_is_run_in_the_best_ways_and_nothing_is_said(llama, caplog):
    with caplog.at_level(logging.WARNING, "gspo_lightning"):
        assert probe.reading(llama, CPU) == "packed"
        assert probe.reading(llama, CPU, packed=False) == "shared"
        assert probe.decoding(llama, CPU) == "grouped"
    assert not caplog.messages
    assert probe.plainer_ways(llama, CPU, sampled=True) == []


def test_a_window_that_only_the_model_knows_of_is_found(make_model, tokenizer):
    """Doge's window is in its mask alone, and far longer than any text that a trial could have."""
    model = make_model("doge", sliding_window=4096, max_position_embeddings=8192)
    ready(model)
    assert probe.reading(model, CPU) == "shared"
    assert "packed rows give other values" in probe.plainer_ways(model, CPU, sampled=False)[0]
    assert model.config.sliding_window == 4096  # as before
    samples, plain = samples_and_plain_logprobs(model, tokenizer)
    torch.testing.assert_close(samples.logprobs.double(), plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("longest", "ways"), [(20, ["shared", "batched"]), (21, ["alone"] * 2)])
def test_scores_that_are_scaled_from_a_place_in_the_row_on_are_tried_where_texts_reach_it(
    longest, ways
):
    """Llama 4 counts the places of a row, padding included, in layers without positions."""
    config = config_of("llama4_text")
    config.no_rope_layers, config.floor_scale, config.attn_scale = [0, 0], 20, 3.0
    model = ready(AutoModelForCausalLM.from_config(config))
    fix_rotary(model, longest)
    assert [probe.reading(model, CPU), probe.decoding(model, CPU)] == ways
    assert model.config.floor_scale == 20  # as before


@pytest.mark.parametrize(
    ("kind", "way"),
    [("positions by place", "alone"), ("neighbours", "padded")],
)
def test_what_fails_takes_the_next_plainer_way(make_model, make_rollout, kind, way):
    """Positions counted along the row; a state that one row of a cache leaves to the next."""
    model = ready(make_model("gpt2"))
    forward = model.transformer.forward

    def by_place(*args, position_ids=None, **kwargs):
        return forward(*args, **kwargs)

    def neighbours(*args, past_key_values=None, attend=None, **kwargs):
        if attend is not None or (past_key_values and past_key_values.get_seq_length()):
            raise KeyError("a state of one row")
        return forward(*args, past_key_values=past_key_values, **kwargs)

    model.transformer.forward = by_place if kind == "positions by place" else neighbours
    assert probe.reading(model, CPU) == way
    rollout = make_rollout()
    found = completion_logprobs(model, *inputs(rollout), group_size=3).logprobs
    torch.testing.assert_close(found.double(), loop(model, rollout)[0], atol=1e-5, rtol=0)


def test_a_gradient_that_does_not_pass_from_token_to_token_is_seen(llama):
    """The values are right: keys and values of a cache written in place have no gradient."""
    layer = llama.model.layers[1].self_attn
    forward = layer.k_proj.forward
    layer.k_proj.forward = lambda x: (
        forward(x).detach() if x.shape[0] == 1 < x.shape[1] > 20 else forward(x)
    )
    assert probe.reading(llama, CPU) == "shared"
    (reason,) = probe.plainer_ways(llama, CPU, sampled=False)
    assert "packed rows give other gradients" in reason


def test_single_rows_have_the_same_log_probs_and_gradients(llama, make_rollout, monkeypatch):
    rollout = make_rollout()
    results = []
    for way in ("packed", "alone"):
        monkeypatch.setattr("gspo_lightning.engine.states.reading", lambda *a, way=way, **k: way)
        llama.zero_grad()
        found = completion_logprobs(llama, *inputs(rollout), temperature=0.7, with_entropy=True)
        (found.logprobs.exp().sum() + found.entropy.sum()).backward()
        results.append([*found, *(p.grad.clone() for p in llama.parameters())])
    for packed, alone in zip(*results, strict=True):
        torch.testing.assert_close(packed, alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", [1, 7])
def test_padding_that_decoding_sees_is_found_whatever_is_drawn(make_model, seed):
    """Rows of both prompts draw more than one token: a first token comes from the prompt's pass."""
    model = ready(make_model("llama", seed))
    model._supports_attention_backend = False
    forward = model.model.forward

    def unmasked(*args, attention_mask=None, past_key_values=None, **kwargs):
        if past_key_values is not None and past_key_values.get_seq_length():
            attention_mask = attention_mask if attention_mask is None else attention_mask * 0 + 1
        options = {"attention_mask": attention_mask, "past_key_values": past_key_values}
        return forward(*args, **options, **kwargs)

    model.model.forward = unmasked
    model.config._attn_implementation = "sdpa"
    assert probe.decoding(model, CPU) == "alone"


def test_rows_of_a_trial_end_at_their_lengths_and_leave_a_place(llama, monkeypatch):
    """Others come in and move up, in the one and in the other decoder."""
    drawn = []
    gap = probe._gap
    monkeypatch.setattr(probe, "_gap", lambda *args: drawn.append(len(args[0])) or gap(*args))
    assert probe.decoding(llama, CPU) == "grouped"
    assert drawn == [sum(probe.COMPLETIONS)]


def test_a_pad_token_that_a_model_does_not_embed_is_in_no_text(make_model):
    model = ready(make_model("gpt2"))
    model.config.pad_token_id = 32
    assert probe.reading(model, CPU) == "packed"


def test_a_state_that_rows_cannot_share_is_no_short_memory(llama):
    """What torch says of a tensor that is written in place, where rows are one row repeated."""
    forward = llama.model.forward

    def in_place(*args, past_key_values=None, attend=None, **kwargs):
        if attend is not None or (past_key_values and past_key_values.get_seq_length()):
            torch.zeros(1, 3).expand(2, 3).add_(1)
        return forward(*args, past_key_values=past_key_values, **kwargs)

    llama.model.forward = in_place
    assert probe.reading(llama, CPU) == "padded"


def test_memory_that_is_short_says_nothing_about_a_model(llama):
    def full(*args, **kwargs):
        raise RuntimeError("CUDA out of memory")

    llama.model.forward = full
    with pytest.raises(RuntimeError, match="out of memory"):
        probe.reading(llama, CPU)


# --- refusals ------------------------------------------------------------------------------------


def test_a_model_that_is_random_is_refused(llama):
    norm = llama.model.norm
    forward = norm.forward
    norm.forward = lambda x: forward(x) * (1 + 0.1 * torch.rand(()))
    with pytest.raises(ValueError, match="LlamaForCausalLM is random: the same text has other"):
        probe.reading(llama, CPU)


def test_a_model_whose_tokens_see_what_follows_is_refused(make_model):
    model = make_model("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="is no causal language model: its tokens see what fol"):
        probe.reading(ready(model), CPU)


def test_a_model_that_lacks_its_mask_on_short_texts_is_refused(make_model):
    """Doge of transformers 5.17: a text within the window was run without any mask."""
    model = ready(make_model("mistral", sliding_window=9))
    norm = model.model.norm
    forward = norm.forward

    def masked_behind_the_window(x):
        return forward(x if x.shape[1] > model.config.sliding_window else x + x.mean(1, True))

    norm.forward = masked_behind_the_window
    with pytest.raises(ValueError, match=r"no causal language model.* or a newer transformers"):
        probe.reading(model, CPU)


def test_a_model_that_cannot_read_a_text_is_refused_in_one_line(llama):
    llama.model.forward = lambda *args, **kwargs: {}["state"]
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM cannot be run on single rows \(KeyError"
    ):
        probe.reading(llama, CPU)


# --- one mode ------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [{"router_jitter_noise": 0.3}, {"attention_dropout": 0.3}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_train_mode_computes_what_eval_mode_does(make_model, make_rollout, option, checkpointing):
    options = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = ready(make_model("mixtral", **options, **option))
    if checkpointing:
        checkpoint_activations(model)
    rollout = make_rollout()
    expected = completion_logprobs(model.eval(), *inputs(rollout)).logprobs
    found = completion_logprobs(model.train(), *inputs(rollout)).logprobs
    assert model.training and torch.equal(found, expected)
    modes = {type(part).__name__ for part in model.modules() if part.training}
    assert modes == {"MixtralForCausalLM"} | RECOMPUTING[checkpointing]


@pytest.mark.parametrize(
    ("dropout", "axes"),
    [
        (torch.nn.Dropout, 3),
        (torch.nn.Dropout1d, 3),
        (torch.nn.Dropout2d, 4),
        (torch.nn.Dropout3d, 5),
        (torch.nn.AlphaDropout, 3),
        (torch.nn.FeatureAlphaDropout, 3),
    ],
)
def test_every_kind_of_dropout_is_off_in_whatever_mode(llama, make_rollout, dropout, axes):
    expected = completion_logprobs(llama, *inputs(make_rollout())).logprobs
    norm = llama.model.norm
    norm.noise, forward = dropout(0.5), norm.forward
    norm.forward = lambda x: norm.noise(forward(x)[(None,) * (axes - 3)]).view(x.shape)
    make_ready(llama)
    for part in llama.train().modules():
        part.training = True  # as of a layer that recomputes
    assert torch.equal(completion_logprobs(llama, *inputs(make_rollout())).logprobs, expected)


def test_dropout_of_a_layer_that_recomputes_is_off(make_model, make_rollout):
    """Dbrx calls the function with a rate of its own, in the layer that is in train mode."""
    attention = {"attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0}}
    experts = {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 2, "tie_word_embeddings": False}
    model = make_model("dbrx", **attention, ffn_config=experts, **sizes, resid_pdrop=0.5)
    checkpoint_activations(ready(model))
    rollout = make_rollout()
    expected = completion_logprobs(model.eval(), *inputs(rollout)).logprobs
    assert torch.equal(completion_logprobs(model.train(), *inputs(rollout)).logprobs, expected)


def test_parts_have_their_mode_back(llama):
    raise_flags(llama)
    with mode_kept(llama):
        llama.eval()
        assert not any(part.training for part in llama.modules())
    assert all(part.training for part in llama.modules())


def test_router_logits_of_a_config_are_left_out_and_exported(make_model, make_rollout, tmp_path):
    options = {"num_local_experts": 4, "num_experts_per_tok": 2}
    expected = ready(make_model("mixtral", **options))
    model = ready(make_model("mixtral", **options, output_router_logits=True))
    for packed in (True, False):
        results = [
            completion_logprobs(m, *inputs(make_rollout()), group_size=3, packed=packed).logprobs
            for m in (model, expected)
        ]
        assert torch.equal(*results)
    assert probe.plainer_ways(model, CPU, sampled=True) == []
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).output_router_logits is True


# --- rotary embeddings that depend on the length -------------------------------------------------


def rotary(make_model, architecture, parameters):
    options = {"max_position_embeddings": 36 if parameters is LONGROPE else 9}
    if architecture == "phi3":
        options["original_max_position_embeddings"] = 9
    # a copy: the config writes into what it is given
    return ready(make_model(architecture, rope_parameters={**parameters}, **options))


CASES = [("phi3", LONGROPE), ("llama", LONGROPE), ("llama", DYNAMIC)]


@pytest.mark.parametrize(("architecture", "parameters"), CASES)
def test_the_length_is_found_at_which_a_rotary_embedding_changes(
    make_model, architecture, parameters
):
    assert rotary_limit(rotary(make_model, architecture, parameters)) == 9
    assert rotary_limit(ready(make_model("llama"))) is None


@pytest.mark.parametrize(("architecture", "parameters"), CASES)
def test_up_to_that_length_texts_are_as_in_plain_passes_and_longer_ones_are_refused(
    make_model, make_rollout, architecture, parameters
):
    model, rollout = rotary(make_model, architecture, parameters), make_rollout()  # 4 + 5 tokens
    found = completion_logprobs(model, *inputs(rollout)).logprobs
    torch.testing.assert_close(found.double(), loop(model, rollout)[0], atol=1e-5, rtol=0)
    longer = torch.nn.functional.pad(rollout.prompt_ids, (1, 0), value=5)
    mask = torch.nn.functional.pad(rollout.prompt_mask, (1, 0), value=True)
    with pytest.raises(ValueError, match="is another one beyond 9 tokens, and a text here may hav"):
        completion_logprobs(model, longer, mask, rollout.completion_ids, rollout.mask)


@pytest.mark.parametrize(("architecture", "parameters"), CASES)
def test_beyond_it_all_texts_have_the_frequencies_of_the_longest(
    make_model, tokenizer, caplog, architecture, parameters
):
    """In sampling, log-probs and a plain pass alike, whatever else is in the batch."""
    model = rotary(make_model, architecture, parameters)
    short = loop_of_first(model)
    with caplog.at_level(logging.WARNING, "gspo_lightning"):
        fix_rotary(model, 11)
    (line,) = caplog.messages
    assert "beyond 9 tokens; texts here may have 11" in line
    samples, plain = samples_and_plain_logprobs(model, tokenizer)
    assert samples.prompt_mask.sum(1).max() + samples.mask.sum(1).max() > 9
    torch.testing.assert_close(samples.logprobs.double(), plain, atol=1e-5, rtol=0)
    for size in (1, 3, len(samples)):
        parts = [completion_logprobs(model, *inputs(part)) for part in samples.micro_batches(size)]
        found = torch.cat([part.logprobs for part in parts])
        torch.testing.assert_close(found.double(), plain, atol=1e-5, rtol=0)
    assert (loop_of_first(model) - short).abs().max() > 1e-3  # not those of a short text
    again = copy.deepcopy(model)
    assert torch.equal(loop_of_first(again), loop_of_first(model))


def test_texts_longer_than_the_longest_of_a_run_are_refused_until_it_is_told_of_them(
    make_model, make_rollout, caplog
):
    models = [rotary(make_model, "llama", DYNAMIC) for _ in range(2)]
    rollout = make_rollout()  # 4 + 5 tokens
    longer = torch.nn.functional.pad(rollout.prompt_ids, (3, 0), value=5)
    mask = torch.nn.functional.pad(rollout.prompt_mask, (3, 0), value=True)
    texts = longer, mask, rollout.completion_ids, rollout.mask
    with caplog.at_level(logging.WARNING, "gspo_lightning"):
        fix_rotary(models[0], 11, None, models[1])
        assert len(caplog.messages) == 1  # of two models of a kind
        with pytest.raises(ValueError, match="another one beyond 11 tokens, and a text here may h"):
            completion_logprobs(models[1], *texts)
        completion_logprobs(models[1], *(x[3:] for x in texts))  # 12 columns, 10 tokens
        fix_rotary(models[1], 12)
    assert "beyond 9 tokens; texts here may have 12" in caplog.messages[1]
    alone = [completion_logprobs(models[1], *(x[i : i + 1] for x in texts)) for i in range(6)]
    found = completion_logprobs(models[1], *texts).logprobs
    torch.testing.assert_close(found, torch.cat([x.logprobs for x in alone]), atol=1e-5, rtol=0)


def test_a_rotary_embedding_of_a_models_own_code_needs_no_config(llama):
    del llama.model.rotary_emb.config
    assert rotary_limit(llama) is None


def loop_of_first(model):
    with torch.no_grad():
        return model(torch.tensor([[3, 4, 5, 6, 7, 8]]), use_cache=False).logits


def test_a_long_text_alone_is_what_transformers_computes_for_it(make_model):
    """The frequencies of a run whose longest text has 12 tokens are those of such a text."""
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        for architecture, parameters in CASES:
            expected = rotary(make_model, architecture, parameters)(ids, use_cache=False).logits
            model = rotary(make_model, architecture, parameters)
            fix_rotary(model, 12)
            found = model(ids, use_cache=False).logits
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_policy_reference_and_critic_of_a_run_have_the_same_frequencies(
    make_model, tokenizer, tmp_path
):
    model = rotary(make_model, "phi3", LONGROPE)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    keep = Outputs()
    module = run(
        tmp_path,
        tmp_path / "model",
        callbacks=[keep],
        sampler=GroupSampler(1, 6),
        reference=ReferencePolicy(device="cpu"),
        kl_coef=0.1,
        critic=CriticConfig(),
        advantages="gae",
        objective=Objective(ratio="token", clip_low=0.2, clip_high=0.2),
    )
    rollout = keep.all[0]["rollout"]
    assert (rollout.prompt_mask.sum(1) + rollout.mask.sum(1)).max() > 9
    torch.testing.assert_close(rollout.ref_logprobs, rollout.old_logprobs, atol=1e-6, rtol=0)
    call = torch.zeros(1), torch.arange(6)[None]  # six tokens, which alone have the short ones
    expected, own = (m.rotary_emb(*call)[0] for m in (module.policy.model.model, model.model))
    assert torch.equal(module.critic.backbone.rotary_emb(*call)[0], expected)
    assert not torch.equal(own, expected)


# --- composite configs ---------------------------------------------------------------------------


def test_a_config_that_nests_the_texts_config_is_read(tokenizer, make_rollout):
    text = {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 32,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
        "initializer_range": 0.2,
    }
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config=vision | {"intermediate_size": 8},
        image_token_index=30,
        boi_token_index=28,
        eoi_token_index=29,
    )
    torch.manual_seed(0)
    model = ready(AutoModelForCausalLM.from_config(config).eval())
    samples, plain = samples_and_plain_logprobs(model, tokenizer)
    torch.testing.assert_close(samples.logprobs.double(), plain, atol=1e-5, rtol=0)
    assert probe.plainer_ways(model, CPU, sampled=True) == []
