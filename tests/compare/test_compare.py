"""Comparisons: what a run is, which differences count, and that the files come out again alike."""

import csv
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from gspo_lightning.compare import __main__ as compare
from gspo_lightning.compare.plan import Arm, arms, merged, overlays, read_plan, settings
from gspo_lightning.compare.report import (
    Run,
    differences,
    statements,
    with_error,
    write_report,
)
from gspo_lightning.compare.significance import holm, t_test

pytestmark = pytest.mark.usefixtures("at_the_root")

PLAN = "configs/compare/arithmetic.yaml"


def record(sampled, greedy=0.5, **options):
    rollouts = [
        {"train/reward": 0.1 * i, "time/rollout": 1.0, "time/score": 0.5, "time/reference": 0.25}
        | {"time/optimise": 2.0, "memory/rollout_gib": 0.4, "completions": 8.0 * (i + 1)}
        for i in range(3)
    ]
    last = {"rollouts": 3, "val/accuracy_sampled": sampled, "val/accuracy_greedy": greedy}
    first = last | {"rollouts": 0}
    base = {"parameters": 10, "trained": 10, "group_size": 4, "kl": False}
    return base | {"rollouts": rollouts, "validations": [first, last]} | options


# --- statistics ----------------------------------------------------------------------------------


# the bound that |t| exceeds with probability 0.05, and 0.01, in any table of Student's t
@pytest.mark.parametrize(
    ("degrees", "t", "p"),
    [
        (1, 12.706, 0.05),
        (2, 4.303, 0.05),
        (3, 3.182, 0.05),
        (4, 2.776, 0.05),
        (9, 2.262, 0.05),
        (4, 4.604, 0.01),
        (7, 3.499, 0.01),
    ],
)
def test_the_t_test_gives_the_values_of_the_tables(degrees, t, p):
    n = degrees + 1
    shape = [i - (n - 1) / 2 for i in range(n)]  # mean 0
    deviation = math.sqrt(sum(x * x for x in shape) / (n - 1))
    shift = t * deviation / math.sqrt(n)
    assert t_test([x + shift for x in shape]) == pytest.approx(p, abs=1e-4)
    assert t_test([x - shift for x in shape]) == pytest.approx(p, abs=1e-4)


def test_equal_pairs_differ_by_nothing():
    assert t_test([0.0, 0.0, 0.0]) == 1.0


def test_holm_never_makes_a_p_value_smaller_than_an_earlier_one():
    assert holm([0.04, 0.001, 0.03]) == [0.06, 0.003, 0.06]


def test_differences_pair_the_same_seed_and_the_same_number_of_updates():
    runs = [
        Run("gspo", 1, 0, record(0.5)),
        Run("gspo", 4, 0, record(0.6)),
        Run("gspo", 4, 1, record(0.7)),
        Run("grpo", 4, 1, record(0.9)),
        Run("grpo", 4, 0, record(0.5)),
        Run("grpo", 16, 0, record(0.1)),  # nothing to compare it with
    ]
    runs.append(Run("dapo", 4, 0, record(math.nan)))  # a validation without the figure
    [(name, values)] = differences(runs, "gspo", "val/accuracy_sampled")
    assert name == "grpo at 4 updates"
    assert values == pytest.approx([0.2, -0.1])


def test_statements_tell_differences_from_noise():
    def runs(name, values):
        return [Run(name, 4, seed, record(value)) for seed, value in enumerate(values)]

    said = statements(
        [
            *runs("gspo", [0.50, 0.52, 0.51]),
            *runs("better", [0.70, 0.721, 0.71]),
            *runs("alike", [0.45, 0.60, 0.50]),
        ],
        "gspo",
    )
    assert "Differs from gspo**: better at 4 updates, sampled +0.200" in said[0]
    unclear = "No difference from gspo that exceeds the noise**: alike at 4 updates, sampled +0.007"
    assert unclear in said[1]


