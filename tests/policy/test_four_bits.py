"""Policies in four bits: what is refused where, how they are loaded, and exported as plain ones.

bitsandbytes multiplies on a GPU; rounding itself is left to it.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from gspo_lightning.critic.critic import CriticConfig, load_critic
from gspo_lightning.frozen.models import FrozenModels, ReferencePolicy
from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.policy.folder import load_weights
from gspo_lightning.policy.lora import LoRAConfig
from gspo_lightning.policy.policy import PolicyConfig, load_policy
from gspo_lightning.supervised.reward_model import RewardModelModule
from support.passes import inputs

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LORA = LoRAConfig(rank=3)


@pytest.fixture
def as_if(monkeypatch):
    """Pretend that there is a GPU, or bitsandbytes, or both."""

    def pretend(gpu, package):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr("gspo_lightning.policy.four_bits.find_spec", lambda n: package or None)

    return pretend


def test_what_is_missing_is_one_line_before_anything_is_loaded(as_if, model_dir):
    as_if(gpu=True, package=True)
    with pytest.raises(ValueError, match=r"policy.load_in_4bit needs policy.lora: .*false"):
        PolicyConfig(str(model_dir), load_in_4bit=True)
    as_if(gpu=False, package=True)
    with pytest.raises(ValueError, match=r"policy.load_in_4bit: this machine has no CUDA device"):
        PolicyConfig(str(model_dir), lora=LORA, load_in_4bit=True)


def test_a_missing_package_is_named_with_its_extra(as_if, model_dir):
    as_if(gpu=True, package=False)
    with pytest.raises(ImportError, match=r"bitsandbytes: pip install 'gspo_lightning\[qlora\]'"):
        PolicyConfig(str(model_dir), lora=LORA, load_in_4bit=True)


def test_devices_are_checked_where_they_are_known(as_if, model_dir):
    as_if(gpu=True, package=True)
    config = PolicyConfig(str(model_dir), lora=LORA, load_in_4bit=True)
    with pytest.raises(ValueError, match=r"load_in_4bit needs a CUDA device, and trainer.accel"):
        FrozenModels(None, {}).load(config, CPU, with_reference=True)
    with pytest.raises(ValueError, match=r"a CUDA device, and reference.device is cpu"):
        FrozenModels(ReferencePolicy(device="cpu"), {}).load(config, CUDA, with_reference=True)
    FrozenModels(None, {}).load(config, CUDA, with_reference=True)
    config.check_device("x", CUDA)
    PolicyConfig(str(model_dir)).check_device("x", CPU)


def test_the_reference_is_the_same_base_and_a_critic_is_not_rounded(as_if, model_dir, monkeypatch):
    as_if(gpu=True, package=True)
    config = PolicyConfig(str(model_dir), dtype="bfloat16", lora=LORA, load_in_4bit=True)
    reference = ReferencePolicy(device="policy")
    frozen = FrozenModels(reference, {})
    frozen.load(config, CUDA, with_reference=True)
    assert frozen.awaits_policy and reference.model is None  # the policy, its adapters off
    asked = {}

    def note(key, auto, path, **options):
        asked[key] = options.get("quantization_config")
        return load_weights(key, auto, path, **options | {"quantization_config": None})

    monkeypatch.setattr("gspo_lightning.policy.folder.load_weights", note)
    policy = load_policy(config)
    load_critic(CriticConfig(backbone="own"), config, policy.model)
    rounding = asked["policy.path"]
    assert rounding.load_in_4bit and rounding.bnb_4bit_quant_type == "nf4"
    assert rounding.bnb_4bit_compute_dtype == torch.bfloat16
    assert asked["critic.path"] is None


def test_a_merged_export_is_a_plain_model(model_dir, tmp_path, monkeypatch, make_rollout):
    """Weights that look rounded, and are not, are written as ``dequantize`` gives them."""
    policy = load_policy(PolicyConfig(str(model_dir), dtype="bfloat16", lora=LORA))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name in policy.adapter_names:
                parameter.normal_(std=0.2)
    base = policy.model.get_base_model()
    base.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    rounded = []
    for layer in base.model.layers:
        weight = layer.mlp.up_proj.get_base_layer().weight
        weight.quant_state, weight.data = weight.data.clone(), weight.data * 0
        rounded.append(weight)
    monkeypatch.setattr(
        "peft.utils.integrations.dequantize_module_weight",
        lambda module: getattr(module.weight, "quant_state", module.weight),
    )
    state = base.state_dict()
    state |= {"model.layers.0.mlp.up_proj.base_layer.weight.absmax": torch.ones(3)}
    monkeypatch.setattr(base, "state_dict", lambda: state)
    policy.export(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.bfloat16
    for weight in rounded:
        weight.data = weight.quant_state
    expected = completion_logprobs(policy.model.float(), *inputs(make_rollout())).logprobs
    found = completion_logprobs(plain.float(), *inputs(make_rollout())).logprobs
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0)  # merged in bfloat16


def test_a_reward_model_is_not_trained_by_adapters(model_dir):
    with pytest.raises(ValueError, match=r"policy.lora: a reward model is trained whole here"):
        RewardModelModule(PolicyConfig(str(model_dir), lora=LORA))
