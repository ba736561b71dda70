"""What users of Lightning expect of a module, without the command line."""

import os
import re
import warnings
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import numpy
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from gspo_lightning import (
    AdaptiveKL,
    CriticConfig,
    Evaluation,
    GroupSampler,
    GSPOModule,
    LoRAConfig,
    OptimizerConfig,
    PolicyConfig,
    PreferenceData,
    PromptData,
    ReferencePolicy,
    RewardModelModule,
    RewardTerm,
    RolloutCheckpoint,
    SFTData,
    SFTModule,
)
from gspo_lightning.checkpoint import find_checkpoint
from gspo_lightning.guards.trainer import leave_out_noise
from gspo_lightning.policy.settings import plain
from support.observers import Outputs
from support.repository import ROOT
from support.reward_functions import digits
from support.run_folder import scalars
from support.tiny_run import make_module, make_trainer, write_prompts

PROMPTS = ["1+2=", "7+9="]


def bare(folder, **options):
    """A Trainer as a program makes it, without what would be drawn on the terminal."""
    shown = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, **shown | options)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model_dir, prompts):
    """A run with LoRA, critic, reference and whitening; all that was logged and said lies there."""
    folder = tmp_path_factory.mktemp("whole")
    callbacks = [RolloutCheckpoint(), AdaptiveKL(initial=0.25)]
    module = make_module(
        model_dir,
        policy=PolicyConfig(str(model_dir), lora=LoRAConfig(rank=2), stop_token_ids=[20]),
        rewards={"digits": RewardTerm(digits, weight=2.0, whiten=True, clip=(-1, 1))},
        reference=ReferencePolicy(device="cpu"),
        advantages="gae",
        critic=CriticConfig(),
        evaluation=Evaluation(correct="digits", ks=(1, 2)),
    )
    loggers = [TensorBoardLogger(folder, name="", version=""), CSVLogger(folder, "csv", "")]
    data = PromptData(prompts, prompts, prompts_per_rollout=4, num_rollouts=2)
    bare(folder, callbacks=callbacks, logger=loggers, num_sanity_val_steps=0).fit(module, data)
    return SimpleNamespace(
        folder=folder, module=module, data=data, path=find_checkpoint(folder, "last")
    )


# ---- settings ------------------------------------------------------------------------------------


def test_plain_values_are_of_plain_types():
    class Judge:
        def __init__(self, key="secret"):
            self.key = key

    @dataclass
    class Jury:
        key: str = "secret"

    class Own(LoRAConfig):
        """Settings all the same."""

    rate = plain(numpy.float64(0.5))
    assert (rate, type(rate), plain(numpy.int64(3))) == (0.5, float, 3)
    assert plain({"a": (1, {2}), "b": digits}) == {
        "a": [1, [2]],
        "b": "support.reward_functions.digits",
    }
    assert plain(GroupSampler(4))["init_args"]["group_size"] == 4
    # somebody else's attributes are not told
    assert "secret" not in str(plain(Judge())) + str(plain(Jury()))
    assert plain(Jury())["class_path"].endswith("Jury") and plain(Own(rank=2))["rank"] == 2


def test_a_checkpoint_holds_the_settings_and_is_safe_to_load(whole):
    saved = torch.load(whole.path, weights_only=True)
    settings = saved["hyper_parameters"]
    assert settings == dict(whole.module.hparams)
    assert settings["policy"] == asdict(whole.module.policy_config)
    assert settings["rewards"]["digits"]["fn"] == "support.reward_functions.digits"
    assert settings["objective"]["clip_low"] == 3e-4 and settings["evaluation"]["ks"] == [1, 2]
    assert saved["datamodule_hyper_parameters"]["prompts_per_rollout"] == 4


