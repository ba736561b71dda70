"""Frozen models at work beside the policy: at the same time, with the same result."""

import threading
from types import SimpleNamespace

import pytest
import torch

from gspo_lightning.collect import Collector
from gspo_lightning.frozen.beside import Passes
from gspo_lightning.frozen.models import FrozenModels, ReferencePolicy
from gspo_lightning.old_logprobs import OldLogProbs
from gspo_lightning.rewards.terms import RewardError, RewardTerm
from gspo_lightning.rewards.time_limit import TimeLimit
from support.reward_functions import digits
from support.steps import make_step, one_rank
from support.tiny_run import run

DEADLINE = 30  # seconds for all passes to meet; those that wait for one another never would


def train(root, model_dir, **options):
    root.mkdir()
    options = {"kl_coef": 0.1, "truncated": "mask", "overlong_ramp": 3} | options
    return run(root, model_dir, 2, reference=ReferencePolicy(device="cpu"), **options)


def apart(monkeypatch, *parts):
    """Pretend that these frozen models have devices of their own."""
    monkeypatch.setattr(FrozenModels, "apart", lambda self, part: part in parts)


@pytest.fixture
def meeting(monkeypatch):
    """Each pass waits until all three have begun."""
    barrier, threads = threading.Barrier(3), {}

    def wait(name, cls, method):
        plain = getattr(cls, method)

        def pass_(*args):
            threads[name] = threading.current_thread()
            barrier.wait(DEADLINE)
            return plain(*args)

        monkeypatch.setattr(cls, method, pass_)

    wait("old", OldLogProbs, "find")
    wait("reward", Collector, "score")
    wait("reference", ReferencePolicy, "logprobs")
    return threads


def test_passes_on_other_devices_run_at_the_same_time(monkeypatch, meeting, tmp_path, model_dir):
    apart(monkeypatch, "model.reference", "model.rewards")
    train(tmp_path / "run", model_dir)
    assert meeting["old"] is threading.main_thread()
    assert len({thread.ident for thread in meeting.values()}) == 3


@pytest.mark.parametrize("drop_flat_groups", [False, True])
def test_side_by_side_gives_the_same_bits(monkeypatch, tmp_path, model_dir, drop_flat_groups):
    options = {"drop_flat_groups": drop_flat_groups}
    plain = train(tmp_path / "one", model_dir, **options)
    apart(monkeypatch, "model.reference", "model.rewards")
    beside = train(tmp_path / "two", model_dir, **options)
    for a, b in zip(plain.parameters(), beside.parameters(), strict=True):
        assert torch.equal(a, b)
    figures = [
        {k: v.item() for k, v in module.trainer.callback_metrics.items()}
        for module in (plain, beside)
    ]
    measured = ("time/", "memory/")
    same = [{k: v for k, v in f.items() if not k.startswith(measured)} for f in figures]
    assert same[0] == same[1]
    assert same[0]["train/kl_divergence"] > 0


def test_the_seconds_of_each_pass_are_logged(tmp_path, model_dir):
    module = train(tmp_path / "run", model_dir)
    figures = module.trainer.callback_metrics
    passes = [figures[f"time/{name}"] for name in ("reward", "reference", "old_logprobs")]
    assert all(seconds > 0 for seconds in passes)
    assert sum(passes) < figures["time/score"]  # one after another: they are parts of the phase


def test_without_a_reference_no_pass_of_it_is_logged(tmp_path, model_dir):
    module = run(tmp_path, model_dir)
    assert "time/reference" not in module.trainer.callback_metrics


@pytest.mark.parametrize("beside", [False, True])
def test_an_error_in_a_pass_ends_the_run(monkeypatch, tmp_path, model_dir, beside):
    def broken(rows, completions):
        raise ZeroDivisionError("no taste")

    if beside:
        apart(monkeypatch, "model.reference", "model.rewards")
    with pytest.raises(RewardError, match="no taste"):
        train(tmp_path / "run", model_dir, rewards={"broken": RewardTerm(broken)})


def test_an_error_of_the_policy_waits_for_the_other_passes(monkeypatch, tmp_path, model_dir):
    finished = []

    def slow(rows, completions):
        failed.wait(DEADLINE)
        finished.append(True)
        return digits(rows, completions)

    def fail(*args):
        failed.set()
        raise ZeroDivisionError

    failed = threading.Event()
    monkeypatch.setattr(OldLogProbs, "find", fail)
    apart(monkeypatch, "model.rewards")
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", model_dir, rewards={"slow": RewardTerm(slow)})
    assert finished == [True]


def test_a_pass_takes_autocast_along():
    def product():
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype, threading.current_thread()

    for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.autocast("cpu", enabled=enabled), Passes() as passes:
            there, thread = passes.begin(True, product).result()
            assert there == passes.begin(False, product).result()[0] == dtype
            assert thread is not threading.current_thread()


def test_rewards_of_another_process_are_made_beside_the_policys_pass(
    monkeypatch, tmp_path, model_dir
):
    """Each waits until the other has begun, which on one thread would never come."""
    barrier, threads = threading.Barrier(2), {}
    options = {"rewards": {"slow": RewardTerm(TimeLimit(digits, seconds=20))}}
    plain = train(tmp_path / "one", model_dir, **options)

    def wait(name, cls, method):
        own = getattr(cls, method)

        def pass_(*args):
            threads[name] = threading.current_thread()
            barrier.wait(DEADLINE)
            return own(*args)

        monkeypatch.setattr(cls, method, pass_)

    wait("old", OldLogProbs, "find")
    wait("reward", Collector, "score")
    beside = train(tmp_path / "two", model_dir, **options)
    assert threads["old"] is threading.main_thread() is not threads["reward"]
    for a, b in zip(plain.parameters(), beside.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("ranks", "whiten", "apart"), [(1, True, True), (2, True, False)])
def test_sums_over_ranks_stay_in_one_thread(ranks, whiten, apart):
    collector = SimpleNamespace(
        rewards={"slow": RewardTerm(TimeLimit(digits, seconds=20), whiten=whiten)},
        frozen=FrozenModels(None, {}),
    )
    step = make_step(ranks=one_rank(count=ranks))
    assert Collector.rewards_apart(collector, step) is apart


def test_a_frozen_model_is_apart_if_its_device_is_not_the_policys():
    frozen = FrozenModels(None, {})
    frozen.policy_device = torch.device("cuda", 0)
    frozen.devices = {
        "model.reference": torch.device("cuda", 0),
        "model.rewards.a.fn": torch.device("cuda", 0),
        "model.rewards.b.fn": torch.device("cuda", 1),
    }
    assert (frozen.apart("model.reference"), frozen.apart("model.rewards")) == (False, True)
