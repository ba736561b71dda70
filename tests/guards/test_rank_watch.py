"""Which rank keeps the others waiting: by hand from what was heard, and from real ranks."""

import contextlib
import io
import json
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from gspo_lightning.guards.rank_watch import (
    PHASES,
    RankWatch,
    Silence,
    Word,
    gradient_wait,
    together,
    watch_for,
)
from gspo_lightning.step import Clock
from support.forked import on_ranks


def word(rollout, phase, count, waits=False):
    place = {"number": rollout, "phase": PHASES.index(phase), "waits": waits}
    return json.dumps(place | {"unit": "rollout", "count": count, "host": "node"})


def told(times, rank=0, seconds=60.0):
    """What rank ``rank`` says at each time, given (time, words of the ranks)."""
    silence, said = Silence(rank, seconds), {}
    for now, words in times:
        silence.hear(dict(enumerate(words)), now)
        if lines := silence.lines(now):
            said[now] = lines
    return said


def test_a_rank_without_a_sign_of_life_is_named_after_a_minute_and_then_in_doubled_steps():
    stays = word(7, "optimise", 1)
    said = told([(t, [word(7, "optimise", t), stays]) for t in range(0, 250, 10)])
    name = "no word from rank 1 (node) for"
    assert said == {t: [f"{name} {t} s, last in rollout 7, update"] for t in (60, 120, 240)}


def test_a_rank_that_is_behind_is_named_and_one_that_works_beside_the_others_is_not():
    ahead = [(t, [word(3, "optimise", t), word(3, "score", t)]) for t in range(0, 100, 10)]
    assert told(ahead) == {
        60: ["rank 1 (node) keeps the others waiting: 60 s in rollout 3, scoring"]
    }
    assert told([(t, [word(3, "score", t)] * 2) for t in range(0, 300, 10)]) == {}


def test_ranks_that_wait_in_a_phase_are_ahead_of_those_that_work_in_it():
    waits = [(t, [word(3, "score", t, waits=True), word(3, "score", t)]) for t in range(0, 100, 10)]
    assert list(told(waits)) == [60]


def test_the_first_rank_that_is_alive_speaks_for_all():
    silent_first = [
        (t, [word(1, "score", 1), *[word(1, "score", t)] * 2]) for t in range(0, 90, 10)
    ]
    assert told(silent_first, rank=2) == {}
    assert list(told(silent_first, rank=1)) == [60]


def test_a_rank_that_comes_back_is_forgiven():
    words = [(0, 1), (60, 1), (70, 2), (130, 2), (140, 3), (190, 3)]
    said = told([(t, [word(1, "score", t + 1), word(1, "score", count)]) for t, count in words])
    assert list(said) == [60, 130]


def test_where_a_batch_is_no_rollout_the_line_says_batch():
    watch = RankWatch()
    shell = SimpleNamespace(fit_loop=SimpleNamespace(total_batch_idx=6))
    watch.on_train_batch_start(shell, SimpleNamespace(automatic_optimization=True), None, 6)
    text = json.dumps(watch._place | {"unit": watch._unit, "count": 1, "host": "node"})
    assert str(Word(text, 0, 0)) == "batch 7, update"


def test_only_a_run_of_several_ranks_is_watched_and_once():
    def callbacks(ranks, *there):
        return watch_for(SimpleNamespace(world_size=ranks, callbacks=list(there)))

    assert callbacks(1) == [] == callbacks(2, RankWatch())
    assert isinstance(callbacks(2)[0], RankWatch)


def watched(rank):
    """Rank 1 stays in scoring; rank 0 waits for it, and says so."""
    dist.init_process_group("gloo")
    watch = RankWatch(seconds=0.4)
    trainer = SimpleNamespace(strategy=SimpleNamespace(barrier=lambda name: dist.barrier()))
    trainer.callbacks = [watch]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        watch.setup(trainer, None, "fit")
        watch.on_phase("score", 6)
        timed = []

        @contextlib.contextmanager
        def stopwatch(name, device):
            timed.append(name)
            yield

        clock = SimpleNamespace(timed=stopwatch, device=None)
        meet = together(trainer, clock, lambda value: dist.barrier() or value)
        if rank == 1:
            threading.Event().wait(1.2)
        meet(rank)
        seconds = gradient_seconds(trainer, rank)
        watch.teardown(trainer, None, "fit")
        dist.barrier()
    return said.getvalue(), timed, seconds


def gradient_seconds(trainer, rank):
    """What a rank waits for the gradients of another one that computes 0.5 s longer."""
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
    if rank == 1:
        model.module.bias.register_hook(lambda grad: threading.Event().wait(0.5) or None)
    clock = Clock(torch.device("cpu"))
    loss = model(torch.ones(3, 2)).sum()
    with gradient_wait(trainer, clock, loss):
        loss.backward()
    return clock.seconds["waiting_gradient"]


@pytest.mark.slow
def test_real_ranks_say_who_is_waited_for():
    (first, timed, waited), (second, _, computed) = on_ranks(watched)
    assert "rank 1 (" in first and "keeps the others waiting: " in first
    assert first.splitlines()[0].endswith("s in rollout 7, scoring")
    assert second == ""
    assert timed == ["waiting_score"]
    assert computed < waited / 2  # nobody waits for the rank that computes longest
