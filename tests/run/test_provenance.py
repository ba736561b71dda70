"""What is recorded of the code: in a repository, in a changed one, and outside of git."""

import platform
import shutil
import subprocess

import pytest
import torch
import yaml

from gspo_lightning.run.provenance import PACKAGE, provenance, write_provenance


def git(folder, *arguments):
    options = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *options, "-C", folder, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def package(tmp_path):
    """A package of two files and a room with the script beside it, not in any repository."""
    folder = tmp_path / "code" / "gspo"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "loss.py").write_text("x = 1\n")
    (folder / "room").mkdir()
    (folder / "room" / "head.py").write_text("z = 1\n")
    (folder.parent / "train.py").write_text("run()\n")
    return folder


@pytest.fixture
def repository(package):
    git(package.parent, "init", "-q")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-q", "-m", "first")
    return package


@pytest.fixture
def root(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_versions_and_commit_are_recorded(repository, root):
    assert write_provenance(root, package=repository)
    facts = yaml.safe_load((root / "versions.yaml").read_text())
    assert facts["python"] == platform.python_version()
    assert facts["torch"] == torch.__version__
    assert facts["git_commit"] == git(repository, "rev-parse", "HEAD")
    assert facts["uncommitted_changes"] == "no"
    assert {"lightning", "transformers", "gspo_lightning"} <= facts.keys()
    assert names(root) == ["versions.yaml"]


def test_commit_and_diff_together_give_the_code_back(repository, root, tmp_path):
    (repository / "loss.py").write_text("x = 2\n")
    (repository / "new.py").write_text("y = 3\n")
    (repository / "notes.txt").write_text("mine\n")
    write_provenance(root, package=repository)
    assert names(root) == ["uncommitted.diff", "versions.yaml"]
    copy = tmp_path / "copy"
    git(tmp_path, "clone", "-q", str(repository.parent), str(copy))
    git(copy, "apply", str(root / "uncommitted.diff"))
    assert (copy / "gspo" / "loss.py").read_text() == "x = 2\n"
    assert (copy / "gspo" / "new.py").read_text() == "y = 3\n"
    assert "mine" not in (root / "uncommitted.diff").read_text()


def test_outside_git_the_source_is_kept(package, root):
    write_provenance(root, package=package)
    facts = yaml.safe_load((root / "versions.yaml").read_text())
    assert (facts["git_commit"], facts["uncommitted_changes"]) == (None, None)
    assert names(root) == ["source", "versions.yaml"]
    assert (root / "source" / "gspo" / "loss.py").read_text() == "x = 1\n"
    assert (root / "source" / "gspo" / "room" / "head.py").read_text() == "z = 1\n"
    assert (root / "source" / "train.py").read_text() == "run()\n"


def test_a_package_that_the_repository_around_it_ignores_is_outside_git(repository, root):
    installed = repository.parent / ".venv" / "gspo"
    shutil.copytree(repository, installed)
    (repository.parent / ".gitignore").write_text(".venv\n")
    assert provenance(installed)[1] is None
    write_provenance(root, package=installed)
    assert (root / "source" / "gspo" / "loss.py").exists()


def test_without_git_the_source_is_kept(repository, root, monkeypatch):
    monkeypatch.setenv("PATH", str(root))
    write_provenance(root, package=repository)
    assert (root / "source" / "gspo" / "loss.py").exists()


@pytest.mark.parametrize("kind", ["package", "repository"])
def test_a_continuation_writes_beside_the_start_and_only_what_differs(kind, request, root):
    package = request.getfixturevalue(kind)
    write_provenance(root, package=package)
    before = {path: path.read_text() for path in root.rglob("*") if path.is_file()}
    assert not write_provenance(root, mark="resume-000004", package=package)
    assert {path for path in root.rglob("*") if path.is_file()} == before.keys()
    (package / "loss.py").write_text("x = 2\n")
    assert write_provenance(root, mark="resume-000004", package=package)
    assert {path: path.read_text() for path in before} == before
    extra = "source.resume-000004" if kind == "package" else "uncommitted.resume-000004.diff"
    assert {"versions.resume-000004.yaml", extra} <= set(names(root))


def test_a_second_start_leaves_nothing_of_the_first(package, root):
    write_provenance(root, package=package)
    (package / "loss.py").unlink()
    write_provenance(root, package=package)
    assert not (root / "source" / "gspo" / "loss.py").exists()


def test_a_change_inside_a_room_changes_the_recorded_source(package, root):
    before = yaml.safe_load(provenance(package)[0])["source_sha256"]
    (package / "room" / "head.py").write_text("z = 2\n")
    assert yaml.safe_load(provenance(package)[0])["source_sha256"] != before


def test_the_source_that_is_kept_by_default_is_the_whole_package():
    assert (PACKAGE / "module.py").is_file()
    assert (PACKAGE / "engine" / "head.py").is_file()
