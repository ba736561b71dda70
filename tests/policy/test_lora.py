"""Policies whose adapters are trained: start, gradients, checkpoints, reference, exports."""

import importlib.util

import pytest
import torch
from lightning.pytorch import Callback
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gspo_lightning.callbacks.files import AdaptiveKL
from gspo_lightning.engine.attention import open_attention
from gspo_lightning.frozen.models import FrozenModels, ReferencePolicy, RewardModel
from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.policy.lora import LoRAConfig, chosen_layers
from gspo_lightning.policy.policy import LoRAPolicy, PolicyConfig, load_policy, make_ready
from gspo_lightning.rewards.terms import RewardTerm
from gspo_lightning.rollout import PromptBatch
from gspo_lightning.run.plan import plan_lines
from gspo_lightning.sampling import GroupSampler
from support.model_configs import config_of
from support.passes import inputs
from support.tiny_models import save_reward_model
from support.tiny_run import run

CPU = torch.device("cpu")
ARCHITECTURES = (
    "qwen3",
    "llama",
    "gpt2",
    "gemma2",
    "mistral",
    "qwen3_moe",
    "cohere",
    "granite",
    "gpt_oss",
    "qwen3_next",
    "lfm2",
    "deepseek_v3",
    "glm4_moe",
    "ernie4_5_moe",
)
DENSE_FIRST = ("deepseek_v3", "glm4_moe", "ernie4_5_moe")


def config(path, lora=None, **options):
    return PolicyConfig(str(path), lora=lora or LoRAConfig(rank=3, alpha=6.0), **options)


