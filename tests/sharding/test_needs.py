"""What a policy takes, by hand, and against what tensors of the real modules hold."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from gspo_lightning.engine import head, norms, packed_attention, products
from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.optim import OptimizerConfig, build_optimizer
from gspo_lightning.policy.policy import checkpoint_activations, opened
from gspo_lightning.sharding.cut import decoder_layers
from gspo_lightning.sharding.memory import (
    IN_UPDATE,
    STATE,
    Ranks,
    Work,
    host_peak,
    on_card,
    on_host,
    peak,
    state_of,
)
from support.large_shapes import QWEN3_8B, QWEN3_32B
from support.live_bytes import LiveBytes
from support.model_configs import config_of
from support.passes import tried

ONE = Work(prompt_tokens=1, new_tokens=1, decoded=1, tokens_at_once=1)


def tiny_llama(**changes):
    sizes = {
        "vocab_size": 50,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
    }
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes | changes))


def without_weights(kind, sizes):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes))


# --- by hand -------------------------------------------------------------------------------------


def test_memory_by_hand():
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    parts = on_card(model, Work(prompt_tokens=6, new_tokens=10, decoded=8, tokens_at_once=64))
    count = sum(p.numel() for p in model.parameters())
    assert parts["weights"] == 4 * count
    assert parts["gradients"] == 4 * (count - 50 * 48)
    assert parts["Adam"] == 8 * (count - 50 * 48)
    assert parts["KV cache"] == 8 * 16 * 3 * 2 * 2 * 12 * 4
    # two inputs of linear layers and two norms of two values; queries, output, that in order
    layer = (2 + 2 * 2) * 48 + 3 * 48 + 2 * 24 + 4 * 96
    logits = 2 * 256 * 50 * 4  # and their exponentials; the head's gradient is less
    last = 3 * 48  # two values of the norm, and the states that the head reads
    assert parts["micro-batch"] == 64 * (3 * layer + last) * 4 + logits
    assert parts["optimizer step"] == 3 * 96 * 48 * 4  # a feed-forward matrix is the largest
    update = parts["gradients"] + parts["micro-batch"]
    assert peak(parts) == parts["weights"] + parts["Adam"] + max(update, parts["KV cache"])


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_embedding_has_two_gradients_at_a_time(tied):
    model = tiny_llama(vocab_size=5_000, hidden_size=480, tie_word_embeddings=tied)
    parts = on_card(model, ONE)
    matrix, chunk = 5_000 * 480 * 4, 256 * 5_000 * 4
    layer = 6 * 480 + 3 * 480 + 2 * 240 + 4 * 96
    kept = (3 * layer + 3 * 480) * 4
    assert parts["micro-batch"] == (2 * matrix if tied else kept + chunk + matrix)
    assert parts["optimizer step"] == 3 * matrix


def test_prompts_of_a_group_are_read_once_and_lie_beside_each_completion():
    sizes = {"prompt_tokens": 100, "new_tokens": 10, "decoded": 1, "group_size": 4}
    work = Work.of_rows(**sizes, rows=6)
    assert (work.tokens_at_once, work.read_again) == (2 * 100 + 6 * 10, 600)
    work = Work.of_rows(**sizes, rows=6, packed=False)
    assert (work.tokens_at_once, work.read_again) == (660, 0)
    work = Work.of_rows(**sizes, rows=6, limit=150)  # four rows of one prompt take 140
    assert (work.tokens_at_once, work.read_again) == (150, 400)
    work = Work.of_rows(**sizes, rows=6, limit=1)  # a row is never cut
    assert (work.tokens_at_once, work.read_again) == (110, 0)


def test_a_card_takes_larger_chunks_of_logits_and_steps_all_weights_at_once():
    model = tiny_llama(vocab_size=5_000)
    on = {kind: on_card(model, Work(1, 1, 1, 1, device=kind)) for kind in ("cpu", "cuda")}
    chunks = {k: v["micro-batch"] / (2 * 5_000 * 4) for k, v in on.items()}
    assert round(chunks["cpu"]) == head.CHUNK and round(chunks["cuda"]) == head.CHUNK_ELSEWHERE
    assert on["cuda"]["optimizer step"] == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "largest_head"),
    [("gemma3", 8), ("gemma4_text", 16)],  # sizes in a nested config; of 8 and 16 by layer
)
def test_memory_is_estimated_where_a_config_nests_its_sizes_or_has_them_by_layer(
    name, largest_head
):
    model = AutoModelForCausalLM.from_config(config_of(name))
    parts = on_card(model, Work(prompt_tokens=12, new_tokens=8, decoded=3, tokens_at_once=24))
    # rows x tokens x layers x (keys and values) x heads x their size x bytes
    assert parts["KV cache"] == 3 * 20 * 2 * 2 * 1 * largest_head * 4


def test_a_model_of_unknown_sizes_gets_no_estimate():
    assert on_card(SimpleNamespace(config=PretrainedConfig()), ONE) is None


# --- against what is allocated -------------------------------------------------------------------

SIZES = {
    "vocab_size": 64,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
}
GPT2 = {"vocab_size": 64, "n_embd": 96, "n_layer": 3, "n_head": 4, "n_inner": 256}
DTYPES = {"float32": torch.float32, "mixed": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True)
def plain_products(monkeypatch):
    """OneDNN holds weights in a form of its own, which is no memory of a card."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)


