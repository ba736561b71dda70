"""The text of a completion, and the stop strings and stop ids that end it."""

from dataclasses import replace

import pytest
import torch

from gspo_lightning import sampling
from gspo_lightning.engine.texts import Continuation, Ends, special_ids
from gspo_lightning.policy.policy import Policy
from gspo_lightning.rollout import join_samples
from gspo_lightning.sampling import GroupSampler
from support.prompts import PROMPTS, batch_of
from support.text_tokenizers import byte_level, encode, letters, sentencepiece

TEXTS = [" yes no .", "a b c\n\nQ: 42", "€🛑é", "  ab\n", "\ufffd?"]


@pytest.fixture(scope="module")
def of_bytes():
    return byte_level()


@pytest.fixture(scope="module")
def of_pieces():
    return sentencepiece()


@pytest.fixture(scope="module", params=["of_bytes", "of_pieces"])
def either(request):
    return request.getfixturevalue(request.param)


# --- the text that a completion adds to its prompt -----------------------------------------------


def test_the_first_space_of_a_completion_stays(of_pieces):
    prompt, completion = encode(of_pieces, "a:"), encode(of_pieces, "a: yes")[-1:]
    assert of_pieces.convert_ids_to_tokens(completion) == ["▁yes"]
    assert of_pieces.decode(completion) == "yes"  # what tokens alone say
    assert Continuation(of_pieces, prompt).text(completion) == " yes"
    # behind nothing but special tokens there is nothing that a space could set apart
    assert Continuation(of_pieces, encode(of_pieces, "<|message|>")).text(completion) == "yes"
    # and a space within one completion, or before special tokens, is no question
    chat = encode(of_pieces, "a:<|channel|><|message|>")
    assert Continuation(of_pieces, chat).text(completion * 2) == " yes yes"


def test_the_parts_of_a_text_are_the_text(either):
    """Cut anywhere: also within a character, which then belongs to what completes it."""
    for text in TEXTS:
        whole = encode(either, "Q:" + text + " ab")
        for cut in range(2, len(whole)):
            first, rest = whole[:cut], whole[cut:]
            before = either.decode(first)
            behind = Continuation(either, first).text(rest)
            joined = before + behind
            if before.endswith("\ufffd") and "\ufffd" not in text:
                joined = before.rstrip("\ufffd") + behind
            if "<0x" in either.convert_ids_to_tokens(first)[-1] and "\ufffd" in before:
                continue  # such bytes spoil all bytes before them, in the prompt alone
            assert joined == "Q:" + text + " ab", (text, cut)


def test_a_character_that_begins_in_the_prompt_is_whole(either):
    ids = encode(either, "a€€€:")
    *prompt, last, colon = ids
    assert Continuation(either, prompt).text([last, colon]) == "€:"
    assert Continuation(either, prompt).text([colon])[-1] == ":"  # never completed


def test_a_long_run_of_bytes_before_a_completion_is_read_from_a_whole_character(either):
    prompt = encode(either, "a" + "€é🛑" * 9)
    assert Continuation(either, prompt).text(encode(either, "a€")[-3:]) == "€"


def test_byte_level_texts_are_those_of_tokens_alone(of_bytes):
    for text in TEXTS:
        ids = encode(of_bytes, text)
        assert Continuation(of_bytes, encode(of_bytes, "ab:")).text(ids) == of_bytes.decode(ids)


def test_no_space_of_a_token_is_cleaned_up():
    tokenizer = sentencepiece(clean_up_tokenization_spaces=True)
    ids = encode(tokenizer, "a .")
    assert tokenizer.decode(ids) == "a."
    assert tokenizer.convert_ids_to_tokens(ids[-1]) == "▁."
    assert Continuation(tokenizer, ids[:-1]).text(ids[-1:]) == " ."


def test_only_a_few_tokens_of_the_prompt_are_read(of_bytes, monkeypatch):
    sizes = []
    decode = of_bytes.decode
    monkeypatch.setattr(of_bytes, "decode", lambda ids, **kw: sizes.append(len(ids)) or decode(ids))
    Continuation(of_bytes, encode(of_bytes, "ab:" * 500)).text(encode(of_bytes, "4"))
    assert sizes == [8, 9]


# --- where a completion ends ---------------------------------------------------------------------


def read(ends, prompt, tokens, eos_id):
    """Tokens kept, whether the row finished, and its two texts."""
    ids = torch.tensor([[*tokens, *[eos_id] * 2]])[:, : max(1, len(tokens))]
    found = ends.read([prompt], ids, [eos_id, *ends.token_ids], 1)
    return int(found.mask.sum()), bool(found.finished), found.texts[0], found.special_texts[0]


