"""The demo, whole: what a newcomer sees, and that the policy learns what it is said to learn."""

import os
import re
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo_lightning.metrics import CURVES
from support.repository import ROOT

pytestmark = pytest.mark.slow
FIGURES = re.compile(r"greedy (\S+) -> (\S+), sampled (\S+) -> (\S+) ")


def train_py(*arguments):
    command = [sys.executable, "train.py", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "run"
    config = ["--config", "configs/arithmetic.yaml", "--trainer.default_root_dir", root]
    return root, train_py("fit", *config)


@pytest.fixture(scope="module")
def scalars(demo):
    events = EventAccumulator(str(demo[0]), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def test_the_demo_learns(demo):
    _, process = demo
    assert process.returncode == 0, process.stderr
    greedy_before, greedy, sampled_before, sampled = map(
        float, FIGURES.search(process.stdout).groups()
    )
    assert sampled_before <= 0.45 and greedy_before <= 0.45
    assert sampled >= 0.85 and greedy >= 0.95


def test_the_demo_prints_no_warning(demo):
    _, process = demo
    for text in (process.stdout, process.stderr):
        assert not re.search("warn|deprecat|error|Tip:", text, re.IGNORECASE), text


def test_the_demo_ends_with_what_came_of_it_and_what_it_wrote(demo):
    starts = ["result", "time", "curves", "samples", "model", "saved", "log", "extend"]
    lines = demo[1].stdout.strip().splitlines()[-len(starts) :]
    assert [line.split()[0] for line in lines] == starts


def test_the_clip_works_and_does_not_choke(scalars):
    values = [point.value for point in scalars["train/clip_fraction_sequences"]]
    assert len(values) == 60
    assert 0.05 <= sum(values) / 60 <= 0.5


def test_all_eight_curves_are_there_once_per_rollout(scalars):
    for name in CURVES:
        assert [point.step for point in scalars[f"train/{name}"]] == list(range(1, 61))
    assert len({point.value for point in scalars["train/kl_coef"]}) > 10  # it adapts


def test_rewards_and_length_rise(scalars):
    for name in ("reward", "avg_response_length"):
        values = [point.value for point in scalars[f"train/{name}"]]
        assert sum(values[-10:]) > 1.5 * sum(values[:10])


def test_validations_stand_at_the_rollouts_they_followed(scalars):
    steps = [point.step for point in scalars["val/accuracy_sampled"]]
    assert steps == [0, 10, 20, 30, 40, 50, 60]


def test_the_export_adds_by_showing_its_working(demo):
    path = demo[0] / "export"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = tokenizer("7+9+4=", return_tensors="pt")["input_ids"]
    output = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    assert text == "7+9=16, 16+4=20, answer: 20"


def test_validate_gives_the_figures_of_the_last_validation(demo):
    root, process = demo
    options = ["--trainer.default_root_dir", root, "--ckpt_path", "last"]
    again = train_py("validate", "--config", "configs/arithmetic.yaml", *options)
    assert again.returncode == 0, again.stderr
    accuracy = float(re.search(r"val/accuracy_sampled\W+([\d.]+)", again.stdout)[1])
    assert accuracy == pytest.approx(float(FIGURES.search(process.stdout)[4]), abs=1e-3)


@pytest.mark.recipes
def test_the_demo_of_several_turns_learns_without_a_warning(tmp_path):
    """Three seeds of it stand in docs/turns.md; of one, that a right answer is remembered."""
    process = train_py("fit", "--config", "configs/turns.yaml", "--run_folder", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    greedy_before, greedy, sampled_before, sampled = map(
        float, FIGURES.search(process.stdout).groups()
    )
    assert max(greedy_before, sampled_before) < 0.1
    assert min(greedy, sampled) > 0.5
    for text in (process.stdout, process.stderr):
        assert not re.search("warn|deprecat|error|Tip:", text, re.IGNORECASE), text