def of_kind(kind, precision="float32", **changes):
    sizes = (GPT2 if kind == "gpt2" else SIZES) | changes
    ids = {"bos_token_id": 1, "eos_token_id": 1}
    config = CONFIG_MAPPING[kind](**sizes, **ids)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision])
    return tried(opened(model.eval()))


def update_bytes(model, prompt, new, group_size, rows, mixed):
    """The most that a micro-batch's passes hold beside weights and gradients."""
    prompts = torch.randint(2, 60, (rows // group_size, prompt))
    prompts = prompts.repeat_interleave(group_size, 0)
    completions = torch.randint(2, 60, (rows, new))
    masks = [torch.ones_like(ids, dtype=torch.bool) for ids in (prompts, completions)]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in model.parameters()]
    known = [*model.parameters(), *model.buffers(), *gradients, prompts, completions, *masks]
    autocast = torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()
    with LiveBytes(known) as live, autocast:
        texts = prompts, masks[0], completions, masks[1]
        found = completion_logprobs(model, *texts, group_size=group_size, with_entropy=True)
        found.logprobs.sum().backward()
    return live.peak


@pytest.mark.parametrize(
    ("kind", "precision", "recomputed", "tolerance"),
    [
        ("qwen3", "float32", False, 0.06),
        ("qwen3", "mixed", False, 0.06),
        ("qwen3", "mixed", True, 0.1),
        ("qwen3", "bfloat16", True, 0.12),
        ("llama", "bfloat16", False, 0.06),
        ("gemma3_text", "mixed", False, 0.1),
        ("gpt2", "mixed", False, 0.2),
    ],
)
def test_a_micro_batch_takes_what_its_passes_hold(kind, precision, recomputed, tolerance):
    model = of_kind(kind, precision)
    if recomputed:
        checkpoint_activations(model.train())
    sizes = {"rows": 6, "group_size": 3}
    mixed = precision == "mixed"
    work = Work.of_rows(96, 32, decoded=6, half_precision=mixed, **sizes)
    measured = update_bytes(model, 96, 32, **sizes, mixed=mixed)
    assert on_card(model, work)["micro-batch"] == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize("precision", DTYPES)
def test_a_large_vocabulary_takes_what_its_logits_hold(monkeypatch, precision):
    monkeypatch.setattr(head, "CHUNK", 64)
    model = of_kind("qwen3", precision, vocab_size=4_000, num_hidden_layers=1)
    mixed = precision == "mixed"
    work = Work.of_rows(4, 32, 1, rows=4, group_size=1, half_precision=mixed)
    measured = update_bytes(model, 4, 32, group_size=1, rows=4, mixed=mixed)
    assert on_card(model, work)["micro-batch"] == pytest.approx(measured, rel=0.1)


class Varlen(torch.autograd.Function):
    """Keeps what a card's kernel for unequal lengths keeps; its numbers are of no use."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.zeros_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors[:3])


def varlen(query, key, value, *_, scale, window_size, enable_gqa):
    return Varlen.apply(query, key, value)


class FusedNorm(torch.autograd.Function):
    """Keeps what a card's kernel for norms keeps, likewise."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, gradient):
        return tuple(map(torch.zeros_like, ctx.saved_tensors))


@pytest.mark.parametrize("precision", ["mixed", "bfloat16"])
def test_a_card_keeps_a_prompt_once_and_norms_of_one_kernel(monkeypatch, precision):
    """The kernels stand in for CUDA's: they keep the same tensors for backward."""
    model = of_kind("qwen3", precision)
    monkeypatch.setattr(head, "CHUNK", head.CHUNK_ELSEWHERE)
    monkeypatch.setattr(packed_attention, "_has_varlen", lambda query: True)
    monkeypatch.setattr(packed_attention, "varlen_attn", varlen)
    monkeypatch.setattr(
        norms.Fused, "forward", lambda norm, x: FusedNorm.apply(x, norm.weight.to(x.dtype))
    )
    mixed = precision == "mixed"
    sizes = {"rows": 6, "group_size": 3}
    work = Work.of_rows(128, 64, 6, **sizes, half_precision=mixed, device="cuda")
    measured = update_bytes(model, 128, 64, **sizes, mixed=mixed)
    assert on_card(model, work)["micro-batch"] == pytest.approx(measured, rel=0.125)


@pytest.mark.parametrize(("device", "foreach"), [("cpu", False), ("cuda", True)])
def test_an_optimizer_step_takes_what_adamw_makes(device, foreach):
    model = tiny_llama()
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.1))
    for group in optimizer.param_groups:
        group["foreach"] = foreach  # as it is on a card
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    known = [*model.parameters(), *(p.grad for p in model.parameters())]
    known += [value for state in optimizer.state.values() for value in state.values()]
    with LiveBytes(known) as live:
        optimizer.step()
    expected = on_card(model, Work(1, 1, 1, 1, device=device))["optimizer step"]
    assert expected == pytest.approx(live.peak, rel=0.05)


