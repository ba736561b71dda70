"""Write the preference pairs: completions of the shipped policy, ranked by a hidden taste.

The taste gives 1 point for the right answer and half a point for showing the working. A
reward model is to find this out from pairs alone: which of two completions of a prompt has
more points, never how many. Prompts are those of data/arithmetic, with its split.

    python data/preference/make.py            # rewrites the files next to this script

Every draw comes from one seed. The same machine writes the same bytes; on another one the
policy may round differently, and then a few completions differ. The reward model itself is
made by ``python train.py fit --config configs/reward_model.yaml``.
"""

import argparse
import itertools
import json
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in this repository

from gspo_lightning.data import collate_prompts
from gspo_lightning.policy import Policy, PolicyConfig, load_policy
from gspo_lightning.rewards import MarkedAnswer
from gspo_lightning.sampling import GroupSampler

TASK = Path(__file__).parents[1] / "arithmetic"
SEED = 0
NUM_PROMPTS = {"train": 1500, "heldout": 256}
NUM_SAMPLES = 8  # completions per prompt, at temperature 1
MAX_PAIRS = 3  # per prompt
MAX_NEW_TOKENS = 40
RIGHT, WORKING = 1.0, 0.5  # the points of the taste


def taste(row: dict, completion: str) -> float:
    """Points of a completion.

    >>> row = {"prompt": "7+9=", "answer": "16"}
    >>> [taste(row, text) for text in ("7+9=16, answer: 16", "answer: 16", "answer: 15")]
    [1.5, 1.0, 0.0]
    """
    right = MarkedAnswer()([row], [completion])[0]
    return RIGHT * float(right or 0) + WORKING * ("=" in completion)


def sample(policy: Policy, rows: list[dict], seed: int) -> list[list[str]]:
    """Draw the different finished completions of each prompt, in the order they came."""
    sampler = GroupSampler(NUM_SAMPLES, MAX_NEW_TOKENS, temperature=1.0)
    prompts = [(policy.tokenizer(row["prompt"])["input_ids"], row) for row in rows]
    found = []
    for start in range(0, len(rows), 256):
        samples = sampler.sample(policy, collate_prompts(prompts[start : start + 256]), seed=seed)
        texts = [
            text if done else None
            for text, done in zip(samples.texts, samples.finished.tolist(), strict=True)
        ]
        for first in range(0, len(texts), NUM_SAMPLES):
            group = texts[first : first + NUM_SAMPLES]
            found.append(list(dict.fromkeys(text for text in group if text is not None)))
        seed += 1
    return found


def pair_up(rng: random.Random, row: dict, texts: list[str]) -> list[dict[str, str]]:
    """Draw some pairs of completions that the taste tells apart, the better one as chosen."""
    pairs = []
    for two in itertools.combinations(texts, 2):
        worse, better = sorted(two, key=lambda text: taste(row, text))
        if taste(row, worse) < taste(row, better):
            pairs.append({"prompt": row["prompt"], "chosen": better, "rejected": worse})
    return rng.sample(pairs, min(MAX_PAIRS, len(pairs)))


def make(folder: Path, num_prompts: dict[str, int] = NUM_PROMPTS) -> None:
    """Write ``train.jsonl`` and ``heldout.jsonl`` into ``folder``."""
    policy = load_policy(PolicyConfig(str(TASK / "policy")))
    rng = random.Random(SEED)
    for seed, (name, count) in enumerate(num_prompts.items()):
        lines = (TASK / f"{name}.jsonl").read_text().splitlines()[:count]
        rows = [json.loads(line) for line in lines]
        completions = sample(policy, rows, seed=1000 * seed + SEED)
        pairs = [
            pair
            for row, texts in zip(rows, completions, strict=True)
            for pair in pair_up(rng, row, texts)
        ]
        text = "".join(json.dumps(pair) + "\n" for pair in pairs)
        (folder / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    make(parser.parse_args().folder)
