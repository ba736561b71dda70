"""The tables from other trainers' arguments: none of TRL's is forgotten, each of ours exists."""

import ast
import importlib.util
import inspect
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

import gspo_lightning
from gspo_lightning import (
    CriticConfig,
    Evaluation,
    GroupSampler,
    GSPOModule,
    LoRAConfig,
    Mismatch,
    Objective,
    OptimizerConfig,
    PolicyConfig,
    PromptData,
    ReferencePolicy,
    RewardTerm,
)
from support.repository import ROOT

PAGE = (ROOT / "docs" / "coming_from.md").read_text()
ROOTS = {"model": GSPOModule, "data": PromptData, "trainer": Trainer}
INSIDE = {
    "policy": PolicyConfig,
    "lora": LoRAConfig,
    "sampler": GroupSampler,
    "objective": Objective,
    "optimizer": OptimizerConfig,
    "evaluation": Evaluation,
    "critic": CriticConfig,
    "mismatch": Mismatch,
    "reference": ReferencePolicy,
    "NAME": RewardTerm,
}
# Arguments that change what is written, shown or how fast it goes, and not what is trained.
SHOWN = re.compile(
    r"log_|logging_|report_to|run_name|project|trackio|disable_tqdm|save_|hub_|push_to_hub|eval_"
    r"|num_completions_to_print|dataloader_(?!drop)|include_|debug|skip_memory|do_|local_rank"
    r"|enable_jit|restore_callback|load_best|metric_for|greater_is|prediction_loss|batch_eval"
    r"|bf16_full|fp16_full|torch_empty|label_names|length_column"
)


def tables():
    """Rows of the three tables: what stands in the first column, and in the second."""
    parts = PAGE.split("\n## ")[2:]
    return [
        [tuple(re.split(r"\s*\|\s*", line)[1:3]) for line in re.findall(r"\|.*", part)[2:]]
        for part in parts
    ]


def quoted(cell):
    return re.findall(r"`([^`]+)`", cell)


def exists(key):
    """Whether a key of ours leads somewhere."""
    root, *rest = key.split(":")[0].split(".")
    owner = ROOTS.get(root) or getattr(gspo_lightning, root, None)
    if owner is None:
        return root in ("seed_everything", "ckpt_path") and not rest
    for name in rest:
        known = inspect.signature(owner).parameters
        if name == "NAME":
            owner = RewardTerm
            continue
        if name not in known:
            return False
        owner = INSIDE.get(name, owner)
    return True


@pytest.mark.parametrize("rows", tables(), ids=["TRL", "verl", "OpenRLHF"])
def test_each_key_of_ours_exists(rows):
    assert len(rows) > 30
    for theirs, ours in rows:
        keys = [
            key for key in quoted(ours) if "." in key or key in ("seed_everything", "ckpt_path")
        ]
        assert quoted(theirs) and (keys or ours == "-"), (theirs, ours)
        assert [key for key in keys if not exists(key)] == []


def test_a_key_that_does_not_exist_is_seen():
    assert exists("model.objective.ratio: token") and exists("model.rewards.NAME.weight")
    assert not exists("model.sampler.group_sizes") and not exists("model.rewards.NAME.wight")
    assert not exists("AdaptiveKL.target") and not exists("nothing.at_all")
    assert all(is_dataclass(kind) and fields(kind) for kind in (Objective, OptimizerConfig))


def declared(package, file, *classes):
    """Fields of dataclasses, read from their source: to import them would take seconds."""
    (folder,) = importlib.util.find_spec(package).submodule_search_locations
    tree = ast.parse(Path(folder, file).read_text())
    found = [node for node in tree.body if getattr(node, "name", None) in classes]
    assert found
    return [
        line.target.id for node in found for line in node.body if isinstance(line, ast.AnnAssign)
    ]


def test_no_argument_of_trl_that_changes_training_is_forgotten():
    told = [name for theirs, _ in tables()[0] for name in quoted(theirs)]
    assert len(told) == len(set(told)) > 110
    if importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed: its arguments cannot be listed")
    names = declared("transformers", "training_args.py", "TrainingArguments")
    names += declared("trl", "trainer/grpo_config.py", "GRPOConfig")
    names = {name for name in names if not name.startswith("_")}
    assert {name for name in names if not SHOWN.match(name)} - {*told} == set()
    assert {*told} - names == set()