# --- shared by ranks -----------------------------------------------------------------------------


def test_a_rank_needs_its_part_and_what_is_gathered():
    model = tiny_llama(tie_word_embeddings=True)
    total = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in decoder_layers(model)[0].parameters())
    rest = total - 3 * layer  # embeddings and the last norm
    work = Work(6, 10, 8, 64, half_precision=True, device="cuda")
    alone, gathered, in_step = (
        on_card(model, work, ranks)
        for ranks in (Ranks(), Ranks(4, 2, True), Ranks(4, 2, True, gathers=False))
    )
    for name in STATE:
        assert gathered[name] == in_step[name] == alone[name] / 4
    assert gathered["KV cache"] == alone["KV cache"] + 2 * total
    assert in_step["KV cache"] == alone["KV cache"] + 2 * (rest + 2 * layer)
    assert gathered["micro-batch"] == in_step["micro-batch"]
    offloaded = on_card(model, work, Ranks(4, 2, True, cpu_offload=True))
    assert not any(offloaded[name] for name in STATE)
    buckets = on_card(model, work, Ranks(4, 2))
    assert buckets == alone | {"buckets of ddp": alone["gradients"]}


def test_a_machine_holds_what_its_ranks_load_offload_and_save():
    model = tiny_llama()
    count = sum(p.numel() for p in model.parameters())
    largest = 4 * 96 * 48
    assert on_host(model, Ranks(), "cpu") == {}  # all of it is counted there already
    parts = on_host(model, Ranks(4, 2), "cuda")
    assert parts == {"loading": 2 * 4 * count, "a checkpoint": largest}
    parts = on_host(model, Ranks(4, 2, True), "cuda")
    assert parts == {"loading": 2 * largest, "a checkpoint": 12 * count}
    parts = on_host(model, Ranks(4, 2, True, cpu_offload=True, in_parts=True), "cuda")
    offloaded = 16 * count / 2  # half of the ranks are here
    assert parts["weights, gradients and Adam"] == offloaded
    assert parts["a checkpoint"] == 12 * count / 2
    assert host_peak(parts) == offloaded + max(parts["a checkpoint"], parts["loading"])


# GB a card: weights, gradients and moments; at most in an update of 16,384 tokens; gathered rollout
# without its cache. By hand, before there was this module.
PAPER = {
    ("8 B", 8): (16, 35, 29),
    ("32 B", 8): (66, 95, 115),
    ("32 B", 16): (33, 63, 90),
    ("32 B", 32): (16, 46, 78),
}


@pytest.mark.parametrize("size", ["8 B", "32 B"])
def test_the_estimate_agrees_with_one_by_hand(size):
    """States and rollouts to the GB; updates to a fifth, for sums between layers are float32."""
    model = without_weights("qwen3", QWEN3_8B if size == "8 B" else QWEN3_32B)
    assert not any(p.device.type != "meta" for p in model.parameters())
    checkpoint_activations(model)
    rows = {"rows": 64, "group_size": 8, "limit": 16_384}
    work = Work.of_rows(2048, 2048, 32, **rows, half_precision=True, device="cuda")
    for (name, count), (state, update, rollout) in PAPER.items():
        if name != size:
            continue
        parts = on_card(model, work, Ranks(count, 8, True))
        assert state_of(parts) / 1e9 == pytest.approx(state, abs=1)
        most = state_of(parts) + max(parts[each] for each in IN_UPDATE)
        assert most / 1e9 == pytest.approx(update, rel=0.2)
        alone = on_card(model, work)["KV cache"]
        beside = parts["weights"] + parts["Adam"] + parts["KV cache"] - alone
        assert beside / 1e9 == pytest.approx(rollout, abs=1)
