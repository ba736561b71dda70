"""Model folders that are broken in small ways: one line with file, key, finding and way out."""

import json
import shutil
import socket
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, MptConfig, Qwen3Config, XLNetConfig

from gspo_lightning.critic.critic import CriticConfig, load_critic
from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.frozen.reward_model import RewardModel
from gspo_lightning.policy import folder as folders
from gspo_lightning.policy.folder import check_model_folder, check_values
from gspo_lightning.policy.policy import PolicyConfig, load_policy, load_tokenizer
from gspo_lightning.policy.reads import check_lengths, limits
from support.tiny_models import build_tokenizer, save_reward_model

CPU = torch.device("cpu")


@pytest.fixture
def broken(model_dir, tmp_path, monkeypatch):
    """A copy of a policy folder, by a short relative path, to be spoilt."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, "broken")
    return Path("broken")


def change(file, **values):
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | values))


def line(broken):
    """The one line with which the folder is refused, from first look to last."""
    with pytest.raises(ValueError) as info:
        load_policy(PolicyConfig(str(broken)))
    assert "\n" not in str(info.value) and str(info.value).startswith("policy.path: ")
    return str(info.value).removeprefix("policy.path: ")


MEND = "; mend broken/config.json, or fetch or save the model again"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_key_value_heads": 0}, "broken/config.json: num_key_value_heads is 0, must be at"),
        ({"hidden_size": -1}, "broken/config.json: hidden_size is -1, must be at least 1"),
        ({"vocab_size": 0}, "broken/config.json: vocab_size is 0, must be at least 1"),
        ({"num_hidden_layers": 0, "layer_types": []}, "num_hidden_layers is 0, must be at least 1"),
        (
            {"num_hidden_layers": 3},
            "`num_hidden_layers` (3) must be equal to the number of `layer_types` (2)" + MEND,
        ),
        ({"vocab_size": 32.5}, "Field 'vocab_size' expected int, got float (value: 32.5)" + MEND),
        (
            {"eos_token_id": "</s>"},
            "Field 'eos_token_id' with value '</s>' doesn't match any type in (int, list[int], "
            "null)" + MEND,
        ),
        ({"hidden_act": "nope"}, "KeyError: 'nope' (at hidden_act of its config)" + MEND),
        ({"quantization_config": "x"}, "broken/config.json: quantization_config is 'x', not an"),
        ({"dtype": "nope"}, "broken/config.json: dtype is 'nope', no type of torch; write float32"),
        (
            {"auto_map": 3},
            "broken/config.json: auto_map is 3, not an object; mend it, or take it out",
        ),
    ],
)
def test_a_bad_value_of_a_config(broken, values, message):
    change(broken / "config.json", **values)
    assert message in line(broken)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("</s>", "generation_config.json: eos_token_id is '</s>', must be an id or a list of ids"),
        ([1, "</s>"], "generation_config.json: eos_token_id is [1, '</s>'], must be an id"),
        ([], "neither generation_config.json nor the tokenizer has an eos_token_id"),
        (-1, "eos_token_id is -1, and the model embeds ids 0 to 31; set another"),
        ([1, 32], "eos_token_id is 32, and the model embeds ids 0 to 31; set another"),
    ],
)
def test_a_bad_end_of_sequence(broken, ids, message):
    change(broken / "generation_config.json", eos_token_id=ids)
    assert message in line(broken)


def test_a_broken_generation_config_is_not_done_without(broken):
    (broken / "generation_config.json").write_text("{")
    assert "broken/generation_config.json is not JSON" in line(broken)
    (broken / "generation_config.json").write_text("[]")
    assert "broken/generation_config.json holds a list" in line(broken)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_max_length": -1}, "broken/tokenizer_config.json: model_max_length is -1, must"),
        ({"pad_token": 3}, "cannot load the tokenizer of broken: TypeError: Special token"),
        ({"tokenizer_class": 3}, "cannot load the tokenizer of broken: "),
    ],
)
def test_a_bad_value_of_a_tokenizer(broken, values, message):
    change(broken / "tokenizer_config.json", **values)
    assert message in line(broken)


def test_a_tokenizer_without_words(broken):
    found = json.loads((broken / "tokenizer.json").read_text())
    found["model"]["vocab"], found["added_tokens"] = {}, []
    (broken / "tokenizer.json").write_text(json.dumps(found))
    assert "the tokenizer of broken has an empty vocabulary; save it again" in line(broken)
    (broken / "tokenizer.json").write_text("[]")
    assert "cannot load the tokenizer of broken" in line(broken)


# --- what weights must be -----------------------------------------------------------------------


def spoil(folder, change):
    """Change every tensor of a folder's weights."""
    file = folder / "model.safetensors"
    save_file({k: change(v) for k, v in load_file(file).items()}, file, {"format": "pt"})


