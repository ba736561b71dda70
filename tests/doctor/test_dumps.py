"""A dump is data: whatever it says, nothing of it is run, and what is no dump is one line."""

import copy
import json
import math
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

import train
from gspo_lightning.checkpoint.io import AtomicCheckpointIO
from gspo_lightning.doctor.dumps import load_dump
from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.mismatch import Mismatch
from support.bad_model_cases import Bomb
from support.fault_injection import every
from support.tiny_run import run

OWN_CODE = """
from pathlib import Path
Path("exploded").touch()
from transformers import Qwen3Config, Qwen3ForCausalLM
class Config(Qwen3Config):
    model_type = "own"
class Model(Qwen3ForCausalLM):
    config_class = Config
"""


@pytest.fixture(scope="module")
def sound(tmp_path_factory, model_dir):
    """The content of a dump that a run wrote."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.raises(FloatingPointError):
        reference = ReferencePolicy(device="cpu")
        inject = [every([(0, 2)], "gradient")]
        options = {"reference": reference, "kl_coef": 0.1, "mismatch": Mismatch("sequence")}
        run(folder, model_dir, 1, inject, max_faults=1, **options)
    (path,) = (folder / "faults").iterdir()
    return torch.load(path, weights_only=True)


@pytest.fixture
def replayed(tmp_path, monkeypatch, capsys, sound):
    """Replay a dump whose entry at a path of names is another one; exit code and both streams."""
    monkeypatch.chdir(tmp_path)

    def replay(place, value, *options):
        content = copy.deepcopy(sound)
        *outer, last = place.split("/")
        part = content
        for name in outer:
            part = part[name]
        part[last] = value
        AtomicCheckpointIO().save_checkpoint(content, Path("dump.pt"))
        return train.main(["replay", "dump.pt", *options]), *capsys.readouterr()

    return replay


def test_a_dump_cannot_ask_for_the_code_of_its_model(tmp_path, model_dir, replayed, sound):
    """The user can, and then the same model gives the same numbers."""
    folder = tmp_path / "own"
    shutil.copytree(model_dir, folder)
    (folder / "own.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    policy = sound["settings"]["policy"] | {"path": str(folder), "trust_remote_code": True}
    code, _, err = replayed("settings/policy", policy)
    assert code == 2 and err.count("\n") == 1
    assert "dump.pt: policy.path: " in err and "Python code of its own" in err
    assert not Path("exploded").exists()
    code, _, err = replayed("settings/policy", policy, "--trust_remote_code")
    assert Path("exploded").exists()


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("version", 9, "written by another version"),
        ("settings", None, "settings is no table"),
        ("settings", {}, "settings.policy is no table"),
        ("settings/policy", None, "settings.policy is no table"),
        ("settings/policy/path", 3, "settings.policy.path is 3, must be str"),
        ("settings/policy/path", "./gone", "there is no folder ./gone"),
        ("settings/policy/mine", 3, "settings.policy.mine is no entry"),
        ("settings/policy/lora", 3, "settings.policy.lora is no table"),
        ("settings/policy/lora", {"rank": 0}, "rank must be >= 1"),
        ("settings/policy/attention", "mine/kernel", "code of a hub"),
        ("settings/policy/dtype", "float8", "settings.policy.dtype is 'float8', must be"),
        ("settings/device", "cuda:evil", "settings.device is 'cuda:evil', must be"),
        ("settings/precision", 16, "settings.precision is 16"),
        ("settings/temperature", math.nan, "temperature must be above 0"),
        ("settings/micro_batch_size", 0, "at least 1"),
        ("settings/micro_batch_tokens", "many", "micro_batch_tokens is 'many'"),
        ("choices", [], "choices is no table"),
        ("choices/objective", None, "choices.objective is None"),
        ("choices/objective/ratio", "tokens", "choices.objective.ratio is 'tokens'"),
        ("choices/kl_estimator", None, "choices.kl_estimator is None"),
        ("minibatch", {"texts": 3}, "minibatch.texts is 3, must be"),
        ("minibatch/mask", None, "minibatch.mask is None, must be torch.Tensor"),
        ("minibatch/mask", torch.ones(3), "mask must have shape"),
        ("minibatch/texts", ["a"], "rows must have length"),
        ("minibatch/prompt_ids", torch.full((8, 8), 99), "shape"),
        ("minibatch/group_size", 0, "group_size must divide"),
        ("minibatch/reward_parts", {"a": 3}, "minibatch.reward_parts"),
        ("weights", torch.ones(2, 2), "weights must have the shape"),
        ("policy", {}, "its weights are not those of"),
        ("policy", {"a": {"b": 1}}, "policy.a is no tensor"),
        ("found", "gradient", "found is 'gradient', must be tuple"),
        ("prompts", [], "prompts must have 8 entries, has 0"),
        ("more", 1, "more is no entry"),
    ],
)
def test_a_dump_that_is_wrong_somewhere_is_one_line(replayed, place, value, words):
    code, out, err = replayed(place, value)
    assert (code, out) == (2, "") and err.count("\n") == 1, err
    assert err.startswith("error: replay: dump.pt") and words in err, err


def test_an_entry_that_is_missing_is_named(tmp_path, sound):
    content = {name: value for name, value in sound.items() if name != "choices"}
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "dump.pt")
    with pytest.raises(ValueError, match=r"dump\.pt: it lacks one of .*choices"):
        load_dump(tmp_path / "dump.pt")


def test_ids_beyond_the_model_are_named(replayed, sound):
    ids = sound["minibatch"]["completion_ids"].clone()
    ids[0, 0] = 99
    _, _, err = replayed("minibatch/completion_ids", ids)
    assert "minibatch.completion_ids must be ids from 0 to " in err


@pytest.mark.parametrize("how", ["code", "zip", "cut", "bit", "unsealed", "list"])
def test_a_file_that_is_no_dump_is_not_read(tmp_path, monkeypatch, capsys, sound, how):
    monkeypatch.chdir(tmp_path)
    path = Path("dump.pt")
    AtomicCheckpointIO().save_checkpoint(sound if how != "code" else sound | {"x": Bomb()}, path)
    content = path.read_bytes()
    if how == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("notes.txt", "no dump")
    elif how == "cut":
        path.write_bytes(content[:-1000])
    elif how == "bit":
        path.write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
    elif how == "unsealed":
        torch.save(sound, path)
    elif how == "list":
        AtomicCheckpointIO().save_checkpoint([1], path)
    assert train.main(["replay", "dump.pt"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("error: replay: dump.pt is no dump of a faulty step"), err
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", "replay: the following arguments are required: dump"),
        ("a b", "replay: unrecognized arguments: b"),
        ("gone.pt", "replay: no file gone.pt; dumps lie in faults/"),
    ],
)
def test_a_wrong_command_is_one_line(capsys, options, words):
    assert train.main(["replay", *options.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {words}") and err.count("\n") == 1


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta"])
def test_a_device_that_is_none_is_named(replayed, device):
    code, _, err = replayed("version", 2, "--device", device)
    assert code == 2 and err.startswith(f"error: replay: --device {device}")
