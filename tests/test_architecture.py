"""Who may import whom, read from the source; the maths stays pure."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gspo_lightning"

MATHS = {
    *("masked", "objectives", "advantages", "kl", "gae", "micro_batches", "rollout"),
    *("logprobs", "packed_attention", "packing", "padded", "linear_logprobs", "head"),
    "products",
}
# file: the files of this package it may import, in an order in which each knows only those above
MAY_IMPORT = {
    "masked": set(),
    "micro_batches": set(),
    "rollout": {"micro_batches"},
    "kl": {"masked"},
    "packed_attention": set(),
    "packing": {"packed_attention"},
    "padded": set(),
    "products": set(),
    "linear_logprobs": {"products"},
    "head": {"linear_logprobs", "products"},
    "logprobs": {"head", "packed_attention", "packing", "padded"},
    "advantages": {"masked"},
    "objectives": {"masked"},
    "gae": {"masked"},
    "optim": set(),
    "attention": {"packed_attention"},
    "lora": set(),
    "model_folder": set(),
    "policy": {"attention", "lora", "model_folder", "products"},
    "start_checks": {"model_folder"},
    "tables": set(),
    "plan": {"products"},
    "config_files": set(),
    "text_scores": set(),
    "event_files": set(),
    "fingerprints": set(),
    "finite": set(),
    "signals": set(),
    "checkpoint_io": set(),
    "cli": {"checkpoint_io"},
    "checkpoint_files": {"checkpoint_io"},
    "checkpoint": {
        *("checkpoint_files", "checkpoint_io", "event_files", "fingerprints", "finite"),
        "signals",
    },
    "provenance": set(),
    "overlap": set(),
    "memory": set(),
    "out_of_memory": set(),
    "terminal_log": set(),
    "run_folder": {
        *("checkpoint_files", "checkpoint_io", "fingerprints", "provenance", "terminal_log"),
    },
    "run_lock": {"run_folder"},
    "shaping": set(),
    "reward_calls": {"out_of_memory"},
    "rewards": {"reward_calls", "shaping"},
    "text_rewards": {"rewards"},
    "verifiers": set(),
    "time_limit": set(),
    "metrics": {"masked"},
    "stream": {"rollout"},
    "supervised": {"fingerprints", "start_checks", "stream", "tables"},
    "preferences": {"stream", "supervised", "tables"},
    "data": {"preferences", "rollout", "start_checks", "stream", "supervised", "tables"},
    "drawing": set(),
    "group_layout": set(),
    "group_attention": {"group_layout"},
    "step_graphs": {"group_layout"},
    "group_decoder": {
        "attention",
        "drawing",
        "group_attention",
        "group_layout",
        "logprobs",
        "products",
        "step_graphs",
    },
    "plain_decoder": {"drawing", "logprobs"},
    "sampling": {"group_decoder", "plain_decoder", "products", "rollout", "step_graphs"},
    "vllm_sampler": {"sampling", "rollout"},
    "classifier": {"out_of_memory", "policy", "products"},
    "critic": {"attention", "gae", "logprobs", "model_folder", "policy", "products", "rollout"},
    "frozen": {
        *("attention", "classifier", "logprobs", "lora", "model_folder", "policy", "products"),
        "rollout",
    },
    "health_rules": {"objectives"},
    "health": {"health_rules", "objectives"},
    "report": {"metrics"},
    "faults": {"checkpoint_io", "rollout"},
    "tally": {"advantages", "gae", "kl", "masked", "metrics", "objectives", "rollout"},
    "json_lines": {"report"},
    "callbacks": {"json_lines", "kl", "metrics", "policy", "report", "rollout"},
    "predictions": {"callbacks", "json_lines"},
    "progress": {"callbacks", "kl", "metrics", "plan", "predictions", "report"},
    "findings": set(),
    "doctor_memory": {"findings", "plan"},
    "doctor_text": {"findings"},
    "doctor_rewards": {"advantages", "findings", "rewards"},
    "doctor_numbers": {"findings", "kl", "masked", "objectives", "rollout"},
    "doctor": {
        *("callbacks", "doctor_memory", "doctor_numbers", "doctor_rewards", "doctor_text"),
        *("cli", "findings", "plan", "rewards", "rollout"),
    },
    "evaluation": {"metrics", "policy", "rewards", "rollout", "sampling"},
    "step_log": set(),
    "sft": {"step_log", "logprobs", "masked", "optim", "policy"},
    "reward_model": {"step_log", "model_folder", "optim", "policy", "products"},
    "old_logprobs": {
        *("evaluation", "frozen", "logprobs", "memory", "objectives", "out_of_memory", "rollout"),
        "tally",
    },
    "collect": {
        *("advantages", "critic", "frozen", "kl", "masked", "old_logprobs", "overlap", "rewards"),
        *("rollout", "time_limit"),
    },
    "update": {
        "collect",
        "old_logprobs",
        "faults",
        "gae",
        "kl",
        "objectives",
        "out_of_memory",
        "policy",
        "rollout",
    },
    "settings": {"rewards", "sampling"},
    "module": {
        *("critic", "faults", "old_logprobs", "out_of_memory", "settings", "update"),
        *("advantages", "kl", "logprobs", "masked", "objectives", "rollout"),
        *("evaluation", "frozen", "health", "metrics", "optim", "policy", "rewards", "sampling"),
        *("memory", "overlap", "tally", "time_limit"),
    },
    "replay": {
        *("logprobs", "lora", "module", "objectives", "packing", "policy", "rewards", "rollout"),
        "sampling",
    },
    "guard_cost": {
        *("data", "faults", "module", "optim", "out_of_memory", "policy", "rewards", "sampling"),
    },
    "significance": set(),
    "compare_report": {"significance"},
    "compare_plan": set(),
    "compare": {"compare_plan", "compare_report"},
    "experiment": {"logprobs", "rollout"},
    "tracing": {"run_folder"},
    "watch": {"run_lock", "signals", "start_checks", "terminal_log"},
    "ending": {"checkpoint_io", "cli", "out_of_memory", "rewards", "run_folder", "signals"},
    "bench_limits": {"products"},
    "bench_samplers": {"rollout"},
    "bench_worker": {
        *("bench_limits", "bench_samplers", "cli", "data", "frozen", "memory", "module", "optim"),
        *("policy", "rewards", "rollout", "sampling"),
    },
    "bench_report": {"bench_limits"},
    "bench_runs": set(),
    "bench_parts": {
        *("bench_report", "bench_runs", "bench_worker", "cli", "data", "logprobs"),
        *("checkpoint", "checkpoint_files", "checkpoint_io"),
        *("memory", "module", "policy", "rewards", "sampling"),
    },
    "bench_scaling": {"bench_report", "bench_runs"},
    "bench": {"bench_parts", "bench_report", "bench_runs", "bench_scaling", "bench_worker"},
}
# where Lightning is the shell; everything else runs without it
SHELL = {
    *("data", "supervised", "module", "sft", "reward_model", "evaluation", "callbacks", "progress"),
    *("ending", "predictions", "watch"),
    *("checkpoint", "checkpoint_files", "checkpoint_io", "signals"),
    *("event_files", "run_folder", "run_lock", "health", "cli", "experiment"),
    *("bench_parts", "bench_worker", "tracing"),
    *("faults", "update", "replay", "guard_cost"),
    "doctor",
}
FILES = sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports(path: Path) -> set[str]:
    """All modules a file imports, with full names, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def siblings(path: Path) -> set[str]:
    """The files of this package that a file imports."""
    parts = [name.split(".") for name in imports(path)]
    return {part[1] for part in parts if part[0] == "gspo_lightning" and len(part) > 1}


