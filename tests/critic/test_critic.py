"""PPO's critic, by behaviour: what its values are, how it is trained, saved and refused."""

import os
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM

from gspo_lightning.critic.critic import Critic, CriticConfig, decoder, load_critic
from gspo_lightning.data.prompts import PromptData
from gspo_lightning.engine import states
from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.guards.out_of_memory import MICRO, TOKENS
from gspo_lightning.objectives import Objective
from gspo_lightning.optim import OptimizerConfig
from gspo_lightning.policy.lora import LoRAConfig
from gspo_lightning.policy.policy import PolicyConfig, load_policy, make_ready
from gspo_lightning.rewards.terms import RewardTerm
from gspo_lightning.run.plan import plan_lines
from gspo_lightning.sampling import GroupSampler
from support.model_configs import config_of
from support.observers import Outputs, Steps
from support.reward_functions import digits
from support.tiny_run import make_module, make_trainer, run, write_prompts

TOKEN = Objective("token", "clip", "token_mean", 0.2, 0.2)
NAN = float("nan")


def ppo(critic=None, **options):
    """Settings of a small PPO: one completion for each of four prompts, two mini-batches."""
    settings = {
        "sampler": GroupSampler(1, 6),
        "objective": TOKEN,
        "advantages": "gae",
        "critic": critic or CriticConfig(),
        "num_minibatches": 2,
    }
    return settings | options


def outputs_of(tmp_path, model_dir, num_rollouts=1, **options):
    keep = Outputs()
    module = run(tmp_path, model_dir, num_rollouts, callbacks=[keep], **options)
    return module, keep.all


@pytest.fixture
def gpt2_dir(tmp_path, make_model, tokenizer):
    """GPT-2, because the other architectures keep float32 inside their norms."""
    path = tmp_path / "gpt2"
    make_model("gpt2").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def double_critic(path, backbone):
    """A policy and its critic in float64, with a head that is not 0."""
    config = PolicyConfig(str(path))
    policy = load_policy(config).double()
    critic = load_critic(CriticConfig(backbone=backbone), config, policy.model).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in critic.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return policy, critic


@pytest.fixture(params=["packed", "padded"])
def way(request, monkeypatch):
    """Both ways in which layers are run."""
    if request.param == "padded":
        monkeypatch.setattr(states, "reading", lambda model, device, packed: "shared")
    return request.param


