"""Two ranks of the whole module, as two processes."""

import os
import subprocess
import sys

import pytest
import torch

from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.objectives import Objective, policy_loss, token_weights
from gspo_lightning.policy.lora import LoRAConfig
from gspo_lightning.policy.policy import PolicyConfig, load_policy
from support.repository import PYTHONPATH

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["weights", "adapters"])
def ranks(tmp_path_factory, model_dir, request):
    """What two ranks ended with that trained all weights, or adapters alone."""
    root = tmp_path_factory.mktemp("ddp")
    environment = os.environ | {
        "PL_GLOBAL_SEED": "0",
        "PYTHONPATH": PYTHONPATH,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "support.ddp_run", str(root), str(model_dir)]
    command.append(request.param)
    subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True)
    return [torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture
def policy(ranks, model_dir):
    """The policy as both ranks had it before the first step."""
    start = ranks[0]["start"]
    lora = LoRAConfig(rank=3) if "_extra_state" in start else None
    policy = load_policy(PolicyConfig(str(model_dir), lora=lora))
    policy.load_state_dict(start)
    return policy


def test_ranks_begin_with_the_same_adapters(ranks):
    first, second = (rank["start"] for rank in ranks)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first if k != "_extra_state")


def test_ranks_end_with_the_same_weights_metrics_and_coefficient(ranks):
    first, second = ranks
    assert torch.equal(first["weights"], second["weights"])
    shared = [k for k in first["metrics"][0] if not k.startswith(("time/", "memory/"))]
    for a, b in zip(first["metrics"], second["metrics"], strict=True):
        assert [a[name] for name in shared] == [b[name] for name in shared]
    coefficients = [[r["kl_coef"] for r in rank["rollouts"]] for rank in ranks]
    assert coefficients[0] == coefficients[1] != [0.1] * 3


def test_ranks_draw_different_prompts_and_completions(ranks):
    first, second = (rank["rollouts"][0] for rank in ranks)
    assert first["prompts"] != second["prompts"]
    same = first["completion_ids"].shape == second["completion_ids"].shape
    assert not same or not torch.equal(first["completion_ids"], second["completion_ids"])


def test_counts_are_summed_over_ranks(ranks):
    # fact 41
    lengths = torch.cat([rank["rollouts"][0]["mask"].sum(1) for rank in ranks]).double()
    metrics = ranks[0]["metrics"][0]
    assert metrics["train/avg_response_length"] == pytest.approx(lengths.mean().item())
    assert metrics["rollout/tokens"] == lengths.sum().item()
    assert metrics["rollout/prompts_drawn"] == 4


def test_whitening_learns_the_rewards_of_all_ranks(ranks):
    first, second = (rank["whitening"] for rank in ranks)
    assert first == second
    raw = torch.cat([r["digits"] for rank in ranks for r in rank["rollouts"]]).double()
    assert first["count"] == len(raw) == 48
    assert first["mean"] == pytest.approx(raw.mean().item(), rel=1e-6)  # parts are float32
    assert first["squares"] == pytest.approx(((raw - raw.mean()) ** 2).sum().item(), rel=1e-6)


def test_gradient_of_two_ranks_is_that_of_one_rank_with_all_rows(ranks, policy):
    # fact 14, through DDP itself: rows of both ranks under one another, one normaliser
    parts = [rank["rollouts"][0] for rank in ranks]
    losses = []
    count = sum(int(part["mask"].any(1).sum()) for part in parts)
    for part in parts:
        logprobs = completion_logprobs(
            policy.model,
            part["prompt_ids"],
            part["prompt_mask"],
            part["completion_ids"],
            part["mask"],
            temperature=1.0,
        ).logprobs
        own = int(part["mask"].any(1).sum())
        weights = token_weights(part["mask"], "sequence_mean") * own / count
        arguments = (logprobs, logprobs.detach(), part["advantages"], part["mask"], weights)
        losses.append(policy_loss(*arguments, Objective()).loss)
    trained = [p for p in policy.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(sum(losses), trained)
    expected = torch.cat([g.flatten() for g in gradient])
    for rank in ranks:
        # the KL term has no gradient at the start: its value and slope are 0 there
        torch.testing.assert_close(rank["gradient"], expected, atol=1e-6, rtol=1e-5)
