"""The embedded task: what its files hold, and what the warm-started policy can do."""

import hashlib
import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo_lightning.data.prompts import collate_prompts
from gspo_lightning.policy.policy import PolicyConfig, load_policy
from gspo_lightning.rewards.terms import MarkedAnswer
from gspo_lightning.sampling import GroupSampler
from support.repository import ROOT

TASK = ROOT / "data" / "arithmetic"
POLICY = TASK / "policy"
PROMPT = re.compile(r"[1-9]([+-][1-9]){1,4}=")


def read(name):
    return [json.loads(line) for line in (TASK / name).read_text().splitlines()]


def working(prompt):
    """The careful completion of a prompt, by another way than the generator's."""
    total, *terms = [int(term) for term in re.findall(r"[+-]?\d", prompt)]
    steps = []
    for term in terms:
        steps.append(f"{total}{term:+d}={total + term}")
        total += term
    return ", ".join([*steps, f"answer: {total}"])


def measure(path):
    """Accuracies of a policy on the held-out prompts, greedy and sampled at temperature 1."""
    policy, rows = load_policy(PolicyConfig(str(path))), read("heldout.jsonl")
    prompts = collate_prompts([(policy.tokenizer(row["prompt"]).input_ids, row) for row in rows])
    greedy = GroupSampler(1, 40, temperature=0.0).sample(policy, prompts, seed=0)
    sampled = GroupSampler(8, 40).sample(policy, prompts, seed=0)
    correct = torch.tensor(MarkedAnswer()(sampled.rows, sampled.texts))
    careful = torch.tensor(["=" in text for text in sampled.texts])
    return {
        "greedy": torch.tensor(MarkedAnswer()(greedy.rows, greedy.texts)).mean().item(),
        "sampled": correct.mean().item(),
        "careful_share": careful.float().mean().item(),
        "careful": correct[careful].mean().item(),
        "quick": correct[~careful].mean().item(),
    }


def assert_in_band(path):
    """Weak as it is, and strong where it writes the working: what the demo starts from."""
    found = measure(path)
    assert 0.25 <= found["sampled"] <= 0.45, found
    assert found["greedy"] <= 0.55, found
    assert 0.2 <= found["careful_share"] <= 0.4, found
    assert found["careful"] >= 0.9, found
    assert found["quick"] <= 0.3, found


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make", TASK / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_make_writes_the_shipped_bytes(make, tmp_path):
    make.make(tmp_path)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3 + 4 + 4
    for file in files:
        assert (tmp_path / file).read_bytes() == (TASK / file).read_bytes(), file


@pytest.mark.parametrize(
    ("name", "heldout"), [("train.jsonl", False), ("demos.jsonl", False), ("heldout.jsonl", True)]
)
def test_the_split_follows_from_the_prompt(name, heldout):
    for row in read(name):
        digest = hashlib.sha256(row["prompt"].encode()).digest()
        assert (int.from_bytes(digest[:8], "big") % 10 == 0) == heldout, row


def test_no_prompt_comes_twice():
    prompts = [row["prompt"] for name in ("train.jsonl", "heldout.jsonl") for row in read(name)]
    assert len(set(prompts)) == len(prompts) == 4096 + 256


@pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl"])
def test_answers_are_right(name):
    for row in read(name):
        assert PROMPT.fullmatch(row["prompt"])
        assert row["answer"] == str(eval(row["prompt"].removesuffix("=")))


def test_careful_demonstrations_show_right_working():
    careful = [row for row in read("demos.jsonl") if "=" in row["completion"]]
    assert all(row["completion"] == working(row["prompt"]) for row in careful)


def test_demonstrations_go_from_skill_to_mixture():
    careful = torch.tensor(["=" in row["completion"] for row in read("demos.jsonl")]).float()
    first, last = careful[:8400], careful[8400:]
    assert first.mean().item() == pytest.approx(0.9, abs=0.02)
    assert last.mean().item() == pytest.approx(0.3, abs=0.03)


def test_quick_demonstrations_are_mostly_wrong():
    quick = [row for row in read("demos.jsonl") if "=" not in row["completion"]]
    right = [row["completion"] == working(row["prompt"]).rpartition(", ")[2] for row in quick]
    assert sum(right) / len(right) == pytest.approx(0.4, abs=0.03)


def test_the_demo_does_not_truncate_a_right_completion():
    config = yaml.safe_load((ROOT / "configs" / "arithmetic.yaml").read_text())
    limit = config["model"]["init_args"]["sampler"]["init_args"]["max_new_tokens"]
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    prompts = [row["prompt"] for name in ("train", "heldout") for row in read(f"{name}.jsonl")]
    texts = [working(prompt) for prompt in prompts]
    texts += [row["completion"] for row in read("demos.jsonl")]
    longest = max(len(ids) for ids in tokenizer(texts).input_ids) + 1  # and the end of sequence
    assert longest <= limit


@pytest.mark.parametrize("folder", ["base", "policy", "moe_policy"])
def test_the_tokenizer_gives_every_text_back(folder):
    tokenizer = AutoTokenizer.from_pretrained(TASK / folder)
    texts = [row["prompt"] + row["completion"] for row in read("demos.jsonl")[::7]]
    ids = tokenizer(texts).input_ids
    assert tokenizer.batch_decode(ids) == texts
    assert tokenizer.unk_token_id not in {i for row in ids for i in row}
    assert tokenizer("7+9=16, answer: 16").input_ids == [10, 13, 12, 15, 4, 9, 16, 17, 4, 9]


def test_the_policy_loads_completely_and_in_float32():
    model, report = AutoModelForCausalLM.from_pretrained(POLICY, output_loading_info=True)
    assert not any(report.values()), report
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 0
    assert len(tokenizer) == model.config.vocab_size


@pytest.mark.parametrize(("base", "policy"), [("base", "policy"), ("moe_base", "moe_policy")])
def test_the_policy_has_the_shape_of_the_base(base, policy):
    base = json.loads((TASK / base / "config.json").read_text())
    policy = json.loads((TASK / policy / "config.json").read_text())
    assert {key: policy[key] for key in base} == base


def test_the_policy_is_small():
    assert sum(path.stat().st_size for path in POLICY.iterdir()) < 600_000  # bytes


@pytest.mark.parametrize("policy", ["policy", "moe_policy"])
def test_the_policy_is_weak_but_knows_the_working(policy):
    assert_in_band(TASK / policy)


@pytest.mark.recipes
def test_the_recipe_recreates_such_a_policy(tmp_path):
    arguments = ["--config", "configs/sft_arithmetic.yaml", "--trainer.default_root_dir", tmp_path]
    command = [sys.executable, "train.py", "fit", *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert_in_band(tmp_path / "export")
