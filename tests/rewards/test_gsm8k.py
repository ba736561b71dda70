"""The overlay of GSM8K: the published file as it is, every right answer in every usual spelling."""

import os
import time
from pathlib import Path

import pytest
import yaml

from gspo_lightning.data.tables import column, extract, read_rows
from gspo_lightning.rewards import LastNumber
from support.repository import ROOT

SAMPLE = ROOT / "tests/support/gsm8k/sample.jsonl"
# The published files, where somebody has put them: GSM8K=folder pytest tests/rewards/test_gsm8k.py
WHOLE = Path(os.environ.get("GSM8K", ROOT / "data/gsm8k"))
OVERLAY = yaml.safe_load((ROOT / "configs/task/gsm8k.yaml").read_text())
SPELLINGS = [
    *("{n}", "{n:,}", "{n}.", "{n:,}.", "{n}.0", "{n}.00", "{n:,}.00"),
    *("**{n}**", "**{n:,}**.", "**{n}.**", "`{n}`", "{n} clips", "{n}%", "= {n}", "({n})"),
    *("The answer is {n}.", "the answer is: **{n:,}**", "Answer: {n}", "**Answer**: {n}", "A: {n}"),
    *(r"\boxed{{{n}}}", r"$\boxed{{{n:,}}}$.", r"\boxed{{{n}\text{{ clips}}}}", "$ {n} $"),
]
CURRENCY = [
    "${n}",
    "${n:,}",
    "${n}.00",
    r"\${n}",
    r"\boxed{{\${n}}}",
    "**${n:,}**",
    "The answer is ${n}.",
]


def verifier():
    return LastNumber(**OVERLAY["model"]["init_args"]["rewards"]["right"]["fn"]["init_args"])


def read(file):
    settings = OVERLAY["data"]["init_args"]
    rows = extract("data.path", str(file), read_rows("data.path", str(file)), settings["extract"])
    assert all(column("data.path", str(file), rows, settings["prompt_column"]))
    return rows


def spelled(gold):
    """The number in each spelling, bare and behind the mark; a minus also in its other places."""
    n = int(gold.replace(",", ""))
    texts = [spelling.format(n=n) for spelling in SPELLINGS]
    money = [spelling.format(n=abs(n)) for spelling in CURRENCY]
    if n < 0:
        money = [text.replace("$", "-$", 1).replace(r"\-$", r"-\$") for text in money]
        texts += [f"\N{MINUS SIGN}{-n}", f"-**{-n}**", f"$-{-n}"]
    return [mark + text for text in texts + money for mark in ("", "#### ", "6 of 9, so\n#### ")]


def check(rows):
    right = verifier()
    for row in rows:
        texts = spelled(row["answer"])
        scores = right([row] * len(texts), texts)
        wrong = [text for text, score in zip(texts, scores, strict=True) if score != 1]
        assert wrong == [], row["answer"]


def published(file):
    """Whether each row's own solution is right, and whether the one of the next row is."""
    rows, raw = read(file), read_rows("data.path", str(file))
    solutions = [row["answer"] for row in raw]
    own = verifier()(rows, solutions)
    other = verifier()(rows, solutions[1:] + solutions[:1])
    same = [a["answer"] == b["answer"] for a, b in zip(rows, rows[1:] + rows[:1], strict=True)]
    return own, other, same


def test_a_published_row_is_read_as_it_is():
    answers = [row["answer"] for row in read(SAMPLE)]
    assert len(answers) == 15 and {"-47", "109,200,000", "2,000", "364000", "0"} < set(answers)
    assert answers[-1] == "72" and read(SAMPLE)[-1]["question"].startswith("Natalia sold clips")


def test_every_right_answer_scores_1_in_every_usual_spelling():
    check(read(SAMPLE))


def test_a_published_solution_is_right_for_its_own_question_alone():
    own, other, same = published(SAMPLE)
    assert own == [1.0] * 15
    assert other == [float(equal) for equal in same]


@pytest.mark.slow
@pytest.mark.skipif(not (WHOLE / "train.jsonl").exists(), reason="the files of GSM8K are not here")
def test_all_of_the_published_set():
    files = [WHOLE / "train.jsonl", WHOLE / "test.jsonl"]
    rows = [row for file in files for row in read(file)]
    assert len(rows) == 8792
    check(rows)
    for file in files:
        own, other, same = published(file)
        assert own == [1.0] * len(own) and other == [float(equal) for equal in same]


@pytest.mark.parametrize(
    "part", [" ", "\n", "#", "#### ", "1", "1 ", "1\n", r"\boxed{", "answer is "]
)
def test_a_text_that_repeats_itself_is_judged_at_once(part):
    start = time.process_time()
    verifier()([{"answer": "72"}], [part * (60_000 // len(part)) + "x"])
    assert time.process_time() - start < 1
