"""What becomes of each option, callback and logger of Lightning: a table, and its page in docs.

Decides how the page looks. ``make lightning`` writes it anew; a test tries what each row claims,
and fails for a name of Lightning's that has no row.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import yaml

from support.repository import ROOT

FILE = Path(__file__).with_suffix(".yaml")
PAGE = ROOT / "docs" / "lightning.md"
BEGIN, END = "<!-- made by tests/support/lightning_table.py: begin -->", "<!-- end -->"
WORKS, REFUSED, NOTHING = "works", "refused", "no effect"


class Row(NamedTuple):
    """A line of the page: what becomes of a name, and what to know of it."""

    here: str
    note: str = ""


TABLES = {
    title: {name: Row(**row) for name, row in rows.items()}
    for title, rows in yaml.safe_load(FILE.read_text()).items()
}


def page() -> str:
    """The part of the page that comes from the table."""
    text = ""
    for title, rows in TABLES.items():
        text += f"\n### {title}\n\n| Name | Here | |\n| --- | --- | --- |\n"
        for name, row in rows.items():
            text += f"| `{name}` | {row.here} | {row.note} |\n"
    return text


def written() -> str:
    """The whole page as it should be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return f"{before}{BEGIN}\n{page()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(written())