def hparams_of(folder):
    """Columns, figures and rows as the tab HPARAMS of TensorBoard has them."""
    from tensorboard import context
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    files = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(folder))
    files.Reload()
    provider = data_provider.MultiplexerDataProvider(files, str(folder))
    backend = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    request = context.RequestContext()
    marks = backend.hparams_metadata(request, "")
    columns = backend.experiment_from_metadata(request, "", True, marks, None)
    wanted = api_pb2.ListSessionGroupsRequest(
        slice_size=9,
        allowed_statuses=range(4),
        col_params=[api_pb2.ColParams(metric=info.name) for info in columns.metric_infos],
    )
    rows = list_session_groups.Handler(request, backend, "", wanted).run().session_groups
    return [info.name for info in columns.hparam_infos], list(rows)


def test_loggers_show_settings_and_newest_figures_and_a_continued_run_is_one_row(whole, tmp_path):
    columns, (row,) = hparams_of(whole.folder)
    assert columns[:3] == [
        "AdaptiveKL.rule.target",
        "model.objective.clip_low",
        "model.objective.ratio",
    ]
    assert row.hparams["model.sampler.group_size"].number_value == 4
    assert row.hparams["model.rewards.digits.fn"].string_value == "support.reward_functions.digits"
    assert row.hparams["data.prompts_per_rollout"].number_value == 4
    curves = scalars(whole.folder)
    assert "hp_metric" not in curves
    figures = {value.name.tag: value.value for value in row.metric_values}
    assert figures["train/reward"] == pytest.approx(curves["train/reward"][-1][1])
    assert figures["val/accuracy_sampled"] == pytest.approx(curves["val/accuracy_sampled"][-1][1])
    for file in ("hparams.yaml", "csv/hparams.yaml"):
        table = yaml.safe_load((whole.folder / file).read_text())
        assert table["model.sampler"] == "GroupSampler"
        assert table["model.optimizer.learning_rate"] == 0.01
        assert not any(isinstance(value, dict | list | None) for value in table.values())
    before = len(row.hparams)
    module = GSPOModule.load_from_checkpoint(whole.path, rewards=whole.module.rewards)
    data = PromptData(**whole.data.hparams | {"num_rollouts": 3})
    logger = TensorBoardLogger(whole.folder, name="", version="")
    callbacks = [RolloutCheckpoint(), AdaptiveKL(initial=0.25)]
    bare(whole.folder, callbacks=callbacks, logger=logger).fit(module, data, ckpt_path=whole.path)
    _, (row,) = hparams_of(whole.folder)
    assert len(row.hparams) == before and len(row.sessions) == 1
    assert [value.training_step for value in row.metric_values if "train" in value.name.tag] == [3]


# ---- load_from_checkpoint ------------------------------------------------------------------------


def test_a_checkpoint_gives_the_policy_that_was_trained(whole, model_dir, monkeypatch, tmp_path):
    untrained = make_module(model_dir)
    untrained.configure_model()
    drawn = {"num_samples": 3, "temperature": 1.0, "seed": 5}
    expected = whole.module.generate(PROMPTS, **drawn)
    monkeypatch.chdir(tmp_path)
    module = GSPOModule.load_from_checkpoint(whole.path)
    assert module.generate(PROMPTS, **drawn) == expected
    assert module.generate(PROMPTS[:1], **drawn) == expected[:1]
    assert untrained.generate(PROMPTS, **drawn) != expected
    assert module.hparams == whole.module.hparams | {"rewards": module.hparams["rewards"]}
    assert (module.kl_coef, module.rewards["digits"].weight) == (0.0, 2.0)
    assert module.sampler.group_size == 4 and module.evaluator.settings.ks == (1, 2)
    ids = torch.tensor([module.tokenizer(PROMPTS[0])["input_ids"]])
    options = {"max_new_tokens": 6, "do_sample": False}
    found = module.policy.model.generate(ids, **options)[0, ids.shape[1] :]  # transformers' own
    text = module.tokenizer.decode(found, skip_special_tokens=True)
    assert text.startswith(module.generate(PROMPTS[:1])[0][0])


