r"""Text that others wrote, on its way to a reader: it is shown, and no reader obeys it.

A policy may write anything: terminal sequences, HTML, links to pictures, marks that turn the
direction of text. So may prompts, columns of rows, and the messages of what reward functions raise.
Decides, for each kind of reader, how such text is written down: ``printable`` for a terminal, a log
and a picture's labels, ``markdown`` for TensorBoard and reports, ``json_line`` for files of JSON.
"""

import json
import re
import string
from typing import Any

from gspo_lightning.start.layout import is_shown, printable

_MARKUP = re.compile(f"[{re.escape(string.punctuation)}\n\r\t]")


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
    return "".join(c if is_shown(c) else json.dumps(c)[1:-1] for c in text) + "\n"
