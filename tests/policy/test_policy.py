"""Policies: what a folder must hold, and what an export holds."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from gspo_lightning.policy.policy import Policy, PolicyConfig, fingerprint, load_policy


def test_a_policy_is_loaded_in_its_dtype_and_exported_for_transformers(model_dir, tmp_path):
    policy = load_policy(PolicyConfig(str(model_dir), dtype="bfloat16"))
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    policy.export(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    pairs = zip(model.parameters(), policy.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(policy.tokenizer)


def test_random_weights_follow_the_config_and_the_global_seed(model_dir):
    torch.manual_seed(1)
    first = load_policy(PolicyConfig(str(model_dir), weights="random"))
    torch.manual_seed(1)
    second = load_policy(PolicyConfig(str(model_dir), weights="random"))
    pretrained = load_policy(PolicyConfig(str(model_dir)))
    assert torch.equal(
        first.model.model.embed_tokens.weight, second.model.model.embed_tokens.weight
    )
    assert not torch.equal(
        first.model.model.embed_tokens.weight, pretrained.model.model.embed_tokens.weight
    )


def test_attention_implementation_is_passed_on(model_dir):
    policy = load_policy(PolicyConfig(str(model_dir), attention="eager"))
    name = policy.model.config._attn_implementation
    assert name == "gspo_eager"  # opened for an attention of ours, "eager" without


def test_every_end_of_sequence_id_of_the_generation_config_counts(make_model, tokenizer):
    # fact 22
    model = make_model("qwen3")
    model.generation_config.eos_token_id = [1, 7]
    assert Policy(model, tokenizer).eos_ids == [1, 7]
    model.generation_config.eos_token_id = None
    assert Policy(model, tokenizer).eos_ids == [tokenizer.eos_token_id]


def test_a_tokenizer_without_pad_pads_with_an_end_of_sequence_id(make_model, tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    assert Policy(make_model("qwen3"), bare).pad_id == 1


def test_a_policy_that_could_never_end_is_refused(make_model, tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    model = make_model("qwen3")
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="eos_token_id"):
        Policy(model, bare)


def test_a_tokenizer_of_another_model_is_refused(make_model, tokenizer):
    import copy

    larger = copy.deepcopy(tokenizer)
    larger.add_tokens([f"<{i}>" for i in range(30)])
    larger.eos_token = "<15>"
    model = make_model("qwen3")
    model.generation_config.eos_token_id = None
    message = r"policy.path: eos_token_id is 36, and the model embeds ids 0 to 31.*save model and"
    with pytest.raises(ValueError, match=message):
        Policy(model, larger)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("data/nowhere/policy", "policy.path: there is no folder data/nowhere/policy"),
        ("./nowhere", "there is no folder ./nowhere"),
        ("/nowhere/at/all", "there is no folder /nowhere/at/all"),
    ],
)
def test_a_missing_folder_is_named(path, message):
    with pytest.raises(ValueError, match=message):
        PolicyConfig(path)


def test_a_name_on_the_hub_is_accepted():
    assert PolicyConfig("Qwen/Qwen3-0.6B").path == "Qwen/Qwen3-0.6B"


def test_a_folder_without_config_and_a_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json"):
        PolicyConfig(str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; give the folder"):
        PolicyConfig(str(tmp_path / "file"))


def test_missing_and_broken_weights_are_one_line(model_dir, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"policy.path: .*broken has no weights") as info:
        load_policy(PolicyConfig(str(broken)))
    assert "\n" not in str(info.value)
    (broken / "model.safetensors").write_bytes(b"garbage!")
    with pytest.raises(ValueError, match=r"policy.path: .*broken/model.safetensors .* is broken"):
        load_policy(PolicyConfig(str(broken)))


def test_a_missing_tokenizer_is_one_line(model_dir, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model_dir, bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"policy.path: no tokenizer in .*bare") as info:
        load_policy(PolicyConfig(str(bare)))
    assert "\n" not in str(info.value)


def test_a_model_of_the_hub_that_is_out_of_reach_is_one_line(monkeypatch):
    def unreachable(*args, **options):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"hub; go online, or give a folder that holds the model$"):
        load_policy(PolicyConfig("nobody/no-such-model"))


def test_an_unknown_architecture_is_one_line(model_dir, tmp_path):
    odd = tmp_path / "odd"
    shutil.copytree(model_dir, odd)
    config = json.loads((odd / "config.json").read_text()) | {"model_type": "no_such_model"}
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"policy.path") as info:
        load_policy(PolicyConfig(str(odd)))
    assert "\n" not in str(info.value)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def folder_with_code(tmp_path, make_model, tokenizer, monkeypatch):
    """A policy whose architecture is a Python file beside its weights."""
    # where transformers copies the code that it runs
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = tmp_path / "own"
    make_model("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    config = json.loads((path / "config.json").read_text()) | {
        "model_type": "own_llama",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "own.py").write_text(OWN_CODE)
    return path


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_code_beside_the_weights_runs_only_when_asked(folder_with_code, weights):
    with pytest.raises(ValueError, match=r"trust_remote_code: true would run it") as info:
        load_policy(PolicyConfig(str(folder_with_code), weights=weights))
    assert "\n" not in str(info.value)
    trusted = PolicyConfig(str(folder_with_code), weights=weights, trust_remote_code=True)
    assert type(load_policy(trusted).model).__name__ == "OwnModel"


@pytest.mark.parametrize("place", [0, 300, 2**22 + 5, -1])
def test_one_value_anywhere_makes_them_other_weights(place):
    model = torch.nn.Embedding(2**13, 2**10)  # two pieces of those that are hashed at a time
    before = fingerprint(model)
    assert fingerprint(model) == before and len(before) == 16
    with torch.no_grad():
        model.weight.view(-1)[place] += 1
    assert fingerprint(model) != before


def test_weights_that_are_only_stored_wider_are_the_same():
    model = torch.nn.Linear(3, 4).to(torch.bfloat16)
    narrow = fingerprint(model)
    assert fingerprint(model.float()) == narrow
