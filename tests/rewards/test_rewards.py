import json
import math
import os
from datetime import date

import pytest
import torch
from jsonargparse import ArgumentParser

from gspo_lightning.data.prompts import PromptData
from gspo_lightning.rewards.terms import (
    MarkedAnswer,
    RewardError,
    RewardTerm,
    overlong_penalty,
    score,
)
from gspo_lightning.rewards.time_limit import TimeLimit
from gspo_lightning.rewards.verifiers import ExactMatch, LastNumber
from support.reward_functions import Scaled, by_command, digits, length
from support.tiny_run import make_module, make_trainer, run, write_prompts


def term(values, weight=1.0):
    return RewardTerm(lambda rows, texts: values, weight)


def test_total_is_the_weighted_sum_and_parts_stay_raw():
    # fact 32
    scores = score({"a": term([1.0, 0.0], 2.0), "b": term([0.5, 3.0], -1.0)}, [{}] * 2, ["x", "y"])
    assert scores.total.tolist() == [1.5, -3.0]
    assert scores.parts["a"].tolist() == [1.0, 0.0] and scores.parts["b"].tolist() == [0.5, 3.0]


def test_a_term_that_does_not_apply_is_left_out_of_the_sum():
    scores = score({"a": term([None, 1.0]), "b": term([2.0, 2.0])}, [{}] * 2, ["x", "y"])
    assert scores.total.tolist() == [2.0, 3.0]
    assert scores.parts["a"].isnan().tolist() == [True, False]


def test_a_row_without_any_term_or_with_nan_has_no_reward():
    # fact 30
    scores = score({"a": term([None, math.nan, 1.0]), "b": term([None, 1.0, 1.0])}, [{}] * 3, "xyz")
    assert scores.total.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "reward 'speed' gave 1 values for 2 completions"),
        ([1.0, math.inf], "reward 'speed' gave inf for the completion 'second'"),
        ([1.0, "much"], "reward 'speed' gave something that is no number: .*completion 'second'"),
    ],
)
def test_a_broken_term_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        score({"speed": term(values)}, [{}] * 2, ["first", "second"])


def test_a_weight_must_be_finite():
    with pytest.raises(ValueError, match="weight must be finite, got nan"):
        term([1.0], math.nan)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("answer: 12", 1.0),
        ("5+7=12, answer: 12", 1.0),
        ("answer: 12 ", 1.0),
        ("answer: 3, answer: 12", 1.0),  # the last one counts
        ("answer: 12, answer: 3", 0.0),
        ("answer: 123", 0.0),
        ("12", 0.0),
        ("", 0.0),
    ],
)
def test_marked_answer(completion, reward):
    assert MarkedAnswer("answer: ")([{"answer": 12}], [completion]) == [reward]


def test_marked_answer_names_a_row_without_answer():
    with pytest.raises(ValueError, match="prompt '1\\+1=' has no column 'answer'"):
        MarkedAnswer()([{"prompt": "1+1="}], ["answer: 2"])


@pytest.mark.parametrize(("length", "expected"), [(6, 0.0), (7, -0.25), (10, -1), (99, -1)])
def test_overlong_penalty_is_a_ramp(length, expected):
    assert overlong_penalty(torch.tensor([length]), max_length=10, ramp=4).item() == expected


def test_overlong_penalty_never_rewards_length():
    penalty = overlong_penalty(torch.arange(50), max_length=40, ramp=7)
    assert (penalty.diff() <= 0).all()


def test_overlong_penalty_names_the_bad_argument():
    with pytest.raises(ValueError, match="ramp must be in"):
        overlong_penalty(torch.tensor([1]), max_length=10, ramp=0)


# --- a term that cannot score --------------------------------------------------------------------

ROWS = [{"prompt": "1+1="}, {"prompt": "2+2="}, {"prompt": "3+3="}]


