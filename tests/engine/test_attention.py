"""The way into a model's attention: open, used by one call, and without effect on all others."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from gspo_lightning.engine.attention import open_attention
from gspo_lightning.policy.policy import checkpoint_activations
from support.model_configs import config_of

OPEN = ["qwen3", "llama", "gpt2", "gemma2", "mistral", "qwen3_moe", "cohere", "granite", "gpt_oss"]
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
FOUR_D = torch.ones(1, 1, 1, 1)  # a mask of four dimensions is passed on as it is


def logits(model, **options):
    options = {"attention_mask": MASK, "use_cache": False} | options
    return model(input_ids=IDS, position_ids=(MASK.cumsum(1) - 1).clamp(min=0), **options).logits


@pytest.mark.parametrize("architecture", OPEN)
def test_an_opened_model_computes_the_same_bits(make_model, architecture):
    model = make_model(architecture).eval()
    before = logits(model)
    assert open_attention(model) and open_attention(model)  # opening twice is opening once
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("architecture", OPEN)
def test_a_call_that_brings_an_attention_has_it_in_every_layer(make_model, architecture):
    model, seen = make_model(architecture).train(), []
    assert open_attention(model)

    def nothing(module, query, key, value, **options):
        assert {"scaling"} <= options.keys()
        seen.append(module.layer_idx)
        return torch.zeros_like(query).transpose(1, 2)

    checkpoint_activations(model)
    logits(model, attention_mask=FOUR_D, attend=nothing).sum().backward()
    assert seen == [0, 1, 1, 0]  # once forward; recomputed from the last layer to the first


def test_what_opening_needs_decides(make_model):
    assert not open_attention(make_model("qwen3_next"))  # calls no interface
    assert not open_attention(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["deepseek_v32", "minimax_m3_vl_text"])
def test_a_model_that_asks_for_the_name_of_its_attention_keeps_it(name):
    """Its sparse layers see fewer tokens than a text has, by a mask of their own."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name)).eval()
    ids = torch.randint(3, 32, (1, 40))
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        assert not open_attention(model)
        assert torch.equal(model(ids, use_cache=False).logits, before)


def test_an_opened_model_is_saved_as_it_was(make_model, tmp_path):
    model = make_model()
    open_attention(model)
    model.save_pretrained(tmp_path)
    assert "gspo" not in (tmp_path / "config.json").read_text()
