"""Write the files of the embedded task: chain sums, with or without working.

Everything but the trained policy is made here: prompts for reinforcement learning,
held-out prompts, demonstrations for the warm start, and the untrained model's
configuration and tokenizer. Only the standard library is used and every draw comes
from one seed, so a second run writes the same bytes.

    python data/arithmetic/make.py            # rewrites the files next to this script

The policy itself is made by ``python train.py fit --config configs/sft_arithmetic.yaml``.
"""

import argparse
import hashlib
import json
import random
from pathlib import Path

SEED = 0
NUM_TRAIN = 4096
NUM_HELDOUT = 256
NUM_DEMOS = 12_000
NUM_TERMS = (2, 5)  # fewest and most digits in one prompt
# A curriculum by order of lines: first mostly the working, which is slow to learn, then the mixture
# of careful and quick that the warm-started policy is to imitate.
CURRICULUM = ((0.7, 0.9), (0.3, 0.3))  # (share of the lines, careful share among them)
QUICK_WRONG_SHARE = 0.6  # quick demonstrations whose answer is off by 1 to 4

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
TOKENS = [PAD, EOS, UNK, *"0123456789+-=", ", ", "answer: "]

MODEL_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "float32",
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,  # with the default of 0.02 AdamW learns several times slower here
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": True,
    "pad_token_id": TOKENS.index(PAD),
    "eos_token_id": TOKENS.index(EOS),
    "bos_token_id": None,
}
# The same with eight experts, two of them active, as a base for comparisons between algorithms.
MOE_CONFIG = MODEL_CONFIG | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_local_experts": 8,  # transformers writes them under this name
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}
GENERATION_CONFIG = {
    "eos_token_id": TOKENS.index(EOS),
    "pad_token_id": TOKENS.index(PAD),
}


def is_heldout(prompt: str) -> bool:
    """Say whether a prompt belongs to the held-out tenth, from its text alone.

    >>> [is_heldout(prompt) for prompt in ("7+9+4=", "3+4=")]
    [False, False]
    """
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def draw_chain(rng: random.Random) -> tuple[str, list[str], int]:
    """Draw one chain sum whose running total never falls below zero.

    Returns:
        The prompt (``7+9+4=``), its steps (``7+9=16``, ``16+4=20``) and its answer (20).
    """
    total = rng.randint(1, 9)
    prompt, steps = str(total), []
    for _ in range(rng.randint(*NUM_TERMS) - 1):
        digit = rng.randint(1, 9)
        sign = rng.choice("+-") if digit <= total else "+"
        following = total + digit if sign == "+" else total - digit
        steps.append(f"{total}{sign}{digit}={following}")
        prompt += f"{sign}{digit}"
        total = following
    return f"{prompt}=", steps, total


def draw_prompts(rng: random.Random, count: int, heldout: bool) -> list[dict[str, str]]:
    """Draw ``count`` different prompts with their answers from one side of the split."""
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        prompt, _, answer = draw_chain(rng)
        if is_heldout(prompt) == heldout:
            rows[prompt] = {"prompt": prompt, "answer": str(answer)}
    return list(rows.values())


def draw_demo(rng: random.Random, careful_share: float) -> dict[str, str]:
    """Draw a demonstration: a careful one with its working, or a quick, often wrong guess."""
    while True:
        prompt, steps, answer = draw_chain(rng)
        if not is_heldout(prompt):
            break
    if rng.random() < careful_share:
        return {"prompt": prompt, "completion": ", ".join([*steps, f"answer: {answer}"])}
    if rng.random() < QUICK_WRONG_SHARE:
        answer = max(0, answer + rng.choice([-4, -3, -2, -1, 1, 2, 3, 4]))
    return {"prompt": prompt, "completion": f"answer: {answer}"}


def draw_demos(rng: random.Random) -> list[dict[str, str]]:
    """Draw the demonstrations in the order of the curriculum."""
    return [
        draw_demo(rng, careful_share)
        for share, careful_share in CURRICULUM
        for _ in range(round(share * NUM_DEMOS))
    ]


def tokenizer_files() -> dict[str, dict]:
    """Return ``tokenizer.json`` and its companion: one token per symbol, nothing learned."""
    specials = [
        {
            "id": TOKENS.index(token),
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in (PAD, EOS, UNK)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": specials,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "answer: |, |[0-9+=-]"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},  # the default decoder would put spaces between tokens
        "model": {
            "type": "WordLevel",
            "vocab": {token: index for index, token in enumerate(TOKENS)},
            "unk_token": UNK,
        },
    }
    companion = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNK,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": MODEL_CONFIG["max_position_embeddings"],
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": companion}


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make(folder: Path) -> None:
    """Write all files of the task below ``folder``."""
    rng = random.Random(SEED)
    write_lines(folder / "train.jsonl", draw_prompts(rng, NUM_TRAIN, heldout=False))
    write_lines(folder / "heldout.jsonl", draw_prompts(rng, NUM_HELDOUT, heldout=True))
    write_lines(folder / "demos.jsonl", draw_demos(rng))
    for name, config in (("base", MODEL_CONFIG), ("moe_base", MOE_CONFIG)):
        base = folder / name
        base.mkdir(parents=True, exist_ok=True)
        files = {
            "config.json": config,
            "generation_config.json": GENERATION_CONFIG,
            **tokenizer_files(),
        }
        for file, content in files.items():
            (base / file).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    make(parser.parse_args().folder)
