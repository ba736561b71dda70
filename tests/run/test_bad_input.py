"""Every mistake is one line that says where and what, and nothing has been done before."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import train
from gspo_lightning.data.tables import read_rows
from gspo_lightning.rollout import PromptBatch, Samples
from gspo_lightning.sampling import GroupSampler
from support.bad_config_cases import CONFIG, FOLDERS
from support.bad_data_cases import DATA_FILES, DEMONSTRATIONS
from support.bad_input_cases import AS_ROOT
from support.bad_model_cases import CHECKPOINTS, MODELS

CASES = [*CONFIG, *FOLDERS, *DATA_FILES, *DEMONSTRATIONS, *MODELS, *CHECKPOINTS]


GSPO = """
seed_everything: 0
trainer:
  default_root_dir: run
  accelerator: cpu
  num_sanity_val_steps: 1
  callbacks:
    - class_path: gspo_lightning.AdaptiveKL
    - class_path: gspo_lightning.RolloutCheckpoint
    - class_path: gspo_lightning.SampleTable
    - class_path: gspo_lightning.HFExport
model:
  class_path: gspo_lightning.GSPOModule
  init_args:
    policy: {path: policy}
    reference: {device: cpu}
    sampler:
      class_path: gspo_lightning.GroupSampler
      init_args: {group_size: 4, max_new_tokens: 4}
    rewards:
      correct: {fn: {class_path: gspo_lightning.rewards.terms.MarkedAnswer}}
    evaluation: {correct: correct}
data:
  class_path: gspo_lightning.PromptData
  init_args:
    path: prompts.jsonl
    val_path: val.jsonl
    prompts_per_rollout: 4
    num_rollouts: 1
    max_prompt_tokens: 32
"""
SUPERVISED = """
trainer: {default_root_dir: run, accelerator: cpu, max_steps: 1}
model: {class_path: gspo_lightning.%s, init_args: {policy: {path: policy}}}
data: {class_path: gspo_lightning.%s, init_args: {path: %s, val_path: %s, batch_size: 1}}
"""
PROMPTS = '{"prompt": "1+2=", "answer": "3"}\n{"prompt": "2+2=", "answer": "4"}\n' * 2
DEMOS = '{"prompt": "1+2=", "completion": "3"}\n'
PAIRS = '{"prompt": "1+2=", "chosen": "3", "rejected": "4"}\n'
BAD_REWARDS = "def one_argument(rows):\n    return [0.0] * len(rows)\n"
ONCE = (  # what reads weights, or makes them up
    (transformers.AutoModelForCausalLM, "from_pretrained"),
    (transformers.AutoModelForCausalLM, "from_config"),
    (transformers.AutoModelForSequenceClassification, "from_pretrained"),
)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory, model_dir):
    """A classifier with three labels."""
    path = tmp_path_factory.mktemp("scorer")
    config = transformers.AutoConfig.from_pretrained(model_dir, num_labels=3)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(model_dir).save_pretrained(path)
    return path


@pytest.fixture
def work(tmp_path, monkeypatch, model_dir, scorer):
    """A folder in which everything is right, and the list of the work done there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("GSPO_TRACEBACK", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "bad_rewards", raising=False)
    for name, source in (("policy", model_dir), ("scorer", scorer)):
        shutil.copytree(source, name)
    supervised = {
        "sft.yaml": SUPERVISED % ("SFTModule", "SFTData", "demos.jsonl", "demos.jsonl"),
        "pairs.yaml": SUPERVISED % ("RewardModelModule", "PreferenceData", *["pairs.jsonl"] * 2),
    }
    data = {"prompts.jsonl": PROMPTS, "val.jsonl": PROMPTS, "demos.jsonl": DEMOS}
    files = {"gspo.yaml": GSPO, "pairs.jsonl": PAIRS, "bad_rewards.py": BAD_REWARDS}
    for name, text in (supervised | data | files).items():
        Path(name).write_text(text)
    done = []
    for owner, method in ONCE:
        original = getattr(owner, method)

        def counted(*args, original=original, **kwargs):
            if torch.get_default_device().type != "meta":  # shapes alone cost nothing
                done.append("weights")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, counted)

    def sample(self, policy: Any, batch: PromptBatch, *, seed: int) -> Samples:
        done.append("sampling")
        raise RuntimeError("nothing should come this far")

    monkeypatch.setattr(GroupSampler, "sample", sample)
    return done


def snapshot():
    """Every file below the folder with its content, folders and links included."""
    found = {}
    for path in sorted(Path().rglob("*")):
        if "__pycache__" not in path.parts:
            link, opaque = path.is_symlink(), path.is_dir() or not os.access(path, os.R_OK)
            found[str(path)] = os.readlink(path) if link else None if opaque else path.read_bytes()
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_mistake_is_one_line_and_nothing_was_done(work, capsys, monkeypatch, case):
    if case.name in AS_ROOT and os.geteuid() == 0:
        pytest.skip("root may read and write everything")
    for name, content in case.files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
    command = [case.command, *(["--config", case.config] if case.config else [])]
    if case.overlay:
        Path("overlay.yaml").write_text(case.overlay)
        command += ["--config", "overlay.yaml"]
    before = snapshot()
    code = train.main([*command, *case.options.split()])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    for word in case.words:
        assert word in err, err
    assert set(work) <= case.work
    assert snapshot() == before
    assert "rollout 1" not in out


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"prompt": "1"}\n{"prompt": "2"}\n',  # a byte-order mark
        b'{"prompt": "1"}\r\n\r\n{"prompt": "2"}',  # lines of Windows, one of them empty
        b'\n {"prompt": "1"} \n\t\n{"prompt": "2"}\n\n',
        b'{"prompt": "1", "id": null}\n{"prompt": "2", "id": null}\n',  # no ids
        b'{"prompt": "1", "id": 7}\n{"prompt": "2", "id": "7"}\n',  # different ones
        b'{"prompt": "1"}\n{"prompt": "2", "mood": "\\ud83d\\ude00"}\n',  # one whole character
    ],
)
def test_what_looks_odd_and_is_right_is_read(tmp_path, content):
    (tmp_path / "p.jsonl").write_bytes(content)
    rows = read_rows("data.path", str(tmp_path / "p.jsonl"))
    assert [row["prompt"] for row in rows] == ["1", "2"]


def test_a_line_may_be_as_long_as_the_limit(tmp_path, monkeypatch):
    line = b'{"prompt": "1"}\n'
    (tmp_path / "p.jsonl").write_bytes(line)
    monkeypatch.setattr("gspo_lightning.data.tables.LONGEST_LINE", len(line))
    assert read_rows("data.path", str(tmp_path / "p.jsonl")) == [{"prompt": "1"}]
    monkeypatch.setattr("gspo_lightning.data.tables.LONGEST_LINE", len(line) - 1)
    with pytest.raises(ValueError, match=r"p\.jsonl:1: longer than"):
        read_rows("data.path", str(tmp_path / "p.jsonl"))


def test_the_work_that_a_case_must_not_do_is_seen(work):
    """The run that every case changes is right, and comes as far as sampling."""
    assert train.main(["fit", "--config", "gspo.yaml"]) == 1
    assert set(work) == {"weights", "sampling"}