def test_the_correction_is_for_all_comparisons_of_a_table():
    """P = 0.03 alone is below the level, and not beside three others."""
    pairs = [0.10, 0.24, 0.30]  # t = 3.61, two degrees of freedom: p = 0.069
    gspo = [Run("gspo", 4, seed, record(0.0, greedy=0.0)) for seed in range(3)]
    close = [1.0, 1.1, 1.25]  # t = 15.4: p = 0.0042
    a = [Run("a", 4, seed, record(close[seed], greedy=close[seed])) for seed in range(3)]
    b = [Run("b", 4, seed, record(pairs[seed], greedy=pairs[seed])) for seed in range(3)]
    said = statements([*gspo, *a, *b], "gspo")
    assert t_test(close) == pytest.approx(0.0042, abs=1e-4)
    assert said[0].count(f"(p {4 * t_test(close):.3f})") == 2  # the two smallest, times four


def test_a_missing_figure_is_a_dash_not_a_number():
    assert with_error([math.nan, 0.1]) == "–"


def test_the_reference_costs_nothing_where_it_only_measures():
    assert Run("a", 4, 0, record(0.5)).seconds() == [3.25] * 3
    assert Run("a", 4, 0, record(0.5, kl=True)).seconds() == [3.5] * 3


def test_a_report_has_a_table_a_figure_and_a_statement(tmp_path):
    section = SimpleNamespace(
        title="Two", text="Said.", experts=False, seeds=[0, 1], baseline="gspo"
    )
    plan = SimpleNamespace(text="Intro.", completions=24, sections={"two": section})
    runs = [Run(name, 4, seed, record(0.5 + seed / 10)) for name in "ab" for seed in (0, 1)]
    runs += [Run("gspo", 4, seed, record(0.25 + seed / 10)) for seed in (0, 1)]
    write_report(tmp_path / "out", plan, {"two": runs}, "the command")
    text = (tmp_path / "out.md").read_text()
    assert "| a | 4 | 0.500 ± 0.000 | 0.550 ± 0.050 |" in text
    assert "| a | 4 | 3.25 | 0.40 | 10 | 1 | 4 | 24 | 3.0 |" in text
    assert "Differs from gspo**: a at 4 updates, sampled +0.250" in text
    assert (tmp_path / "out_two.png").read_bytes().startswith(b"\x89PNG")


# --- plans and runs ------------------------------------------------------------------------------


