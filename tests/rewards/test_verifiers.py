"""Verifiers: what counts as equal, case by case."""

import sys
import time

import pytest

from gspo_lightning.rewards.verifiers import (
    ExactMatch,
    LastNumber,
    MathVerify,
    RegexMatch,
    TagCount,
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


def test_of_several_patterns_the_first_one_that_matches_decides():
    marked = LastNumber(pattern=["####(.*)", r"boxed\{(\d+)|(x)", ".+"])
    texts = ["boxed{3} #### 2", "boxed{3} or 4", "x or 4", "5", ""]
    assert marked([{"answer": n} for n in (2, 3, 4, 5, 6)], texts) == [1.0, 1.0, 1.0, 1.0, 0.0]


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
        ("-$3", "-3"),
        (r"-\$3.50", "-3.5"),
        ("-€1,000", "-1000"),
        ("-**3**", "-3"),
        ("_-3_", "-3"),
        ("10-$3", "3"),
        ("5 - $3", "3"),
        ("$3", "3"),
        ("1{,}000", "1000"),
        (r"1\,000", "1000"),
        (r"1,\!000", "1000"),
        ("1\N{NARROW NO-BREAK SPACE}000", "1000"),
        ("**1,000.**", "1000"),
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


def test_a_debt_is_no_gain():
    assert LastNumber()([{"answer": n} for n in (3, -3)], ["-$3"] * 2) == [0.0, 1.0]


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


def test_an_answer_without_a_number_is_an_error_before_training_too():
    for judge in (lambda: one(LastNumber(), "3", "none"), lambda: check("none")):
        with pytest.raises(ValueError, match="the answer 'none' holds no number"):
            judge()
    check("3"), check(3), check(None)  # one that is missing is found by its column


def check(answer):
    LastNumber().check_row({"answer": answer})


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


# What is words, and what is algebra. The third value is None where the answer cannot be read.
@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("silent", r"\boxed{listen}", None),
        ("silent", r"\boxed{silent}", None),
        ("$silent$", r"\boxed{listen}", 0.0),
        ("$silent$", r"\boxed{Silent}", 1.0),
        (r"\boxed{\text{silent}}", r"\boxed{listen}", 0.0),
        (r"$\text{red}$", r"$\text{ red }$", 1.0),
        ("no", r"\boxed{on}", None),
        ("七十二", "72", None),
        ("forty two", "42", None),
        ("3 apples and 4 pears", "4", None),
        ("abcd + 2", "2", None),
        ("72 dollars", r"\boxed{72}", 1.0),
        ("72 dollars", r"\boxed{27}", 0.0),
        ("72", r"\boxed{72 dollars}", 1.0),
        ("about 3/4", "0.75", 1.0),
        ("50 percent", "0.5", 1.0),
        ("答案是72", r"\boxed{72}", 1.0),
        ("72 in", "72", 1.0),
        ("5 km/h", r"\boxed{5 km/h}", 1.0),
        ("5 km/h", r"\boxed{6 km/h}", 0.0),
        ("-$3", r"\boxed{-3}", 1.0),
        ("-$3", r"\boxed{3}", 0.0),
        ("3", "The answer is -$3", 0.0),
        ("abc + 2", r"\boxed{2+bca}", 1.0),
        ("$5xyz$", r"\boxed{5zxy}", 1.0),
        ("x = 5", "5", 1.0),
        (r"2\pi r", "2", 0.0),
        ("pi/2", r"\boxed{\frac{\pi}{2}}", 1.0),
        (r"\sin x", r"\boxed{sin(x)}", 1.0),
        (r"3\frac{1}{2}", "3.5", 1.0),
        ("(1, 2)", "2", 0.0),
        ("A", r"\boxed{\text{(A)}}", 1.0),
        ("A", r"\boxed{B}", 0.0),
        ("1.5e3", "1500", 1.0),
        ("1e-05", "$10^{-5}$", 1.0),
    ],
)
def test_words_are_never_read_as_algebra(answer, text, expected):
    pytest.importorskip("math_verify")
    verifier = MathVerify()
    assert one(verifier, text, answer) == expected
    assert verifier.counts == {"unreadable_answers": int(expected is None)}


