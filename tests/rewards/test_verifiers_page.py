"""The examples of docs/verifiers.md are what the verifiers give."""

import json
import re

import pytest

from gspo_lightning import rewards
from support.repository import ROOT

PAGE = (ROOT / "docs" / "verifiers.md").read_text()
MAKE = re.compile(r"`((?:[A-Z]\w+)\((?:[^`]*)\))`")
ROW = re.compile(r"\| (?:`(?P<answer>.*?)` \| )?`(?P<text>.*)` \| (?P<reward>none|-?[\d.]+) \|")


def examples():
    """Each row with the verifier that was named last: (verifier, answer, completion, reward)."""
    make = None
    for line in PAGE.splitlines():
        if row := ROW.fullmatch(line):
            yield make, row["answer"], row["text"], row["reward"]
        elif named := MAKE.search(line):
            make = named[1]


EXAMPLES = list(examples())


def value(cell):
    """An answer: lists are JSON, all else is text."""
    try:
        read = json.loads(cell)
    except (TypeError, ValueError):
        read = None
    return read if isinstance(read, list) else (cell or "").replace("⏎", "\n")


@pytest.mark.parametrize(("make", "answer", "text", "reward"), EXAMPLES)
def test_an_example_of_the_page_is_true(make, answer, text, reward):
    if "MathVerify" in make:
        pytest.importorskip("math_verify")
    verifier = eval(make, vars(rewards))
    row = {getattr(verifier, "column", None) or "answer": value(answer)}
    (given,) = verifier([row], [text.replace("⏎", "\n")])
    assert given == (None if reward == "none" else pytest.approx(float(reward), abs=5e-5))


def test_each_verifier_has_right_and_wrong_examples():
    verifiers = {
        *("ExactMatch", "LastNumber", "MathVerify", "MarkedAnswer", "ChoiceLetter", "WordMatch"),
        *("CodeTests", "TagFormat", "TagCount", "RegexMatch", "ValidJSON", "CosineLength"),
    }
    for name in verifiers:
        scores = {reward for make, _, _, reward in EXAMPLES if make.startswith(f"{name}(")}
        assert len(scores) > 1, name
    lines = re.findall(r"^\| `.*\|$", PAGE, re.MULTILINE)
    assert len([line for line in lines if not line.startswith("| `Last")]) == len(EXAMPLES)
