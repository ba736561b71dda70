r"""Text that others wrote, on its way to a reader: it is shown, and no reader obeys it.

A policy may write anything: terminal sequences, HTML, links to pictures, marks that turn the
direction of text. So may prompts, columns of rows, and the messages of what reward functions raise.
Decides, for each kind of reader, how such text is written down: ``printable`` for a terminal, a log
and a picture's labels, ``markdown`` for TensorBoard and reports, ``json_line`` for files of JSON.
"""

import json
import re
import string
import unicodedata
from typing import Any

_MARKUP = re.compile(f"[{re.escape(string.punctuation)}\n\r\t]")


def _is_shown(char: str) -> bool:
    """Whether a character is seen where it stands, or is a space.

    Others are control characters (C0, C1), line ends, marks of direction, of zero width or of a
    language, halves of a character, and what no font has.
    """
    return char.isprintable() or unicodedata.category(char) == "Zs"


def printable(text: str, keep: str = "") -> str:
    r"""Text for a terminal: what is not seen becomes an escape of Python, but for ``keep``.

    >>> printable("reward 'a' failed: \x1b]0;title\x07\n\u202e\u200b")
    "reward 'a' failed: \\x1b]0;title\\x07\\n\\u202e\\u200b"
    >>> printable("é 日本\u3000語 \n", keep="\n")
    'é 日本\u3000語 \n'
    """
    if text.isprintable():
        return text
    return "".join(c if _is_shown(c) or c in keep else repr(c)[1:-1] for c in text)


def markdown(text: str) -> str:
    r"""Text for Markdown and HTML, on one line: nothing in it is markup, a link or a cell's end.

    All ASCII punctuation is written by number, since each kind of Markdown has marks of its own.

    >>> markdown("<b>|*"), markdown("\x1b[1m\x00")
    ('&#60;b&#62;&#124;&#42;', '&#92;x1b&#91;1m&#92;x00')
    """
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", printable(text, keep="\n\r\t"))


def kind_of_value(value: Any) -> str:
    """The kind of a value that others wrote, as they know it.

    >>> kind_of_value(None), kind_of_value(1.5)
    ('null', 'a float')
    """
    return "null" if value is None else f"a {type(value).__name__}"


def json_line(value: Any) -> str:
    r"""A line of JSON that gives ``value`` back, and is harmless on a terminal.

    What JSON has no word for, such as dates and arrays in rows of Parquet files, is kept as text.

    >>> json_line({"text": "é\x9b1m\u2028"}), json.loads(json_line("\x9b\ud800"))
    ('{"text": "é\\u009b1m\\u2028"}\n', '\x9b\ud800')
    """
    text = json.dumps(value, ensure_ascii=False, default=str)
    return "".join(c if _is_shown(c) else json.dumps(c)[1:-1] for c in text) + "\n"
