"""Time updates that pick tokens by statistics of the whole mini-batch, against one that does not.

Prints the table of docs/performance.md. Statistics must be known before the first backward pass,
which costs one more forward pass over each mini-batch. CPU seconds of the updates of a rollout,
each run in a process of its own, in turn; ratios are medians over rounds, with the smallest and
the largest.

    python benchmarks/picks.py
"""

import argparse
import json
import statistics

from gspo_lightning.bench.cases import Case, assets, in_process

TOKEN = {"ratio": "token", "aggregation": "token_mean", "clip_low": 0.2, "clip_high": 0.2}
PICKS = {  # the rows of configs/algorithm
    "none": {},
    "high_entropy": {"pick": "high_entropy", "pick_share": 0.2},
    "clip_cov": {"pick": "clip_cov", "pick_share": 2e-4, "cov_low": 1.0, "cov_high": 5.0},
    "kl_cov": {"pick": "kl_cov", "pick_share": 2e-3, "cov_kl": 1.0, "clip_low": 1.0}
    | {"clip_high": 1e4},
}


def seconds(case: Case, pick: str, options: argparse.Namespace) -> float:
    """CPU seconds of the updates of a rollout."""
    model, prompts = assets(case, options)
    settings = {"objective": TOKEN | PICKS[pick], "micro_batch_size": options.micro_batch_size}
    words = ["-m", "gspo_lightning.bench", "worker", f"--model={model}", f"--prompts={prompts}"]
    words += [f"--group-size={case.group}", f"--max-new-tokens={case.limit}"]
    words += [f"--settings={json.dumps(settings)}"]
    return in_process(words, 1)["cpu_seconds"]["optimise"]


def main() -> None:
    """Time all picks in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    cases = [Case.parse("S/32/geo/8"), Case.parse("S/32/128/8")]
    parser.add_argument("--cases", type=Case.parse, nargs="+", default=cases)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro-batch-size", type=int, help="completions; the default is all")
    parser.add_argument("--assets", default="runs/bench/assets", help="models and prompts")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    print("| case | pick | CPU s of the updates | against none |\n|---|---|---|---|")
    for case in options.cases:
        found: dict[str, list[float]] = {pick: [] for pick in PICKS}
        for _ in range(options.rounds):
            for pick in PICKS:
                found[pick].append(seconds(case, pick, options))
        for pick, values in found.items():
            ratios = sorted(v / n for v, n in zip(values, found["none"], strict=True))
            ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"| {case} | {pick} | {statistics.median(values):.2f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
