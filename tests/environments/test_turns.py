"""Several turns in a rollout, against a plain loop that reads the whole history at each token."""

import itertools

import pytest
import torch

from gspo_lightning import sampling
from gspo_lightning.engine import group_decoder
from gspo_lightning.engine.drawing import draw
from gspo_lightning.engine.texts import Ends, Watch
from gspo_lightning.environments import COLUMN, Turn
from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.objectives import Objective, policy_loss, token_weights
from gspo_lightning.policy.policy import Policy
from gspo_lightning.rollout import stream_seed
from gspo_lightning.sampling import GroupSampler
from support.environments import Says, Talker
from support.prompts import PROMPTS, batch_of

FAST = ("qwen3", "gemma2", "qwen3_next")  # windows; a cache of its own
FURTHER = ("llama", "gpt2", "mistral", "qwen3_moe", "cohere", "granite", "gpt_oss", "lfm2")
ARCHITECTURES = (*FAST, *(pytest.param(name, marks=pytest.mark.models) for name in FURTHER))
G, T, SEED, EOS = 2, 20, 7, [1, 5, 9, 13]


def policy_of(model, tokenizer):
    policy = Policy(model, tokenizer)
    policy.eos_ids = EOS  # about one token in eight, so that turns are short
    return policy


@torch.no_grad()
def loop(policy, batch, environment, max_turns, temperature=0.7):
    """Row by row and token by token: ids, drawn or not, log-probs, what was said, finished."""
    uniform = torch.rand(len(batch) * G, T, generator=torch.Generator().manual_seed(SEED))
    rows = []
    for i in range(len(uniform)):
        prompt = batch.prompt_ids[i // G][batch.prompt_mask[i // G]].tolist()
        episode = environment.begin(batch.rows[i // G], stream_seed(SEED, i // G, 0, "environment"))
        ids, drawn, logprobs, said, turn, reward, done = [], [], [], [], [], 0.0, False
        while len(ids) < T:
            logits = policy.model(torch.tensor([prompt + ids])).logits[:, -1]
            token, logprob = draw(logits, uniform[i, len(ids)][None], temperature)
            ids.append(int(token))
            drawn.append(True)
            logprobs.append(float(logprob))
            turn.append(ids[-1])
            if ids[-1] not in EOS:
                continue
            text = policy.tokenizer.decode(turn[:-1])
            said, turn = [*said, text], []
            answer = episode.step(text)
            reward += answer.reward
            done = answer.message is None
            if done or len(said) == max_turns:
                break
            given = policy.tokenizer(answer.message)["input_ids"]
            if len(ids) + len(given) >= T:
                break
            ids += given
            drawn += [False] * len(given)
            logprobs += [0.0] * len(given)
        if turn:
            said.append(policy.tokenizer.decode(turn))
        rows.append((ids, drawn, logprobs, said, reward, done))
    return rows


def assert_same(samples, rows):
    for i, (ids, drawn, logprobs, said, reward, done) in enumerate(rows):
        length = len(ids)
        assert samples.completion_ids[i, :length].tolist() == ids, i
        assert samples.mask[i].nonzero()[:, 0].tolist() == [t for t in range(length) if drawn[t]]
        torch.testing.assert_close(
            samples.logprobs[i, :length], torch.tensor(logprobs), atol=1e-5, rtol=0
        )
        record = samples.rows[i][COLUMN]
        assert [turn["policy"] for turn in record["turns"]] == said
        plain = "\n".join(said)
        for special in ("<pad>", "<eos>", "<unk>"):
            plain = plain.replace(special, "")
        assert (samples.special_texts[i], samples.texts[i]) == ("\n".join(said), plain)
        assert (record["reward"], bool(samples.finished[i])) == (reward, done)
        assert record["tokens"] == length - sum(drawn)
    assert samples.lengths.tolist() == [len(row[0]) for row in rows]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_rollout_is_that_of_a_plain_loop(make_model, tokenizer, architecture):
    """Rows that come in later, messages of several tokens that hold an end of sequence."""
    policy, batch = policy_of(make_model(architecture), tokenizer), batch_of(PROMPTS)
    expected = loop(policy, batch, Talker(), max_turns=4)
    assert max(len(row[3]) for row in expected) > 2 and any(row[5] for row in expected)
    assert not all(row[5] for row in expected)
    for batch_size in (5, None):
        sampler = GroupSampler(G, T, 0.7, batch_size, environment=Talker(), max_turns=4)
        assert_same(sampler.sample(policy, batch, seed=SEED), expected)


@pytest.fixture
def policy(make_model, tokenizer):
    return policy_of(make_model("qwen3"), tokenizer)


def talked(policy, batch_size=None, **options):
    settings = {"environment": Talker(), "max_turns": 4} | options
    sampler = GroupSampler(G, T, 0.7, batch_size, **settings)
    return sampler.sample(policy, batch_of(PROMPTS), seed=SEED)


@pytest.mark.parametrize("way", ["batched", "alone"])
def test_every_engine_draws_the_same(policy, monkeypatch, way):
    expected = talked(policy)
    monkeypatch.setattr(sampling, "decoding", lambda model, device: way)
    found = talked(policy, batch_size=5)
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert torch.equal(found.mask, expected.mask) and found.rows == expected.rows
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)


def test_an_environment_that_only_listens_changes_no_rollout(policy):
    """One turn that ends with the policy's own end is what there is without an environment."""
    alone = GroupSampler(G, T, 0.7).sample(policy, batch_of(PROMPTS), seed=SEED)
    heard = talked(policy, environment=Says(lambda row, text: Turn(None)))
    for name in ("completion_ids", "mask", "finished", "logprobs"):
        assert torch.equal(getattr(heard, name), getattr(alone, name)), name
    assert (heard.texts, heard.special_texts) == (alone.texts, alone.special_texts)
    assert alone.waited is None and heard.waited >= 0


def test_stop_strings_end_turns(make_model, tokenizer):
    """Each run of drawn tokens is a turn: what was said in it ends before "+"."""
    policy = Policy(make_model("qwen3"), tokenizer)
    policy.ends = Ends(tokenizer, ["+"])
    samples = talked(policy, environment=Says(lambda row, text: Turn("3+7-")))
    stopped = 0
    for row, ids, mask in zip(
        samples.rows, samples.completion_ids.tolist(), samples.mask.tolist(), strict=True
    ):
        runs = itertools.groupby(zip(mask, ids, strict=True), lambda pair: pair[0])
        drawn = [tokenizer.decode([i for _, i in run]) for own, run in runs if own]
        stopped += sum(text.endswith("+") for text in drawn)
        said = [turn["policy"] for turn in row[COLUMN]["turns"]]
        assert said == [text.removesuffix("+").removesuffix("<eos>") for text in drawn]
    assert stopped > 2


def test_a_turn_that_is_answered_with_nothing_begins_anew(make_model, tokenizer):
    """A stop string that has ended a turn is not found once more with the next token."""
    policy = Policy(make_model("qwen3"), tokenizer)
    policy.ends = Ends(tokenizer, ["444"])  # what this policy says all the time
    environment = Says(lambda row, text: Turn(""))
    sampler = GroupSampler(1, T, 0.0, environment=environment, max_turns=9)
    samples = sampler.sample(policy, batch_of(PROMPTS), seed=SEED)
    drawn = samples.special_texts[1].split("\n")
    assert samples.completion_ids[1].tolist() == [7] * T and samples.mask[1].all()
    assert drawn == [""] * (T // 3) + ["4" * (T % 3)]


def test_no_stop_string_goes_across_what_a_row_is_given(tokenizer):
    def ids(text):
        return tokenizer(text)["input_ids"]

    watch = Watch(Ends(tokenizer, ["-3"]), [ids("1+")])
    assert [watch(0, token) for token in ids("2-")] == [False, False]
    watch.go_on(0, ids("7-"))
    assert [watch(0, token) for token in ids("34-3")] == [False, False, False, True]


def test_the_limit_of_tokens_leaves_room_for_a_word_of_the_policy(policy):
    """A message is said only if a draw fits in behind it; the last turn may be cut off."""
    samples = talked(policy, environment=Says(lambda row, text: Turn("1+1+1")), max_turns=99)
    last = samples.completion_ids.gather(1, samples.lengths[:, None] - 1)
    assert samples.mask.gather(1, samples.lengths[:, None] - 1).all() and len(last) == 8
    assert not samples.finished.any() and samples.lengths.max() == T
    assert {row[COLUMN]["end"] for row in samples.rows} == {"tokens"}
    gaps = samples.lengths - samples.mask.sum(1)
    assert gaps.tolist() == [row[COLUMN]["tokens"] for row in samples.rows]
    assert (gaps % 5 == 0).all() and gaps.max() >= 10


def test_rows_of_a_group_have_one_seed_and_other_groups_another(policy):
    environment = Talker()
    talked(policy, environment=environment)
    seeds = environment.seeds
    assert [seeds[i] == seeds[i + 1] for i in range(0, len(seeds), G)] == [True] * len(PROMPTS)
    assert len(set(seeds)) == len(PROMPTS)


def test_an_environment_cannot_change_the_rows_of_the_data(policy):
    batch = batch_of(PROMPTS)

    class Careless(Talker):
        def begin(self, row, seed):
            row["i"] = "gone"
            return super().begin(row, seed)

    samples = GroupSampler(G, T, environment=Careless()).sample(policy, batch, seed=0)
    assert [row["i"] for row in batch.rows] == [0, 1, 2, 3]
    assert [row["i"] for row in samples.rows] == [0, 0, 1, 1, 2, 2, 3, 3]


# --- what is learned from ------------------------------------------------------------------------


def full_logprobs(policy, samples):
    """Of each row, log-probs by one forward pass over all of its tokens; 0 where none was drawn."""
    rows = []
    for i in range(len(samples)):
        prompt = samples.prompt_ids[i][samples.prompt_mask[i]]
        ids = samples.completion_ids[i]
        logits = policy.model(torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
        found = (logits / 0.7).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        rows.append(torch.where(samples.mask[i], found, 0))
    return torch.stack(rows)


@pytest.mark.parametrize("packed", [True, False])
def test_logprobs_behind_holes_have_the_whole_history(policy, packed):
    samples = talked(policy)
    policy.model.double()
    inputs = (samples.prompt_ids, samples.prompt_mask, samples.completion_ids, samples.mask)
    options = {"temperature": 0.7, "group_size": G, "packed": packed, "with_entropy": True}
    found = completion_logprobs(policy.model, *inputs, **options)
    expected = full_logprobs(policy, samples)
    torch.testing.assert_close(found.logprobs, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(samples.logprobs.double(), expected, atol=1e-5, rtol=0)
    assert (found.entropy[~samples.mask] == 0).all()


def test_loss_and_gradient_are_those_of_a_loop_over_drawn_tokens(policy):
    """GSPO's ratio is the mean over drawn tokens alone; float64."""
    samples = talked(policy)
    assert (samples.lengths > samples.mask.sum(1)).sum() > 3
    policy.model.double()
    old = samples.logprobs.double() + 0.1 * torch.randn(
        samples.mask.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    advantages = torch.linspace(-1, 1, len(samples), dtype=torch.float64)
    objective = Objective(clip_low=0.9, clip_high=9.0)

    def gradient(loss):
        policy.model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in policy.model.parameters()]

    weights = token_weights(samples.mask, objective.aggregation, T, dtype=torch.float64)
    inputs = (samples.prompt_ids, samples.prompt_mask, samples.completion_ids, samples.mask)
    logprobs = completion_logprobs(policy.model, *inputs, temperature=0.7, group_size=G).logprobs
    spread = advantages[:, None].expand_as(samples.mask)
    found = policy_loss(logprobs, old, spread, samples.mask, weights, objective).loss

    losses = []
    for i, row in enumerate(full_logprobs(policy, samples)):
        places = [t for t in range(T) if t < samples.mask.shape[1] and samples.mask[i, t]]
        ratio = (sum(row[t] - old[i, t] for t in places) / len(places)).exp()
        losses.append(-ratio * advantages[i])
    expected = sum(losses) / len(losses)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    for left, right in zip(gradient(found), gradient(expected), strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=0)  # norms are float32


def test_a_limit_of_tokens_holds_with_holes(policy):
    samples = talked(policy)
    spans = samples.lengths.tolist()
    prompts = samples.prompt_mask.sum(1).tolist()
    limit = max(spans) + max(prompts) + 4
    pieces = samples.micro_batch_indices(None, limit)
    assert sorted(torch.cat(pieces).tolist()) == list(range(len(samples)))
    for rows in pieces:
        shared = {int(row) // G: prompts[row] for row in rows}
        assert sum(spans[row] for row in rows) + sum(shared.values()) <= limit
    assert sum(spans) > samples.mask.sum() + 20  # the count of drawn tokens would let more in


def test_lengths_are_those_of_masks_without_holes(make_rollout):
    rollout = make_rollout()
    assert rollout.lengths.tolist() == rollout.mask.sum(1).tolist() == [5, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(
    "architecture",
    [*("qwen3", "gemma2"), *(pytest.param(name, marks=pytest.mark.models) for name in FURTHER)],
)
@pytest.mark.parametrize("batch_size", [3, None])
def test_long_messages_are_read_at_once_and_change_nothing(
    make_model, tokenizer, monkeypatch, architecture, batch_size
):
    """Two tokens are long here, so that each message is read in a pass of its own."""
    policy = policy_of(make_model(architecture), tokenizer)
    expected = talked(policy, batch_size)
    monkeypatch.setattr(group_decoder, "LONG", 2)
    passes = []
    policy.model.register_forward_pre_hook(
        lambda _, __, kwargs: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    found = talked(policy, batch_size)
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert torch.equal(found.mask, expected.mask) and found.rows == expected.rows
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    assert architecture == "lfm2" or len(passes) > T
