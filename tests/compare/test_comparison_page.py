"""What docs/algorithms.md says was measured is what docs/comparison.csv holds."""

import csv
import re
from collections import defaultdict

import pytest

from gspo_lightning.compare.report import with_error
from support.repository import ROOT

PAGE = (ROOT / "docs" / "algorithms.md").read_text()
NAMES = {  # of a table for people
    "GSPO (published clip range)": "gspo",
    "GRPO": "grpo",
    "DAPO": "dapo",
    "Dr. GRPO": "dr_grpo",
    "CISPO": "cispo",
    "PPO with a critic": "ppo",
}


@pytest.fixture(scope="module")
def held_out():
    """Of each section, algorithm and number of updates: the last accuracies of all seeds."""
    last = {}
    with (ROOT / "docs" / "comparison.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            if line["accuracy_sampled"]:
                run = line["section"], line["algorithm"], int(line["updates"]), line["seed"]
                last[run] = float(line["accuracy_greedy"]), float(line["accuracy_sampled"])
    found = defaultdict(list)
    for (*place, _), accuracies in last.items():
        found[tuple(place)].append(accuracies)
    return {place: tuple(zip(*values, strict=True)) for place, values in found.items()}


def rows(heading):
    """Cells of the table whose head begins so."""
    lines = PAGE.partition(heading)[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_each_row_of_choices_has_its_figure(held_out):
    seen = set()
    for first, *_, here in rows("| config |"):
        for name in re.findall(r"`(\w+)`", first):
            seen.add(name)
            section = "algorithms" if ("algorithms", name, 4) in held_out else "rows"
            if (section, name, 4) in held_out:
                assert here == with_error(held_out[section, name, 4][1]), name
            else:
                assert here in ("as `gspo`", "–"), name
    assert seen == {path.stem for path in (ROOT / "configs" / "algorithm").glob("*.yaml")}


def test_the_table_side_by_side_is_that_of_the_csv(held_out):
    found = rows("| | greedy accuracy |")
    assert len(found) == len(NAMES)
    for name, greedy, sampled, _ in found:
        figures = held_out["algorithms", NAMES[name], 4]
        assert [greedy, sampled] == [with_error(values) for values in figures], name