@pytest.mark.parametrize("backbone", ["own", "policy"])
def test_a_value_is_what_the_tokens_before_it_promise(gpt2_dir, make_rollout, backbone, way):
    """Against the bare hidden states of one unpadded row: V_t stands before token t."""
    policy, critic = double_critic(gpt2_dir, backbone)
    rollout = make_rollout()
    values = critic(policy.model, rollout)
    layers = critic.backbone if backbone == "own" else policy.model.base_model
    for i in range(len(rollout)):
        prompt = rollout.prompt_ids[i, rollout.prompt_mask[i]]
        completion = rollout.completion_ids[i, rollout.mask[i]]
        states = layers(torch.cat([prompt, completion])[None]).last_hidden_state[0]
        expected = critic.head(states[len(prompt) - 1 : -1])[:, 0]
        torch.testing.assert_close(values[i, : len(completion)], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backbone", ["own", "policy"])
def test_value_loss_and_gradient_are_the_same_for_every_padding_order_and_micro_batch(
    gpt2_dir, make_rollout, backbone, way
):
    policy, critic = double_critic(gpt2_dir, backbone)
    rollout = make_rollout()
    generator = torch.Generator().manual_seed(2)
    numbers = [torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    rollout = replace(rollout, values=numbers[0], returns=numbers[1])
    weights = numbers[2].abs()
    trained = [*critic.parameters(), *policy.parameters()]

    def gradient(pieces):
        loss = sum(critic.loss(policy.model, *piece).loss for piece in pieces)
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        return torch.cat([loss[None], *(g.flatten() for g in gradients if g is not None)])

    whole = gradient([(rollout, weights)])
    assert whole.abs().max() > 1e-3
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    mixed = rollout.select(order)
    found = {
        "micro-batches": gradient(zip(rollout.micro_batches(4), weights.split(4), strict=True)),
        "order": gradient([(mixed, weights[order])]),
        "padding": gradient([(padded(rollout), torch.nn.functional.pad(weights, (0, 3)))]),
    }
    for name, other in found.items():
        torch.testing.assert_close(other, whole, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("backbone", ["own", "policy"])
def test_the_critic_reads_a_groups_prompt_once_and_no_padding(
    model_dir, make_rollout, backbone, caplog
):
    policy, critic = double_critic(model_dir, backbone)
    rollout, counts = make_rollout(), []
    critic(policy.model, rollout)  # what its layers can do is tried once
    layers = critic.backbone if backbone == "own" else policy.model.base_model
    layers.register_forward_pre_hook(
        lambda _, __, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    critic(policy.model, rollout)
    prompts, lengths = rollout.prompt_mask.sum(1), rollout.mask.sum(1)
    # nothing follows the last token of a completion
    assert counts == [int(prompts[::3].sum() + (lengths - 1).sum())]
    assert not [line for line in caplog.records if line.name.startswith("gspo_lightning")]


def test_a_batch_without_a_token_has_no_values_but_a_graph(model_dir, make_rollout, way):
    policy, critic = double_critic(model_dir, "own")
    rollout = make_rollout()
    values = critic(policy.model, replace(rollout, mask=torch.zeros_like(rollout.mask)))
    assert values.shape == rollout.mask.shape and not values.any()
    gradients = torch.autograd.grad(values.sum(), list(critic.parameters()))
    assert len(gradients) > 10 and not any(g.any() for g in gradients)


def padded(rollout):
    """The rollout with two more pads before and three more behind, and rubbish in all of them."""

    def widen(x, left, right, value):
        return torch.nn.functional.pad(x, (left, right), value=value)

    hidden = ~rollout.mask
    return replace(
        rollout,
        prompt_ids=widen(rollout.prompt_ids, 2, 0, 7),
        prompt_mask=widen(rollout.prompt_mask, 2, 0, False),
        completion_ids=widen(rollout.completion_ids.masked_fill(hidden, 9), 0, 3, 9),
        mask=widen(rollout.mask, 0, 3, False),
        old_logprobs=widen(rollout.old_logprobs, 0, 3, NAN),
        ref_logprobs=None,
        advantages=widen(rollout.advantages, 0, 3, NAN),
        values=widen(rollout.values.masked_fill(hidden, NAN), 0, 3, NAN),
        returns=widen(rollout.returns.masked_fill(hidden, NAN), 0, 3, NAN),
    )


def test_values_begin_at_zero_and_learn(tmp_path, model_dir):
    options = ppo(num_minibatches=4, optimizer=OptimizerConfig(learning_rate=1e-3))
    module, outputs = outputs_of(tmp_path, model_dir, 6, **options)
    assert (outputs[0]["rollout"].values == 0).all()
    assert outputs[0]["metrics"]["critic/explained_variance"] == 0
    assert outputs[-1]["metrics"]["critic/value_mean"] > 0.05  # rewards are shares of digits
    assert module.critic.head.weight.abs().max() > 0


def test_explained_variance_and_value_mean_are_those_of_the_trained_tokens(tmp_path, model_dir):
    _, outputs = outputs_of(
        tmp_path, model_dir, 3, **ppo(truncated="mask", sampler=GroupSampler(4, 6))
    )
    rollout, metrics = outputs[-1]["rollout"], outputs[-1]["metrics"]
    values, returns = (x[rollout.mask].double() for x in (rollout.values, rollout.returns))
    explained = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    assert metrics["critic/explained_variance"] == pytest.approx(explained.item(), rel=1e-6)
    assert metrics["critic/value_mean"] == pytest.approx(values.mean().item(), rel=1e-6)


def test_value_loss_before_the_first_step_is_that_of_the_rollout(tmp_path, model_dir):
    _, outputs = outputs_of(
        tmp_path, model_dir, **ppo(CriticConfig(value_coef=0.3), num_minibatches=1)
    )
    rollout, metrics = outputs[0]["rollout"], outputs[0]["metrics"]
    expected = 0.3 * 0.5 * (rollout.returns[rollout.mask] ** 2).mean().item()
    assert metrics["critic/value_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["critic/clip_fraction"] == 0


def test_advantages_are_per_token_and_whitened_over_the_rollout(tmp_path, model_dir):
    _, outputs = outputs_of(tmp_path, model_dir, **ppo())
    rollout = outputs[0]["rollout"]
    advantages = rollout.advantages[rollout.mask]
    assert advantages.mean().item() == pytest.approx(0, abs=1e-6)
    assert advantages.std().item() == pytest.approx(1, abs=1e-3)
    assert (rollout.advantages[:, 0] != rollout.advantages[:, 1]).any()


def test_old_values_are_made_within_a_budget_of_tokens(tmp_path, model_dir, monkeypatch):
    forward, passes = Critic.forward, []

    def see(self, policy, samples):
        if not torch.is_grad_enabled():
            passes.append(int((samples.mask.sum(1) + samples.prompt_mask.sum(1)).sum()))
        return forward(self, policy, samples)

    monkeypatch.setattr(Critic, "forward", see)
    options = ppo(num_minibatches=1, sampler=GroupSampler(4, 6), micro_batch_tokens=20)
    module, outputs = outputs_of(tmp_path, model_dir, 2, **options)
    assert len(passes) > 8
    rollout = outputs[-1]["rollout"]
    passes.clear()
    pieces = rollout.micro_batch_indices(None)
    once = module.critic.old_values(module.policy.model, rollout, pieces)
    pieces = rollout.micro_batch_indices(None, 20)
    cut = module.critic.old_values(module.policy.model, rollout, pieces)
    torch.testing.assert_close(cut[rollout.mask], once[rollout.mask], rtol=1e-4, atol=1e-5)
    assert len({v.item() for v in once[rollout.mask]}) > len(rollout)  # rows can be told apart
    # a shared prompt is counted once: at most 7 tokens of it, four times
    assert len(passes) > 5 and max(passes[1:]) <= 20 + 3 * 7


@pytest.mark.filterwarnings("ignore:out of memory in rollout 1, old values")
def test_old_values_without_memory_halve_the_budget_of_tokens(tmp_path, model_dir, monkeypatch):
    forward = Critic.forward

    def tight(self, policy, samples):
        if not torch.is_grad_enabled() and samples.mask.sum() > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, policy, samples)

    monkeypatch.setattr(Critic, "forward", tight)
    module, _ = outputs_of(tmp_path, model_dir, 1, **ppo(num_minibatches=1, micro_batch_tokens=26))
    assert (module.sizes.now[TOKENS], module.sizes.now[MICRO]) == (13, None)


@pytest.mark.parametrize(
    "change",
    [
        {"backbone": "policy"},
        {"learning_rate_ratio": 1.0},
        {"value_coef": 5.0, "backbone": "policy"},
        {"value_clip": None},
        {"gamma": 0.5},
        {"lam": 0.5},
        {"whiten": False},
        {"kl_in_reward": False},
    ],
)
def test_every_option_of_the_critic_changes_the_run(tmp_path, model_dir, change):
    def weights(config):
        reference = ReferencePolicy(device="cpu")
        options = ppo(config, reference=reference, kl_coef=0.5, max_grad_norm=None)
        module = run(tmp_path, model_dir, 3, **options)
        return torch.cat([p.detach().flatten() for p in module.policy.parameters()])

    start = {"backbone": change.pop("backbone")} if len(change) > 1 else {}
    first = weights(CriticConfig(**start))
    assert not torch.equal(first, weights(CriticConfig(**(start | change))))
    assert torch.equal(first, weights(CriticConfig(**start)))


def test_a_path_is_where_the_critics_layers_start(tmp_path, model_dir, make_model):
    make_model("qwen3", seed=7).save_pretrained(tmp_path / "other")
    policy = load_policy(PolicyConfig(str(model_dir)))
    own = load_critic(CriticConfig(), PolicyConfig(str(model_dir)), policy.model)
    other = CriticConfig(path=str(tmp_path / "other"))
    other = load_critic(other, PolicyConfig(str(model_dir)), policy.model)
    weight = make_model("qwen3", seed=7).model.layers[0].mlp.up_proj.weight
    assert torch.equal(other.backbone.layers[0].mlp.up_proj.weight, weight)
    layer = policy.model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(own.backbone.layers[0].mlp.up_proj.weight, layer)
    assert own.backbone.layers[0].mlp.up_proj.weight is not layer


def test_the_value_loss_trains_the_policys_layers_only_where_they_are_shared(tmp_path, model_dir):
    """With flat rewards the policy loss has no gradient; what is left comes from the values."""

    def norm(backbone):
        steps = Steps()
        flat = {"one": RewardTerm(lambda rows, texts: [1.0] * len(texts))}
        config = CriticConfig(backbone=backbone, lam=1.0, value_clip=None)
        options = ppo(config, rewards=flat, num_minibatches=4, max_grad_norm=None)
        run(tmp_path, model_dir, 1, [steps], **options)
        assert steps.gradients[0].abs().max() == 0  # the head is 0, nothing passes it yet
        return steps.gradients[1].abs().max()

    assert norm("own") == 0
    assert norm("policy") > 1e-4


def test_the_kl_penalty_is_in_the_reward_or_in_the_loss_but_never_both(tmp_path, model_dir):
    def second(in_reward, kl_coef):
        options = ppo(
            CriticConfig(kl_in_reward=in_reward, whiten=False, lam=1.0),
            reference=ReferencePolicy(device="cpu"),
            kl_coef=kl_coef,
        )
        return outputs_of(tmp_path, model_dir, 2, **options)[1][1]

    inside = second(True, 0.5)
    rollout, metrics = inside["rollout"], inside["metrics"]
    kl = (rollout.old_logprobs - rollout.ref_logprobs).masked_fill(~rollout.mask, 0)
    assert kl.abs().max() > 1e-3
    to_come = rollout.rewards[:, None] - 0.5 * kl.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(rollout.returns[rollout.mask], to_come[rollout.mask])
    assert metrics["train/kl_loss"] == 0
    assert metrics["train/reward"] == pytest.approx(rollout.rewards.mean().item())  # before KL
    beside = second(False, 0.5)
    expected = beside["rollout"].rewards[:, None].expand_as(rollout.mask)
    mask = beside["rollout"].mask
    torch.testing.assert_close(beside["rollout"].returns[mask], expected[mask])
    assert beside["metrics"]["train/kl_loss"] > 0


def third_missing(rows, completions):
    return [None if i == 2 else value for i, value in enumerate(digits(rows, completions))]


def test_a_missing_reward_teaches_neither_policy_nor_critic(tmp_path, model_dir):
    _, outputs = outputs_of(
        tmp_path, model_dir, rewards={"some": RewardTerm(third_missing)}, **ppo()
    )
    rollout, metrics = outputs[0]["rollout"], outputs[0]["metrics"]
    assert (rollout.advantages[2] == 0).all() and rollout.returns[2].isnan().all()
    assert rollout.advantages.isfinite().all()
    assert metrics["reward/missing"] == 1 and metrics["critic/value_loss"] > 0


def test_a_truncated_completion_is_one_that_ended_or_is_left_out(tmp_path, model_dir):
    _, kept = outputs_of(tmp_path, model_dir, **ppo(truncated="keep", num_minibatches=1))
    _, masked = outputs_of(tmp_path, model_dir, **ppo(truncated="mask", num_minibatches=1))
    rollout = masked[0]["rollout"]
    cut = ~rollout.finished
    assert cut.any() and (rollout.advantages[cut] == 0).all()
    rollout = kept[0]["rollout"]
    last = rollout.rewards[cut]  # values are 0: the last return is the reward, nothing behind it
    assert torch.equal(rollout.returns[cut, -1], last)


def test_groups_go_with_a_critic_too(tmp_path, model_dir):
    options = ppo(sampler=GroupSampler(4, 6), drop_flat_groups=True)
    _, outputs = outputs_of(tmp_path, model_dir, **options)
    assert outputs[0]["metrics"]["reward/group_std"] > 0
    assert len(outputs[0]["rollout"]) == 16


def test_a_critic_beside_adapters_trains(tmp_path, model_dir):
    for backbone in ("own", "policy"):
        policy = PolicyConfig(str(model_dir), lora=LoRAConfig(rank=2), gradient_checkpointing=True)
        module, outputs = outputs_of(
            tmp_path, model_dir, 2, policy=policy, **ppo(CriticConfig(backbone=backbone))
        )
        assert module.critic.head.weight.abs().max() > 0
        assert outputs[1]["metrics"]["critic/value_mean"] != 0


def test_layers_below_the_head_include_adapters(model_dir):
    policy = load_policy(PolicyConfig(str(model_dir), lora=LoRAConfig(rank=2)))
    names = [name for name, _ in decoder(policy.model).named_parameters()]
    assert any("lora_A" in name for name in names)


def test_head_and_values_stay_float32_in_a_bfloat16_run(tmp_path, model_dir):
    policy = PolicyConfig(str(model_dir), dtype="bfloat16")
    loaded = load_policy(policy)
    critic = load_critic(CriticConfig(), policy, loaded.model)
    assert critic.head.weight.dtype == torch.float32
    assert next(critic.backbone.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        critic.head.bias.fill_(1.001)  # 1.0 in bfloat16
    ids = torch.full((1, 3), 5)
    from gspo_lightning.rollout import Samples

    on = torch.ones(1, 3, dtype=torch.bool)
    samples = Samples(ids, on, ids, on, on[:, 0], [{}], [""], 1)
    with torch.autocast("cpu", torch.bfloat16):
        values = critic(loaded.model, samples)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.full((1, 3), 1.001), atol=1e-6, rtol=0)


def test_the_critic_has_its_own_learning_rate_on_every_schedule(tmp_path, model_dir):
    module = make_module(model_dir, **ppo(CriticConfig(learning_rate_ratio=3.0)))
    data = PromptData(
        str(write_prompts(tmp_path / "p.jsonl")), prompts_per_rollout=4, num_rollouts=1
    )
    os.environ["PL_GLOBAL_SEED"] = "0"
    trainer = make_trainer(tmp_path)
    trainer.fit(module, data)
    (optimizer,) = trainer.optimizers
    heads = {id(p) for p in module.critic.parameters()}
    for group in optimizer.param_groups:
        critics = {id(p) in heads for p in group["params"]}
        assert critics == {bool(group.get("critic"))}
        assert group["lr"] == pytest.approx(0.03 if group.get("critic") else 0.01)


def test_the_critic_is_saved_but_never_exported(tmp_path, model_dir):
    module, _ = outputs_of(tmp_path, model_dir, **ppo())
    names = set(module.state_dict())
    assert "critic.head.weight" in names and any(n.startswith("critic.backbone.") for n in names)
    module.export(tmp_path / "export")
    from safetensors import safe_open

    with safe_open(tmp_path / "export" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "head.weight" in name and "lm_head" not in name]  # noqa: SIM118
    assert load_policy(PolicyConfig(str(tmp_path / "export")))


def test_a_shared_critic_is_its_head_alone(tmp_path, model_dir):
    module, _ = outputs_of(tmp_path, model_dir, **ppo(CriticConfig(backbone="policy")))
    names = {name for name in module.state_dict() if name.startswith("critic.")}
    assert names == {"critic.head.weight", "critic.head.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"advantages": "gae"}, "advantages gae needs a critic.*ppo.yaml"),
        ({"critic": CriticConfig()}, "advantages normalized does not ask it; use gae"),
        (
            ppo(sampler=GroupSampler(1, 6), drop_flat_groups=True),
            "drop_flat_groups with sampler.group_size 1",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(model_dir, options, message):
    with pytest.raises(ValueError, match=message):
        make_module(model_dir, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.5}, r"critic.gamma must be in \[0, 1\], got 1.5"),
        ({"lam": -0.1}, r"critic.lam must be in \[0, 1\], got -0.1"),
        ({"value_clip": 0.0}, "critic.value_clip must be above 0, got 0.0"),
        ({"value_coef": 0.0}, "critic.value_coef must be above 0"),
        ({"learning_rate_ratio": NAN}, "critic.learning_rate_ratio must be above 0, got nan"),
        ({"path": "nowhere/at/all"}, "critic.path: there is no folder nowhere/at/all"),
        ({"path": "x", "backbone": "policy"}, "critic.path x is not read"),
    ],
)
def test_bad_settings_of_the_critic_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CriticConfig(**options)


def test_layers_that_cannot_be_loaded_or_do_not_fit_are_named(tmp_path, model_dir, make_model):
    policy = load_policy(PolicyConfig(str(model_dir)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    make_model("qwen3", vocab_size=16).save_pretrained(tmp_path / "small")
    start = PolicyConfig(str(model_dir))
    with pytest.raises(ValueError, match=r"critic.path: .*empty"):
        load_critic(CriticConfig(path=str(tmp_path / "empty")), start, policy.model)
    with pytest.raises(ValueError, match="embeds 16 tokens, the policy 32"):
        load_critic(CriticConfig(path=str(tmp_path / "small")), start, policy.model)
    random = PolicyConfig(str(model_dir), weights="random")
    with pytest.raises(ValueError, match="a policy with random weights is in no folder"):
        load_critic(CriticConfig(), random, policy.model)
    assert isinstance(load_critic(CriticConfig(backbone="policy"), random, policy.model), Critic)


@pytest.mark.parametrize(
    ("backbone", "text"),
    [("own", "layers of its own, learning rate 10 x"), ("policy", "17 parameters, the policy's")],
)
def test_the_plan_names_the_critic_and_what_it_takes(tmp_path, model_dir, backbone, text):
    lines = []

    class Plan(Callback):
        def on_train_start(self, trainer, module):
            lines.extend(plan_lines(trainer, module))

    module = run(tmp_path, model_dir, 1, [Plan()], **ppo(CriticConfig(backbone=backbone)))
    plan = {line[:9].strip(): line[10:] for line in lines}
    assert text in plan["critic"]
    assert ("; critic " in plan["memory"]) == (backbone == "own")
    count = sum(p.numel() for p in module.policy.parameters())
    assert plan["policy"].startswith(f"{count:,} parameters")  # the critic's are not counted here


def test_the_plan_says_how_critic_and_reference_are_run_and_nothing_says_it_again(
    tmp_path, make_model, tokenizer, caplog
):
    """Doge's layers do not say their windows."""
    make_model("doge", sliding_window=3).save_pretrained(tmp_path / "doge")
    tokenizer.save_pretrained(tmp_path / "doge")
    lines = []

    class Plan(Callback):
        def on_train_start(self, trainer, module):
            lines.extend(plan_lines(trainer, module))

    with caplog.at_level("WARNING", "gspo_lightning"):
        run(tmp_path, tmp_path / "doge", 1, [Plan()], **ppo(CriticConfig()))
    (line,) = [line for line in lines if line.startswith("passes")]
    assert line.count("packed rows give other values") == 2  # the policy's, the critic's
    assert "; critic: rows are padded" in line
    assert not [m for m in caplog.messages if "rows are padded" in m]


@pytest.mark.parametrize("kind", ["llama4_text", "gemma3", "bart"])
def test_a_value_head_on_the_policys_layers_finds_them(kind, make_rollout):
    model = AutoModelForCausalLM.from_config(config_of(kind)).eval()
    make_ready(model)
    critic = Critic(CriticConfig(backbone="policy"), hidden_size=16)
    torch.nn.init.ones_(critic.head.weight)
    rollout, states = make_rollout(), []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: states.append(args[0]))
    values = critic(model, rollout)
    prompt = rollout.prompt_ids[3][rollout.prompt_mask[3]]
    with torch.no_grad():
        model(input_ids=torch.cat([prompt, rollout.completion_ids[3]])[None], use_cache=False)
    count = int(rollout.mask[3].sum())
    expected = states[-1][0].sum(-1)[len(prompt) - 1 :][:count]
    torch.testing.assert_close(values[3, :count], expected, atol=1e-4, rtol=1e-4)


def test_the_critics_gradient_is_measured_and_scaled_down_apart_from_the_policys():
    critic = Critic(CriticConfig(), hidden_size=2)
    critic.head.weight.grad = torch.tensor([[3.0, 4.0]])
    assert critic.clip_gradient(None) == critic.clip_gradient(1.0) == 5
    assert critic.head.weight.grad.norm().item() == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:rollout 1, optimizer step")
def test_a_broken_value_is_a_fault_and_moves_no_weight(tmp_path, model_dir):
    class Break(Callback):
        def on_train_start(self, trainer, module):
            with torch.no_grad():
                module.critic.head.bias.fill_(1e30)  # its square is infinite in float32

    keep = Outputs()
    module = run(tmp_path, model_dir, 1, [Break(), keep], **ppo())
    (outputs,) = keep.all
    assert outputs["metrics"]["optim/faults"] == 2
    fresh = make_module(model_dir)
    fresh.configure_model()
    pairs = zip(fresh.policy.parameters(), module.policy.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not module.critic.head.weight.any()
