"""The table of all figures in docs/curves.md, made from the package's own.

Decides how the table looks. ``make curves`` writes it anew; a test compares.
"""

import sys

from gspo_lightning.curves.table import FIRST_SCREEN, PATTERNS, TABLE
from support.repository import ROOT

PAGE = ROOT / "docs" / "curves.md"
BEGIN, END = "<!-- made by tests/support/curves_page.py: begin -->", "<!-- end -->"
MADE_UP = {"reward/(.+)": "reward/NAME", r"val/reward_(.+)": "val/reward_NAME"}
MADE_UP |= {r"val/pass_at_(\d+)": "val/pass_at_K"}
MADE_UP |= {r"memory/(\w+?)_gib(?:_(\w+))?": "memory/PHASE_gib"}
MADE_UP |= {r"time/waiting_(\w+)": "time/waiting_PHASE"}
MADE_UP |= {name: name for name in PATTERNS if name == "time/waiting_gradient"}


def page() -> str:
    """The part of the page that comes from the table."""
    rows = dict(TABLE)
    for pattern, made in PATTERNS.items():
        name = MADE_UP[pattern]
        word = name.partition("/")[2].replace("reward_", "").replace("pass_at_", "")
        word = word.replace("_gib", "").replace("waiting_", "")
        rows[name] = type(made)(*(text.replace("{0}", word) for text in made))
    groups: dict[str, list[str]] = {}
    for name, (_, unit, meaning) in rows.items():
        tag = f" Also `{FIRST_SCREEN[name]}`." if name in FIRST_SCREEN else ""
        groups.setdefault(name.partition("/")[0], []).append(
            f"| `{name}` | {unit} | {meaning}{tag} |\n"
        )
    return "".join(
        f"\n### {group}\n\n| Name | Unit | Meaning |\n| --- | --- | --- |\n{''.join(lines)}"
        for group, lines in groups.items()
    )


def written() -> str:
    """The whole page as it should be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return f"{before}{BEGIN}\n{page()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(written())
