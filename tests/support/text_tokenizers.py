"""Tokenizers whose tokens are bytes, or begin with spaces, as those of real models do."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<eos>", "<|channel|>", "<|message|>", "answer: "]


def wrapped(core: Tokenizer, **options) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers with all of ``SPECIAL``."""
    core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", **options
    )


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes, and a few words: as GPT-2, Llama 3 and Qwen; `Ġ` is a space, `Ċ` a newline."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Q"), ("ĊQ", ":"), ("a", "b"), ("Ġ", "c"), ("4", "2")]
    words = [left + right for left, right in merges]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *words])}
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return wrapped(core)


def sentencepiece(**options) -> PreTrainedTokenizerFast:
    """Words that begin with a space, and bytes for what is unknown: as Llama 2, Mistral, Gemma."""
    scores = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    scores += [(word, -1.0) for word in ("▁yes", "▁no", "▁.")]
    scores += [(letter, -3.0) for letter in "▁abcQ:.42\n"]
    core = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrapped(core, unk_token="<unk>", **options)


def letters(pad: str, eos: str, symbols: str) -> PreTrainedTokenizerFast:
    """One token per symbol."""
    vocabulary = {symbol: i for i, symbol in enumerate([pad, eos, *symbols])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=pad))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, eos_token=eos)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