def test_the_shipped_plan_is_read():
    plan = read_plan(PLAN)
    assert plan.sections["algorithms"].seeds == [0, 1, 2, 3, 4]
    assert plan.sections["off_policy"].updates == [1, 4, 16, 64]
    compared = {arm.algorithm for section in plan.sections.values() for arm in arms(section)}
    rows = {path.stem for path in Path("configs/algorithm").glob("*.yaml")}
    assert rows - compared == {"gspo_token", "gspo_sum", "origin_sequence", "origin_token"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seedz": [0]}, "unknown ['seedz']"),
        ({"algorithms": ["gspoo"]}, "there is no configs/algorithm/gspoo.yaml"),
        ({"algorithms": ["gspo + kl/of"]}, "there is no configs/kl/of.yaml"),
        ({"seeds": []}, "sections.algorithms needs algorithms, updates and seeds"),
        ({"configs": ["configs/none.yaml"]}, "there is no config configs/none.yaml"),
    ],
)
def test_a_plan_that_cannot_work_is_one_line_and_exit_code_2(tmp_path, capsys, change, words):
    plan = yaml.safe_load(Path(PLAN).read_text())
    plan["sections"]["algorithms"].update(change)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    assert compare.main([str(tmp_path / "plan.yaml"), "--runs", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_plan_that_is_not_there_is_one_line(tmp_path, capsys):
    assert compare.main([str(tmp_path / "none.yaml")]) == 2
    assert "there is no plan" in capsys.readouterr().err


def test_every_run_has_the_same_updates_completions_and_a_reference_to_measure_with():
    plan = read_plan(PLAN)
    for algorithm in ("gspo", "dapo", "grpo"):
        arm = Arm(algorithm, 16, 0, (), False)
        own = settings(plan, arm)
        model = merged([*plan.configs, *map(str, overlays(algorithm))])["model"]
        assert own["model"]["init_args"]["num_minibatches"] == 16
        assert own["data"]["init_args"]["num_rollouts"] == 60
        assert (model["init_args"]["reference"] is None) == (
            "reference" in own["model"]["init_args"]
        )


TINY = """
configs: [configs/base.yaml, configs/task/arithmetic.yaml, configs/hardware/cpu.yaml, {small}]
completions: 24
validate_every: 2
sections:
  one: {{title: One, algorithms: [gspo, dapo], updates: [2], seeds: [3]}}
"""
SMALL = """# A rollout of 2 prompts x 4 completions.
trainer: {limit_val_batches: 1}
model: {init_args: {sampler: {init_args: {group_size: 4}}}}
data: {init_args: {prompts_per_rollout: 2, val_batch_size: 4}}
"""


@pytest.mark.slow
def test_a_comparison_gives_the_same_csv_again_and_runs_nothing_twice(tmp_path, capsys):
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "plan.yaml").write_text(TINY.format(small=tmp_path / "small.yaml"))

    def make(name):
        out = tmp_path / name / "report"
        words = [str(tmp_path / "plan.yaml"), "--out", str(out), "--runs", str(out.parent / "runs")]
        assert compare.main([*words, "--jobs", "2"]) == 0, capsys.readouterr().err
        return out

    first = make("a")
    content = first.with_suffix(".csv").read_bytes()
    lines = list(csv.DictReader(content.decode().splitlines()))
    by_arm = {name: [x for x in lines if x["algorithm"] == name] for name in ("gspo", "dapo")}
    assert [x["completions"] for x in by_arm["gspo"]] == ["", "8", "16", "24"]
    # groups of 4 that are flat are drawn again, and count
    assert float(by_arm["dapo"][-1]["completions"]) >= 24
    assert all(x["accuracy_sampled"] for name in by_arm for x in by_arm[name][::3][:1])
    assert by_arm["gspo"][-1]["accuracy_sampled"] != ""
    assert make("b").with_suffix(".csv").read_bytes() == content
    # complete runs are read, not made: they could not be, without this file
    runs = first.parent / "runs"
    stamps = {p: os.stat(p).st_mtime_ns for p in runs.glob("*/record.json")}
    first.with_suffix(".csv").unlink()
    make("a")
    assert first.with_suffix(".csv").read_bytes() == content
    assert {p: os.stat(p).st_mtime_ns for p in runs.glob("*/record.json")} == stamps


def test_the_mark_of_a_run_changes_with_what_it_is_configured_by(tmp_path, monkeypatch):
    plan = read_plan(PLAN)
    arm = next(arms(plan.sections["algorithms"]))
    monkeypatch.setattr(compare.subprocess, "call", lambda *_, **__: 1)
    for name, rate in (("a", 1.0), ("b", 2.0)):
        (tmp_path / "task.yaml").write_text(f"model: {{init_args: {{entropy_coef: {rate}}}}}")
        changed = replace(plan, configs=[*plan.configs, str(tmp_path / "task.yaml")])
        (tmp_path / name).mkdir()
        with pytest.raises(RuntimeError, match="failed"):
            compare.run(changed, arm, tmp_path / name)
    first, second = (tmp_path / n / f"{arm.name}.arm.json" for n in "ab")
    assert first.read_text() != second.read_text()


def test_a_folder_of_another_plan_is_refused(tmp_path, monkeypatch):
    plan = read_plan(PLAN)
    arm = next(arms(plan.sections["algorithms"]))
    folder = tmp_path / arm.name
    folder.mkdir()
    (folder / compare.RECORD).write_text(json.dumps(record(0.5)))
    folder.with_suffix(".arm.json").write_text("{}")
    with pytest.raises(RuntimeError, match="was made for another plan"):
        compare.run(plan, arm, tmp_path)
