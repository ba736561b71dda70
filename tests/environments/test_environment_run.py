"""Whole runs with an environment: what is logged, shown, refused, and evaluated."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gspo_lightning import EnvironmentReward, GSPOModule, PromptData, Turn
from gspo_lightning.callbacks.report import sample_rows
from gspo_lightning.data.prompts import PromptData as Prompts
from gspo_lightning.doctor.environment import episodes, out_of_turns
from gspo_lightning.doctor.text import example
from gspo_lightning.environments import COLUMN, transcript
from gspo_lightning.evaluation import Evaluation
from gspo_lightning.rewards.calls import RewardError
from gspo_lightning.rewards.terms import RewardTerm
from gspo_lightning.sampling import GroupSampler
from gspo_lightning.vllm.sampler import VLLMSampler
from support.environments import Says, Talker
from support.observers import Outputs
from support.tiny_run import make_module, make_trainer, run, write_prompts

EARNED = {"earned": RewardTerm(EnvironmentReward())}
T, RAMP = 20, 12


def settings(environment=None, on_error="stop", **options):
    environment = environment or Talker()
    return {
        "sampler": GroupSampler(4, T, environment=environment, max_turns=3),
        "rewards": {"earned": RewardTerm(EnvironmentReward(), on_error=on_error)},
        **options,
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_dir):
    """A run of two rollouts with validation, and what its rollouts handed on."""
    folder, keep, environment = tmp_path_factory.mktemp("run"), Outputs(), Talker()
    options = settings(environment, overlong_ramp=RAMP)
    options["evaluation"] = Evaluation("earned", 0.5, num_samples=2, ks=(1,))
    module = make_module(model_dir, **options)
    prompts = str(write_prompts(folder / "prompts.jsonl"))
    data = PromptData(prompts, prompts, prompts_per_rollout=4, num_rollouts=2)
    trainer = make_trainer(folder, callbacks=[keep], val_check_interval=2)
    trainer.fit(module, data)
    return module, trainer, keep.all, environment


def test_figures_are_those_of_the_episodes(trained):
    for outputs in trained[2]:
        rollout, figures = outputs["rollout"], outputs["metrics"]
        episodes = [row[COLUMN] for row in rollout.rows]
        assert figures["env/turns"] == sum(len(e["turns"]) for e in episodes) / 16
        assert figures["env/tokens"] == sum(e["tokens"] for e in episodes) / 16 > 1
        assert figures["env/out_of_turns"] == sum(e["end"] == "turns" for e in episodes) / 16
        assert figures["env/errors"] == figures["env/timeouts"] == 0
        assert 0 < figures["time/environment"] < figures["time/rollout"]
        drawn = rollout.mask.sum(1)
        assert figures["train/avg_response_length"] == pytest.approx(drawn.double().mean().item())
        assert figures["rollout/tokens"] == drawn.sum() < rollout.lengths.sum()
        assert outputs["lengths"].tolist() == drawn.tolist()
        assert figures["rollout/truncated_fraction"] == (~rollout.finished).double().mean()


def test_rewards_are_what_the_episodes_earned_and_length_counts_what_was_read(trained):
    """The overlong ramp is about room: it counts the environment's tokens, as the limit does."""
    for outputs in trained[2]:
        rollout = outputs["rollout"]
        earned = [row[COLUMN]["reward"] for row in rollout.rows]
        assert rollout.reward_parts["earned"].tolist() == pytest.approx(earned)
        for length, penalty in zip(
            rollout.lengths.tolist(), rollout.reward_parts["overlong"].tolist(), strict=True
        ):
            assert penalty == pytest.approx(-min(max(length - (T - RAMP), 0) / RAMP, 1))


def test_validation_asks_the_environment(trained):
    module, trainer, _, environment = trained
    asked = len(environment.seeds)
    assert asked == 2 * 16 + 10 * (1 + 2)  # two rollouts, and ten prompts greedily and twice
    (figures,) = trainer.validate(module, trainer.datamodule, verbose=False)
    assert len(environment.seeds) == asked + 30
    assert {"val/accuracy_greedy", "val/pass_at_1", "val/reward"} <= figures.keys()
    assert figures["val/reward"] == pytest.approx(figures["val/reward_earned"]) != 0


def test_people_see_what_the_environment_said(trained):
    module, trainer, (outputs, _), _ = trained
    rollout = outputs["rollout"]
    spoken = [transcript(row[COLUMN]) for row in rollout.rows]
    assert any("[environment: " in text for text in spoken)
    shown = sample_rows(outputs, module.policy.tokenizer, 16, 4)
    assert sorted(row["completion"] for row in shown) == sorted(spoken)
    (predicted, *_) = trainer.predict(module, trainer.datamodule)
    completion = json.loads(json.dumps(predicted[0]))["completions"][0]
    assert completion[COLUMN].keys() == {"turns", "reward", "end", "error", "tokens"}
    assert completion["parts"]["earned"] == completion[COLUMN]["reward"]
    first = next(i for i, row in enumerate(rollout.rows) if row[COLUMN]["tokens"])
    said = example(module.policy, rollout.select(torch.tensor([first])))[1]
    given = rollout.rows[first][COLUMN]["tokens"]
    assert "[environment: " in said.text and f"{given} of the environment)" in said.text


