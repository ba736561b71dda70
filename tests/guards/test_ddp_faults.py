"""Two ranks, one of them at fault: both skip, nobody hangs, the weights stay the same on both."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from support.repository import PYTHONPATH
from support.tiny_run import write_prompts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory, model_dir):
    root = tmp_path_factory.mktemp("ddp_faults")
    write_prompts(root / "prompts.jsonl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PL_GLOBAL_SEED": "0",
        "PYTHONPATH": PYTHONPATH,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    command = [sys.executable, "-m", "support.ddp_fault_run", str(root), str(model_dir)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, err = rank.communicate(timeout=240)
            assert rank.returncode == 0, err[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
    return root


@pytest.fixture(scope="module")
def ranks(root):
    return [torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_a_fault_of_one_rank_is_skipped_by_both(ranks):
    first, second = (rank["broken"] for rank in ranks)
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["weights"], ranks[0]["left out"]["weights"])
    assert first["weights"].isfinite().all()


def test_a_step_that_two_ranks_skip_is_counted_once(ranks):
    assert [rank["broken"]["faults"] for rank in ranks] == [[0, 1, 0]] * 2


def test_only_the_rank_at_fault_writes_and_says_so(root, ranks):
    assert [path.name for path in (root / "faults").iterdir()] == [
        "rollout=000002-step=001-rank1.pt"
    ]
    assert not any("not finite" in line for line in ranks[0]["lines"])
    assert sum("loss, gradient not finite" in line for line in ranks[1]["lines"]) == 1


def test_a_rank_halves_its_own_micro_batch_and_checkpoints_know_both(ranks):
    assert sum("micro_batch_size 4 -> 2" in line for line in ranks[1]["lines"]) == 1
    for rank in ranks:
        assert [size[0] for size in rank["broken"]["sizes"][-1]] == [4, 2]
