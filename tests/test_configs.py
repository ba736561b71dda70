"""Every config, and the one in the README, is parsed and instantiated as train.py does it."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import write_prompts

from gspo_lightning.cli import quiet
from gspo_lightning.module import GSPOModule
from gspo_lightning.reward_model import RewardModelModule
from gspo_lightning.sft import SFTModule
from train import GSPOCLI, Watch

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("**/*.yaml"))


class Dry(GSPOCLI):
    """Instantiates everything and runs nothing."""

    def _run_subcommand(self, subcommand):
        pass


def instantiate(*arguments):
    with quiet():
        return Dry(["fit", *map(str, arguments)], Watch())


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_instantiated(name, tmp_path):
    cli = instantiate("--config", ROOT / "configs" / name, "--trainer.default_root_dir", tmp_path)
    assert isinstance(cli.model, (GSPOModule, RewardModelModule, SFTModule))


@pytest.mark.parametrize("name", CONFIGS)
def test_config_begins_with_what_it_is(name):
    assert (ROOT / "configs" / name).read_text().startswith("# ")


def test_the_demo_is_what_the_readme_says():
    cli = instantiate("--config", "configs/arithmetic.yaml")
    assert cli.model.objective.ratio == "sequence"
    assert cli.model.objective.aggregation == "sequence_mean"
    assert cli.model.sampler.temperature == 1.0
    longest = max(
        len(cli.model.tokenizer(row)["input_ids"])
        for line in (ROOT / "data/arithmetic/demos.jsonl").read_text().splitlines()
        for row in [yaml.safe_load(line)["completion"]]
    )
    assert longest + 1 <= cli.model.sampler.max_new_tokens  # else right answers are cut off


def readme_configs():
    text = (ROOT / "README.md").read_text()
    return [
        block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "model:" in block
    ]


def test_the_configs_of_the_readme_are_instantiated(tmp_path, model_dir):
    blocks = readme_configs()
    assert blocks
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "my_rewards.py").write_text(
        "def polite(rows, completions):\n    return [float('please' in c) for c in completions]\n"
    )
    sys.path.insert(0, str(tmp_path))
    for i, block in enumerate(blocks):
        config = tmp_path / f"readme{i}.yaml"
        config.write_text(block)
        cli = instantiate(
            "--config", config,
            "--model.init_args.policy.path", model_dir,
            "--data.init_args.path", prompts,
            "--data.init_args.val_path", prompts,
            "--trainer.default_root_dir", tmp_path / "run",
        )  # fmt: skip
        assert isinstance(cli.model, GSPOModule)
    sys.path.remove(str(tmp_path))
