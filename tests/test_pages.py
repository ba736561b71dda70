"""The pages are in the navigation, their links lead somewhere, and lines they quote are said."""

import ast
import importlib.util
import re

import pytest
import yaml

import gspo_lightning
from support.pages import PAGES, anchors, blocks, links
from support.repository import ROOT

DOCS = ROOT / "docs"


def site():
    """The hook of the site, which is in no package."""
    spec = importlib.util.spec_from_file_location("site_hook", DOCS / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entries(nav):
    for entry in nav:
        inside = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from entries(inside) if isinstance(inside, list) else [inside]


def test_every_page_is_in_the_navigation_of_the_site_and_on_the_front_page():
    nav = list(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    beside = site().BESIDE
    pages = {page.name for page in DOCS.glob("*.md")}
    assert sorted(nav) == sorted(pages | set(beside.values()))
    assert all((ROOT / path).is_file() for path in beside)
    named = {path for path, _ in links(ROOT / "README.md")}
    assert pages <= {path.removeprefix("docs/") for path in named}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page):
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{path} is not there"
        if anchor and target.name != "api.md":  # whose anchors are names of the package
            assert anchor in anchors(target), f"{target.name} has no heading #{anchor}"
        elif anchor:
            assert f"::: {anchor}" in target.read_text()


def test_links_between_files_become_links_between_pages():
    turn = site().for_the_site
    assert turn("[a](docs/b.md#c), ![d](docs/images/e.png)", "README.md") == (
        "[a](b.md#c), ![d](images/e.png)"
    )
    assert turn("[`f[0]`](../data/arithmetic/README.md)", "docs/b.md") == (
        "[`f[0]`](data_arithmetic.md)"
    )
    assert turn("[g](make.py) [h](https://h.org) [i](#j)", "data/arithmetic/README.md") == (
        "g [h](https://h.org) [i](#j)"
    )


def test_every_public_name_is_on_the_page_of_the_api():
    named = re.findall(r"^::: gspo_lightning\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(gspo_lightning.__all__)


def said():
    """All texts of the package but docstrings, with … for what a message fills in."""
    for path in (ROOT / "gspo_lightning").rglob("*.py"):
        tree = ast.parse(path.read_text())
        documents = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and id(node) not in documents:
                yield str(node.value)


def test_the_lines_of_the_page_on_troubles_are_said_by_the_code():
    page = (DOCS / "troubleshooting.md").read_text()
    lines = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(lines) >= 25
    texts = list(said())
    for line in lines:
        pieces = [re.escape(piece) for piece in line.replace("...", "…").split("…") if piece]
        pattern = re.compile(".*".join(pieces), re.DOTALL)
        assert any(pattern.search(text) for text in texts), line


def test_the_step_shown_to_a_reader_is_the_step_of_the_module():
    (shown,) = (b.text for b in blocks(DOCS / "reading_the_code.md")[0] if b.language == "python")
    source = ast.parse((ROOT / "gspo_lightning" / "module.py").read_text())
    (real,) = (n for n in ast.walk(source) if getattr(n, "name", "") == "training_step")
    (ours,) = ast.parse(shown).body
    assert ours.name == real.name
    body = [n for n in real.body if not isinstance(getattr(n, "value", None), ast.Constant)]
    assert [ast.unparse(n) for n in ours.body] == [ast.unparse(n) for n in body]
