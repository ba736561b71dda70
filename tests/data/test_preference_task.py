"""The shipped pairs and the tiny reward model, and the demo that trains against it."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gspo_lightning.frozen.models import RewardModel
from support.repository import ROOT

TASK = ROOT / "data" / "preference"
NAMES = ("train", "heldout")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def points(prompt, completion):
    """The stated taste, by another way than the generator's."""
    answer = re.search(r"answer: (\d+)$", completion)
    right = answer is not None and int(answer[1]) == eval(prompt.removesuffix("="))
    return 1.0 * right + 0.5 * (completion.count("=") > 0)


def measure(folder):
    """Share of held-out pairs put right, by what tells the two completions apart."""
    model = RewardModel(str(folder), device="cpu", separator="", batch_size=64)
    model.load(torch.device("cpu"))
    pairs = read(TASK / "heldout.jsonl")
    chosen = torch.tensor(model(pairs, [pair["chosen"] for pair in pairs]))
    rejected = torch.tensor(model(pairs, [pair["rejected"] for pair in pairs]))
    style = torch.tensor([("=" in p["chosen"]) != ("=" in p["rejected"]) for p in pairs])
    right = (chosen > rejected).float()
    return {
        "all": right.mean().item(),
        "working against none": right[style].mean().item(),
        "same style": right[~style].mean().item(),
    }


def assert_in_band(folder):
    """It knows the style and, as its README says, not the sums."""
    found = measure(folder)
    assert 0.8 <= found["all"] <= 0.92, found
    assert found["working against none"] >= 0.98, found
    assert 0.35 <= found["same style"] <= 0.65, found


def train_py(*arguments):
    command = [sys.executable, "train.py", "fit", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make_preference", TASK / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_the_chosen_completion_has_more_points(name):
    for pair in read(TASK / f"{name}.jsonl"):
        better, worse = (points(pair["prompt"], pair[side]) for side in ("chosen", "rejected"))
        assert better > worse, pair


@pytest.mark.parametrize("name", NAMES)
def test_prompts_keep_to_the_split_of_the_task(name):
    allowed = {row["prompt"] for row in read(ROOT / "data" / "arithmetic" / f"{name}.jsonl")}
    assert {pair["prompt"] for pair in read(TASK / f"{name}.jsonl")} <= allowed


def test_pairs_are_those_of_the_readme():
    counts = [len(read(TASK / f"{name}.jsonl")) for name in NAMES]
    assert counts == [4305, 739]
    assert "4305 and 739 pairs" in (TASK / "README.md").read_text()


def test_make_writes_the_shipped_pairs(make, tmp_path):
    # rounding on another machine may change a sample here and there
    make.make(tmp_path, {"train": 50})
    made = read(tmp_path / "train.jsonl")
    shipped = read(TASK / "train.jsonl")[: len(made)]
    assert len(made) > 100
    assert sum(a == b for a, b in zip(made, shipped, strict=True)) >= 0.8 * len(made)


def test_make_is_deterministic(make, tmp_path):
    texts = []
    for _ in range(2):
        make.make(tmp_path, {"train": 5, "heldout": 5})
        texts.append([(tmp_path / f"{name}.jsonl").read_bytes() for name in NAMES])
    assert texts[0] == texts[1]


def test_files_are_small():
    assert sum(path.stat().st_size for path in TASK.glob("*.jsonl")) < 1_000_000  # bytes
    assert sum(path.stat().st_size for path in (TASK / "reward_model").iterdir()) < 1_000_000


def test_the_shipped_reward_model_is_what_its_readme_says():
    assert_in_band(TASK / "reward_model")


def test_the_demo_scores_what_the_reward_model_was_trained_on():
    pairs = yaml.safe_load((ROOT / "configs/reward_model.yaml").read_text())["data"]["init_args"]
    demo = yaml.safe_load((ROOT / "configs/preference.yaml").read_text())["model"]["init_args"]
    assert demo["rewards"]["preference"]["fn"]["init_args"]["separator"] == pairs["separator"]
    assert demo["rewards"]["correct"]["weight"] == 0  # looked at, not trained on


@pytest.mark.recipes
def test_the_recipe_recreates_such_a_reward_model(tmp_path):
    process = train_py(
        "--config", "configs/reward_model.yaml", "--trainer.default_root_dir", tmp_path
    )
    assert process.returncode == 0, process.stderr
    assert not re.search("warn|deprecat|error|Tip:", process.stdout + process.stderr, re.IGNORECASE)
    assert_in_band(tmp_path / "export")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("preference") / "run"
    process = train_py("--config", "configs/preference.yaml", "--trainer.default_root_dir", root)
    assert process.returncode == 0, process.stderr
    events = EventAccumulator(str(root), size_guidance={"scalars": 0})
    events.Reload()
    scalars = {tag: [p.value for p in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    config = yaml.safe_load((ROOT / "configs/preference.yaml").read_text())
    rule = config["trainer"]["callbacks"][0]["init_args"]["rule"]
    return scalars, rule["init_args"]["target"], process.stdout + process.stderr


def mean(values):
    return sum(values) / len(values)


@pytest.mark.recipes
def test_the_kl_settles_at_its_target(demo):
    scalars, target, _ = demo
    kl = scalars["train/kl_divergence"]
    assert len(kl) == 150
    assert target / 1.5 <= mean(kl[-10:]) <= target * 1.5
    assert max(kl) <= 3 * target  # no overshoot on the way there


@pytest.mark.recipes
def test_the_coefficient_is_what_holds_the_kl(demo):
    coefs = demo[0]["train/kl_coef"]
    assert len(set(coefs)) > 50 and min(coefs) > 0.1 and max(coefs) < 5


@pytest.mark.recipes
def test_the_reward_ends_clearly_above_its_start(demo):
    scalars, _, _ = demo
    score = scalars["reward/preference"]
    assert mean(score[-10:]) - mean(score[:5]) >= 0.8  # of 3.7 between no working and working


@pytest.mark.recipes
def test_accuracy_follows_although_nothing_rewards_it(demo):
    scalars, _, output = demo
    accuracy = scalars["val/accuracy_sampled"]
    assert accuracy[0] <= 0.45 and accuracy[-1] >= 0.6
    assert not re.search("warn|deprecat|error|Tip:", output, re.IGNORECASE), output
