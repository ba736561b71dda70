"""What number or expression a text holds: the last number, or what math-verify can read.

Decides how a number may be spelled, and when a text is words: words are never read as products of
their letters.
"""

import re
from decimal import Decimal

# A minus or plus directly behind a letter, a digit or a closing bracket is an operation, no sign. A
# sign may stand before a currency sign or a mark of emphasis: -$3 and -**3** are -3.
SEPARATOR = r"(?:,(?:\\!)?|\{,\}|\\,|[\u00a0\u2009\u202f])"  # of thousands: in print, TeX, Unicode
NUMBER = re.compile(
    r"(?:(?<![^\W_])(?<![)\]}])([-+])(?:\\?[$€£¥*_{]){0,4})?"
    rf"((?:[0-9]{{1,3}}(?:{SEPARATOR}[0-9]{{3}})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?)"
)


def last_number(text: str) -> Decimal | None:
    """The last number of a text; None if there is none.

    ``1,234.5`` is one number (commas before groups of three digits), ``1,2`` are two. A minus is a
    sign unless it follows a letter, a digit or a closing bracket: ``10-7`` ends in 7, ``= -7`` and
    ``-$7`` in -7. ``50%`` is 50: a percent sign, like any other unit, is not part of the number.
    ``1/2`` ends in 2; fractions are for ``MathVerify``.

    >>> [str(last_number(text)) for text in ("so $1,234.50.", "10-7", "x = -$7", "50%", "none")]
    ['1234.50', '7', '-7', '50', 'None']
    """
    numbers = NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    if not numbers:
        return None
    sign, digits = numbers[-1]
    return Decimal(sign + re.sub(SEPARATOR, "", digits))


EXPONENT = re.compile(r"\s*[-+]?[0-9]*\.?[0-9]+[eE][-+]?[0-9]{1,3}\s*")
DELIMITER = re.compile(r"\$|\\boxed|\\\(|\\\[")
TEXT = re.compile(r"\\(?:text\w*|math\w+|mbox|operatorname)\s*\{([^{}]*)\}")
FUNCTION = r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)|sinh|cosh|tanh|log|ln|exp|pi"
PLAIN_FUNCTION = re.compile(rf"(?<![A-Za-z\\])(?:{FUNCTION})(?![A-Za-z])")
# Names of environments and colours, columns of an array, and lengths are not words of the answer.
MARKUP = r"\\(?:begin|end|color|hspace)\s*\{[^{}]*\}(?:\{[lcr|\s]*\})?"
NO_WORD = re.compile(rf"{MARKUP}|\\[A-Za-z]+|(?<![A-Za-z])(?:{FUNCTION}|sqrt)(?![A-Za-z])")
LETTER = r"[^\W\d_]"
# What makes a text words, not algebra: four letters in a row (two where they are neither Latin nor
# Greek), or a unit such as that of 5 km/h.
WORDS = rf"{LETTER}{{4}}|[^\W\d_A-Za-zͰ-Ͽ]{{2}}|[0-9]\s+{LETTER}{{2,}}\s*/\s*{LETTER}"
# Where nothing says that LaTeX is meant, two letters beside a number are words, too: 72 in.
WORDS_OUTSIDE = rf"{WORDS}|[0-9]\s+{LETTER}{{2}}|{LETTER}{{2}}\s+[0-9]"


def read_answer(answer: str) -> list:
    r"""What math-verify reads in a right answer; empty where it is words without a number.

    LaTeX is only read between delimiters, so an answer without them gets its ``$``, unless it holds
    words: those would become products of letters.

    >>> [read_answer(text)[:1] for text in ("72 dollars", "silent", "x + 1")]
    [[72], [], [x + 1]]
    """
    if answer.count("$") == 1:  # a currency sign
        answer = answer.replace("\\$", "").replace("$", "")
    if DELIMITER.search(answer):
        return read_result(answer)
    if EXPONENT.fullmatch(answer):  # 1e-05, as Python writes it, would be a product with Euler's e
        return read_result(f"{Decimal(answer.strip()):f}")
    letters = NO_WORD.sub(" ", TEXT.sub(" ", answer))
    if re.search(WORDS_OUTSIDE, letters) or only_words(answer):
        return read_number(answer)
    found = read_result(f"${answer}$")
    # 1,22 is two numbers or one with a decimal comma: either may be what is meant.
    return found + read_result(answer) if re.fullmatch(r"\s*-?[0-9]+,[0-9]+\s*", answer) else found


def read_result(text: str) -> list:
    """What math-verify reads in a text; where that is words, their number, or the words as text."""
    from math_verify import parse

    if text.count("$") % 2:  # a currency sign, behind which math-verify loses the minus of -$3
        text = re.sub(r"-\$(?=[.0-9])", "-", text)
    found = parse(text, parsing_timeout=None)
    part = found[-1] if found and isinstance(found[-1], str) else ""
    if only_words(part):
        return [" ".join(TEXT.sub(r"\1", part).casefold().split())]
    if re.search(WORDS, NO_WORD.sub(" ", TEXT.sub(" ", part))):
        return read_number(part)
    if PLAIN_FUNCTION.search(part):  # sin(x) would be a product of i, s and n(x)
        return parse(f"${PLAIN_FUNCTION.sub(as_command, part)}$", parsing_timeout=None)
    return found


def as_command(match: re.Match[str]) -> str:
    return f"\\{match[0]} "


def only_words(text: str) -> bool:
    r"""Whether there are letters in a row, and neither digits nor signs of an operation.

    >>> [only_words(text) for text in (r"\text{red}", "yes", "A", "xy + 1", r"2\pi")]
    [True, True, False, False, False]
    """
    spoken = NO_WORD.sub(" ", TEXT.sub(r" \1 ", text))
    return bool(re.search(LETTER * 2, spoken)) and not re.search(r"[^\w\s.,;:!?'\"]|\d|_", spoken)


def read_number(text: str) -> list:
    """The number in a text of words, if there is one and no other, and nothing to be computed."""
    from math_verify import ExprExtractionConfig, parse

    numbers = list(re.finditer(rf"{NUMBER.pattern}(?:\s*/\s*[0-9]+)?", text))
    if len(numbers) != 1 or re.search(r"[+*^]|\s-\s", text):
        return []
    found = parse(text, [ExprExtractionConfig()], parsing_timeout=None)
    return found or parse(numbers[0][0], parsing_timeout=None)
