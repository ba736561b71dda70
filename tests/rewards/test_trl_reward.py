"""Reward functions of TRL's signature, compared with TRL's own calls where it is installed."""

import asyncio

import pytest
import torch

from gspo_lightning.rewards import RewardTerm, TRLReward, check_signatures, row_checks, score

CHAT = [{"role": "user", "content": "1+1="}]


def seen(prompts, completions, answer, **columns):
    """Gives what it was called with in place of numbers."""
    return [{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True)]


async def later(prompts, completions, **columns):
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


def test_a_function_gets_prompts_completions_and_columns():
    calls = []

    def near(prompts, completions, answer, level=None, **kwargs):
        calls.append((prompts, completions, answer, level, kwargs))
        return [1.0, None]

    rows = [{"prompt": "a", "answer": 1, "level": 2, "x": 3}, {"prompt": "b", "answer": 4}]
    term = RewardTerm(TRLReward(near), weight=2.0)
    scores = score({"near": term}, rows, ["c", "d"])
    assert calls == [(["a", "b"], ["c", "d"], [1, 4], [2, None], {"x": [3, None]})]
    assert scores.total[0] == 2.0 and scores.total[1].isnan()  # None does not apply


def test_completions_are_messages_where_prompts_are():
    assert TRLReward(seen)([{"prompt": CHAT, "answer": 2}], ["2"]) == [
        {"prompt": CHAT, "completion": [{"role": "assistant", "content": "2"}]}
    ]
    (found,) = TRLReward(seen, completions="messages")([{"prompt": "1=", "answer": 1}], ["1"])
    assert found["completion"] == [{"role": "assistant", "content": "1"}]
    (found,) = TRLReward(seen, "texts", "chat")([{"chat": CHAT, "answer": 2}], ["2"])
    assert found == {"prompt": CHAT, "completion": "2"}


def test_an_async_function_is_awaited():
    terms = {"later": RewardTerm(TRLReward(later))}
    assert score(terms, [{"prompt": "a"}] * 2, ["xx", "yyy"]).total.tolist() == [2.0, 3.0]


@pytest.mark.slow  # TRL takes seconds to import
def test_trl_calls_the_same_function_with_the_same_arguments():
    """`GRPOTrainer._calculate_rewards` on a stand-in for the trainer."""
    pytest.importorskip("trl")
    from types import SimpleNamespace

    from accelerate import PartialState
    from trl import GRPOTrainer

    PartialState()  # which TRL's trainer makes, and its own log needs

    calls = []

    def keep(prompts, completions, answer, **kwargs):
        calls.append((prompts, completions, answer, kwargs["level"]))
        return [0.5, None]

    rows = [{"prompt": CHAT, "answer": a, "level": a + 1} for a in (1, 2)]
    completions = [[{"role": "assistant", "content": text}] for text in ("x", "y")]
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, is_main_process=False),
        reward_funcs=[keep], reward_processing_classes=[None], reward_func_names=["keep"],
        environments=None, state=SimpleNamespace(global_step=0), args=SimpleNamespace(report_to=[]),
        _log_completion_extra=None, _log_metric=None,
    )  # fmt: skip
    theirs = GRPOTrainer._calculate_rewards.__wrapped__(
        trainer, rows, [row["prompt"] for row in rows], completions, [[1], [2]]
    )
    ours = score({"keep": RewardTerm(TRLReward(keep))}, rows, ["x", "y"])
    assert calls[0] == calls[1]
    torch.testing.assert_close(theirs[:, 0], ours.total, equal_nan=True)


@pytest.mark.parametrize(
    ("fn", "line"),
    [
        (lambda rows, texts: [], r"takes \(rows, texts\), and TRL's functions take \(prompts, "),
        (lambda completions, completion_ids, **k: [], "needs completion_ids, which only TRL's"),
        (lambda completions, answer: [], r"takes \(completions, answer\) alone; add \*\*kwargs"),
    ],
)
def test_what_is_no_function_of_trl_is_one_line(fn, line):
    with pytest.raises(ValueError, match=line):
        TRLReward(fn)
    with pytest.raises(ValueError, match="must be auto, texts or messages, got 'text'"):
        TRLReward(seen, "text")


def test_what_needs_wrapping_and_which_columns_it_needs_is_said_before_training():
    with pytest.raises(ValueError, match=r"model.rewards.a.fn takes .* wrap it in gspo.*TRLReward"):
        check_signatures({"a": RewardTerm(seen)})
    terms = {"a": RewardTerm(TRLReward(seen))}
    check_signatures(terms)
    assert row_checks(terms)["a"]([{"prompt": "a", "answer": 1}, {"prompt": "b"}]) == (
        2,
        "there is no column 'answer', only ['prompt'], which reward 'a' reads; mend the row, or "
        "name another column",
    )
