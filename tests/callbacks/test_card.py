import ast
import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gspo_lightning import CurvePlot, Evaluation, GroupSampler, HFExport
from gspo_lightning.callbacks.card import card, sample_as_trained
from support.rollout_dummies import fit
from support.tiny_run import PromptData, make_module, make_trainer, write_prompts


@pytest.fixture(scope="module")
def export(tmp_path_factory, model_dir):
    """What one rollout, evaluated before and after it, exports."""
    root = tmp_path_factory.mktemp("card") / "my-run"
    root.mkdir()
    policy = shutil.copytree(model_dir, root / "secret-place" / "base")
    module = make_module(
        policy,
        sampler=GroupSampler(group_size=4, max_new_tokens=6, temperature=0.7),
        evaluation=Evaluation(correct="digits", num_samples=2, ks=(1, 2)),
    )
    file = str(write_prompts(root / "prompts.jsonl"))
    data = PromptData(file, prompts_per_rollout=4, num_rollouts=1, val_path=file)
    callbacks = [CurvePlot(), HFExport()]
    options = {"callbacks": callbacks, "num_sanity_val_steps": -1, "val_check_interval": 1}
    make_trainer(root, **options).fit(module, data)
    return root / "export", module, callbacks[1]


def test_the_card_has_front_matter_that_the_hub_takes(export):
    folder, _, callback = export
    data = huggingface_hub.ModelCard.load(folder / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert "gspo" in data.tags and data.base_model is None  # a folder is no model of the hub
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    after = callback.held_out["after"]
    assert found["greedy, held out"] == pytest.approx(after["greedy"], abs=1e-6)
    assert {result.metric_type for result in data.eval_results} == {"accuracy", "pass@k", "reward"}


def test_the_card_says_what_was_trained_how_it_did_and_how_to_load_it(export):
    folder, _, callback = export
    text = (folder / "README.md").read_text()
    assert "# my-run/export\n\n`base`, trained on `prompts.jsonl` for 1 rollouts" in text
    before, after = (callback.held_out[when]["reward"] for when in ("before", "after"))
    assert f"| `reward` | {before:.3f} | {after:.3f} |" in text
    assert "    model.sampler.temperature: 0.7\n" in text
    assert "    torch: " in text
    assert "![Curves of the training](curves.png)" in text
    assert (folder / "curves.png").read_bytes() == (folder.parent / "curves.png").read_bytes()


@pytest.mark.parametrize("name", ["a\n# b", "<b>`|*", "---: - {x", "```", "q'\"\\"])
def test_no_name_of_a_folder_is_markup_or_breaks_the_card(export, tmp_path, name):
    _, module, callback = export
    trainer = SimpleNamespace(
        default_root_dir=tmp_path / name,
        datamodule=SimpleNamespace(),
        fit_loop=SimpleNamespace(total_batch_idx=0),
    )
    text = card(trainer, module, "export", callback.held_out, False, tmp_path)
    assert huggingface_hub.ModelCard(text).data.model_name == f"{name}/export"
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert len(heads) == 5 and heads[0].startswith("# `") and heads[0].count("`") == 2
    code = text.partition("```python\n")[2].partition("```")[0]
    assert (
        ast.literal_eval(code.partition("pretrained(")[2].partition(")\n")[0]) == f"{name}/export"
    )


def test_the_card_tells_nothing_of_this_machine(export):
    text = (export[0] / "README.md").read_text()
    assert "secret-place" not in text and str(export[0].parents[1]) not in text


def test_the_lines_that_load_the_model_run(export, monkeypatch, capsys):
    folder, _, _ = export
    monkeypatch.chdir(folder.parents[1])
    lines = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(lines.replace("your prompt", "1+2="), {})
    assert capsys.readouterr().out.endswith("\n")


def test_generate_draws_as_training_did(export):
    folder, module, _ = export
    settings = GenerationConfig.from_pretrained(folder)
    assert (settings.do_sample, settings.temperature, settings.max_new_tokens) == (True, 0.7, 6)
    assert (settings.top_k, settings.top_p) == (0, 1.0)
    ends = settings.eos_token_id
    assert (ends if isinstance(ends, list) else [ends]) == module.policy.eos_ids
    model, tokenizer = (
        kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert model.generate(**tokenizer("1+2=", return_tensors="pt")).shape[1] <= 4 + 6


def test_what_the_authors_of_a_base_model_advise_is_left_out(tmp_path, export):
    file = tmp_path / "generation_config.json"
    advice = {"top_k": 20, "top_p": 0.95, "temperature": 0.6, "repetition_penalty": 1.1}
    file.write_text(json.dumps(advice | {"eos_token_id": [7, 8], "max_length": 99}))
    _, module, _ = export
    sample_as_trained(file, module.sampler, module.policy)
    settings = json.loads(file.read_text())
    assert settings["eos_token_id"] == [7, 8]
    assert settings["pad_token_id"] == module.policy.pad_id
    assert (settings["temperature"], settings["top_k"], settings["top_p"]) == (0.7, 0, 1.0)
    assert not {"repetition_penalty", "max_length"} & settings.keys()


class Hub:
    """The hub's API with its own signatures; keeps calls, or fails."""

    calls: ClassVar[list] = []
    error: Exception | None = None
    token_error: Exception | None = None

    def __init__(self):
        self.real = huggingface_hub.hf_api.HfApi

    def whoami(self):
        if self.token_error is not None:
            raise self.token_error

    def create_repo(self, *args, **kwargs):
        bound = inspect.signature(self.real.create_repo).bind(self, *args, **kwargs)
        self.calls.append(("create_repo", bound.arguments))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{bound.arguments['repo_id']}")

    def upload_folder(self, *args, **kwargs):
        bound = inspect.signature(self.real.upload_folder).bind(self, *args, **kwargs)
        files = sorted(file.name for file in Path(bound.arguments["folder_path"]).iterdir())
        self.calls.append(("upload_folder", bound.arguments | {"files": files}))
        if self.error is not None:
            raise self.error


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    return Hub


def test_the_export_is_pushed_once_as_the_run_ends(tmp_path, hub, capsys):
    fit(tmp_path, [HFExport(push_to_hub="me/mine", every_n_rollouts=1)], num_rollouts=3)
    (_, made), (_, sent) = hub.calls
    assert (made["repo_id"], made["private"], made["exist_ok"]) == ("me/mine", True, True)
    assert (sent["repo_id"], sent["folder_path"]) == ("me/mine", tmp_path / "export")
    assert sent["files"] == ["README.md", "weight.txt"]
    assert "# me/mine\n" in (tmp_path / "export/README.md").read_text()
    said = f"pushed    {tmp_path}/export to https://huggingface.co/me/mine"
    assert said in capsys.readouterr().out


def test_with_a_monitor_the_best_one_is_pushed(tmp_path, hub):
    export = HFExport(push_to_hub="me/mine", monitor="val/reward")
    fit(tmp_path, [export], num_rollouts=3)
    assert hub.calls[-1][1]["folder_path"] == tmp_path / "export_best"


def test_a_best_one_that_lies_in_another_folder_is_not_pushed(tmp_path, hub):
    export = HFExport(push_to_hub="me/mine", monitor="val/reward")
    export.load_state_dict({"monitor": "val/reward", "best": 99.0})  # never reached here
    fit(tmp_path, [export], num_rollouts=3)
    assert hub.calls[-1][1]["folder_path"] == tmp_path / "export"


def test_a_push_that_fails_is_said_and_loses_nothing(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(hub, "error", OSError("no space left on the hub\nmore"))
    advice = (
        rf"push_to_hub 'me/mine' failed \(no space left on the hub\); the model is whole in "
        rf"{tmp_path}/export: push it with `hf upload me/mine {tmp_path}/export`$"
    )
    with pytest.warns(UserWarning, match=advice):
        fit(tmp_path, [HFExport(push_to_hub="me/mine")], num_rollouts=3)
    assert (tmp_path / "export/weight.txt").exists()


@pytest.mark.parametrize(
    ("token", "error", "message"),
    [
        (None, None, "there is no token of the hub on this machine; run `hf auth login` or set"),
        ("a", OSError("401 Unauthorized\nx"), r"or cannot be reached \(401 Unauthorized\)"),
    ],
)
def test_a_push_that_would_fail_is_refused_before_training(
    tmp_path, hub, monkeypatch, token, error, message
):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(hub, "token_error", error)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, [HFExport(push_to_hub="me/mine")], num_rollouts=3)
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "export").exists()


def test_a_rehearsal_asks_nothing_of_the_hub(tmp_path, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    fit(tmp_path, [HFExport(push_to_hub="me/mine")], fast_dev_run=1)
    assert not hub.calls


def test_a_name_that_is_none_of_a_repository_is_refused():
    with pytest.raises(ValueError, match="push_to_hub: Repo id must be in the form"):
        HFExport(push_to_hub="a/b/c")