def test_arguments_win_over_what_a_checkpoint_holds(whole, model_dir, tmp_path):
    elsewhere = tmp_path / "moved"
    elsewhere.symlink_to(model_dir)
    rewards = {"digits": RewardTerm(digits)}
    module = GSPOModule.load_from_checkpoint(
        str(whole.path), "cpu", policy={"path": str(elsewhere)}, rewards=rewards, max_draws=7
    )
    config = module.policy_config
    assert (config.path, config.lora, module.max_draws) == (str(elsewhere), LoRAConfig(2), 7)
    assert module.generate(PROMPTS) == whole.module.generate(PROMPTS)
    bare(tmp_path, logger=False).validate(module, whole.data, verbose=False)  # rewards are there


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"policy": {"path": "gone/away"}}, "no folder gone/away.*load_from_checkpoint.*policy="),
        ({"policy": {"lora": {"rank": 0}}}, "policy.lora.rank must be >= 1, got 0"),
        ({"critic": {"speed": 1}}, "unexpected keyword argument 'speed'"),
        ({"policy": {"lora": None}}, r"\.ckpt does not hold .* GSPOModule .*Missing key.*\.\.\.;"),
        ({"policy": None, "path": "nowhere.ckpt"}, "there is no file nowhere.ckpt"),
    ],
)
def test_what_a_checkpoint_lacks_is_said_in_one_line(whole, tmp_path, monkeypatch, given, line):
    monkeypatch.chdir(tmp_path)
    os.mkdir("gone")
    with pytest.raises(ValueError, match=line) as caught:
        GSPOModule.load_from_checkpoint(given.pop("path", whole.path), **given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def changed(whole, tmp_path, **entries):
    """The checkpoint with other entries, as Lightning itself writes one."""
    saved = torch.load(whole.path, weights_only=True) | entries
    torch.save(saved, tmp_path / "changed.ckpt")
    return tmp_path / "changed.ckpt"


def test_nothing_that_a_checkpoint_names_is_imported(whole, tmp_path, model_dir):
    settings = dict(whole.module.hparams)
    evil = {"class_path": "antigravity.Fly", "init_args": {}}
    terms = {"digits": settings["rewards"]["digits"] | {"fn": evil}}
    path = changed(whole, tmp_path, hyper_parameters=settings | {"rewards": terms})
    module = GSPOModule.load_from_checkpoint(path)
    assert module.generate(PROMPTS)
    with pytest.raises(ValueError, match=r"'digits': antigravity.Fly is not imported .* rewards="):
        bare(tmp_path, logger=False).validate(module, whole.data)
    path = changed(whole, tmp_path, hyper_parameters=settings | {"sampler": evil})
    with pytest.raises(ValueError, match=r"antigravity.Fly is not made .* sampler="):
        GSPOModule.load_from_checkpoint(path)
    trusting = settings["policy"] | {"trust_remote_code": True}
    path = changed(whole, tmp_path, hyper_parameters=settings | {"policy": trusting})
    assert not GSPOModule.load_from_checkpoint(path).policy_config.trust_remote_code
    path = changed(whole, tmp_path, hyper_parameters={})  # as earlier versions wrote
    with pytest.raises(ValueError, match=r"does not hold the settings .* policy=PolicyConfig"):
        GSPOModule.load_from_checkpoint(path)
    config = PolicyConfig(str(model_dir), lora=LoRAConfig(rank=2))
    assert GSPOModule.load_from_checkpoint(path, policy=config).generate(PROMPTS)


def test_a_warm_start_comes_back_from_its_checkpoint(tmp_path, model_dir):
    rows = '{"prompt": "1+2=", "completion": "3"}\n{"prompt": "7+9=", "completion": "16"}\n'
    (tmp_path / "demos.jsonl").write_text(rows)
    module = SFTModule(PolicyConfig(str(model_dir)), OptimizerConfig(learning_rate=1e-2))
    data = SFTData(tmp_path / "demos.jsonl", batch_size=2, num_steps=3)
    bare(tmp_path, callbacks=[RolloutCheckpoint()], logger=False).fit(module, data)
    again = SFTModule.load_from_checkpoint(find_checkpoint(tmp_path, "last"))
    assert again.optimizer_config.learning_rate == 1e-2
    pairs = zip(module.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(ValueError, match=r"not hold the weights of the RewardModelModule .*class"):
        RewardModelModule.load_from_checkpoint(find_checkpoint(tmp_path, "last"))
    with pytest.raises(ValueError, match=r"optimizer: expected OptimizerConfig \(learning_rate"):
        RewardModelModule(PolicyConfig(str(model_dir)), torch.optim.AdamW)


# ---- a module without a Trainer, and a plain Trainer ---------------------------------------------


def test_a_module_that_is_called_gives_logits_whatever_the_padding(model_dir):
    module = make_module(model_dir)
    assert not module.state_dict()
    with pytest.raises(RuntimeError, match=r"not loaded yet.*configure_model"):
        module(torch.tensor([[5]]))
    module.configure_model()
    ids = torch.tensor([[5, 6, 7], [0, 8, 9]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    found = module(ids, mask)
    torch.testing.assert_close(found[0], module(ids[:1])[0])
    torch.testing.assert_close(found[1, 1:], module(ids[1:, 1:])[0])
    torch.testing.assert_close(found[:1], module.policy.model(ids[:1]).logits)
    with pytest.raises(ValueError, match=r"list of at least one, such as .*, got '1"):
        module.generate("1+2=")
    with pytest.raises(ValueError, match="prompt 2 must be a text or a list of messages"):
        module.generate(["1+2=", 3])
    with pytest.raises(ValueError, match="prompt 1 is a list of messages, and the tokenizer has"):
        module.generate([[{"role": "user", "content": "1+2="}]])


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("policy", {"path": "a"}, r"model.policy: expected PolicyConfig \(path, .*, got dict"),
        ("policy", None, r"model.policy: expected PolicyConfig \(path, .*, got NoneType"),
        ("optimizer", torch.optim.AdamW, r"expected OptimizerConfig \(learning_rate, .*AdamW"),
        ("sampler", 8, "model.sampler: expected an object with group_size, .*, got int"),
        ("sampler", GroupSampler, "model.sampler: expected an object with .*, got GroupSampler"),
        ("micro_batch_size", "8", "model.micro_batch_size must be >= 1, got '8'"),
        ("max_grad_norm", "1", "model.max_grad_norm must be above 0, got '1'"),
    ],
)
def test_an_argument_of_another_kind_is_named(model_dir, name, value, line):
    with pytest.raises(ValueError, match=line):
        make_module(model_dir, **{name: value})


def test_a_plain_trainer_goes_on_without_a_warning(tmp_path, model_dir, prompts):
    for length, path in ((1, None), (2, tmp_path / "checkpoints" / "rollout=000001.ckpt")):
        trainer = bare(tmp_path, callbacks=[RolloutCheckpoint()])  # pytest makes warnings errors
        data = PromptData(str(prompts), prompts_per_rollout=4, num_rollouts=length)
        trainer.fit(make_module(model_dir), data, ckpt_path=path)
    assert trainer.logger.log_dir.endswith("version_1") and trainer.global_step == 4
    trainer.test(datamodule=PromptData(prompts, prompts), ckpt_path="best", verbose=False)
    assert trainer.ckpt_path == str(tmp_path / "checkpoints/rollout=000002.ckpt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saving", [{"every_n_train_steps": 2}, {"save_last": True}])
def test_a_run_made_longer_goes_on_exactly_from_a_checkpoint_of_lightning(
    tmp_path, model_dir, prompts, saving
):
    def fit(length, callbacks, path=None):
        kept = {"callbacks": callbacks, "enable_checkpointing": bool(callbacks), "logger": False}
        trainer, module = bare(tmp_path, **kept), make_module(model_dir)
        data = PromptData(prompts, prompts_per_rollout=4, num_rollouts=length)
        trainer.fit(module, data, ckpt_path=path)
        assert trainer.global_step == 2 * length
        return module.state_dict()

    whole = fit(2, [])
    fit(1, [ModelCheckpoint(tmp_path / "kept", filename="kept", **saving)])
    again = fit(2, [], tmp_path / "kept" / "kept.ckpt")
    assert all(torch.equal(whole[name], again[name]) for name in whole | again)


def test_a_plain_trainer_is_silent_and_stops_at_num_rollouts(
    tmp_path, model_dir, prompts, capsys, caplog
):
    module, keep = make_module(model_dir), Outputs()
    data = PromptData(str(prompts), str(prompts), prompts_per_rollout=4, num_rollouts=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        leave_out_noise()  # as importing the module did, which pytest has taken back
        callbacks = [ModelCheckpoint(every_n_train_steps=2, save_top_k=-1), keep]
        trainer = bare(tmp_path, callbacks=callbacks, limit_val_batches=1)
        trainer.fit(module, data)
        bare(tmp_path, barebones=True, enable_progress_bar=False).fit(make_module(model_dir), data)
    assert [str(warning.message) for warning in said] == []
    heard = [record.getMessage() for record in caplog.records]
    assert [line for line in heard if "barebones" not in line] == []
    assert [line for line in capsys.readouterr().err.split("\n") if "barebones" not in line] == [""]
    assert len(keep.all) == 2 and trainer.global_step == 4
    warnings.simplefilter("ignore")  # Lightning's callback says that its folder is not empty
    trainer.fit(module, data)
    assert caplog.records[-1].getMessage().startswith("nothing to train: this Trainer has done")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data)
    assert [outputs["index"] for outputs in keep.all] == [0, 1, 2, 3]
    path = min(tmp_path.rglob("*.ckpt"))  # written by Lightning's own callback
    assert GSPOModule.load_from_checkpoint(path).generate(PROMPTS)


def test_a_run_is_not_begun_in_the_folder_of_another(whole, model_dir):
    with pytest.raises(ValueError, match=r"already holds a run .*fit\(..., ckpt_path='.*ckpt'\)"):
        trainer = bare(whole.folder, callbacks=[RolloutCheckpoint()], logger=False)
        trainer.fit(make_module(model_dir), whole.data)


def test_a_fit_that_is_refused_leaves_no_file_and_none_of_its_own_of_an_earlier_one(
    tmp_path, model_dir, prompts
):
    data = PromptData(prompts, prompts_per_rollout=4, num_rollouts=1)
    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path, "csv")]
    trainer = bare(tmp_path / "run", callbacks=[RolloutCheckpoint()], logger=loggers)
    with pytest.raises(ValueError, match="num_minibatches must divide"):
        trainer.fit(make_module(model_dir, num_minibatches=5), data)
    assert not [*tmp_path.rglob("version_*"), *tmp_path.rglob("events*")]
    trainer.fit(make_module(model_dir), data)
    before = {*tmp_path.rglob("*")}
    with pytest.raises(ValueError, match="num_minibatches must divide"):
        trainer.fit(make_module(model_dir, num_minibatches=5), data)
    assert {*tmp_path.rglob("*")} >= before


