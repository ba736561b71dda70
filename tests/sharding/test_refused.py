"""What FSDP2 refuses, and what it says that ranks need, without a rank."""

from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule

from gspo_lightning.guards.ignored import check_strategy
from gspo_lightning.guards.out_of_memory import SAMPLED, OutOfMemory, Sizes
from gspo_lightning.sharding import FSDP2


def checked(critic=None, four_bits=False, device="cuda", **options):
    """What a strategy says of a module, before any process group is made."""
    strategy = FSDP2(**options)
    policy = SimpleNamespace(load_in_4bit=four_bits)
    strategy._lightning_module = SimpleNamespace(critic_config=critic, policy_config=policy)
    strategy.cluster_environment = SimpleNamespace(local_rank=lambda: 0)
    strategy.parallel_devices = [torch.device(device)]
    strategy._check()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"critic": object()}, "model.critic: fsdp2 shares out no critic"),
        ({"four_bits": True}, "policy.load_in_4bit"),
        ({"cpu_offload": True, "device": "cpu"}, "FSDP2.cpu_offload: the policy is on the CPU"),
        (
            {"cpu_offload": True, "process_group_backend": "nccl"},
            "FSDP2.process_group_backend is nccl, .* set cpu:gloo,cuda:nccl",
        ),
        ({"rollout": "alone"}, "FSDP2.rollout must be gathered or in_step, got 'alone'"),
        ({"checkpoints": "zip"}, "FSDP2.checkpoints must be auto, file or parts"),
        ({"timeout": timedelta(0)}, "FSDP2.timeout must be > 0, got 0:00:00"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_in_a_line(options, reason):
    checked()
    with pytest.raises(ValueError, match=reason):
        checked(**options)


def test_a_module_without_a_policy_of_ours_is_refused():
    strategy = FSDP2()
    strategy._lightning_module = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"not what Linear trains; set trainer\.strategy to auto"):
        strategy._check()


def test_all_but_the_parts_is_moved_and_the_module_knows_where_it_is():
    module = LightningModule()
    module.policy, module.other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    strategy = FSDP2()
    strategy._lightning_module = module
    strategy.cluster_environment = SimpleNamespace(local_rank=lambda: 0)
    strategy.parallel_devices = [torch.device("meta")]
    strategy.model_to_device()
    assert module.device.type == module.other.weight.device.type == "meta"
    assert module.policy.weight.device.type == "cpu"


@pytest.mark.parametrize("name", ["fsdp", "deepspeed_stage_3", "ModelParallelStrategy"])
def test_other_ways_to_share_out_name_fsdp2(name):
    with pytest.raises(ValueError, match=f"trainer.strategy {name}: .* by fsdp2 here"):
        check_strategy(SimpleNamespace(strategy=name, precision="32-true"))
    check_strategy(SimpleNamespace(strategy="fsdp2", precision="32-true"))
    check_strategy(SimpleNamespace(strategy=FSDP2(), precision="32-true"))


def test_a_pass_that_ranks_share_is_not_made_again():
    calls = []

    def work():
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    sizes = Sizes({SAMPLED: 8}, shared=(SAMPLED,))
    with pytest.raises(OutOfMemory, match=r"sampler.batch_size 8\), in a pass that other ranks"):
        sizes.fit(SAMPLED, 16, "rollout 3, sampling", work)
    assert calls == [1]
