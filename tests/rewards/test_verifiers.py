"""Verifiers: what counts as equal, case by case."""

import sys

import pytest

from gspo_lightning.rewards.verifiers import (
    ExactMatch,
    LastNumber,
    MathVerify,
    RegexMatch,
    TagFormat,
    ValidJSON,
    last_number,
)


def one(fn, text, answer=None):
    (value,) = fn([{} if answer is None else {"answer": answer}], [text])
    return value


def test_exact_match_is_of_the_whole_text_but_for_space_at_its_ends():
    assert one(ExactMatch(), " Rome\n", "Rome") == 1.0
    assert one(ExactMatch(), "in Rome", "Rome") == 0.0
    assert one(ExactMatch(), "rome", "Rome") == 0.0
    assert one(ExactMatch(ignore_case=True), "rome", "Rome") == 1.0
    assert one(ExactMatch(), "7", 7) == 1.0


def test_a_pattern_says_which_part_is_judged():
    tagged = ExactMatch(pattern="<a>(.*?)</a>")
    assert one(tagged, "<a>Oslo</a> or <a>\nRome</a>!", "Rome") == 1.0  # the last one
    assert one(tagged, "<a>Rome</a> or <a>Oslo</a>", "Rome") == 0.0
    assert one(tagged, "Rome", "Rome") == 0.0
    assert one(ExactMatch(pattern="[A-Z][a-z]+"), "it is Rome.", "Rome") == 1.0  # no group
    assert one(ExactMatch(pattern="x|(y)"), "y x", "y") == 0.0  # a group without part in it
    assert one(LastNumber(pattern="answer is (.*)"), "the answer is 7 of 9", 9) == 1.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 12.", "12"),
        ("1,234.5", "1234.5"),
        ("12,345,678", "12345678"),
        ("1,2", "2"),
        ("1,2345", "2345"),
        ("1234,567", "567"),
        ("0.5", "0.5"),
        (".5", "0.5"),
        ("-7", "-7"),
        ("= -7", "-7"),
        ("\N{MINUS SIGN}7", "-7"),
        ("+7", "7"),
        ("10-7", "7"),
        ("x-7", "7"),
        ("(3)-7", "7"),
        ("$-1,000", "-1000"),
        ("50%", "50"),
        ("3 apples", "3"),
        ("1.5e3", "1500"),
        ("1e9999999999", "9999999999"),  # no exponent of ours; three digits at most
        ("1/2", "2"),
        ("7 and then none", "7"),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == float(number)


@pytest.mark.parametrize("text", ["", "none", "-", "..."])
def test_no_number(text):
    assert last_number(text) is None
    assert one(LastNumber(), text, 0) == 0.0


def test_last_number_compares_values_not_texts():
    assert one(LastNumber(), "12.50", "12.5") == 1.0
    assert one(LastNumber(), "the sum is 1,000", "reasoning with 3 steps #### 1000") == 1.0
    assert one(LastNumber(), "0.3", 0.1 + 0.2) == 0.0
    assert one(LastNumber(tolerance=1e-9), "0.3", 0.1 + 0.2) == 1.0
    assert one(LastNumber(tolerance=0.5), "10", 11) == 0.0
    assert one(LastNumber(tolerance=0.5), "1e999", "1e998") == 0.0
    assert one(LastNumber(), "-3", 3) == 0.0


def test_last_number_of_a_very_long_number_is_quick():
    assert one(LastNumber(), "9" * 100_000, 9) == 0.0
    assert one(LastNumber(), "1,234" * 20_000, 9) == 0.0


def test_an_answer_without_a_number_is_an_error():
    with pytest.raises(ValueError, match="the answer 'none' holds no number"):
        one(LastNumber(), "3", "none")


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("1/2", r"so \boxed{\frac{1}{2}}", 1.0),
        (r"\frac{1}{2}", "the answer is 0.5", 1.0),
        (r"\boxed{\frac12}", "$0.5$", 1.0),
        ("x^2+2x+1", "$(x+1)^2$", 1.0),
        ("x^2+2x+1", "$(x-1)^2$", 0.0),
        ("50%", "0.5", 1.0),
        (12, "no idea", 0.0),
        (12, "$13$", 0.0),
    ],
)
def test_math_verify(answer, text, expected):
    pytest.importorskip("math_verify")
    assert one(MathVerify(), text, answer) == expected


