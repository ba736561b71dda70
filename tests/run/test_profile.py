"""``--profile``: a trace of one rollout that shows its phases and changes nothing."""

import gzip
import json
import threading
from pathlib import Path

import pytest
import torch

from gspo_lightning import old_logprobs
from gspo_lightning.frozen.models import FrozenModels, ReferencePolicy
from gspo_lightning.run.tracing import RolloutProfile
from gspo_lightning.update import Updater
from support.command import enter, refused, run
from support.tiny_run import run as fit
from support.tiny_run import write_prompts

PHASES = ("rollout", "score", "reward", "old_logprobs", "reference", "optimise")


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    enter(tmp_path, monkeypatch)


def traced(folder):
    """The ranges of the phases in the one trace of a run, and the number of its rollout."""
    (path,) = Path(folder, "profile").glob("*.pt.trace.json.gz")
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    ranges = {}
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"] in PHASES:
            ranges.setdefault(event["name"], []).append(event)
    return ranges, path.name


def span(event):
    return event["ts"], event["ts"] + event["dur"]


def train(root, model_dir, profile=None, num_rollouts=3):
    root.mkdir()
    callbacks = [] if profile is None else [RolloutProfile(profile)]
    reference = ReferencePolicy(device="cpu")
    options = {"kl_coef": 0.1, "reference": reference, "callbacks": callbacks}
    return fit(root, model_dir, num_rollouts, **options)


def test_a_trace_holds_each_phase_once_and_in_order(tmp_path, model_dir):
    train(tmp_path / "run", model_dir, profile=2)
    ranges, name = traced(tmp_path / "run")
    assert name.startswith("rollout=000002.rank0.")
    assert {phase: len(ranges[phase]) for phase in PHASES} == dict.fromkeys(PHASES, 1)
    rollout, score, optimise = (span(ranges[p][0]) for p in ("rollout", "score", "optimise"))
    assert rollout[1] <= score[0] and score[1] <= optimise[0]
    for part in ("reward", "old_logprobs", "reference"):  # parts of the score phase
        start, end = span(ranges[part][0])
        assert score[0] <= start and end <= score[1]


def test_the_number_chooses_the_rollout(tmp_path, model_dir):
    train(tmp_path / "run", model_dir, profile=3)
    assert traced(tmp_path / "run")[1].startswith("rollout=000003.")


def test_a_trace_shows_the_reference_at_work_beside_the_policy(monkeypatch, tmp_path, model_dir):
    """Each of the two passes waits, inside its range, until the other has begun."""
    barrier, met = threading.Barrier(2), set()

    def wait(name, cls, method):
        plain = getattr(cls, method)

        def pass_(*args, **kwargs):
            if name not in met:
                met.add(name)
                barrier.wait(30)
            return plain(*args, **kwargs)

        monkeypatch.setattr(cls, method, pass_)

    wait("reference", ReferencePolicy, "logprobs")
    wait("old", old_logprobs, "samples_logprobs")
    # what a device of its own comes to on a machine that has only one
    monkeypatch.setattr(FrozenModels, "apart", lambda self, part: part == "model.reference")
    train(tmp_path / "run", model_dir, profile=1, num_rollouts=1)
    ranges, _ = traced(tmp_path / "run")
    (old,), (reference,) = ranges["old_logprobs"], ranges["reference"]
    assert old["tid"] != reference["tid"]
    assert max(span(old)[0], span(reference)[0]) < min(span(old)[1], span(reference)[1])
    assert ranges["optimise"][0]["tid"] == old["tid"]


def test_on_one_device_the_reference_waits_for_its_turn(tmp_path, model_dir):
    train(tmp_path / "run", model_dir, profile=1, num_rollouts=1)
    ranges, _ = traced(tmp_path / "run")
    (old,), (reference,) = ranges["old_logprobs"], ranges["reference"]
    assert old["tid"] == reference["tid"]
    assert span(reference)[1] <= span(old)[0]


def test_a_traced_run_ends_with_the_same_bits(tmp_path, model_dir):
    plain = train(tmp_path / "plain", model_dir, num_rollouts=2)
    beside = train(tmp_path / "traced", model_dir, profile=1, num_rollouts=2)
    for a, b in zip(plain.parameters(), beside.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_that_is_too_short_says_so(capfd, tmp_path, model_dir):
    train(tmp_path / "run", model_dir, profile=2, num_rollouts=1)
    assert "no trace, the run ended before its rollout 2" in capfd.readouterr().err
    assert not (tmp_path / "run" / "profile").exists()


def test_an_error_stops_the_profiler(monkeypatch, tmp_path, model_dir):
    def fail(*args, **kwargs):
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Updater, "update", fail)
        train(tmp_path / "broken", model_dir, profile=1)
    train(tmp_path / "next", model_dir, profile=1, num_rollouts=1)  # a second one would be refused
    assert set(traced(tmp_path / "next")[0]) == set(PHASES)


def test_profile_is_an_option_of_fit(capsys, model_dir):
    write_prompts(Path("prompts.jsonl"))
    Path("own.yaml").write_text("""
trainer: {accelerator: cpu}
model:
  init_args:
    rewards: {length: {fn: support.reward_functions.length}}
    sampler: {init_args: {max_new_tokens: 4}}
""")
    command = f"fit --config real.yaml --config own.yaml --model.policy.path {model_dir}"
    code, _, err = run(capsys, command + " --data.num_rollouts 2 --profile")
    assert code == 0, err
    assert "profile: rollout 2 is in runs/default/profile/" in err
    assert set(traced("runs/default")[0]) == set(PHASES) - {"reference"}
    # of that command alone: a run that is continued with its own config is not traced again
    assert "\nprofile: null\n" in Path("runs/default/config.yaml").read_text()


def test_profile_is_refused_where_nothing_is_trained(capsys):
    line = refused(capsys, "validate --config real.yaml --profile")
    assert line == "profile: a trace is of a rollout in training; validate has none"


def test_profile_refuses_a_rollout_that_is_none(capsys):
    line = refused(capsys, "fit --config dummy.yaml --profile 0")
    assert line == "profile must be a rollout, 1 or later, got 0"
