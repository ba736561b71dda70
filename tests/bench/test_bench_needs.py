"""The table of what a policy takes, and the one in the documentation."""

import re

import pytest
from transformers import CONFIG_MAPPING

from gspo_lightning.bench.__main__ import main, parse
from gspo_lightning.bench.needs import rows
from gspo_lightning.policy.policy import PolicyConfig
from gspo_lightning.run.memory import without_weights
from support.large_shapes import QWEN3_8B, QWEN3_32B
from support.repository import ROOT


@pytest.mark.parametrize(("name", "sizes"), [("8 B", QWEN3_8B), ("32 B", QWEN3_32B)])
def test_the_table_of_the_page_is_that_of_the_command(tmp_path, name, sizes):
    folder = str(tmp_path)
    CONFIG_MAPPING["qwen3"](**sizes).save_pretrained(folder)
    model = without_weights(PolicyConfig(folder, gradient_checkpointing=True))
    assert all(p.is_meta for p in model.parameters())
    found = rows(model, parse(["needs", "--policy", folder]))
    made = {count: cells for count, *cells in found[1:]}
    page = (ROOT / "docs" / "scale.md").read_text()
    written = re.findall(rf"^\| {name}, (\d+) \| (.*) \|$", page, re.M)
    assert len(written) >= 3
    for count, cells in written:
        assert cells.split(" | ") == made[count]


def test_fewer_tokens_adapters_and_parts_take_less(model_dir, capsys):
    def cells(*options):
        assert main(["needs", "--policy", str(model_dir), "--ranks", "2", *options]) == 0
        return capsys.readouterr().out

    assert "| ranks |" in cells() and "|     2 |" in cells("--lora", "2", "--strategy", "ddp")


def test_a_policy_that_is_nowhere_is_one_line(tmp_path, capsys):
    assert main(["needs", "--policy", str(tmp_path / "none")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: policy.path: ")
