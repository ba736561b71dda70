"""Lightning's callbacks that save or change weights, beside our checkpoints, on tiny runs."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, Timer
from safetensors.torch import load_file

from gspo_lightning import HFExport, PromptData, RolloutCheckpoint
from gspo_lightning.checkpoint.files import find_checkpoint
from support.run_folder import names
from support.tiny_run import make_module, make_trainer, write_prompts

ROLLOUTS = 4


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.policy.parameters()]).clone()


class Weights(Callback):
    """Keeps the policy's weights after each rollout, and as each validation has them."""

    def __init__(self):
        self.trained, self.validated = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.trained.append(flat(module))

    def on_validation_batch_start(self, trainer, module, *_):
        self.validated.append(flat(module))


def train(folder, model_dir, callbacks, ckpt=None):
    folder.mkdir(exist_ok=True)
    prompts = str(write_prompts(folder / "prompts.jsonl"))
    module, seen = make_module(model_dir), Weights()
    data = PromptData(prompts, val_path=prompts, prompts_per_rollout=4, num_rollouts=ROLLOUTS)
    trainer = make_trainer(
        folder,
        callbacks=[*callbacks, seen],
        enable_checkpointing=True,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        log_every_n_steps=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Lightning's own, of these callbacks
        trainer.fit(module, data, ckpt_path=ckpt)
    return module, seen


@pytest.fixture(scope="module")
def both(tmp_path_factory, model_dir):
    """A run with both kinds of checkpoints in one folder, ours first in the list."""
    folder = tmp_path_factory.mktemp("both") / "run"
    theirs = ModelCheckpoint(
        folder / "checkpoints", "best-{step}", monitor="val/reward", mode="max", save_top_k=-1
    )
    late = ModelCheckpoint(folder / "late", every_n_train_steps=4, save_top_k=-1)
    module, seen = train(folder, model_dir, [RolloutCheckpoint(1, 9), theirs, late])
    return folder, module, seen, theirs


def test_theirs_hold_the_weights_after_whole_rollouts_and_ours_are_all_that_is_found(both):
    folder, module, seen, theirs = both
    files = sorted((folder / "checkpoints").glob("best-*"))
    assert [file.name for file in files] == [f"best-step={n}.ckpt" for n in (2, 4, 6, 8)]
    for file, weights in zip(files, seen.trained, strict=True):
        saved = torch.load(file, weights_only=True)["state_dict"]
        policy = [saved[name] for name, _ in module.policy.named_parameters(prefix="policy")]
        assert torch.equal(torch.cat([v.flatten() for v in policy]), weights)
    assert Path(theirs.best_model_path) in files
    assert names(folder) == [f"rollout=00000{n}.ckpt" for n in (1, 2, 3, 4)]
    assert find_checkpoint(folder, "last").name == "rollout=000004.ckpt"
    assert sorted(f.name for f in (folder / "late").iterdir()) == [
        "epoch=0-step=4.ckpt",
        "epoch=0-step=8.ckpt",
    ]


@pytest.mark.parametrize("file", ["best-step=4.ckpt", "rollout=000002.ckpt"])
def test_a_run_that_goes_on_from_either_comes_to_the_same_weights(both, file, model_dir, tmp_path):
    folder, module, seen, _ = both
    again, more = train(tmp_path / "run", model_dir, [], folder / "checkpoints" / file)
    assert len(more.trained) == 2
    assert torch.equal(flat(again), flat(module))
    assert torch.equal(more.trained[0], seen.trained[2])


def test_ours_know_what_theirs_have_saved_at_the_same_rollout(both):
    folder, *_ = both
    states = torch.load(folder / "checkpoints/rollout=000003.ckpt", weights_only=True)["callbacks"]
    (best,) = [s for key, s in states.items() if "val/reward" in key]
    assert sorted(Path(path).name for path in best["best_k_models"]) == [
        "best-step=2.ckpt",
        "best-step=4.ckpt",
        "best-step=6.ckpt",
    ]


def exported(module, folder):
    """The weights of an export, in the order of ``flat``."""
    found = load_file(folder / "model.safetensors")
    names = dict(module.policy.model.named_parameters())
    return torch.cat([found[name].flatten() for name in names])


def test_an_average_of_the_weights_is_evaluated_kept_exported_and_continued(model_dir, tmp_path):
    def callbacks():  # HFExport stands before what it exports
        export = HFExport(monitor="val/reward")
        return [
            export,
            EMAWeightAveraging(decay=0.5),
            Timer("00:01:00:00"),
            RolloutCheckpoint(1, 9),
        ]

    module, seen = train(tmp_path / "run", model_dir, callbacks())
    average = seen.trained[0]  # the first one is taken as it is
    for trained, validated in zip(seen.trained, seen.validated, strict=True):
        average = average + 0.5 * (trained - average)
        torch.testing.assert_close(validated, average)
    assert torch.equal(flat(module), seen.validated[-1])
    assert torch.equal(exported(module, tmp_path / "run/export"), seen.validated[-1])
    best = exported(module, tmp_path / "run/export_best")
    assert any(torch.equal(best, validated) for validated in seen.validated)
    file = shutil.copy(tmp_path / "run/checkpoints/rollout=000002.ckpt", tmp_path)
    again, more = train(tmp_path / "again", model_dir, callbacks(), file)
    assert torch.equal(flat(again), flat(module))
    assert torch.equal(more.trained[-1], seen.trained[-1])


class KeepsAPath(Callback):
    """Its state is one that a checkpoint cannot hold, until it is told otherwise."""

    def __init__(self, state):
        self.state, self.loaded = state, None

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.loaded = state


def test_a_state_that_is_no_plain_value_is_named_and_costs_no_checkpoint(tmp_path):
    from support.rollout_dummies import fit

    with pytest.warns(UserWarning, match=r"KeepsAPath begins anew .* \['best'\] is a PosixPath"):
        fit(tmp_path, [KeepsAPath({"best": Path("a")})])
    keeps = KeepsAPath({"best": "a"})
    fit(tmp_path, [keeps], num_rollouts=9, ckpt="last")
    assert keeps.loaded is None  # the checkpoint had no state of its
    again = KeepsAPath({})
    fit(tmp_path, [again], num_rollouts=12, ckpt="last")
    assert again.loaded == {"best": "a"}
