"""Decoding groups with one cache: what reaches the model, what is kept, and what comes out."""

import copy
import gc
import logging
import weakref
from contextlib import nullcontext

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gspo_lightning import sampling
from gspo_lightning.engine import group_attention, group_decoder
from gspo_lightning.engine.attention import open_attention
from gspo_lightning.engine.group_attention import GroupAttention
from gspo_lightning.engine.products import filled
from gspo_lightning.engine.step_graphs import cuda_graph_recorder
from gspo_lightning.engine.texts import Ends
from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.policy.policy import Policy
from gspo_lightning.sampling import GroupSampler
from support.passes import tried
from support.prompts import PROMPTS, batch_of

ATTENTION = (
    *("qwen3", "llama", "gpt2", "gemma2", "mistral"),
    *("qwen3_moe", "cohere", "granite", "gpt_oss"),
)
HYBRID = ("qwen3_next", "lfm2")


@pytest.fixture
def policy(make_model, tokenizer):
    return many_ends(Policy(tried(opened(make_model("qwen3"))), tokenizer))


def opened(model):
    assert open_attention(model)
    return model


def many_ends(policy):
    policy.eos_ids = [1, 5, 9, 13]  # about one token in eight, so that lengths differ
    return policy


def count_tokens(model):
    counts = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return counts


def assert_same(samples, expected):
    assert torch.equal(samples.completion_ids, expected.completion_ids)
    assert torch.equal(samples.mask, expected.mask)
    torch.testing.assert_close(samples.logprobs, expected.logprobs, atol=1e-5, rtol=0)


# --- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [*ATTENTION, *HYBRID])
def test_logprobs_are_those_of_plain_forward_passes(make_model, tokenizer, architecture, caplog):
    """Prompts of 1 to 9 tokens, rows that come in later, windows of 3 tokens; float32."""
    policy = many_ends(Policy(make_model(architecture), tokenizer))
    batch = batch_of([*PROMPTS, list(range(3, 12))])
    samples = GroupSampler(3, 12, temperature=0.7, batch_size=7).sample(policy, batch, seed=2)
    assert len(set(samples.mask.sum(1).tolist())) > 3
    assert samples.logprobs.dtype == torch.float32 and (samples.logprobs[~samples.mask] == 0).all()
    with torch.no_grad():
        for i in range(len(samples)):
            prompt = samples.prompt_ids[i][samples.prompt_mask[i]]
            ids = samples.completion_ids[i][samples.mask[i]]
            logits = policy.model(torch.cat([prompt, ids])[None]).logits[0]
            plain = (logits[len(prompt) - 1 : -1] / 0.7).log_softmax(-1).gather(1, ids[:, None])
            torch.testing.assert_close(
                samples.logprobs[i][samples.mask[i]], plain[:, 0], atol=1e-5, rtol=0
            )
    assert ("cache of its own" in caplog.text) == (architecture in HYBRID)


def test_without_temperature_nothing_is_drawn_from_a_distribution(policy):
    assert (
        GroupSampler(1, 3, temperature=0.0).sample(policy, batch_of(PROMPTS), seed=0).logprobs
        is None
    )


@pytest.mark.parametrize("batch_size", [1, 2, 5, 11, None])
def test_both_engines_draw_the_same(policy, monkeypatch, batch_size):
    batch = batch_of(PROMPTS)
    expected = GroupSampler(3, 12).sample(policy, batch, seed=7)
    assert_same(GroupSampler(3, 12, batch_size=batch_size).sample(policy, batch, seed=7), expected)

    monkeypatch.setattr(sampling, "decoding", lambda model, device: "batched")
    assert_same(GroupSampler(3, 12, batch_size=batch_size).sample(policy, batch, seed=7), expected)


