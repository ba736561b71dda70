"""Build the models and prompts of the benchmarks: random weights, completions of a set length.

python benchmarks/make_models.py --out runs/bench/assets --models S M --lengths full geo32 \
    --prompts 32 256

Writes folders for ``from_pretrained`` such as ``S-geo32``, and files such as ``S-256.jsonl``.

Decides how long completions are, by the weights alone: the first channel of the residual stream is
a constant that no layer writes to, and the head reads it into the logit of the end of sequence.
``full`` never ends; ``geoK`` ends with probability about 1/K at every step, so that lengths are
geometric with mean K. Every engine therefore meets the same lengths, and a second forward pass
gives the log-probs that were sampled from. Leaves out timing.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

SIZES = {  # hidden size, layers, heads, key-value heads, head size, feed-forward size, vocabulary
    "S": (256, 4, 4, 2, 64, 768, 512),
    "M": (512, 8, 8, 4, 64, 1536, 8192),
    "0.6B": (1024, 28, 16, 8, 128, 3072, 151936),
}
PAD, EOS = 0, 1
NUM_PROMPTS = 64
MOST_MERGES = 8192  # of the tokenizer; a larger vocabulary has ids that no text uses


def corpus(num_files: int = 400) -> str:
    """Text that every machine has: files of Python's standard library, in a fixed order."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    files = [file for file in files if "site-packages" not in file.parts]
    random.Random(0).shuffle(files)
    return "\n".join(file.read_text(errors="ignore") for file in files[:num_files])


def build_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on ``text``."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, MOST_MERGES),
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def build_model(size: str, dtype: torch.dtype = torch.float32) -> Qwen3ForCausalLM:
    """A random model with a constant first channel; its layers count, so that logits vary."""
    hidden, layers, heads, kv_heads, head, feed_forward, vocabulary = SIZES[size]
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        intermediate_size=feed_forward,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for writes in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                writes.mul_(3.0)
                writes[0] = 0.0
        model.model.embed_tokens.weight[:, 0] = 0.5
    return model.to(dtype)


@torch.no_grad()
def set_lengths(model: Qwen3ForCausalLM, mean: int | None, steps: int = 40) -> float:
    """Make completions end with probability 1 / ``mean`` per step, or never.

    Args:
        model: From :func:`build_model`; its embedding is also its head.
        mean: Mean length, tokens; None for completions that never end by themselves.
        steps: Bisections of the weight that decides.

    Returns:
        The mean probability reached, over random contexts.
    """
    table = model.model.embed_tokens.weight
    ids = torch.randint(2, len(table), (8, 64), generator=torch.Generator().manual_seed(0))
    states = model.model(ids).last_hidden_state.flatten(0, 1)

    def probability(weight: float) -> float:
        table[EOS, 0] = weight
        return torch.softmax((states @ table.T).float(), -1)[:, EOS].mean().item()

    if mean is None:
        weight = -8.0
        while probability(weight) > 1e-9:
            weight *= 2
        return probability(weight)
    low, high = -2.0, 80.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < 1 / mean else (low, middle)
    return probability(high)


def cut_prompts(text: str, tokenizer: PreTrainedTokenizerFast, longest: int) -> list[str]:
    """Pieces of ``text`` of 5/8 ``longest`` to ``longest`` tokens each, in a fixed random order."""
    draw = random.Random(longest)
    ids = tokenizer(text[:2_000_000])["input_ids"]
    shortest, prompts = longest * 5 // 8, []
    while len(prompts) < NUM_PROMPTS:
        length = draw.randint(shortest, longest)
        start = draw.randrange(len(ids) - length)
        prompt = tokenizer.decode(ids[start : start + length])
        whole = "\ufffd" not in prompt  # no character was cut in two
        if whole and shortest <= len(tokenizer(prompt)["input_ids"]) <= longest:
            prompts.append(prompt)
    return prompts


def main(argv: list[str] | None = None) -> None:
    """Write what is asked for and say what it holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for models and prompts")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["S", "M"])
    parser.add_argument("--lengths", nargs="+", default=["full", "geo32"], help="full or geoK")
    parser.add_argument("--prompts", nargs="+", type=int, default=[32, 256], help="longest, tokens")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args(argv)
    logging.disable_progress_bar()
    text = corpus()
    for size in options.models:
        tokenizer = build_tokenizer(text, SIZES[size][-1])
        options.out.mkdir(parents=True, exist_ok=True)
        for longest in options.prompts:
            rows = [json.dumps({"prompt": p}) for p in cut_prompts(text, tokenizer, longest)]
            (options.out / f"{size}-{longest}.jsonl").write_text("\n".join(rows) + "\n")
        model = build_model(size)
        for lengths in options.lengths:
            mean = None if lengths == "full" else int(lengths.removeprefix("geo"))
            reached = set_lengths(model, mean)
            folder = options.out / f"{size}-{lengths}"
            model.to(getattr(torch, options.dtype)).save_pretrained(folder)
            model.float()
            tokenizer.save_pretrained(folder)
            parameters = sum(p.numel() for p in model.parameters())
            print(f"{folder}: {parameters:,} parameters, P(end) {reached:.2g}")


if __name__ == "__main__":
    main()