def test_nan_is_refused_in_every_kind_of_model(broken, model_dir, tokenizer, tmp_path):
    policy = load_policy(PolicyConfig(str(model_dir)))
    scorer = Path(save_reward_model(tmp_path / "scorer", tokenizer, 1))
    for folder in (broken, scorer):
        spoil(folder, lambda v: v * float("nan"))
    message = r"broken has NaN or infinite weights: 512 of 512 in \S*embed_tokens.weight; fetch or"
    with pytest.raises(ValueError, match=f"policy.path: {message}"):
        load_policy(PolicyConfig("broken"))
    with pytest.raises(ValueError, match=f"reference.path: {message}"):
        ReferencePolicy("broken").load(PolicyConfig(str(model_dir)), CPU)
    with pytest.raises(ValueError, match=f"critic.path: {message}"):
        config = CriticConfig(backbone="own", path="broken")
        load_critic(config, PolicyConfig(str(model_dir)), policy.model)
    with pytest.raises(ValueError, match=r"scorer has NaN or infinite weights"):
        RewardModel(str(scorer)).load(CPU)


def test_numbers_that_only_add_up_to_infinity_are_let_pass():
    model = torch.nn.Linear(2, 2, dtype=torch.float64)
    torch.nn.init.constant_(model.weight, 1e300)  # a sum in float32 is infinite
    check_values("x", model)
    with pytest.raises(ValueError, match=r"x has NaN or infinite weights: 1 of 4 in weight"):
        model.weight.data[1, 0] = float("-inf")
        check_values("x", model)


@pytest.mark.parametrize("kind", [torch.int32, torch.bool, torch.uint8])
def test_whole_numbers_are_refused_before_they_are_cast(broken, kind):
    spoil(broken, lambda v: v.to(kind))
    assert "model.safetensors has model.embed_tokens.weight in " in line(broken)
    weights = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    torch.save(weights, broken / "pytorch_model.bin")
    name = str(kind).removeprefix("torch.")
    assert f"pytorch_model.bin has model.embed_tokens.weight in {name}, which" in line(broken)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_type_is_read(broken, kind):
    spoil(broken, lambda v: v.to(kind))
    assert load_policy(PolicyConfig("broken")).model.dtype == torch.float32


