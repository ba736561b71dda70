"""Time rollouts of several turns: the cache kept, against reading each history again at each turn.

Prints a Markdown table. Random weights, 3.3 million parameters; a turn ends with a probability of
1/16 a token, so that both ways draw turns of the same distribution; seconds are CPU seconds per
thousand tokens drawn, medians of runs in turn.

    python benchmarks/turns.py
"""

import argparse
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from gspo_lightning import Environment, GroupSampler, Turn
from gspo_lightning.engine import group_decoder
from gspo_lightning.engine.texts import ends_of
from gspo_lightning.rollout import PromptBatch

VOCABULARY, PROMPT, PROMPTS, GROUP, TURNS, LONGEST_TURN = 512, 64, 4, 8, 4, 64
ENDS = range(VOCABULARY // 16)


class Says(Environment):
    """Says so many words behind each turn but the last."""

    def __init__(self, words: int) -> None:
        self.message = " ".join(f"w{100 + i % 200}" for i in range(words))

    def begin(self, row: dict, seed: int) -> Any:
        left = iter(range(TURNS - 1, -1, -1))
        return SimpleNamespace(step=lambda text: Turn(self.message if next(left) else None))


def make_policy() -> Any:
    """A random model with a word for each token."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    words = {f"w{i}": i for i in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    model = AutoModelForCausalLM.from_config(config).eval()
    known = {"model": model, "tokenizer": tokenizer, "ends": ends_of(tokenizer)}
    return SimpleNamespace(**known, eos_ids=[*ENDS], pad_id=0)


def batch_of(texts: list[list[int]]) -> PromptBatch:
    """Prompts, padded on the left."""
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    lengths = torch.tensor([[len(text)] for text in texts])
    return PromptBatch(ids, torch.arange(width) >= width - lengths, [{} for _ in texts])


def kept(policy: Any, prompts: list[list[int]], words: int, seed: int) -> int:
    """One call of the sampler; tokens drawn."""
    longest = TURNS * (LONGEST_TURN + words)
    sampler = GroupSampler(GROUP, longest, environment=Says(words), max_turns=TURNS)
    return int(sampler.sample(policy, batch_of(prompts), seed=seed).mask.sum())


def again(policy: Any, prompts: list[list[int]], words: int, seed: int) -> int:
    """A call for each turn, with the whole history as its prompt; tokens drawn."""
    message = policy.tokenizer(Says(words).message)["input_ids"]
    histories, drawn = [list(prompt) for prompt in prompts for _ in range(GROUP)], 0
    for turn in range(TURNS):
        # the first turn shares prompts, as groups do; later histories are each other's no more
        texts, size = (prompts, GROUP) if turn == 0 else (histories, 1)
        samples = GroupSampler(size, LONGEST_TURN).sample(policy, batch_of(texts), seed=seed + turn)
        for i, row in enumerate(samples.completion_ids):
            own = row[samples.mask[i]].tolist()
            drawn += len(own)
            histories[i] += own + message
    return drawn


def main() -> None:
    """Time all ways in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--words", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = make_policy()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(ENDS), VOCABULARY, (PROMPTS, PROMPT), generator=generator)
    prompts = drawn.tolist()
    long = group_decoder.LONG
    ways = {"again": (again, long), "token by token": (kept, 10**9), "kept": (kept, long)}
    print("| tokens of a message | again | kept, token by token | kept | again / kept |")
    print("|---|---|---|---|---|")
    for words in options.words:
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for run in range(options.runs + 1):
            for name, (way, group_decoder.LONG) in ways.items():
                start = time.process_time()
                tokens = way(policy, prompts, words, seed=100 * run)
                taken = 1000 * (time.process_time() - start) / tokens
                if run:  # the first warms up
                    seconds[name].append(taken)
        pairs = zip(seconds["again"], seconds["kept"], strict=True)
        ratios = sorted(one / other for one, other in pairs)
        figures = [f"{statistics.median(seconds[name]):.2f} s" for name in ways]
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {words} | {' | '.join(figures)} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
