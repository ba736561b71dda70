"""What is said, and what refused, of a run's memory before any weight is read."""

from types import SimpleNamespace

import pytest
import torch

from gspo_lightning.data.prompts import PromptData
from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.policy.lora import LoRAConfig
from gspo_lightning.policy.policy import PolicyConfig
from gspo_lightning.run import memory
from gspo_lightning.run.command import Watch
from gspo_lightning.run.memory import Needs, before_loading, memory_line, needs, shortages
from gspo_lightning.sharding import FSDP2
from gspo_lightning.sharding.memory import Ranks
from gspo_lightning.vllm.ahead import AsyncSampler
from gspo_lightning.vllm.local import EngineConfig
from gspo_lightning.vllm.sampler import VLLMSampler
from support.tiny_models import build_model
from support.tiny_run import make_module, make_trainer, write_prompts

CARD = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """Says what a card has, and what it and the host have left."""

    def make(card=2**40, left=2**40, host=2**40):
        monkeypatch.setattr(memory, "capacity", lambda device: card)
        room = {"cuda": left, "cpu": host}
        monkeypatch.setattr(memory, "available", lambda device: room[device.type])

    make()
    return make


def trainer_on(device=CARD, strategy=None, ranks=1, precision="bf16-mixed"):
    strategy = strategy or SimpleNamespace()
    if isinstance(strategy, FSDP2):
        strategy.parallel_devices = [device]
        strategy.cluster_environment = SimpleNamespace(local_rank=lambda: 0)
    else:
        strategy.root_device = device
    return SimpleNamespace(
        strategy=strategy,
        world_size=ranks,
        num_nodes=1,
        precision=precision,
        datamodule=SimpleNamespace(prompts_per_rollout=4, longest_prompt=12),
        is_global_zero=True,
    )


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)])
def test_the_plan_before_loading_is_that_behind_it(model_dir, tokenizer, machine, lora):
    config = PolicyConfig(str(model_dir), lora=lora, gradient_checkpointing=True)
    module, trainer = make_module(model_dir, policy=config), trainer_on(torch.device("cpu"))
    before = before_loading(trainer, module)
    assert all(p.is_meta for p in before.model.parameters())
    module.configure_model()
    behind = needs(trainer, module)
    assert before.card == behind.card and memory_line(module, before) == memory_line(module, behind)
    assert before_loading(trainer, module) is None  # it is loaded


def test_no_weight_is_read_of_a_policy_that_fits_no_card(model_dir, monkeypatch, machine):
    module = make_module(model_dir)
    state = 16 * sum(p.numel() for p in build_model("qwen3").parameters())
    machine(card=state)
    before_loading(trainer_on(), module)
    machine(card=state - 1)
    with pytest.raises(ValueError, match=r"policy.path: weights.* on cuda:0, which has .*fsdp2"):
        before_loading(trainer_on(), module)
    before_loading(trainer_on(strategy=FSDP2(), ranks=2), module)  # half of it each
    machine(card=state / 2 - 1)
    with pytest.raises(ValueError, match="among some 5 such cards"):  # 2 / 0.9 for computing
        before_loading(trainer_on(strategy=FSDP2(), ranks=2), module)


STATE = {"weights": 1.0, "gradients": 1.0, "Adam": 2.0}
GATHERED = Ranks(8, 8, sharded=True)
NAMES = ("KV cache", "micro-batch", "optimizer step")


@pytest.mark.parametrize(
    ("in_turn", "ranks", "options", "remedy"),
    [
        ((2, 1, 1), Ranks(), {}, "train adapters (policy.lora), share the policy out among more"),
        ((9, 1, 1), Ranks(), {}, "lower sampler.batch_size or sampler.max_new_tokens"),
        ((9, 1, 1), GATHERED, {}, "set trainer.strategy.init_args.rollout: in_step, or lower"),
        ((9e9, 1, 1), GATHERED, {}, "lower sampler.batch_size or sampler.max_new_tokens"),
        ((9, 1, 9), Ranks(), {}, "train adapters (policy.lora), or share the policy out (trainer"),
        ((9, 9, 1), Ranks(), {}, "lower model.init_args.micro_batch_size, or set policy.gradient_"),
        ((9, 9, 1), Ranks(), {"micro_batch_tokens": 9}, "lower model.init_args.micro_batch_tokens"),
    ],
)
def test_what_is_short_names_the_setting_of_the_largest_part(
    model_dir, machine, in_turn, ranks, options, remedy
):
    card = STATE | dict(zip(NAMES, in_turn, strict=True))
    found = Needs(build_model("qwen3"), ranks, CARD, card, {"loading": 1.0, "a checkpoint": 1.0})
    module = make_module(model_dir, **options)
    assert shortages(module, found) == []
    machine(left=2.0)
    ((text, said),) = shortages(module, found)
    assert text.startswith("about ") and " of cuda:0, where " in text
    assert said.startswith(remedy)