def move(policy, seed=0):
    """Put noise into the adapters, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name in policy.adapter_names:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def folder(tmp_path, make_model, tokenizer):
    """Folders of tiny policies by architecture."""

    def save(architecture="qwen3", **options):
        path = tmp_path / architecture
        make_model(architecture, **options).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return path

    return save


def logprobs(model, rollout, **options):
    open_attention(model)  # as a policy is: or its bits could not be compared
    make_ready(model)
    return completion_logprobs(model, *inputs(rollout), **options).logprobs


class Outputs(Callback):
    def __init__(self):
        self.all, self.start = [], {}

    def on_train_start(self, trainer, module):
        self.start = {name: p.clone() for name, p in module.policy.named_parameters()}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.all.append(outputs)


# --- the start ----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_policy_starts_as_the_model_it_adapts_bit_for_bit(
    folder, make_model, make_rollout, architecture
):
    policy = load_policy(config(folder(architecture)))
    found = logprobs(policy.model, make_rollout(), group_size=3)
    assert torch.equal(found, logprobs(make_model(architecture), make_rollout(), group_size=3))


def test_rank_decides_the_number_of_trained_parameters(model_dir):
    # by hand, for a layer: q 16x16, k and v 16x8, o 16x16, gate and up 16x32, down 32x16
    sides = (16 + 16) + 2 * (16 + 8) + (16 + 16) + 2 * (16 + 32) + (32 + 16)
    for rank in (1, 5):
        policy = load_policy(config(model_dir, LoRAConfig(rank=rank)))
        trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        assert trained == 2 * rank * sides


def test_target_modules_choose_the_layers(model_dir):
    policy = load_policy(config(model_dir, LoRAConfig(target_modules=["q_proj", "v_proj"])))
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in policy.adapter_names}
    assert layers == {"q_proj", "v_proj"}


def test_experts_of_a_mixture_and_its_router_get_no_adapters(folder):
    policy = load_policy(config(folder("qwen3_moe")))
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in policy.adapter_names}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(ValueError, match="no layer is called 'down_proj'"):
        load_policy(config(folder("qwen3_moe"), LoRAConfig(target_modules=["down_proj"])))
    # a shared expert has linear layers, which peft takes for the others
    policy = load_policy(config(folder("qwen3_next")))
    assert not any(".mlp." in name for name in policy.adapter_names)
    assert any(".linear_attn." in name for name in policy.adapter_names)
    # by name, a shared expert gets its own, and the others beside it still get none
    policy = load_policy(config(folder("qwen3_next"), LoRAConfig(target_modules=["down_proj"])))
    assert {name.partition(".mlp.")[2].split(".lora_")[0] for name in policy.adapter_names} == {
        "shared_expert.down_proj"
    }


@pytest.mark.parametrize("architecture", DENSE_FIRST)
def test_dense_layers_before_experts_get_adapters_and_experts_none(
    folder, tmp_path, make_rollout, architecture
):
    path = folder(architecture)
    policy = load_policy(config(path))
    layers = {name.split(".lora_")[0].partition(".layers.")[2] for name in policy.adapter_names}
    feed_forward = {name for name in layers if ".mlp." in name}
    assert feed_forward == {f"0.mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert {name[0] for name in layers - feed_forward} == {"0", "1"}  # attention of both
    # peft would load them onto the experts: refused with a list that works on this very model
    alone = LoRAConfig(rank=3, export="adapter")
    with pytest.raises(ValueError, match=r"policy.lora.export: adapter: .* export: merged") as info:
        load_policy(config(path, alone))
    names = str(info.value).partition("target_modules: [")[2].rstrip("]").split(", ")
    policy = load_policy(config(path, LoRAConfig(rank=3, export="adapter", target_modules=names)))
    move(policy)
    policy.export(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = logprobs(policy.model, make_rollout())
    assert torch.equal(logprobs(loaded, make_rollout()), expected)


def test_a_model_that_also_sees_gets_adapters_on_what_reads_text():
    from transformers import Gemma3Config

    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    text |= {"head_dim": 8, "num_key_value_heads": 1, "intermediate_size": 32}
    eyes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    eyes |= {"intermediate_size": 32, "patch_size": 14}
    settings = Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(settings)
    assert any("vision" in name for name, _ in model.named_parameters())
    layers = chosen_layers(model, "all-linear")
    assert len(layers) == 7 and not any("vision" in name for name in layers)


def test_alpha_over_rank_scales_the_adapters(model_dir, make_rollout):
    def moved(alpha):
        policy = load_policy(config(model_dir, LoRAConfig(rank=3, alpha=alpha)))
        move(policy)
        layer = policy.model.get_base_model().model.layers[0].self_attn.q_proj
        x = torch.ones(1, 16)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        return layer(x) - layer.base_layer(x), x @ product.T

    for alpha, scale in ((3.0, 1.0), (12.0, 4.0)):
        difference, product = moved(alpha)
        torch.testing.assert_close(difference, scale * product)


def test_rank_stabilised_adapters_are_scaled_by_the_root_of_the_rank(model_dir):
    policy = load_policy(config(model_dir, LoRAConfig(rank=4, alpha=6.0, use_rslora=True)))
    move(policy)
    layer = policy.model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.ones(1, 16)
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer(x) - layer.base_layer(x), 3.0 * x @ product.T)  # 6 / sqrt(4)


# --- training -----------------------------------------------------------------------------


def test_one_rollout_trains_the_adapters_alone(tmp_path, model_dir):
    keep = Outputs()
    module = run(tmp_path, model_dir, 2, [keep], policy=config(model_dir))
    policy = module.policy
    changed = {n for n, p in policy.named_parameters() if not torch.equal(p, keep.start[n])}
    assert changed == policy.adapter_names
    assert all(p.grad is None for n, p in policy.named_parameters() if n not in changed)


def test_ratio_is_one_and_noise_zero_before_the_first_step(tmp_path, model_dir):
    # fact 18
    keep = Outputs()
    options = {"micro_batch_size": 3, "old_logprobs": "recompute"}
    run(tmp_path, model_dir, 2, [keep], policy=config(model_dir), **options)
    for outputs in keep.all:
        assert (outputs["ratios"] == 1).sum() >= 8  # the first of two mini-batches
        assert outputs["metrics"]["policy/ratio_noise"] == 0.0


def test_adapters_of_a_bfloat16_policy_are_float32_and_ratios_exact(tmp_path, model_dir):
    keep = Outputs()
    options = {"policy": config(model_dir, dtype="bfloat16"), "old_logprobs": "recompute"}
    module = run(tmp_path, model_dir, 1, [keep], **options)
    types = {n in module.policy.adapter_names: p.dtype for n, p in module.policy.named_parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    assert keep.all[0]["metrics"]["policy/ratio_noise"] == 0.0


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradient(folder, make_rollout, architecture):
    def gradient(**options):
        policy = load_policy(config(folder(architecture), **options)).train()
        move(policy)
        logprobs(policy.model, make_rollout(), group_size=3).exp().sum().backward()
        return {n: p.grad for n, p in policy.named_parameters() if n in policy.adapter_names}

    plain, saved = gradient(), gradient(gradient_checkpointing=True)
    for name, value in plain.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(saved[name], value, atol=1e-5, rtol=1e-4)  # float32


def test_rollouts_are_the_same_under_gradient_checkpointing(tmp_path, model_dir):
    def rollout(**options):
        keep = Outputs()
        policy = config(model_dir, **options)
        run(tmp_path, model_dir, 1, [keep], policy=policy, old_logprobs="recompute")
        return keep.all[0]["rollout"]

    plain, saved = rollout(), rollout(gradient_checkpointing=True)
    assert plain.texts == saved.texts
    torch.testing.assert_close(plain.old_logprobs, saved.old_logprobs, atol=1e-5, rtol=0)


def test_a_sampler_sees_the_adapters_and_the_positions(folder, make_rollout):
    """GPT-2 has absolute positions: without position ids padding would move them."""
    policy = load_policy(config(folder("gpt2")))
    move(policy)
    rollout = make_rollout()
    batch = PromptBatch(rollout.prompt_ids[::3], rollout.prompt_mask[::3], [{}, {}])
    samples = GroupSampler(2, 8, temperature=0.0).sample(policy, batch, seed=0)
    for i in (0, 2):
        ids = samples.prompt_ids[i][samples.prompt_mask[i]]
        for token in samples.completion_ids[i][samples.mask[i]]:
            assert policy.model(ids[None]).logits[0, -1].argmax() == token
            ids = torch.cat([ids, token[None]])


def test_a_tiny_policy_a_reward_model_and_a_reference_train_three_rollouts(
    tmp_path, model_dir, tokenizer
):
    keep = Outputs()
    reward = RewardModel(save_reward_model(tmp_path / "reward", tokenizer, 1), device="cpu")
    module = run(
        tmp_path,
        model_dir,
        3,
        [keep, AdaptiveKL(initial=0.1)],
        policy=config(model_dir, gradient_checkpointing=True),
        reference=ReferencePolicy(device="policy"),
        rewards={"taste": RewardTerm(reward)},
    )
    assert len(keep.all) == 3 and not torch.isnan(keep.all[-1]["rollout"].rewards).any()
    assert keep.all[2]["metrics"]["train/kl_divergence"] > 0
    assert isinstance(module.policy, LoRAPolicy)


# --- the reference ----------------------------------------------------------------------------


def test_the_reference_is_the_policy_with_its_adapters_off(tmp_path, model_dir, make_rollout):
    """No copy; at first no KL at all; later what a copy would say, to the bit."""
    reference, keep = ReferencePolicy(device="policy"), Outputs()
    found = {}

    class Look(Callback):
        def on_train_end(self, trainer, module):
            found["same"] = reference.model is module.policy.model
            found["logprobs"] = reference.logprobs(make_rollout(), 0.7)
            found["mark"] = reference.fingerprint
            found["trained"] = {n for n, p in module.policy.named_parameters() if p.requires_grad}
            found["plan"] = "\n".join(plan_lines(trainer, module))

    module = run(
        tmp_path, model_dir, 2, [keep, Look()], policy=config(model_dir), reference=reference
    )
    assert found["same"]
    assert "reference on policy (its adapters off)" in found["plan"]
    assert "about" in found["plan"] and "; reference " not in found["plan"]  # no memory of its own
    assert found["trained"] == module.policy.adapter_names  # switched on again, all of them
    first, second = (outputs["metrics"]["train/kl_divergence"] for outputs in keep.all)
    assert first == pytest.approx(0, abs=1e-9)
    assert second > 1e-5
    copy = ReferencePolicy(device="cpu")
    copy.load(PolicyConfig(str(model_dir)), CPU)
    assert torch.equal(found["logprobs"], copy.logprobs(make_rollout(), 0.7))
    assert found["mark"] == copy.fingerprint  # a run may change devices when it is continued
    assert reference.model is None and not reference.shared  # released


@pytest.mark.parametrize(
    ("options", "lora", "policy_device", "shares"),
    [
        ({"device": "policy"}, True, "cpu", True),
        ({"device": "cpu"}, True, "cpu", True),  # the same device by another word
        ({"device": "cpu"}, True, "cuda:0", False),
        ({"device": "policy"}, False, "cpu", False),
        ({"device": "policy", "dtype": "float32"}, True, "cpu", True),
        ({"device": "policy", "dtype": "bfloat16"}, True, "cpu", False),
        ({"device": "policy", "path": "model_dir"}, True, "cpu", False),
    ],
)
def test_only_the_same_weights_on_the_same_device_are_shared(
    model_dir, options, lora, policy_device, shares
):
    if "path" in options:
        options = options | {"path": str(model_dir)}
    reference = ReferencePolicy(**options)
    frozen = FrozenModels(reference, {})
    settings = config(model_dir) if lora else PolicyConfig(str(model_dir))
    frozen.load(settings, torch.device(policy_device), with_reference=True)
    assert (reference.model is None) == shares  # nothing was read from the disk
    policy = load_policy(settings)
    frozen.share(policy)
    assert reference.shared == (reference.model is policy.model) == shares
    assert frozen.fingerprints() == {"model.reference": reference.fingerprint}


def test_an_evaluation_needs_no_reference(model_dir):
    frozen = FrozenModels(ReferencePolicy(device="policy"), {})
    frozen.load(config(model_dir), CPU, with_reference=False)
    frozen.share(load_policy(config(model_dir)))
    assert frozen.fingerprints() == {}


def test_adapters_off_is_the_model_without_adapters(model_dir, tiny_policy, make_rollout):
    policy = load_policy(config(model_dir))
    move(policy)
    plain = logprobs(tiny_policy, make_rollout())
    with policy.model.disable_adapter():
        assert torch.equal(logprobs(policy.model, make_rollout()), plain)
    assert not torch.allclose(logprobs(policy.model, make_rollout()), plain, atol=0.01)


# --- checkpoints ------------------------------------------------------------------------------


def test_a_state_dict_holds_the_adapters_alone_and_loads(model_dir, make_rollout):
    policy, again = (load_policy(config(model_dir)) for _ in range(2))
    move(policy)
    state = policy.state_dict()
    assert set(state) == policy.adapter_names | {"_extra_state"}
    again.load_state_dict(state)  # strict
    expected = logprobs(policy.model, make_rollout())
    assert torch.equal(logprobs(again.model, make_rollout()), expected)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_state_dict_of_another_policy_is_refused(model_dir, change):
    policy = load_policy(config(model_dir))
    state = policy.state_dict()
    name = sorted(policy.adapter_names)[0]
    if change == "missing":
        del state[name]
    elif change == "unexpected":
        state = load_policy(PolicyConfig(str(model_dir))).state_dict() | state
    else:
        state[name] = state[name][:1]
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict"):
        policy.load_state_dict(state)


def test_adapters_are_not_put_on_other_weights(model_dir, folder):
    state = load_policy(config(model_dir)).state_dict()
    other = load_policy(config(folder(seed=3)))
    with pytest.raises(ValueError, match=r"policy.path: these are not the weights"):
        other.load_state_dict(state)


def test_adapters_are_not_scaled_otherwise_than_they_were_trained(model_dir):
    state = load_policy(config(model_dir, LoRAConfig(rank=3, alpha=6.0))).state_dict()
    other = load_policy(config(model_dir, LoRAConfig(rank=3, alpha=3.0)))
    with pytest.raises(ValueError, match=r"policy.lora.alpha: .* a scale of 2, here it is 1"):
        other.load_state_dict(state)


def test_a_rank_stabilised_scale_is_another_scale(model_dir):
    plain, root = (LoRAConfig(rank=4, alpha=6.0, use_rslora=on) for on in (False, True))
    state = load_policy(config(model_dir, root)).state_dict()
    with pytest.raises(ValueError, match=r"trained for a scale of 3, here it is 1.5 \(alpha"):
        load_policy(config(model_dir, plain)).load_state_dict(state)
    load_policy(config(model_dir, LoRAConfig(rank=4, alpha=12.0))).load_state_dict(state)


# --- modules that are trained whole -----------------------------------------------------------

WHOLE = LoRAConfig(rank=3, modules_to_save=["embed_tokens", "lm_head", "norm"], use_rslora=True)


def test_modules_are_trained_whole_beside_the_adapters_and_resumed(tmp_path, folder, make_rollout):
    """Saved, loaded, off for the reference, and in the merged export."""
    path, reference, keep = folder(tie_word_embeddings=False), ReferencePolicy(device="policy"), {}

    class Look(Callback):
        def on_train_start(self, trainer, module):
            keep["start"] = {name: p.clone() for name, p in module.policy.named_parameters()}

        def on_train_end(self, trainer, module):
            keep["reference"] = reference.logprobs(make_rollout(), 1.0)

    options = {"policy": config(path, WHOLE), "reference": reference}
    module = run(tmp_path, path, 2, [Look(), AdaptiveKL(initial=0.1)], **options)
    policy = module.policy
    changed = {n for n, p in policy.named_parameters() if not torch.equal(p, keep["start"][n])}
    whole = {name for name in changed if ".modules_to_save." in name}
    parts = {name.split(".modules_to_save.")[0].rpartition(".")[2] for name in whole}
    assert parts == {"embed_tokens", "norm", "lm_head"} and len(whole) == 3
    assert changed == policy.adapter_names
    start = AutoModelForCausalLM.from_pretrained(path)
    expected = logprobs(start, make_rollout())
    torch.testing.assert_close(keep["reference"], expected, atol=2e-6, rtol=0)

    expected = logprobs(policy.model, make_rollout())
    assert not torch.allclose(expected, keep["reference"], atol=0.01)
    again = load_policy(config(path, WHOLE))
    again.load_state_dict(policy.state_dict())
    assert torch.equal(logprobs(again.model, make_rollout()), expected)

    policy.export(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any("lora" in name or "save" in name for name, _ in plain.named_parameters())
    torch.testing.assert_close(logprobs(plain, make_rollout()), expected, atol=2e-5, rtol=0)


def test_modules_trained_whole_are_exported_with_the_adapters(folder, tmp_path, make_rollout):
    lora = LoRAConfig(rank=3, modules_to_save=["norm", "lm_head"], export="adapter")
    policy = load_policy(config(folder(tie_word_embeddings=False), lora))
    move(policy)
    policy.export(tmp_path / "out")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder(tie_word_embeddings=False)), tmp_path / "out"
    )
    expected = logprobs(policy.model, make_rollout())
    assert torch.equal(logprobs(loaded, make_rollout()), expected)


def test_a_block_that_is_trained_whole_gets_no_adapters(model_dir):
    policy = load_policy(config(model_dir, LoRAConfig(modules_to_save=["mlp"])))
    names = {name for name in policy.adapter_names if ".mlp." in name}
    assert names and all(".mlp.modules_to_save." in name for name in names)
    both = LoRAConfig(target_modules=["up_proj"], modules_to_save=["mlp"])
    with pytest.raises(ValueError, match=r"mlp.up_proj is trained whole \(modules_to_save\); le"):
        load_policy(config(model_dir, both))


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head", "model"])
def test_tied_modules_are_not_trained_whole(model_dir, name):
    lora = LoRAConfig(modules_to_save=[name])
    with pytest.raises(ValueError, match=f"modules_to_save: {name} shares its weight with another"):
        load_policy(config(model_dir, lora))


def test_a_module_that_is_not_there_is_named_with_those_there_are(model_dir):
    with pytest.raises(ValueError, match=r"modules_to_save: no module is called 'nrm'; .*, norm"):
        load_policy(config(model_dir, LoRAConfig(modules_to_save=["nrm"])))


# --- exports --------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_export_is_a_plain_model_that_says_the_same(
    folder, tmp_path, make_rollout, architecture
):
    policy = load_policy(config(folder(architecture)))
    move(policy)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    policy.export(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any("lora" in name for name, _ in plain.named_parameters())
    expected = logprobs(policy.model, make_rollout())
    torch.testing.assert_close(logprobs(plain, make_rollout()), expected, atol=2e-5, rtol=0)
    # an export during training must leave no trace in it
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())


def test_a_merged_export_of_an_untied_head_keeps_the_head(folder, tmp_path, make_rollout):
    policy = load_policy(config(folder(tie_word_embeddings=False)))
    move(policy)
    policy.export(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.lm_head.weight is not plain.model.embed_tokens.weight
    expected = logprobs(policy.model, make_rollout())
    torch.testing.assert_close(logprobs(plain, make_rollout()), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe", "gpt2"])
def test_adapters_are_exported_alone_when_asked(
    folder, tmp_path, make_model, make_rollout, architecture
):
    policy = load_policy(config(folder(architecture), LoRAConfig(rank=3, export="adapter")))
    move(policy)
    policy.export(tmp_path / "out")
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(weights) == len(policy.adapter_names)
    expected = logprobs(policy.model, make_rollout())
    loaded = PeftModel.from_pretrained(make_model(architecture), tmp_path / "out")
    assert torch.equal(logprobs(loaded, make_rollout()), expected)
    direct = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # with peft installed
    assert torch.equal(logprobs(direct, make_rollout()), expected)


def test_exported_adapters_find_their_weights_from_any_folder(
    folder, tmp_path, make_rollout, monkeypatch
):
    folder()
    monkeypatch.chdir(tmp_path)
    policy = load_policy(config("qwen3", LoRAConfig(rank=3, export="adapter")))
    move(policy)
    policy.export("out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = AutoModelForCausalLM.from_pretrained("../out")
    expected = logprobs(policy.model, make_rollout())
    assert torch.equal(logprobs(loaded, make_rollout()), expected)


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "policy.lora.rank must be >= 1, got 0"),
        ({"alpha": 0.0}, "policy.lora.alpha must be above 0, got 0.0"),
        ({"target_modules": []}, r"must be a list of layer names or all-linear, got \[\]"),
        ({"modules_to_save": []}, "policy.lora.modules_to_save is empty; name modules, or set it"),
        ({"target_modules": "q_proj"}, "must be a list of layer names or all-linear, got 'q_proj'"),
    ],
)
def test_a_bad_setting_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**options)


def test_a_missing_peft_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'gspo_lightning\[lora\]'"):
        LoRAConfig()


def test_names_that_no_layer_has_are_named_with_those_there_are(model_dir):
    with pytest.raises(ValueError, match=r"no layer is called 'nowhere'; there are .*k_proj, lm_h"):
        load_policy(config(model_dir, LoRAConfig(target_modules=["q_proj", "nowhere"])))


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_adapters_on_tied_embeddings_are_refused(folder, name):
    """Merged into the one weight, they would change embedding and head."""
    lora = LoRAConfig(target_modules=["q_proj", name])
    with pytest.raises(ValueError, match=f"{name} shares its weight with another layer"):
        load_policy(config(folder(), lora))
    load_policy(config(folder(tie_word_embeddings=False), lora))


def test_random_weights_are_refused(model_dir):
    with pytest.raises(ValueError, match=r"policy.weights is random, but with policy.lora"):
        config(model_dir, weights="random")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # kernels read the weight of a Mamba layer's out_proj past any adapter
        ("falcon_h1", "down_proj gate_proj in_proj k_proj o_proj q_proj up_proj v_proj"),
        # what it calls its decoder is its output embedding
        ("modernbert-decoder", "Wi Wo dense k_proj q_proj v_proj"),
    ],
)
def test_all_linear_leaves_out_what_peft_cannot_adapt(name, expected):
    model = AutoModelForCausalLM.from_config(config_of(name))
    chosen = {layer.rpartition(".")[2] for layer in chosen_layers(model, "all-linear")}
    assert chosen == set(expected.split())
