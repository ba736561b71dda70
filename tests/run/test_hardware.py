"""Each overlay of a machine trains adapters, with a reward model and a reference."""

import gc
import json
import re

import pytest
import torch
import yaml
from lightning.pytorch import Callback

import train
from gspo_lightning.data.prompts import PromptData
from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.policy.policy import PolicyConfig
from gspo_lightning.run.plan import plan_lines
from gspo_lightning.sampling import GroupSampler
from support.repository import ROOT
from support.run_folder import scalars
from support.tiny_run import make_module, make_trainer, write_prompts


def cards(number):
    """Marks of a test that needs so many cards."""
    there = torch.cuda.device_count()
    reason = f"needs {number} CUDA device{'s' if number > 1 else ''}, there are {there}"
    return [pytest.mark.gpu, pytest.mark.skipif(there < number, reason=reason)]


MACHINES = [
    pytest.param("cpu", [], "cpu", id="cpu"),
    pytest.param("one_gpu", [], "cuda:0", id="one_gpu", marks=cards(1)),
    pytest.param("two_gpu", [], "cuda:1", id="two_gpu", marks=cards(2)),
    pytest.param(
        "one_gpu", ["--model.frozen_device", "cpu"], "cpu", id="frozen_on_cpu", marks=cards(1)
    ),
]


@pytest.mark.parametrize(("hardware", "options", "place"), MACHINES)
def test_adapters_a_reward_model_and_a_reference_train_under_the_overlay(
    tmp_path, monkeypatch, capsys, model_dir, hardware, options, place
):
    monkeypatch.chdir(ROOT)
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    overlay = {
        "trainer": {"callbacks+": [{"class_path": "gspo_lightning.AdaptiveKL"}]},
        "model": {
            "init_args": {
                "policy": {"path": str(model_dir), "lora": {"rank": 2}},
                "sampler": {"init_args": {"group_size": 4, "max_new_tokens": 6}},
                "rewards": {
                    "taste": {
                        "fn": {
                            "class_path": "gspo_lightning.RewardModel",
                            "init_args": {"path": "data/preference/reward_model"},
                        }
                    }
                },
                # not the policy with its adapters off, which needs no weights of its own
                "reference": {"path": str(model_dir)},
                "num_minibatches": 2,
            }
        },
        "data": {
            "init_args": {
                "path": str(prompts),
                "prompts_per_rollout": 2,
                "num_rollouts": 3,
            }
        },
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(overlay))
    configs = ["configs/base.yaml", str(tmp_path / "own.yaml"), f"configs/hardware/{hardware}.yaml"]
    command = ["fit", *(part for file in configs for part in ("--config", file)), *options]
    assert train.main([*command, "--trainer.default_root_dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert f"reference on {place if hardware != 'one_gpu' or options else 'policy'}" in out
    curves = scalars(tmp_path / "run")
    assert len(curves["reward/taste"]) == len(curves["train/kl_divergence"]) == 3
    assert curves["train/kl_divergence"][-1][1] != 0  # the adapters have moved
    if hardware != "cpu":
        assert curves["memory/optimise_gib"][-1][1] > 0
    assert json.loads((tmp_path / "run/export/config.json").read_text())["model_type"] == "qwen3"


class Look(Callback):
    """Notes the plan, the peaks and what is allocated behind each rollout."""

    def __init__(self):
        self.plan, self.peaks, self.allocated = [], [], []

    def on_train_start(self, trainer, module):
        self.plan = plan_lines(trainer, module)

    def on_train_batch_end(self, trainer, module, outputs, *_):
        figures = {k: v for k, v in outputs["metrics"].items() if k.startswith("memory/")}
        self.peaks.append(max(v for k, v in figures.items() if not k.endswith("_cpu")))
        del outputs
        gc.collect()
        self.allocated.append(torch.cuda.memory_allocated())


def fit_on_a_card(root, model_dir, num_rollouts, **options):
    look = Look()
    module = make_module(model_dir, **options)
    data = PromptData(
        str(write_prompts(root / "p.jsonl")), prompts_per_rollout=8, num_rollouts=num_rollouts
    )
    make_trainer(root, callbacks=[look], accelerator="gpu", devices=1).fit(module, data)
    return look


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, there is none")
def test_nothing_grows_on_a_card_over_fifty_rollouts(tmp_path, model_dir):
    options = {"kl_coef": 0.1, "reference": ReferencePolicy(device="policy")}
    allocated = fit_on_a_card(tmp_path, model_dir, 60, **options).allocated
    # rollouts differ in length, so a rollout kept would show as growth of the least that is held
    assert min(allocated[50:]) - min(allocated[10:20]) < 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, there is none")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_on_a_card_is_within_a_quarter(tmp_path, make_model, tokenizer, dtype):
    sizes = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
    sizes |= {"num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 1536}
    sizes |= {"max_position_embeddings": 256}
    make_model("qwen3", vocab_size=8192, **sizes).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    look = fit_on_a_card(
        tmp_path,
        tmp_path / "model",
        2,
        policy=PolicyConfig(str(tmp_path / "model"), dtype=dtype),
        sampler=GroupSampler(8, 128),
        num_minibatches=4,
        micro_batch_size=16,
    )
    text = next(line for line in look.plan if line.startswith("memory"))
    size, unit = re.search(r"about ([\d.]+) (MiB|GiB) for the policy", text).groups()
    estimate = float(size) / (1024 if unit == "MiB" else 1)
    assert estimate == pytest.approx(max(look.peaks), rel=0.25), text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, there is none")
def test_doctor_examines_on_a_card_and_nothing_else_is_said(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    configs = ["configs/arithmetic.yaml", "configs/hardware/one_gpu.yaml"]
    assert train.main(["doctor", *(f"--config={config}" for config in configs)]) == 0
    output = capsys.readouterr()
    assert "0 error" in output.out
    assert "CUDA_VISIBLE_DEVICES" not in output.err and "Tensor Cores" not in output.err
