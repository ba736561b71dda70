"""Verifiers of words: which letter is chosen, which words are shared."""

import re
import string
import time
from collections import Counter

import pytest

from gspo_lightning.rewards import ChoiceLetter, WordMatch
from gspo_lightning.rewards.words import chosen


@pytest.mark.parametrize(
    "text",
    [
        *("B", "b", "(b)", "**B**", "B.", "B) Rome", "B. Rome", "B: Rome", "Let me see.\n\nB"),
        *("Answer: B", "answer: b", "**Answer:** B", "Answer:B", "The answer is b.", "Answer: (B)"),
        *("The correct answer is B, since (A) is not.", "The answer is:\n\n(B) Rome"),
        *(
            "Answer is option B.",
            "The correct option is B",
            "The answer would be B",
            "so (B) it is",
        ),
        *(r"$\boxed{B}$", r"\boxed{\textbf{(B)}\ 5}", r"\boxed{\text{(B)}}", "<answer>B</answer>"),
        *("The answer is A. No: the answer is B", "Not (A), but the answer is **(B)** Rome"),
    ],
)
def test_a_letter_is_chosen(text):
    assert chosen(text, "ABCD") == "B"


@pytest.mark.parametrize(
    "text",
    [
        *("A dog", "A good answer", "Answer: A dog has four legs", "The answer is Bob", "Rome", ""),
        *("The answer is A or B", "(A) or (B)", "A) or B)", "A/B", "Answer: A, B", r"\boxed{A,B}"),
        *(r"\boxed{AB}", "(A) Oslo (B) Rome (C) Bonn: Rome", "A is wrong, hence B.", "answer B's"),
    ],
)
def test_no_letter_is_chosen(text):
    assert chosen(text, "ABCD") is None


def test_the_answer_may_be_written_in_several_ways():
    answers = ["B", "b", "(B)", "B. Rome", " b) ", "A"]
    rows = [{"answer": answer} for answer in answers]
    assert ChoiceLetter()(rows, ["The answer is B"] * 6) == [1.0] * 5 + [0.0]
    assert ChoiceLetter(letters="xy")([{"answer": "Y"}], ["(y)"]) == [1.0]
    assert ChoiceLetter(pattern="</think>(.*)")(rows[:1], ["(A)</think>(B)"]) == [1.0]
    with pytest.raises(ValueError, match="the answer 'Rome' begins with none of the letters ABCDE"):
        ChoiceLetter().check_row({"answer": "Rome"})
    with pytest.raises(ValueError, match=r"ChoiceLetter\.letters must be different letters"):
        ChoiceLetter(letters="AA")


@pytest.mark.parametrize(
    "part", [" ", "\n", "answer ", "(", "*", "A ", "A\n", "answer:", r"\boxed{"]
)
def test_a_text_that_repeats_itself_is_judged_at_once(part):
    text = part * (100_000 // len(part)) + "x"
    start = time.process_time()
    chosen(text, "ABCD"), WordMatch()([{"answer": "x"}], [text])
    assert time.process_time() - start < 1


def squad_f1(given, right):
    """The measure of SQuAD, written again in its own words: (exact, F1)."""
    both = []
    for text in (given, right):
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        both.append([w for w in re.sub(r"\b(a|an|the)\b", " ", text).split()])
    if not both[0] or not both[1]:
        return float(both[0] == both[1]), float(both[0] == both[1])
    same = sum(min(n, Counter(both[1])[word]) for word, n in Counter(both[0]).items())
    if not same:
        return 0.0, 0.0
    precision, recall = same / len(both[0]), same / len(both[1])
    return float(both[0] == both[1]), 2 * precision * recall / (precision + recall)


def test_word_match_is_the_measure_of_squad():
    texts = [
        *(
            "the Eiffel Tower",
            "Eiffel tower!",
            "A tower, in Paris",
            "tower tower",
            "",
            "the",
            "Rome",
        ),
        *("U.S.A.", "usa", "it's an    apple", "its apple", "anthem", "theatre a b"),
    ]
    for right in texts:
        rows = [{"answer": right}] * len(texts)
        for column, measure in enumerate(("exact", "f1")):
            expected = [squad_f1(given, right)[column] for given in texts]
            assert WordMatch(measure=measure)(rows, texts) == pytest.approx(expected)


def test_of_several_answers_the_best_one_counts():
    answers = [["Rome", "the city of Rome"], {"text": ["Oslo", "Rome"], "answer_start": [1, 2]}]
    rows = [{"answer": answer} for answer in answers]
    assert WordMatch()(rows, ["City of Rome", "rome"]) == [1.0, 1.0]
    assert WordMatch()([{"answer": {"text": []}}] * 2, ["", "Rome"]) == [1.0, 0.0]
    assert WordMatch()([{"answer": 1889}], ["in 1889"]) == pytest.approx([2 / 3])
    with pytest.raises(ValueError, match=r"the answer '\[\[1\]\]' is neither a text nor a list"):
        WordMatch().check_row({"answer": [[1]]})
    WordMatch().check_row({"answer": ["Rome"]})


def test_characters_are_shared_where_there_are_no_spaces():
    # 2 of 2 and 2 of 5: 2 * 2 / 7
    assert WordMatch(unit="characters")([{"answer": "埃菲尔铁塔"}], ["铁塔。"]) == [4 / 7]
    assert WordMatch()([{"answer": "埃菲尔铁塔"}], ["铁塔。"]) == [0.0]