BYTES = [  # stop strings, completion as texts of tokens or ids of bytes, tokens kept, text
    ("no stop string", [], ["a", "\n", "Q"], None, "a\nQ"),
    ("over three tokens", ["\nQ:"], ["a", "\n", "Q", ":", "b"], 4, "a"),
    ("within one token", ["\nQ"], ["a", "\nQ:", "b"], 2, "a"),
    ("one token", ["\nQ:"], ["a", "\nQ:", "b"], 2, "a"),
    ("the last allowed token", ["\nQ:"], ["a", "\n", "Q", ":"], 4, "a"),
    ("not quite", ["\nQ:"], ["a", "\n", "Q", "a"], None, "a\nQa"),
    ("the first token", ["a"], ["ab", "b"], 1, ""),
    ("begun twice", ["aab"], ["a", "a", "a", "b"], 4, "a"),
    ("the first of several", ["42", "c"], ["a", "c", "42"], 2, "a"),
    ("two in one token, the one complete first", [":", "Q"], ["a", "\nQ:"], 2, "a\n"),
    ("one within the other", ["\nQ:", "Q"], ["a", "\n", "Q", ":"], 3, "a\n"),
    ("both complete at once, the longer one", [":", "\nQ:"], ["a", "\nQ:"], 2, "a"),
    ("a character of four bytes", ["🛑"], ["a", 0xF0, 0x9F, 0x9B, 0x91, "b"], 5, "a"),
    ("bytes that are no character", ["🛑"], ["a", 0xF0, 0x9F, "b"], None, "a\ufffdb"),
    ("a space", [" c"], ["a", " c"], 2, "a"),
    ("special tokens within", ["\nQ:"], ["\n", "<|channel|>", "Q", "<|message|>", ":"], 5, ""),
    ("an end of sequence before", ["\nQ:"], ["a", "<eos>", "\nQ:"], 2, "a"),
]


def tokens_of(tokenizer, parts):
    """Ids, each of one token: a text that is one, or a byte."""
    letters = {value: letter for letter, value in byte_values().items()}
    found = []
    for part in parts:
        ids = (
            [tokenizer.convert_tokens_to_ids(letters[part])]
            if isinstance(part, int)
            else encode(tokenizer, part)
        )
        assert len(ids) == 1, part
        found += ids
    return found


def behind_colon(tokenizer, text):
    """Ids of a text that does not begin."""
    return encode(tokenizer, ":" + text)[len(encode(tokenizer, ":")) :]