def test_a_run_is_a_function_of_its_seed(trained, tmp_path, model_dir):
    module, _, expected, _ = trained
    keep = Outputs()
    again = run(tmp_path, model_dir, 2, [keep], **settings(overlong_ramp=RAMP))
    for left, right in zip(keep.all, expected, strict=True):
        assert torch.equal(left["rollout"].completion_ids, right["rollout"].completion_ids)
        assert left["rollout"].rows == right["rollout"].rows
    for one, other in zip(again.parameters(), module.parameters(), strict=True):
        assert torch.equal(one, other)


def fails(row, text):
    return OSError("no server") if "+" in row["prompt"] else Turn(None, len(text))


def test_an_environment_that_fails_stops_the_run_and_its_completions_are_kept(tmp_path, model_dir):
    with pytest.raises(RewardError, match="the environment failed: OSError: no server"):
        run(tmp_path, model_dir, **settings(Says(fails)))
    lines = (tmp_path / "failed_rollout.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert {line["row"][COLUMN]["end"] for line in kept} >= {"error"}


def test_an_environment_that_fails_costs_its_rows_alone_where_errors_are_skipped(
    tmp_path, model_dir
):
    keep = Outputs()
    with pytest.warns(UserWarning, match="completions get no reward.*no server"):
        run(tmp_path, model_dir, 1, [keep], **settings(Says(fails), "skip"))
    (outputs,) = keep.all
    rewards, rows = outputs["rollout"].rewards.tolist(), outputs["rollout"].rows
    failed = [row[COLUMN]["end"] == "error" for row in rows]
    assert 0 < sum(failed) < 16 and [math.isnan(reward) for reward in rewards] == failed
    assert outputs["metrics"]["env/errors"] == outputs["metrics"]["reward/missing"] == sum(failed)


# --- at the door ---------------------------------------------------------------------------------

TALK = GroupSampler(4, T, environment=Talker())
REFUSED = [
    ({"sampler": TALK}, "sampler.environment needs a term"),
    ({"rewards": EARNED}, "reward 'earned' is an EnvironmentReward, and the sampler has no"),
    (
        {"sampler": TALK, "rewards": {"e": RewardTerm(EnvironmentReward(), on_error="retry 2")}},
        "reward 'e': on_error 'retry 2' would ask an episode again",
    ),
]


@pytest.mark.parametrize(("options", "text"), REFUSED)
def test_an_environment_and_its_reward_come_together(model_dir, options, text):
    with pytest.raises(ValueError, match=text):
        make_module(model_dir, **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_turns": 0}, "sampler.max_turns must be >= 1, got 0"),
        ({"environment_seconds": 0.0}, "sampler.environment_seconds must be above 0"),
    ],
)
def test_the_sampler_names_the_bad_argument(options, text):
    with pytest.raises(ValueError, match=text):
        GroupSampler(environment=Talker(), **options)


@pytest.mark.parametrize("sampler", [GroupSampler, VLLMSampler])
@pytest.mark.parametrize("options", [{"max_turns": 4}, {"environment_seconds": 2.0}])
def test_settings_of_turns_want_an_environment(sampler, options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"sampler\.{name} is for turns .* or take {name} out"):
        sampler(**options)
    sampler(max_turns=8)


def refused(tmp_path, module, rows, **options):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Prompts(str(path), prompts_per_rollout=4, num_rollouts=1, **options)
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path).fit(module, data)
    assert module.policy is None  # nothing was loaded
    return str(error.value)


def test_data_and_template_are_looked_at_before_anything_is_loaded(tmp_path, model_dir, tokenizer):
    rows = [{"prompt": "1+2="}] * 3 + [{"prompt": "3=", "episode": 1}]
    text = refused(tmp_path, make_module(model_dir, **settings()), rows)
    assert text.startswith("data.path: row 4 has a column 'episode'")

    module = make_module(model_dir, **settings())
    module.tokenizer.chat_template = "{{ messages[0].content }}="
    text = refused(tmp_path, module, [{"prompt": "1+2"}], chat_template=True)
    assert text.startswith("model.sampler.environment: the chat template takes no message")


def test_a_checkpoint_imports_no_environment(trained, tmp_path):
    module, trainer, *_ = trained
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    path = tmp_path / "a.ckpt"
    again = GSPOModule.load_from_checkpoint(path, rewards=module.rewards, weights_only=True)
    assert again.sampler.max_turns == 3
    with pytest.raises(
        ValueError, match=r"environment support\.environments\.Talker is named here"
    ):
        make_trainer(tmp_path).validate(again, trainer.datamodule)


def test_doctor_plays_an_episode_again(trained):
    """An environment with a state of its own answers otherwise: a continued run would, too."""
    rollout = trained[2][0]["rollout"]
    found = episodes(Talker(), rollout)
    assert found.status == "ok" and "asked again, it answers the same" in found.text
    count = itertools.count()
    found = episodes(Says(lambda row, text: Turn(str(next(count)))), rollout)
    assert found.status == "warning" and "will not be exact" in found.text
    unknown = SimpleNamespace(unk_token_id=int(rollout.completion_ids[~rollout.mask].max()))
    found = episodes(Talker(), rollout, unknown)
    assert found.status == "warning" and "unknown to the tokenizer" in found.text
    ends = [{COLUMN: {"end": end}} for end in ("turns", "done", "turns", "tokens")]
    assert out_of_turns(SimpleNamespace(rows=ends)) == 0.5
    broken = dict(rollout.rows[3])
    broken[COLUMN] = broken[COLUMN] | {"error": "OSError: no server", "end": "error"}
    rollout = replace(rollout, rows=[*rollout.rows[:3], broken, *rollout.rows[4:]])
    found = episodes(Talker(), rollout)
    assert found.status == "error" and "1 of 16 episodes failed: OSError: no" in found.text
