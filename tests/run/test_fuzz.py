"""Inputs made at random: each is refused with exit code 2 and one line, or does what it says.

Every case is tried in this process, up to the first batch. `FUZZ_CASES` is how many are made (by
default as many as fit into the time of the slow tests), `FUZZ_SEED` chooses others:

    FUZZ_CASES=5000 FUZZ_SEED=1 python -m pytest -n 0 -m slow tests/run/test_fuzz.py -s

prints each case that fails as it is found, as a line for `tests/support/fuzz_corpus.jsonl`.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

import train
from support.command import instantiated
from support.fault_injection import every
from support.fuzz import CODE, CONFIG, REACHED, ROWS, Maker, Place, corpus, paths, short_of_training
from support.tiny_run import run

pytestmark = pytest.mark.slow
CASES = int(os.environ.get("FUZZ_CASES", 30))
SEED = int(os.environ.get("FUZZ_SEED", 0))


@pytest.fixture(scope="module")
def monkeypatch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def sound(tmp_path_factory, model_dir, monkeypatch):
    """A folder with a config that works, its data and model, a dump and a checkpoint."""
    root = tmp_path_factory.mktemp("sound")
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(str(root))
    for name in ("GSPO_TRACEBACK", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(model_dir, "policy")
    Path("gspo.yaml").write_text(CONFIG)
    Path("own.py").write_text(CODE)
    shutil.copy("own.py", "policy/own.py")
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert train.main(["fit", "--config", "gspo.yaml"]) == 0
    (checkpoint,) = Path("run/checkpoints").glob("*.ckpt")
    checkpoint.rename("a.ckpt")
    shutil.rmtree("run")
    with pytest.raises(FloatingPointError):
        run(root, Path("policy"), 1, [every([(0, 2)], "gradient")], max_faults=1)
    (dump,) = Path("faults").iterdir()
    dump.rename("dump.pt")
    for name in ("faults", "export", "checkpoints"):
        shutil.rmtree(name, ignore_errors=True)
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return root


@pytest.fixture(scope="module")
def place(sound, tmp_path_factory, monkeypatch):
    root = tmp_path_factory.mktemp("place")
    monkeypatch.chdir(root)
    with short_of_training(monkeypatch):
        yield Place(sound, root)


@pytest.fixture(scope="module")
def maker(place):
    config = instantiated("--config", "gspo.yaml").config["fit"].as_dict()
    settings = yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(config, default=str))))
    stored = {n: paths(torch.load(n, weights_only=True)) for n in ("dump.pt", "a.ckpt")}
    return Maker(settings, stored)


def test_what_once_failed_is_answered(place):
    found = {json.dumps(case): place.fault(case) for case in corpus()}
    assert {case: fault for case, fault in found.items() if fault} == {}


def test_the_right_inputs_are_taken(place):
    """Else every case would be refused for another reason than its own."""
    for words in ([], ["--ckpt_path", "a.ckpt"]):
        assert place.fault({"kind": "words", "words": words}) is None
        assert REACHED
    assert train.main(["replay", "dump.pt"]) in (0, 1)
    place.restore()


def test_every_input_is_refused_in_one_line_or_does_what_it_says(place, maker):
    found = {}
    for number in range(CASES):
        case = maker.make(SEED, number)
        fault = place.fault(case)
        if fault is not None:
            found[json.dumps(case)] = fault
            sys.stdout.write(f"{json.dumps(case)[:3000]}\n  {number}: {fault}\n")
            sys.stdout.flush()
    assert found == {}