@pytest.mark.parametrize(
    ("ranks", "host", "reference", "remedy"),
    [
        (GATHERED, {"loading": 1.0, "a checkpoint": 9.0}, None, "init_args.checkpoints: parts"),
        (Ranks(8, 8, True, cpu_offload=True), {"moments": 9.0}, None, "cpu_offload out, or take"),
        (Ranks(), {"loading": 5.0}, 9.0, "put the reference on a card (reference.device)"),
        (Ranks(8, 8), {"loading": 9.0}, None, "fewer ranks on this machine (trainer.devices)"),
    ],
)
def test_a_host_that_is_short_names_what_takes_most(
    model_dir, machine, capsys, ranks, host, reference, remedy
):
    card = STATE | dict.fromkeys(NAMES, 1.0)
    found = Needs(build_model("qwen3"), ranks, CARD, card, host, reference, "host")
    machine(host=found.on_host - 1)
    ((text, said),) = shortages(make_module(model_dir), found)
    assert "of this machine's memory" in text and remedy in said
    assert ("for 8 ranks" in text) == (ranks.count == 8)


def test_an_engine_apart_needs_no_cache_here_and_one_in_this_process_its_share(model_dir, machine):
    def card(server=None, around=lambda sampler: sampler, **engine):
        sampler = VLLMSampler(4, 6, server=server, engine=EngineConfig(**engine))
        return before_loading(trainer_on(), make_module(model_dir, sampler=around(sampler))).card

    url = "http://127.0.0.1:8000"
    assert card(url)["KV cache"] == card(url, AsyncSampler)["KV cache"] == 0
    asleep, awake = card(gpu_memory_utilization=0.25), card(sleep=False)
    assert (asleep["KV cache"], "vLLM" in asleep) == (2**38, False)
    assert (awake["KV cache"], awake["vLLM"]) == (0, 0.4 * 2**40)
    module = make_module(model_dir, sampler=VLLMSampler(4, 6))
    machine(left=2**30)
    ((_, said),) = shortages(module, before_loading(trainer_on(), module))
    assert said == "lower sampler.engine.gpu_memory_utilization"


def test_a_reference_counts_where_it_is(model_dir, machine):
    alone = before_loading(trainer_on(), make_module(model_dir))
    weights = alone.card["weights"]

    def with_reference(device, **options):
        reference = ReferencePolicy(device=device)
        module = make_module(model_dir, reference=reference, kl_coef=0.1)
        found = before_loading(trainer_on(**options), module)
        return found.on_card - alone.on_card, found.on_host - alone.on_host

    assert with_reference("policy") == (weights, 0)
    assert with_reference("cuda:1") == (0, 0)
    assert with_reference("cpu") == (0, weights)


def test_what_a_model_cannot_say_without_weights_is_left_to_loading(
    model_dir, machine, monkeypatch
):
    def broken(*_, **__):
        raise RuntimeError("this code wants numbers")

    monkeypatch.setattr(memory.AutoModelForCausalLM, "from_config", broken)
    assert before_loading(trainer_on(), make_module(model_dir)) is None
    assert before_loading(trainer_on(), SimpleNamespace()) is None  # no GSPOModule


class Seen(Exception):
    """Ends a run that has been seen as far as it matters."""


class Watching(Watch):
    """The command's own callback, as it looks at the memory of a run."""

    def before_loading(self, trainer, module):
        super().before_loading(trainer, module)
        raise Seen(module.policy, module.reference.model)


def test_a_large_policy_is_told_of_before_anything_is_loaded(
    model_dir, machine, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(memory, "WORTH_SAYING", 1)
    data = PromptData(str(write_prompts(tmp_path / "p.jsonl")), prompts_per_rollout=4)
    options = {"reference": ReferencePolicy(device="cpu"), "kl_coef": 0.1}

    def fit(**changes):
        module = make_module(model_dir, **options, **changes)
        make_trainer(tmp_path / "run", callbacks=[Watching()]).fit(module, data)

    with pytest.raises(ValueError, match="num_minibatches must divide"):
        fit(num_minibatches=3)  # behind all that refuses a config
    assert "memory    " not in capsys.readouterr().err
    with pytest.raises(Seen) as seen:
        fit()
    assert seen.value.args == (None, None)
    assert "memory    about 0 MiB for the policy: weights" in capsys.readouterr().err