@pytest.mark.parametrize(
    ("prompts", "group_size", "limit", "ends"),
    [
        (PROMPTS[:1], 1, 1, [1]),
        (PROMPTS, 2, 1, [1]),  # no step at all
        (PROMPTS, 3, 6, list(range(32))),  # every first token ends
        ([[3], [4] * 40], 3, 6, [1, 5]),
        ([[3]], 7, 9, [1, 5, 9]),
    ],
)
def test_small_and_lopsided_rollouts(policy, prompts, group_size, limit, ends):
    policy.eos_ids = ends
    batch = batch_of(prompts)
    expected = GroupSampler(group_size, limit, batch_size=1).sample(policy, batch, seed=0)
    for batch_size in (2, None):
        sampler = GroupSampler(group_size, limit, batch_size=batch_size)
        assert_same(sampler.sample(policy, batch, seed=0), expected)
    assert expected.mask.shape[1] == (1 if len(ends) == 32 else limit)


def test_adapters_are_part_of_what_is_sampled(policy):
    batch = batch_of(PROMPTS)
    plain = GroupSampler(3, 9).sample(policy, batch, seed=1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    policy.model = peft.get_peft_model(policy.model, config)
    samples = GroupSampler(3, 9).sample(policy, batch, seed=1)
    assert samples.texts != plain.texts
    again = completion_logprobs(
        policy.model.eval(),
        *(samples.prompt_ids, samples.prompt_mask, samples.completion_ids, samples.mask),
    )
    torch.testing.assert_close(samples.logprobs, again.logprobs, atol=1e-5, rtol=0)


def own_lines(caplog):
    """What this package said; transformers has a word on some models, once a process."""
    return [record for record in caplog.records if record.name.startswith("gspo_lightning")]


def test_sampling_leaves_nothing_behind_that_training_would_meet(make_model, tokenizer):
    """Decoding runs in inference mode, whose tensors no graph may hold."""
    gradients = []
    for sampled in (False, True):
        policy = Policy(make_model("qwen3"), tokenizer)
        assert open_attention(policy.model)  # as the sampler does, which decides how rows are read
        other = Policy(copy.deepcopy(policy.model), tokenizer)
        samples = GroupSampler(2, 6).sample(policy if sampled else other, batch_of(PROMPTS), seed=0)
        result = completion_logprobs(
            policy.model,
            *(samples.prompt_ids, samples.prompt_mask, samples.completion_ids, samples.mask),
        )
        (result.logprobs - samples.logprobs).square().sum().add(result.logprobs.sum()).backward()
        gradients.append([p.grad for p in policy.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_sharded_weights_are_not_gathered_in_inference_mode(policy):
    """FSDP2 keeps what it gathers, and training could not save it."""
    seen = []
    policy.model.register_forward_pre_hook(
        lambda *_: seen.append(torch.is_inference_mode_enabled())
    )
    GroupSampler(1, 3).sample(policy, batch_of(PROMPTS), seed=0)
    assert all(seen)
    seen.clear()
    next(policy.model.parameters()).device_mesh = "as of a DTensor"
    GroupSampler(1, 3).sample(policy, batch_of(PROMPTS), seed=0)
    assert seen and not any(seen)


# --- what reaches the model ----------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 5, 16, None])
def test_every_token_is_computed_once_and_nothing_else(policy, monkeypatch, batch_size):
    """Each prompt once per group; no padding, no ended row, and no last token."""
    multiplying_by(monkeypatch, "mkl")
    counts = count_tokens(policy.model)
    samples = GroupSampler(6, 12, batch_size=batch_size).sample(policy, batch_of(PROMPTS), seed=3)
    lengths = samples.mask.sum(1)
    assert sum(counts) == sum(map(len, PROMPTS)) + int((lengths - 1).sum())
    assert lengths.min() == 1 and lengths.max() == 12


@pytest.mark.parametrize("batch_size", [6, 13, None])
def test_where_onednn_multiplies_steps_have_few_sizes(policy, monkeypatch, batch_size):
    """Rows that nobody reads fill a step up; they change no token."""
    sampler = GroupSampler(6, 12, batch_size=batch_size)
    multiplying_by(monkeypatch, "mkl")
    expected = sampler.sample(policy, batch_of(PROMPTS), seed=3)
    multiplying_by(monkeypatch, "onednn")
    counts, running = count_tokens(policy.model), []
    forward = group_decoder.GroupDecoder._forward

    def counted(self):
        running.append((len(counts), self.num))
        return forward(self)

    monkeypatch.setattr(group_decoder.GroupDecoder, "_forward", counted)
    found = sampler.sample(policy, batch_of(PROMPTS), seed=3)
    slots = batch_size or 24
    wanted = [min(filled(num), slots) if num > 2 else num for _, num in running]
    assert [counts[i] for i, _ in running] == wanted
    assert len({num for _, num in running}) > len(set(wanted))
    assert_same(found, expected)


def test_the_batch_stays_full_while_rows_wait(policy, monkeypatch):
    steps = []
    forward = group_decoder.GroupDecoder._forward

    def counted(self):
        steps.append((self.num, len(self.waiting), len(self.groups)))
        return forward(self)

    monkeypatch.setattr(group_decoder.GroupDecoder, "_forward", counted)
    batch = batch_of(PROMPTS * 3)
    samples = GroupSampler(4, 12, batch_size=10).sample(policy, batch, seed=3)
    waiting = [num for num, waits, _ in steps if waits]
    assert len(waiting) > 10 and min(waiting) > 10 * group_decoder.REFILL_BELOW
    assert max(num for num, _, _ in steps) == 10
    assert max(groups for _, _, groups in steps) < 10  # prompts leave with their last row
    assert len(steps) < 12 * 3  # four full batches one after the other would take 12 * 5
    assert samples.mask.any(1).all()


def test_prompts_are_read_in_parts_where_they_are_many(policy, monkeypatch):
    expected = GroupSampler(3, 5).sample(policy, batch_of(PROMPTS), seed=0)
    counts = count_tokens(policy.model)
    monkeypatch.setattr(group_decoder, "READ_AT_ONCE", 4)
    assert_same(GroupSampler(3, 5).sample(policy, batch_of(PROMPTS), seed=0), expected)
    assert counts[:3] == [5, 3, 3]  # the longest first, alone: it is longer than a part


@pytest.mark.parametrize("architecture", ["gemma2", "gpt_oss"])
def test_long_prompts_are_attended_to_piece_by_piece(
    make_model, tokenizer, monkeypatch, architecture
):
    """No matrix of all scores of all heads is written out, a gigabyte a layer for 4,096 tokens."""
    policy = many_ends(Policy(tried(opened(make_model(architecture))), tokenizer))
    expected = GroupSampler(3, 5).sample(policy, batch_of(PROMPTS), seed=0)
    monkeypatch.setattr(group_attention, "AT_ONCE", 2)
    assert_same(GroupSampler(3, 5).sample(policy, batch_of(PROMPTS), seed=0), expected)


# --- what is kept --------------------------------------------------------------------------------


def test_buffers_are_made_once_and_bounded_by_the_batch(policy, monkeypatch):
    seen = set()
    extend = GroupAttention._extend

    def watched(self, step, module, *args, **options):
        output = extend(self, step, module, *args, **options)
        buffers = self.layers[module.layer_idx]
        seen.add((module.layer_idx, *((x.data_ptr(), x.shape) for x in buffers)))
        return output

    monkeypatch.setattr(GroupAttention, "_extend", watched)
    GroupSampler(3, 12, batch_size=5).sample(policy, batch_of(PROMPTS), seed=3)
    assert len(seen) == 2  # the same in every step of each layer
    for _, prompt_keys, prompt_values, keys, values in seen:
        assert prompt_keys[1] == prompt_values[1] == (4, 1, 5, 8)  # four prompts, not twelve
        assert keys[1] == values[1] == (5, 1, 11, 8)


# --- models that need their own cache ------------------------------------------------------------


def test_a_model_that_keeps_its_window_to_itself_decodes_with_its_own_cache(
    policy, caplog, monkeypatch
):
    """Its attention would be given the whole past."""
    monkeypatch.setattr(policy.model.config, "layer_types", None)
    monkeypatch.setattr(policy.model.config, "sliding_window", 3)
    monkeypatch.setattr(policy.model, "_supports_attention_backend", True)
    with caplog.at_level(logging.WARNING):
        decoder = group_decoder.GroupDecoder(policy.model, wanted(policy))
        decoder.cache.windows = {0: None, 1: None}
        with pytest.raises(group_decoder.NotDecodable, match="do not say their windows"):
            decoder._check_layers()
        decoder.cache.windows = {0: 3}
        with pytest.raises(group_decoder.NotDecodable, match="do not say their windows"):
            decoder._check_layers()


def multiplying_by(monkeypatch, library):
    """Decode with as many rows as ``library`` wants, whatever multiplies."""
    rows = {"mkl": lambda num: num, "onednn": lambda num: filled(num) if num > 2 else num}
    monkeypatch.setattr(sampling, "ordered_weights", lambda _: nullcontext(rows[library]))


def wanted(policy):
    return group_decoder.Wanted(
        prompts=[torch.tensor(prompt) for prompt in PROMPTS],
        group_size=2,
        uniform=torch.rand(8, 6),
        temperature=1.0,
        eos_ids=policy.eos_ids,
        pad_id=0,
        num_rows=8,
    )


def test_the_line_about_an_own_cache_comes_once(make_model, tokenizer, caplog):
    policy, sampler = Policy(make_model("lfm2"), tokenizer), GroupSampler(2, 3)
    for seed in (0, 1):
        sampler.sample(policy, batch_of(PROMPTS), seed=seed)
    (record,) = own_lines(caplog)
    assert record.message == (
        "Lfm2ForCausalLM decodes with a cache of its own, which is slower: "
        "it has layers of the kind conv"
    )


# --- recorded steps ------------------------------------------------------------------------------


class Recording(TorchDispatchMode):
    """What a CUDA graph does, on the CPU: keep the operations of a call, and do them again.

    Python code runs once. Later calls repeat each operation on the very tensors it had, and put
    its results where the first ones were. As on a GPU, reading a value is refused.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        output = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, output))
        return output

    def replay(self):
        for function, args, kwargs, output in self.operations:
            results = function(*args, **kwargs)
            if isinstance(output, torch.Tensor):
                output, results = [output], [results]
            for kept, result in zip(output, results, strict=True):
                if result.data_ptr() != kept.data_ptr():
                    kept.copy_(result)


def record(step):
    step()  # as what warms up
    recording = Recording()
    with recording:
        output = step()

    def play():
        recording.replay()
        return output

    return play


def record_with(function, monkeypatch):
    """Let samplers record, on the CPU, in this way."""
    make = sampling.Wanted
    monkeypatch.setattr(sampling, "Wanted", lambda **kw: make(**kw | {"record": function}))


@pytest.mark.parametrize("architecture", ATTENTION)
@pytest.mark.parametrize("batch_size", [7, None])
def test_recorded_steps_draw_what_steps_one_by_one_draw(
    make_model, tokenizer, monkeypatch, caplog, architecture, batch_size
):
    policy = many_ends(Policy(make_model(architecture), tokenizer))
    batch = batch_of([*PROMPTS, list(range(3, 12))])
    sampler = GroupSampler(3, 30, batch_size=batch_size)
    expected = sampler.sample(policy, batch, seed=7)
    counts = count_tokens(policy.model)
    sampler.sample(policy, batch, seed=7)
    steps = len(counts)
    counts.clear()
    record_with(record, monkeypatch)
    assert_same(sampler.sample(policy, batch, seed=7), expected)
    assert not own_lines(caplog)
    assert len(counts) < steps  # Python ran for new shapes only, twice each


def test_recordings_are_freed_with_their_rollout_and_not_by_chance(policy, monkeypatch):
    """On a card one that is freed while the next is made breaks that one."""
    alive = []

    def kept(step):
        play = record(step)
        alive.append(weakref.ref(play))
        return play

    record_with(kept, monkeypatch)
    gc.disable()
    try:
        GroupSampler(3, 30, batch_size=7).sample(policy, batch_of(PROMPTS), seed=7)
        assert alive and not any(play() for play in alive)
        policy.model.lm_head.weight.data.fill_(torch.nan)
        with pytest.raises(FloatingPointError):
            GroupSampler(3, 30, batch_size=7).sample(policy, batch_of(PROMPTS), seed=7)
        assert not any(play() for play in alive)
    finally:
        gc.enable()


def test_recorded_steps_end_at_stop_strings_as_others_do(policy, monkeypatch):
    batch, sampler = batch_of(PROMPTS), GroupSampler(3, 30, batch_size=7)
    free = sampler.sample(policy, batch, seed=7)
    policy.ends = Ends(policy.tokenizer, ["=", "12", "\n"])
    expected = sampler.sample(policy, batch, seed=7)
    assert (expected.mask.sum(1) < free.mask.sum(1)).any()
    record_with(record, monkeypatch)
    assert_same(sampler.sample(policy, batch, seed=7), expected)


@pytest.mark.parametrize("good", [0, 3])
def test_where_recording_fails_steps_are_computed_one_by_one(policy, monkeypatch, caplog, good):
    """Also behind good recordings, when rows have left and their number was rounded up."""
    batch, sampler = batch_of([*PROMPTS, *PROMPTS]), GroupSampler(5, 30)
    expected = sampler.sample(policy, batch, seed=7)
    tries = []

    def fail(step):
        tries.append(True)
        if len(tries) <= good:
            return record(step)
        step()
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    record_with(fail, monkeypatch)
    assert_same(sampler.sample(policy, batch, seed=7), expected)
    (line,) = (entry.message for entry in caplog.records)
    assert line == (
        "decode steps are computed one by one, recording failed: "
        "operation not permitted when stream is capturing"
    )


def test_off_a_gpu_one_line_says_that_nothing_is_recorded(policy, caplog):
    sampler = GroupSampler(3, 6, cuda_graphs=True)
    expected = GroupSampler(3, 6).sample(policy, batch_of(PROMPTS), seed=7)
    for _ in range(2):
        assert_same(sampler.sample(policy, batch_of(PROMPTS), seed=7), expected)
    (line,) = (entry.message for entry in caplog.records)
    assert line == "sampler.cuda_graphs: the policy is on cpu, without a GPU"


def test_all_graphs_of_a_rollout_share_one_pool_of_memory(monkeypatch):
    pools, handles = [], iter(range(7, 99))

    class Graph(nullcontext):
        def replay(self):
            played.append(self)

    def begin(graph, pool=None):
        pools.append(pool)
        return graph

    class Stream:
        def wait_stream(self, _):
            pass

    fakes = {"graph_pool_handle": lambda: next(handles), "CUDAGraph": Graph, "graph": begin}
    fakes |= {"Stream": Stream, "current_stream": Stream, "stream": nullcontext}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    record, played, steps = cuda_graph_recorder(), [], []
    plays = [record(lambda: steps.append(gc.isenabled()) or torch.ones(1)) for _ in range(3)]
    assert steps == [True, False] * 3 and gc.isenabled()  # no garbage is freed while it records
    assert pools == [7, 7, 7] and len(steps) == 6  # each is tried once before it is recorded
    assert plays[1]() == 1 and len(played) == 1 and len(steps) == 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "mistral"])
def test_cuda_graphs_draw_what_steps_one_by_one_draw(make_model, tokenizer, caplog, architecture):
    policy = many_ends(Policy(make_model(architecture).cuda(), tokenizer))
    batch = batch_of([*PROMPTS, list(range(3, 12))]).to("cuda")
    expected = GroupSampler(3, 30, batch_size=7).sample(policy, batch, seed=7)
    counts = count_tokens(policy.model)
    sampler = GroupSampler(3, 30, batch_size=7, cuda_graphs=True)
    assert_same(sampler.sample(policy, batch, seed=7), expected)
    assert not caplog.records
    assert len(counts) < expected.mask.sum()