def test_a_function_that_raises_is_one_line_with_term_place_and_row():
    with pytest.raises(RewardError) as caught:
        score({"speed": RewardTerm(by_command)}, ROWS, ["", "raise", "raise"])
    text = str(caught.value)
    assert text.startswith("reward 'speed' failed: KeyError: 'no such thing' (reward_functions.py:")
    assert text.endswith("row with prompt '2+2=', completion 'raise'") and "\n" not in text
    assert (caught.value.term, caught.value.row) == ("speed", 1)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_function_that_fails_only_on_several_rows_at_once_names_no_row():
    def one_at_a_time(rows, texts):
        if len(texts) > 1:
            raise RuntimeError("too\nmany")
        return [0.0]

    with pytest.raises(RewardError, match=r"'speed' failed: RuntimeError: too many \(") as caught:
        score({"speed": RewardTerm(one_at_a_time)}, ROWS, ["a", "b", "c"])
    assert caught.value.row is None


def fails_in_the_second_rollout(rows, completions):
    fails_in_the_second_rollout.calls += 1
    return [0.0] if fails_in_the_second_rollout.calls > 1 else digits(rows, completions)


def test_a_failed_rollout_is_kept_for_inspection(tmp_path, model_dir):
    fails_in_the_second_rollout.calls = 0
    rewards = {"fine": RewardTerm(digits), "speed": RewardTerm(fails_in_the_second_rollout)}
    with pytest.raises(RewardError, match=r"'speed' gave 1 values for 16 .*failed_rollout.jsonl"):
        run(tmp_path, model_dir, 2, rewards=rewards)
    lines = (tmp_path / "failed_rollout.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert [sample["completion"] for sample in kept] == list(range(16))
    assert {sample["term"] for sample in kept} == {"speed"}
    assert all(set(sample["row"]) == {"prompt"} and sample["text"] for sample in kept)


def test_of_a_failed_rollout_the_row_that_failed_has_the_error(tmp_path, model_dir):
    def odd(rows, texts):
        if any(text[:1] == "7" for text in texts):
            raise ValueError("seven")
        return [0.0] * len(texts)

    class Dated(PromptData):
        def setup(self, stage):
            super().setup(stage)
            for _, row in self.examples["path"]:
                row["day"] = date(2026, 1, 1)  # as Parquet files have

    os.environ["PL_GLOBAL_SEED"] = "0"
    module = make_module(model_dir, rewards={"odd": RewardTerm(odd)})
    data = Dated(str(write_prompts(tmp_path / "p.jsonl")), prompts_per_rollout=10, num_rollouts=9)
    with pytest.raises(RewardError, match="'odd' failed: seven"):
        make_trainer(tmp_path).fit(module, data)
    lines = (tmp_path / "failed_rollout.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    guilty = [sample for sample in kept if sample["error"]]
    first = next(sample for sample in kept if sample["text"][:1] == "7")
    assert guilty == [first] and guilty[0]["row"]["day"] == "2026-01-01"


@pytest.mark.parametrize("term", [MarkedAnswer(), ExactMatch(), TimeLimit(LastNumber())])
def test_a_row_without_the_column_of_a_verifier_is_found_before_training(tmp_path, model_dir, term):
    module = make_module(model_dir, rewards={"right": RewardTerm(term)})
    module.configure_model = lambda: pytest.fail("the policy was loaded")
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": None}]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PromptData(str(path), prompts_per_rollout=2, num_rollouts=1)
    message = r"row 2 has no column 'answer', which reward 'right' needs; it has \['answer', 'pr"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path).fit(module, data)
    with pytest.raises(ValueError, match=r"data.predict_path: .* row 2 has no column 'answer'"):
        make_trainer(tmp_path).predict(module, PromptData(str(path)))


def test_a_verifier_that_may_skip_rows_trains_on_the_others(tmp_path, model_dir):
    rewards = {"right": RewardTerm(ExactMatch(missing="skip")), "digits": RewardTerm(digits)}
    run(tmp_path, model_dir, rewards=rewards)  # no row has an answer


# --- from a config -------------------------------------------------------------------------------


def parsed(tmp_path, text):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--rewards", type=dict[str, RewardTerm])
    (tmp_path / "c.yaml").write_text(text)
    config = parser.parse_args(["--config", str(tmp_path / "c.yaml")])
    return parser.instantiate(config).rewards


def test_a_term_is_a_function_by_its_path_or_a_class_with_arguments(tmp_path):
    terms = parsed(
        tmp_path,
        """
        rewards:
          plain: {fn: support.reward_functions.length, weight: 0.5}
          made: {fn: {class_path: support.reward_functions.Scaled, init_args: {factor: 3.0}}}
          shaped: {fn: support.reward_functions.length, whiten: true, scale: 2.0, clip: [-1, 1.5]}
          lossy: {fn: support.reward_functions.length, on_error: skip}
          flaky:
            fn: support.reward_functions.length
            on_error: retry 2, then skip
          slow:
            fn:
              class_path: gspo_lightning.rewards.TimeLimit
              init_args: {fn: support.reward_functions.length, seconds: 7.5, on_timeout: -1.0}
          both:
            fn:
              class_path: gspo_lightning.rewards.TimeLimit
              init_args:
                fn: {class_path: gspo_lightning.rewards.LastNumber, init_args: {tolerance: 0.1}}
        """,
    )
    assert terms["plain"].fn is length and terms["plain"].weight == 0.5
    assert isinstance(terms["made"].fn, Scaled) and terms["made"].fn([{}], ["ab"]) == [6.0]
    assert terms["shaped"].whiten and terms["shaped"].scale == 2.0
    assert terms["shaped"].clip == (-1.0, 1.5)
    assert terms["plain"].policy == (0, False) and terms["lossy"].policy == (0, True)
    assert terms["flaky"].policy == (2, True)
    slow = terms["slow"].fn
    assert (slow.seconds, slow.on_timeout) == (7.5, -1.0)
    assert slow([{}], ["abc"]) == [3.0]
    slow.release()
    both = terms["both"].fn
    assert both([{"answer": 3}] * 2, ["3.05", "3.2"]) == [1.0, 0.0]
    both.release()


EVERY = {
    "gspo_lightning.rewards.verifiers.ExactMatch": "{column: a, ignore_case: true, pattern: x}",
    "gspo_lightning.rewards.verifiers.LastNumber": "{missing: skip}",
    "gspo_lightning.rewards.verifiers.MathVerify": "{column: a}",
    "gspo_lightning.rewards.verifiers.RegexMatch": "{pattern: x, where: search}",
    "gspo_lightning.rewards.verifiers.TagFormat": "{tags: [a, b], text_after: true, opened: true}",
    "gspo_lightning.rewards.TagCount": "{tags: [a], opened: true}",
    "gspo_lightning.rewards.ChoiceLetter": "{letters: ABCD, pattern: [x, '.+']}",
    "gspo_lightning.rewards.WordMatch": "{measure: exact, unit: characters}",
    "gspo_lightning.rewards.CodeTests": "{seconds: 2, memory_mib: 256, score: share, workers: 1}",
    "gspo_lightning.rewards.CosineLength": (
        "{limit: 9, right: [2, 1], wrong: [-10, 0], exceeded: -10, "
        "fn: {class_path: gspo_lightning.rewards.LastNumber, init_args: {column: a}}}"
    ),
    "gspo_lightning.rewards.verifiers.ValidJSON": "{required: [a]}",
    "gspo_lightning.rewards.text_rewards.LengthBonus": "{target: 5}",
    "gspo_lightning.rewards.text_rewards.SoftOverlong": "{limit: 9, ramp: 5, unit: characters}",
    "gspo_lightning.rewards.text_rewards.RepetitionPenalty": "{n: 4}",
    "gspo_lightning.RewardModel": "{path: p, chat_template: true, overlong: truncate_left}",
}


@pytest.mark.parametrize("name", EVERY)
def test_every_term_of_the_package_can_stand_in_a_config(tmp_path, name):
    if name.endswith("MathVerify"):
        pytest.importorskip("math_verify")
    text = f"rewards: {{x: {{fn: {{class_path: {name}, init_args: {EVERY[name]}}}}}}}"
    assert type(parsed(tmp_path, text)["x"].fn).__name__ == name.rpartition(".")[2]
