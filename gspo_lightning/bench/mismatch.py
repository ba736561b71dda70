"""What weights of a sampler that is not the policy come to, by length: the table of the docs.

Decides the model of rounding: log-ratios of tokens that are normal, independent, and of mean 1 when
exponentiated, as those of two probability distributions are. The weights are those of a run, by
the same function.
"""

import argparse
import math

import torch
from torch import Tensor

from gspo_lightning.bench.report import table
from gspo_lightning.mismatch import Mismatch, row_weights

SHORT = 40  # tokens of the rows that share a mini-batch with those of each line
COLUMNS = (
    "tokens",
    "spread of S",
    "effective size",
    "mean of min(cap, e^S)",
    f"weight beside {SHORT} tokens",
    "spread of M",
)


def add_arguments(part: argparse.ArgumentParser) -> None:
    part.add_argument("--sigma", type=float, default=0.05, help="spread of a token's, nats")
    part.add_argument("--cap", type=float, default=2.0)
    part.add_argument("--tokens", type=int, nargs="+", default=[SHORT, 200, 1000, 8000])
    part.add_argument("--rows", type=int, default=400_000, help="drawn for each length")


def sums(tokens: int, sigma: float, rows: int, generator: torch.Generator) -> Tensor:
    """S of rows, nats: normal, with exp(S) of mean 1."""
    variance = tokens * sigma**2
    noise = torch.randn(rows, generator=generator, dtype=torch.float64)
    return math.sqrt(variance) * noise - variance / 2


def line(tokens: int, options: argparse.Namespace) -> list[str]:
    """A line of the table; the generator is the same for all, so that one line can be asked for."""
    generator = torch.Generator().manual_seed(0)
    own = sums(tokens, options.sigma, options.rows, generator)
    short = sums(SHORT, options.sigma, options.rows, generator)
    capped = own.clamp(max=math.log(options.cap)).exp().mean().item()
    both = torch.cat([own, short])[:, None]  # one token each, whose log-ratio is S
    drawn = torch.zeros_like(both), torch.ones_like(both, dtype=torch.bool)
    found = row_weights(both, *drawn, Mismatch("sequence", options.cap)).weights
    beside = found[: options.rows].mean().item()
    return [
        f"{tokens:,}",
        f"{math.sqrt(tokens) * options.sigma:.2f}",
        f"{math.exp(-tokens * options.sigma**2):.2g}",
        f"{capped:.2f}",
        f"{beside:.2f}",
        f"{options.sigma / math.sqrt(tokens):.1e}",
    ]


def mismatch(options: argparse.Namespace) -> int:
    """Print the table."""
    print(f"sigma {options.sigma:g} nats, cap {options.cap:g}\n")
    print(table([[*COLUMNS], *(line(tokens, options) for tokens in options.tokens)]))
    return 0
