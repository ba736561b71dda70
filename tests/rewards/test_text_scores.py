import pytest

from gspo_lightning.rewards.text_rewards import same_language, variety


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("zh", "今天很好", 1.0),
        ("zh", "今天ok", 0.5),
        ("en", "今天ok", 0.5),
        ("en", "Fine, thanks: 3 of 4!", 1.0),
        ("en", "12 + 3", 0.0),
        ("en", "", 0.0),
        ("fr", "bonjour", None),
        (None, "hello", None),
    ],
)
def test_same_language_is_a_share_of_the_letters(language, text, expected):
    assert same_language([{"language": language}], [text]) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"), [("aaaaaa", 0.25), ("abcdef", 1.0), ("ab", 0.0), ("abab", 1.0)]
)
def test_variety_falls_with_repetition(text, expected):
    assert variety([{}], [text]) == [expected]
