"""The table of docs/mismatch.md: made by the script, and right."""

import argparse
import math

import pytest
import torch

from gspo_lightning.bench import mismatch
from support.repository import ROOT


def options(*words):
    parser = argparse.ArgumentParser()
    mismatch.add_arguments(parser)
    return parser.parse_args(words)


def test_the_page_has_the_table_of_the_script(capsys):
    assert mismatch.mismatch(options()) == 0
    _, table = capsys.readouterr().out.split("\n\n")
    assert table in (ROOT / "docs" / "mismatch.md").read_text()


@pytest.mark.parametrize("tokens", [40, 1000, 8000])
def test_sums_have_the_capped_mean_of_a_log_normal(tokens):
    """E min(cap, e^S) of a normal S with E e^S = 1, by its distribution function."""

    def below(x):
        return (1 + math.erf(x / math.sqrt(2))) / 2

    cap, variance = 2.0, tokens * 0.05**2
    spread, edge = math.sqrt(variance), math.log(cap)
    inside = below((edge - variance / 2) / spread)  # the share of e^S that is not capped
    expected = inside + cap * (1 - below((edge + variance / 2) / spread))
    drawn = mismatch.sums(tokens, 0.05, 200_000, torch.Generator().manual_seed(1))
    assert drawn.clamp(max=edge).exp().mean().item() == pytest.approx(expected, rel=0.03)