def test_an_answer_that_cannot_be_read_does_not_apply_and_is_counted():
    pytest.importorskip("math_verify")
    verifier = MathVerify()
    rows = [{"answer": "$ $"}, {"answer": "4"}]
    assert verifier(rows, ["4", "4"]) == [None, 1.0]
    assert verifier.counts == {"unreadable_answers": 1}
    verifier(rows[1:], ["4"])
    assert verifier.counts == {"unreadable_answers": 0}


def test_without_the_package_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"^MathVerify needs .*gspo_lightning\[math\]$"):
        MathVerify()


def test_regex_match():
    assert one(RegexMatch("a+"), " aa\n") == 1.0
    assert one(RegexMatch("a+"), "aab") == 0.0
    assert one(RegexMatch("a+", where="search"), "baab") == 1.0
    assert one(RegexMatch("a.b"), "a\nb") == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>x</think><answer>y</answer>", 1.0),
        ("\n<think>\nx\n</think>\n\n<answer></answer> ", 1.0),
        ("<answer>y</answer><think>x</think>", 0.0),
        ("<think>x</think>", 0.0),
        ("<think>x</think> so <answer>y</answer>", 0.0),
        ("hm <think>x</think><answer>y</answer>", 0.0),
        ("<think>x</think><answer>y</answer>.", 0.0),
        ("<think>x<answer>y</answer></think>", 0.0),
        ("<think><think>x</think><answer>y</answer>", 0.0),
        ("</think>x<think><answer>y</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_tag_format(text, expected):
    assert one(TagFormat(), text) == expected


def test_tags_can_be_chosen():
    assert one(TagFormat(["a"]), "<a>1</a>") == 1.0
    assert one(TagFormat(), "<a>1</a>") == 0.0


@pytest.mark.parametrize(
    ("text", "valid", "with_keys"),
    [
        ('{"a": 1, "b": null}', 1.0, 1.0),
        (' {"a": 1}\n', 1.0, 0.0),
        ("[1, 2]", 1.0, 0.0),
        ('"a b"', 1.0, 0.0),
        ('{"a": 1, "b": NaN}', 0.0, 0.0),
        ('{"a": 1, "b": 2', 0.0, 0.0),
        ('{"a": 1, "b": 2} done', 0.0, 0.0),
        ("{'a': 1}", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("[" * 100_000, 0.0, 0.0),
    ],
)
def test_valid_json(text, valid, with_keys):
    assert one(ValidJSON(), text) == valid
    assert one(ValidJSON(required=["a", "b"]), text) == with_keys


@pytest.mark.parametrize("kind", [ExactMatch, LastNumber, MathVerify])
def test_a_row_without_an_answer_is_an_error_or_does_not_apply(kind):
    if kind is MathVerify:
        pytest.importorskip("math_verify")
    rows = [{"answer": None}, {"answer": 3}]
    with pytest.raises(ValueError, match=r"there is no column 'answer', only \['q'\]"):
        kind()([{"q": 1}], ["3"])
    assert kind(missing="skip")(rows, ["3", "3"]) == [None, 1.0]
    assert kind("solution")([{"solution": "3"}], ["3"]) == [1.0]
    # what is checked before training
    assert kind("solution").column == "solution"
    assert kind(missing="skip").column is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExactMatch(pattern="("), "ExactMatch.pattern '\\(' is no regular expression"),
        (lambda: RegexMatch("["), "RegexMatch.pattern '\\[' is no regular expression"),
        (lambda: LastNumber(tolerance=-1.0), "LastNumber.tolerance must be >= 0, got -1.0"),
        (lambda: TagFormat([]), "TagFormat.tags must be different names"),
        (lambda: TagFormat(["a", "a"]), "TagFormat.tags must be different names"),
    ],
)
def test_a_bad_argument_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
