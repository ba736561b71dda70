"""Tokens and log-probs drawn from logits, against the softmax they come from."""

import math

import pytest
import torch

from gspo_lightning.engine.drawing import draw, listed


def random_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("vocabulary", [1, 2, 5, 64, 777, 2000])
def test_tokens_are_drawn_from_the_tempered_softmax(vocabulary):
    """Evenly spaced numbers in place of random ones: shares are off by one draw at most."""
    logits = random_logits(vocabulary)
    if vocabulary > 3:
        logits[3] = -math.inf
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    tokens, _ = draw(logits.expand(20_000, vocabulary), uniform, temperature=0.7)
    share = tokens.bincount(minlength=vocabulary) / 20_000
    assert len(share) == vocabulary
    torch.testing.assert_close(share, (logits / 0.7).softmax(0), atol=1.1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocabulary", [5, 777])
def test_a_token_comes_with_its_logprob(vocabulary, temperature):
    logits = random_logits(50, vocabulary)
    tokens, logprobs = draw(logits, torch.linspace(0, 0.999, 50), temperature)
    expected = (logits.double() / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, atol=2e-6, rtol=0)


def test_a_row_is_drawn_as_if_it_were_alone():
    logits, uniform = random_logits(40, 300), torch.rand(40, generator=torch.Generator())
    together = draw(logits, uniform, 0.8)
    alone = [draw(logits[i : i + 1], uniform[i : i + 1], 0.8) for i in range(40)]
    for which in (0, 1):
        assert torch.equal(together[which], torch.cat([one[which] for one in alone]))


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_a_token_of_probability_zero_is_never_drawn(uniform):
    """Whole blocks, and the places right before and behind the possible tokens."""
    for first, last in [(0, 4000), (96, 4096), (1000, 1001), (63, 65)]:
        logits = torch.full((8, 4096), -math.inf)
        logits[:, first:last] = random_logits(8, last - first) * 2
        tokens, logprobs = draw(logits, torch.full((8,), uniform), 1.0)
        assert ((first <= tokens) & (tokens < last)).all() and torch.isfinite(logprobs).all()


def test_logits_are_not_written_into():
    logits = random_logits(3, 20)
    before = logits.clone()
    draw(logits, torch.rand(3), 0.5)
    assert torch.equal(logits, before)


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.zeros(1, 4096, dtype=torch.bfloat16)
    tokens, logprobs = draw(logits, torch.tensor([0.75]), 1.0)
    assert tokens.item() == 3072 and logprobs.item() == pytest.approx(-math.log(4096), abs=1e-6)


def test_temperature_zero_takes_the_most_likely():
    logits = random_logits(30, 100)
    tokens, logprobs = draw(logits, torch.rand(30), 0.0)
    assert torch.equal(tokens, logits.argmax(-1)) and (logprobs == 0).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_are_an_error(temperature, value):
    with pytest.raises(FloatingPointError, match="not finite"):
        listed(draw(torch.tensor([[0.0, value]]), torch.tensor([0.5]), temperature)[0])
