"""A critic and dynamic sampling on two ranks, as two processes."""

import os
import subprocess
import sys

import pytest
import torch

from support.repository import PYTHONPATH

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["own", "policy"])
def ranks(tmp_path_factory, model_dir, request):
    """What two ranks ended with whose critic has layers of its own, or the policy's."""
    root = tmp_path_factory.mktemp("critic_ddp")
    environment = os.environ | {
        "PL_GLOBAL_SEED": "0",
        "PYTHONPATH": PYTHONPATH,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "support.ddp_critic_run", str(root), str(model_dir)]
    command.append(request.param)
    subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True)
    return [torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def joined(ranks, rollout, name):
    """A quantity of both ranks' trained tokens."""
    parts = [rank["rollouts"][rollout] for rank in ranks]
    return torch.cat([part[name][part["mask"]] for part in parts]).double()


def test_ranks_end_with_the_same_weights_metrics_and_place_in_the_data(ranks):
    first, second = ranks
    assert torch.equal(first["weights"], second["weights"])
    assert first["served"] == second["served"]
    for a, b in zip(first["metrics"], second["metrics"], strict=True):
        shared = [name for name in a if not name.startswith(("time/", "memory/"))]
        assert [a[name] for name in shared] == [b[name] for name in shared]


def test_explained_variance_and_whitening_are_over_both_ranks(ranks):
    for i, metrics in enumerate(ranks[0]["metrics"]):
        returns, values = joined(ranks, i, "returns"), joined(ranks, i, "values")
        explained = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
        assert metrics["critic/explained_variance"] == pytest.approx(explained.item(), abs=1e-6)
        advantages = joined(ranks, i, "advantages")
        assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
        assert advantages.std().item() == pytest.approx(1, abs=1e-3)
        own = [rank["rollouts"][i]["advantages"][rank["rollouts"][i]["mask"]] for rank in ranks]
        assert any(abs(x.mean()) > 1e-3 for x in own)  # not each rank by itself


def test_the_critic_s_gradient_is_averaged_over_all_tokens_of_both_ranks(ranks):
    assert torch.equal(ranks[0]["gradient"], ranks[1]["gradient"])
    assert ranks[0]["gradient"].abs().max() > 0


def test_each_rank_draws_what_it_lacks(ranks):
    drawn = sum(metrics["rollout/prompts_drawn"] for metrics in ranks[0]["metrics"])
    assert ranks[0]["served"] == drawn > 3 * 6  # nothing was sampled in vain
    for rank in ranks:
        assert all(metrics["rollout/flat_groups_kept"] == 0 for metrics in rank["metrics"])
        assert all(p.count("+") % 2 for prompts in rank["prompts"] for p in prompts)