def top_level(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_imports_only_what_it_may(path):
    assert path.stem in MAY_IMPORT, f"say in MAY_IMPORT what {path.name} may import"
    assert siblings(path) <= MAY_IMPORT[path.stem]


def test_the_allowed_imports_have_no_cycle():
    above = set()
    for name, allowed in MAY_IMPORT.items():
        assert allowed <= above, name
        above.add(name)


@pytest.mark.parametrize("name", sorted(MATHS | {"optim"}))
def test_the_maths_imports_torch_and_the_standard_library_only(name):
    outside = top_level(PACKAGE / f"{name}.py") - sys.stdlib_module_names - {"gspo_lightning"}
    assert outside <= {"torch"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_lightning_stays_in_the_shell(path):
    assert path.stem in SHELL or not top_level(path) & {"lightning", "pytorch_lightning"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_file_needs_a_peer(path):
    assert not top_level(path) & {"trl", "accelerate", "verl"}


def test_train_leaves_the_algorithm_to_the_package():
    assert siblings(ROOT / "train.py") <= {
        *("callbacks", "checkpoint", "checkpoint_files", "checkpoint_io", "cli", "config_files"),
        *("plan", "progress", "rewards", "run_folder", "signals", "start_checks", "terminal_log"),
        *("doctor", "ending", "predictions", "replay", "run_lock", "tracing", "watch"),
    }


def test_gradients_are_made_by_manual_backward_alone():
    """``loss.backward()`` would go past the precision plugin and the strategy."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            assert not (called and node.func.attr == "backward"), f"{path.name}:{node.lineno}"


def test_no_file_has_a_name_that_says_nothing():
    forbidden = {"utils", "types", "constants", "registry", "base"}
    for folder in (ROOT, PACKAGE, ROOT / "tests"):
        assert not forbidden & {path.stem for path in folder.glob("*.py")}


def test_the_package_is_flat():
    assert not [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE]
