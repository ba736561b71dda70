"""The script for a GPU: its table, and what it does with a figure that cannot be made."""

import importlib.util
import json
import sys

import pytest

from support.repository import ROOT


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks/gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]
    sys.path[:] = path


def names(text):
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [row.split(" | ")[0].removeprefix("| ") for row in rows]


def test_the_page_has_each_figure(script, tmp_path):
    page = (ROOT / "docs" / "performance.md").read_text()
    page = page[page.index("### One script for a card") :]
    wanted = names(script.table(tmp_path / "none"))
    assert [name for name in names(page) if name in wanted] == wanted


def test_the_newest_figure_counts_and_what_fails_is_said(script, tmp_path, monkeypatch, capsys):
    def part(check):
        yield "tests passed", 3
        yield "tests passed", 4
        raise RuntimeError("no kernel")

    file = tmp_path / "figures.jsonl"
    monkeypatch.setitem(script.PARTS, "tests", part)
    assert not script.measure("tests", script.Check(True, tmp_path), file)
    assert "tests: failed: no kernel" in capsys.readouterr().out
    assert len(list(map(json.loads, file.read_text().splitlines()))) == 2
    table = script.table(file)
    assert "| tests passed | 4 |" in table and "| tests failed | not measured |" in table