def byte_values():
    """The value of each letter that byte-level tokenizers write for a byte (GPT-2)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [value for value in range(256) if value not in kept]
    return {chr(v): v for v in kept} | {chr(256 + i): v for i, v in enumerate(rest)}


@pytest.mark.parametrize(("stops", "parts", "kept", "text"), [case[1:] for case in BYTES],
                         ids=[case[0] for case in BYTES])  # fmt: skip
def test_a_stop_string_ends_a_completion_at_the_token_that_completes_it(
    of_bytes, stops, parts, kept, text
):
    tokens, prompt = tokens_of(of_bytes, parts), encode(of_bytes, "a\nQ: ")
    found = read(Ends(of_bytes, stops), prompt, tokens, of_bytes.eos_token_id)
    assert found[:3] == (kept or len(tokens), kept is not None, text)


@pytest.mark.parametrize("stop", ["\nQ:", "Q:", ":", " yes", "no", "€", "🛑é", "aa", " "])
def test_every_tokenizer_ends_where_a_plain_search_ends(either, stop):
    """The rule: the least number of tokens whose text, behind the prompt, has the stop string."""
    prompt = encode(either, "a\nQ: no €")
    generator = torch.Generator().manual_seed(0)
    pieces = ["\n", "Q", ":", " yes", " no", "a", "€", "🛑", "é", " ", "ab", "<|channel|>"]
    ended = 0
    for row in range(12):
        chosen = [pieces[i] for i in torch.randint(12, (14,), generator=generator)]
        chosen[7:7] = [[stop], [*stop], []][row % 3]  # whole, in characters, or by chance
        tokens = [i for piece in chosen for i in behind_colon(either, piece)]
        texts = [Continuation(either, prompt).text(tokens[:n]) for n in range(1, len(tokens) + 1)]
        expected = next((n for n, text in enumerate(texts, 1) if stop in text), None)
        kept, finished, text, _ = read(Ends(either, [stop]), prompt, tokens, either.eos_token_id)
        assert (kept, finished) == (expected or len(tokens), expected is not None)
        assert text == texts[kept - 1].partition(stop)[0]
        ended += finished
    assert ended > 7


@pytest.mark.parametrize("split", [1, 2])
def test_only_the_text_of_the_completion_counts(either, split):
    """A stop string that begins in the prompt, or stands in it, ends nothing."""
    whole = [i for letter in "\nQ:" for i in behind_colon(either, letter)]
    prompt, tokens = encode(either, "\nQ: a") + whole[:split], whole[split:] + encode(either, "a")
    kept, finished, _, _ = read(Ends(either, ["\nQ:"]), prompt, tokens, either.eos_token_id)
    assert (kept, finished) == (len(tokens), False)


def test_a_stop_id_belongs_to_the_completion_and_not_to_its_text(of_bytes):
    tokens = tokens_of(of_bytes, ["a", "\n", "b", "42"])
    newline = tokens[1]
    eos = of_bytes.eos_token_id
    assert read(Ends(of_bytes, [], [newline]), [], tokens, eos) == (2, True, "a", "a")
    # the id comes first where its token completes a stop string, too
    assert read(Ends(of_bytes, ["a\n"], [newline]), [], tokens, eos) == (2, True, "a", "a")
    kept = Ends(of_bytes, [], [newline], included=True)
    assert read(kept, [], tokens, eos) == (2, True, "a\n", "a\n")
    # an end of sequence stays out of the text all the same
    assert read(kept, [], [tokens[0], eos], eos) == (2, True, "a", "a")


def test_a_stop_string_may_stay_in_the_text(of_bytes):
    tokens = tokens_of(of_bytes, ["a", "\nQ:", "b"])
    ends = Ends(of_bytes, ["\nQ"], included=True)
    assert read(ends, [], tokens, of_bytes.eos_token_id)[2] == "a\nQ"  # and nothing behind it


def test_a_stop_string_that_is_a_special_token_is_its_id(of_bytes):
    channel = of_bytes.convert_tokens_to_ids("<|channel|>")
    ends = Ends(of_bytes, ["<|channel|>", "\nQ:"], [7])
    assert (ends.strings, ends.token_ids) == (["\nQ:"], [7, channel])


@pytest.mark.parametrize(
    ("strings", "message"),
    [
        (["a", ""], "policy.stop_strings holds an empty text"),
        (
            ["<|message|>a"],
            r"'<\|message\|>a' holds the special token .* policy.stop_token_ids: \[",
        ),
    ],
)
def test_a_stop_string_that_could_never_end_a_text_is_refused(of_bytes, strings, message):
    with pytest.raises(ValueError, match=message):
        Ends(of_bytes, strings)


# --- special tokens ------------------------------------------------------------------------------


def test_special_texts_keep_special_tokens_but_not_the_end(of_bytes):
    tokens = encode(of_bytes, "<|channel|>a<|message|>answer: 42<eos>")
    eos = of_bytes.eos_token_id
    found = read(Ends(of_bytes), encode(of_bytes, "ab"), tokens, eos)
    assert found == (len(tokens), True, "a42", "<|channel|>a<|message|>answer: 42")
    stopped = read(Ends(of_bytes, ["2"]), encode(of_bytes, "ab"), tokens, eos)
    assert stopped == (len(tokens) - 1, True, "a4", "<|channel|>a<|message|>answer: 4")


def test_rows_without_special_tokens_are_decoded_once(of_bytes, monkeypatch):
    ends, prompt = Ends(of_bytes), encode(of_bytes, "ab")
    calls = []
    decode = of_bytes.decode
    monkeypatch.setattr(of_bytes, "decode", lambda ids, **kw: calls.append(kw) or decode(ids, **kw))
    ends.read([prompt], torch.tensor([encode(of_bytes, "ca")] * 8), [of_bytes.eos_token_id], 8)
    assert all(kw["skip_special_tokens"] for kw in calls)
    assert len(calls) == 1 + 8  # the prompt, and each row


def test_special_ids_are_all_that_decoding_leaves_out(either):
    ids = range(len(either))
    left_out = {i for i in ids if either.decode([i, i], skip_special_tokens=True) == ""}
    assert left_out <= special_ids(either)
    assert {either.convert_tokens_to_ids(t) for t in ("answer: ", "<|channel|>")} <= left_out


# --- decoders ------------------------------------------------------------------------------------


@pytest.fixture
def policy(make_model, tokenizer):
    policy = Policy(make_model("qwen3"), tokenizer)
    policy.eos_ids = [1, 31]
    return policy


STOPS = ["61", "5", "*answer: ", "\n", "9+"]


def plainly_stopped(policy, samples, stops):
    """Tokens of each row that a search in growing texts keeps."""
    kept = []
    for ids, keep in zip(samples.completion_ids, samples.mask, strict=True):
        ids = ids[keep].tolist()
        texts = [policy.tokenizer.decode(ids[:n]) for n in range(1, len(ids) + 1)]
        ends = (n for n, text in enumerate(texts, 1) if any(stop in text for stop in stops))
        kept.append(next(ends, len(ids)))
    return kept


@pytest.mark.parametrize("engine", ["groups", "own cache"])
@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_decoders_stop_at_the_token_that_the_mask_ends_with(
    policy, monkeypatch, engine, batch_size
):
    """Rows of different length, waiting rows, both engines: what is drawn before stays the same."""
    batch = batch_of([*PROMPTS, list(range(3, 12))])
    free = GroupSampler(3, 16).sample(policy, batch, seed=4)
    policy.ends = Ends(policy.tokenizer, STOPS)
    if engine == "own cache":
        monkeypatch.setattr(sampling, "decoding", lambda *_: "batched")
    raw = []
    decode = GroupSampler._decode
    monkeypatch.setattr(GroupSampler, "_decode", lambda *args: raw.append(decode(*args)) or raw[-1])
    samples = GroupSampler(3, 16, batch_size=batch_size).sample(policy, batch, seed=4)
    expected = plainly_stopped(policy, free, STOPS)
    lengths = samples.mask.sum(1)
    assert lengths.tolist() == expected
    assert len(set(expected)) > 4 and (samples.mask.sum(1) < free.mask.sum(1)).sum() > 4
    width = samples.mask.shape[1]
    same = samples.completion_ids == free.completion_ids[:, :width]
    assert same[samples.mask].all()
    assert ((raw[0][1] != 0).sum(1) == lengths).all()  # nothing was drawn behind the end
    ends = [any(stop in policy.tokenizer.decode(ids[keep].tolist()) for stop in STOPS)
            for ids, keep in zip(samples.completion_ids, samples.mask, strict=True)]  # fmt: skip
    eos = torch.isin(samples.completion_ids, torch.tensor([1, 31])) & samples.mask
    assert samples.finished.tolist() == [a or b for a, b in zip(ends, eos.any(1), strict=True)]
    assert not any(stop in text for text in samples.texts for stop in STOPS)


def test_generate_ends_at_the_same_tokens(make_model):
    symbols = letters("<pad>", "<eos>", "abcdefghijklmnopqrstuvwxyz0123")
    policy = Policy(make_model("qwen3", seed=3), symbols)
    batch = batch_of(PROMPTS)
    sampler = GroupSampler(1, 16, temperature=0.0)
    free = sampler.sample(policy, batch, seed=0).texts
    stops = [free[0][1:4], free[1][:2], free[3][:3]]
    policy.ends = Ends(policy.tokenizer, stops)
    samples = sampler.sample(policy, batch, seed=0)
    assert samples.finished[[0, 1, 3]].all() and samples.texts != free
    expected = policy.model.generate(
        batch.prompt_ids,
        attention_mask=batch.prompt_mask.long(),
        do_sample=False,
        max_new_tokens=16,
        pad_token_id=0,
        stop_strings=stops,
        tokenizer=policy.tokenizer,
    )[:, batch.prompt_ids.shape[1] :]
    assert expected.shape == samples.mask.shape
    assert torch.equal(expected[samples.mask], samples.completion_ids[samples.mask])
    assert (expected[~samples.mask] == 0).all()


def test_without_stop_strings_nothing_is_asked_while_decoding(policy, monkeypatch):
    def refuse(*_):
        raise AssertionError("asked")

    policy.ends = Ends(policy.tokenizer, [], [7])  # ids are no question of texts
    policy.eos_ids = [1, 7]
    monkeypatch.setattr(Ends, "completed", refuse)
    samples = GroupSampler(3, 8).sample(policy, batch_of(PROMPTS), seed=0)
    assert samples.finished.any()


def test_special_texts_travel_with_their_rows(policy):
    samples = GroupSampler(3, 8).sample(policy, batch_of(PROMPTS), seed=0)
    assert samples.special_texts is not None
    picked = samples.select(torch.tensor([4, 1]))
    assert picked.special_texts == [samples.special_texts[4], samples.special_texts[1]]
    assert join_samples([samples, samples]).special_texts == samples.special_texts * 2
    untold = replace(samples, special_texts=None)
    assert join_samples([samples, untold]).special_texts is None
