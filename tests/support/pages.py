"""The Markdown pages of the repository: their blocks of code, links and headings.

A block is run or parsed by `tests/test_page_commands.py`, unless a comment in front of it says why
not: `<!-- not run: needs a card -->`, or which test runs it: `<!-- run by tests/... -->`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from support.repository import ROOT

FOLDERS = ("docs/*.md", "data/*/README.md")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [path for folder in FOLDERS for path in sorted(ROOT.glob(folder))]
FENCE = re.compile(r"^( *)```(.*)$")
MARK = re.compile(r"^ *<!-- (not run: .+|run by tests/\S+\.py) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: Path
    line: int
    language: str
    text: str
    mark: str | None

    @property
    def name(self):
        """Where it stands, for the name of a test."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page):
    """The fenced blocks of a page, and its other lines, joined."""
    found, prose = [], []
    mark, opened, held = None, None, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if opened and fence:
            indent, language, start, why = opened
            text = "\n".join(row[len(indent) :] for row in held)
            found.append(Block(page, start, language, text, why))
            opened, held, mark = None, [], None
        elif opened:
            held.append(line)
        elif fence:
            opened = (fence[1], fence[2].strip(), number, mark)
        else:
            given = MARK.match(line)
            mark = given[1] if given else mark if not line.strip() else None
            prose.append(line)
    assert opened is None, f"{page}: a fence is not closed"
    return found, "\n".join(prose)


def anchors(page):
    """The anchors that GitHub and MkDocs make of the headings of a page."""
    _, prose = blocks(page)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        words = re.sub(r"[^\w\s-]", "", plain.lower())
        found |= {words.strip().replace(" ", "-"), re.sub(r"[\s-]+", "-", words.strip())}
    return found


def links(page):
    """The relative links of a page: (path, anchor), either of them may be empty."""
    _, prose = blocks(page)
    for target in re.findall(r'(?:\]\(|src=")([^)\s"]+)[)"]', prose):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield path, anchor
