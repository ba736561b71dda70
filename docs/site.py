"""Pages of the site that lie beside docs/: the README, CONTRIBUTING, ... under their own names.

A hook of MkDocs (mkdocs.yml). Decides where a link from one Markdown file of the repository to
another leads in the site; a link to a file that is no page becomes the file's name.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

FORMULA = re.compile(r"^\$\$\n(.+?)\n\$\$$", re.DOTALL | re.MULTILINE)
ROOT = Path(__file__).parents[1]
BESIDE = {  # of each file of the repository: the page that it is
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "data/arithmetic/README.md": "data_arithmetic.md",
    "data/preference/README.md": "data_preference.md",
    "data/scenarios/README.md": "data_scenarios.md",
    "data/turns/README.md": "data_turns.md",
}
LINK = re.compile(r"(!?)\[((?:[^\]`]|`[^`]*`)*)\]\(([^)\s]+)\)")


def for_the_site(text: str, source: str) -> str:
    """The Markdown of a file of the repository, with links as the site needs them."""

    def link(match: re.Match[str]) -> str:
        mark, words, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        page = BESIDE.get(file, file.removeprefix("docs/") if file.startswith("docs/") else "")
        return f"{mark}[{words}]({page}{hash_}{anchor})" if page else words

    return LINK.sub(link, text).replace('src="docs/', 'src="')


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie beside docs/, with formulas that a browser draws by itself."""
    from latex2mathml.converter import convert
    from mkdocs.structure.files import File

    for source, page in BESIDE.items():
        text = for_the_site((ROOT / source).read_text(encoding="utf-8"), source)
        text = FORMULA.sub(lambda match: convert(match[1], display="block"), text)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Mend the links of a page of docs/; those of the others are mended above."""
    if page.file.src_uri in BESIDE.values():
        return markdown
    return for_the_site(markdown, f"docs/{page.file.src_uri}")