def test_what_is_no_data_of_prompts_is_refused_in_one_line(tmp_path, model_dir):
    trainer = make_trainer(tmp_path)
    module = make_module(model_dir)
    with pytest.raises(ValueError, match=r"GSPOModule learns from PromptData.*trainer.fit"):
        trainer.fit(module, train_dataloaders=DataLoader(PROMPTS), val_dataloaders=[])
    for stage in (trainer.validate, trainer.predict):
        with pytest.raises(ValueError, match=r"must be a PromptBatch, got list; give a PromptData"):
            stage(module, DataLoader(PROMPTS))


def test_data_without_a_trainer_says_what_it_belongs_to(tmp_path, prompts):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "1", "chosen": "2", "rejected": "3"}\n')
    for data in (PromptData(prompts, prompts), PreferenceData(tmp_path / "pairs.jsonl")):
        for use in (lambda: data.setup("fit"), data.train_dataloader, data.val_dataloader):  # noqa: B023
            with pytest.raises(
                ValueError, match=r"Data takes .* from a Trainer.*fit\(module, data"
            ):
                use()


def test_the_example_of_the_page_on_own_runs_runs(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "own_run.md").read_text().partition("## From Python")[2]
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert code.count("60") == 2
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    quick = code.replace("60", "02").replace("num_rollouts=02", "num_rollouts=2")
    exec(quick, {})
    assert "answer" in capsys.readouterr().out