# Cases of the kinds that the tests of math-verify have; the library itself is asked again.
@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("-5", "-5", True),
        ("7425000", "7,425,000", True),
        ("1000", "1 000", True),
        ("1000.99", "1000,99", True),
        ("1,22", "1.22", True),
        ("1000.99", "it is not 10 but 1,000.99€", True),
        ("2", "AZYUK2A", False),
        ("-10/9", r"$-\frac{10}{9}$", True),
        ("$[0,9)$", "$[0,1)$", False),
        ("$9$", r"Answer \[ 9 \]", True),
        (r"$\sqrt{3}$", r"$\sqrt3 $", True),
        ("$1/3$", r"$\frac{1}{3} \text{meters}$", True),
        ("$1/3$", r"$k = \frac{1}{3}$", True),
        (r"$28\%$", "28 percent", True),
        (r"$28\%$", r"$\boxed{28 percent}$", True),
        ("$0.28$", "28", False),
        ("$2-2p$", r"If $2-x=p$, then $x=2-p$. Thus $x-p=\boxed{2-2p}$.", True),
        (r"$\text{Evelyn}$", r"Therefore, $\boxed{\text{Evelyn}}$ is our answer.", True),
        (r"$\boxed{\text{C}}$", r"$\boxed{\text{(C)}}.$", True),
        (
            r"$\begin{pmatrix} 1 \\ 2 \end{pmatrix}$",
            r"\boxed{\begin{bmatrix}1\\2\end{bmatrix}}",
            True,
        ),
        (
            r"$\begin{array}{cccc}1&2&3&4\end{array}$",
            r"$\begin{array}{cccc}1&2&3&4\end{array}$",
            True,
        ),
        (
            r"$\begin{pmatrix} 1 \\ 2 \end{pmatrix}$",
            r"\boxed{\begin{pmatrix}1\\3\end{pmatrix}}",
            False,
        ),
    ],
)
def test_math_verify_is_no_worse_than_the_library_alone(answer, text, expected):
    library = pytest.importorskip("math_verify")
    readings = (library.parse(part, parsing_timeout=None) for part in (answer, text))
    assert library.verify(*readings, timeout_seconds=None) == expected
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


THOUGHTS = [
    "<think>a</think>b",
    "<think>\na\nb\n</think>\nc",
    "<think>a <b> c</think>\nd",
    "<think></think>\na",
    "<think>\na\nb",
    "a. b",
    "a</think>\nb",
    "a<think>b</think>\nc",
    "<think>a<think>b</think></think>c",
    "<think>a</think>\nb\n<think>c</think>\nd",
]


def test_thoughts_and_then_anything_as_the_reward_of_trl_has_it():
    rewards = pytest.importorskip("trl.rewards")
    theirs = rewards.think_format_reward([[{"content": text}] for text in THOUGHTS])
    assert theirs == [1.0] * 4 + [0.0] * 6
    assert TagFormat(["think"], text_after=True)([{}] * 10, THOUGHTS) == theirs


def test_a_tag_that_the_prompt_opens():
    opened = TagFormat(["think"], text_after=True, opened=True)
    whole = [f"<think>{text}" for text in THOUGHTS]
    expected = TagFormat(["think"], text_after=True)([{}] * 10, whole)
    assert opened([{}] * 10, THOUGHTS) == expected and 1.0 in expected
    assert one(TagCount(opened=True), "7</think><answer>7</answer>") == 1.0


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("</answer><answer></think><think>", 1.0),
        ("<think>a</think><think>b</think>", 0.0),
        ("<think>a</think>b", 0.5),
        ("<think>a<answer>b</answer>", 0.75),
        ("", 0.0),
    ],
)
def test_tag_count(text, share):
    assert one(TagCount(), text) == share


@pytest.mark.parametrize("part", [" ", "\n", "1", "1,", "1 ", "####", "(", "-$", "<think>", "ab "])
def test_a_text_that_repeats_itself_is_judged_at_once(part):
    pytest.importorskip("math_verify")
    text = part * (60_000 // len(part))
    start = time.process_time()
    for verifier in (LastNumber(), TagFormat(), TagCount(), ExactMatch()):
        one(verifier, text, "1")
    assert time.process_time() - start < 1


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
        (lambda: TagFormat("ab"), "TagFormat.tags must be different names, at least one, got 'ab'"),
        (lambda: TagCount([]), "TagCount.tags must be different names"),
        (lambda: LastNumber(pattern=[]), "LastNumber.pattern is an empty list"),
        (lambda: LastNumber(pattern=[".", "("]), "LastNumber.pattern '\\(' is no regular"),
    ],
)
def test_a_bad_argument_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
