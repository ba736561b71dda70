"""Waits for a device, and what is sent to it: a budget for each decode step and each micro-batch.

On a CPU nothing waits, so what would is counted: values that Python reads, and tensors made of
Python's values, which would be copied to the device.
"""

from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode

from gspo_lightning.engine.attention import open_attention
from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.policy.policy import Policy
from gspo_lightning.sampling import GroupSampler
from support.passes import inputs, tried
from support.prompts import PROMPTS, batch_of

READ = {"tolist", "item", "__bool__", "__int__", "__float__", "cpu", "nonzero", "equal"}
SENT = {"tensor", "as_tensor", "new_tensor"}


class Counted(TorchFunctionMode):
    """Counts what would wait for a device ("read") and what would be copied to it ("sent")."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        index = args[1] if name in ("__getitem__", "__setitem__") else None
        parts = index if isinstance(index, tuple) else [index]
        by_mask = any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in parts)
        self.found["read"] += name in READ or by_mask
        self.found["sent"] += name in SENT
        return function(*args, **(kwargs or {}))


@pytest.fixture
def policy(make_model, tokenizer):
    model = make_model("qwen3")
    assert open_attention(model)
    return Policy(tried(model), tokenizer)


def counted(work):
    with Counted() as counted:
        work()
    return counted.found


def test_a_decode_step_waits_once_and_sends_nothing(policy):
    """For the tokens, which say which rows have ended."""
    policy.eos_ids = [-1]  # nothing ends early

    def steps(count):
        sampler = GroupSampler(3, count)
        return counted(lambda: sampler.sample(policy, batch_of(PROMPTS), seed=0))

    steps(2)  # what is found out on first use
    few, many = steps(5), steps(25)
    assert many["read"] - few["read"] == 20
    assert many["sent"] == few["sent"]


def test_rows_that_end_cost_a_few_copies_however_many_layers_there_are(make_model, tokenizer):
    found = []
    for layers in (2, 4):
        model = make_model("qwen3", num_hidden_layers=layers)
        assert open_attention(model)
        policy = Policy(tried(model), tokenizer)
        policy.eos_ids = [1, 5, 9, 13]
        torch.manual_seed(0)
        ends = []
        policy.model.register_forward_pre_hook(lambda *_, seen=ends: seen.append(1))
        sent = counted(lambda p=policy: GroupSampler(3, 12).sample(p, batch_of(PROMPTS), seed=0))
        found.append(sent["sent"] / len(ends))
    assert max(found) <= 5  # where rows are and where they go, prompts' lengths, and the layout


def test_a_micro_batch_waits_for_its_lengths_alone(policy, make_rollout):
    rollout = make_rollout()
    work = lambda: completion_logprobs(policy.model, *inputs(rollout), group_size=3)  # noqa: E731
    work()
    found = counted(work)
    # whether prompts end where they should, lengths, which tokens count; and one on the CPU
    assert found["read"] == 4 and found["sent"] <= 1, found