def test_masks_and_quantized_weights_may_be_whole_numbers(broken):
    file = broken / "model.safetensors"
    save_file(load_file(file) | {"h.0.attn.bias": torch.ones(1, 4).bool()}, file, {"format": "pt"})
    check_model_folder("policy.path", "broken", False)
    spoil(broken, lambda v: v.to(torch.uint8))
    change(broken / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    check_model_folder("policy.path", "broken", False)


def test_zeros_are_said_and_a_zero_matrix_is_not(broken):
    file = broken / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.down_proj.weight"].zero_()  # an added layer begins like that
    save_file(weights, file, {"format": "pt"})
    load_policy(PolicyConfig("broken"))  # warnings are errors here
    spoil(broken, lambda v: v * 0)
    with pytest.warns(UserWarning, match="broken: 15 of 15 matrices are all zeros, such as"):
        load_policy(PolicyConfig("broken"))


# --- what a model can read ----------------------------------------------------------------------


def test_ids_beyond_the_model_are_nobodys_business_until_one_is_used(broken):
    larger = build_tokenizer()
    larger.add_tokens([f"<{i}>" for i in range(12)])  # 33 ids, and the model has 32
    larger.save_pretrained(broken)
    config = PolicyConfig("broken")
    assert len(load_policy(config).tokenizer) == 33
    assert limits(config) == (32, None)
    larger.pad_token = "<11>"
    larger.save_pretrained(broken)
    assert line(broken).startswith("pad_token is 32, and the model embeds ids 0 to 31; set another")


def test_texts_beyond_a_table_of_positions_are_refused_and_others_said(tmp_path):
    prompts = {"path": [([1] * 5, {}), ([1] * 7, {})], "val_path": [([1] * 6, {})]}

    def check(config, *new_tokens):
        config.save_pretrained(tmp_path)
        check_lengths(PolicyConfig(str(tmp_path)), prompts, *new_tokens)

    table = GPT2Config(n_positions=16, vocab_size=32)
    check(table, 9, 10)
    assert limits(PolicyConfig(str(tmp_path))) == (32, 16)
    found = r"policy.path: prompts of data.path have up to 7 tokens; with 10 new tokens that is "
    found += r"more than the 16 the model reads"
    remedy = r"; lower sampler.max_new_tokens to 9, or data.max_prompt_tokens"
    with pytest.raises(ValueError, match=found + remedy):
        check(table, 10, 10)
    remedy = r"data.val_path have up to 6.*; lower evaluation.max_new_tokens to 10, or data"
    with pytest.raises(ValueError, match=remedy):
        check(table, 9, 11)
    with pytest.raises(ValueError, match=r"the 7 the model reads; lower data.max_prompt_tokens"):
        check(GPT2Config(n_positions=7), 1, 1)
    with pytest.raises(ValueError, match=r"the 8 the model reads; lower sampler.max_new_tokens"):
        check(MptConfig(max_seq_len=8), 2, 1)
    check(XLNetConfig(), 9, 9)  # -1 stands for no limit
    rotary = Qwen3Config(max_position_embeddings=16)
    with pytest.warns(UserWarning, match=found + ", and it was not trained on longer texts"):
        check(rotary, 10, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(rotary, 9, 10)


def test_a_config_of_parts_is_read_in_its_text(tmp_path):
    from transformers import Gemma3Config

    text = {"vocab_size": 40, "max_position_embeddings": 16}
    Gemma3Config(text_config=text).save_pretrained(tmp_path)
    config = PolicyConfig(str(tmp_path))
    assert limits(config) == (40, None)
    with pytest.warns(UserWarning, match="more than the 16 the model reads"):
        check_lengths(config, {"path": [([1] * 10, {})]}, 7, 7)


def test_a_tokenizer_is_loaded_without_a_word_on_the_terminal(broken, capfd):
    change(broken / "config.json", pad_token_id=99)  # transformers logs two lines about it
    load_tokenizer(PolicyConfig("broken"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 10**6}, "hidden_size 1000000 and vocab_size 32 need 3e+07 values, and"),
        ({"vocab_size": 10**7}, "hidden_size 16 and vocab_size 10000000 need 2e+08 values, and"),
        ({"head_dim": 10**7}, "hidden_size 16 and num_attention_heads x head_dim 20000000 need"),
        ({"hidden_size": 10**30}, "hidden_size is 1e+30, as of no model"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings is 1e+30, as of no model"),
    ],
)
def test_sizes_that_the_weights_cannot_have_are_refused_before_a_model_is_made(
    broken, values, message, monkeypatch
):
    """Made, it would take all memory: what does not fit is drawn at random."""
    change(broken / "config.json", **values)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    assert message in line(broken)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_attention_from_the_hub_is_code_and_needs_trust(broken, name, deep):
    values = {name: "mine/kernel"}
    change(broken / "config.json", **({"parts": [values]} if deep else values))
    found = line(broken)
    assert found.startswith(f"broken/config.json: {name} is 'mine/kernel', code on the hub; take")
    check_model_folder("policy.path", str(broken), trust_remote_code=True)


@pytest.mark.parametrize("content", [[1], {"a": 1}, "x", {1: torch.ones(1)}])
def test_weights_of_the_old_kind_that_are_none(broken, content):
    (broken / "model.safetensors").unlink()
    torch.save(content, broken / "pytorch_model.bin")
    assert "broken" in line(broken)


def test_a_name_on_a_hub_that_is_not_found_is_one_line_at_once(monkeypatch):
    def unknown(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(folders.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(folders.urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ValueError, match=r"^no/such is no folder, .*Name or service.*; go online"):
        folders.read_tokenizer("no/such")
    monkeypatch.setattr(folders, "try_to_load_from_cache", lambda *_: "config.json")
    folders.check_hub("no/such")  # cached: no network is needed
