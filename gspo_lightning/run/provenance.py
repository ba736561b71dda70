"""What code a run was made with: versions, the commit and what it lacks, or a copy of the source.

Nothing here can stop a run: without git, or outside a repository, the source itself is kept.
"""

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from gspo_lightning.checkpoint.fingerprints import source_digest, sources
from gspo_lightning.checkpoint.io import replacing

PACKAGES = ("torch", "lightning", "transformers", "gspo_lightning")
PACKAGE = Path(__file__).parents[1]


def provenance(package: Path = PACKAGE) -> tuple[str, str | None]:
    """Describe the code in ``package`` and in the ``train.py`` beside it.

    Returns:
        The text of ``versions.yaml``; the working tree's diff against the commit, None outside git.
    """
    facts: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "run from a folder, not installed"
    # Ask whether git tracks the package: an environment may lie inside some other repository.
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None
    commit = _git(package, "rev-parse", "HEAD") if tracked else None
    diff = None if commit is None else _uncommitted(package)
    facts["git_commit"] = None if commit is None else commit.strip()
    facts["uncommitted_changes"] = None if diff is None else "yes" if diff else "no"
    facts["source_sha256"] = source_digest(_program(package))
    return yaml.safe_dump(facts, sort_keys=False), diff


def write_provenance(folder: Path, mark: str = "", package: Path = PACKAGE) -> bool:
    """Write ``versions.yaml`` and ``uncommitted.diff`` or ``source/``; returns whether it did.

    Args:
        folder: The run folder.
        mark: Empty for the start of a run, whose files replace older ones. Otherwise part of the
            files' names, which are then written only if something differs from the start.
        package: The folder of the package.
    """
    versions, changes = provenance(package)
    first = folder / "versions.yaml"
    if mark and first.exists():
        diff = folder / "uncommitted.diff"
        old = tuple(
            file.read_text(errors="replace") if file.exists() else "" for file in (first, diff)
        )
        if old == (versions, changes or ""):
            return False
        mark = f".{mark}"
    else:
        mark = ""
    with replacing(folder / f"versions{mark}.yaml") as file:
        file.write(versions.encode())
    diff, source = folder / f"uncommitted{mark}.diff", folder / f"source{mark}"
    diff.unlink(missing_ok=True)
    if source.is_symlink():
        source.unlink()  # what it leads to is not of a run
    elif source.exists():
        shutil.rmtree(source)
    if changes:
        with replacing(diff) as file:
            file.write(changes.encode())
    elif changes is None:
        for name, original in _program(package).items():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(original, target)
    return True


def _program(package: Path) -> dict[str, Path]:
    """The package's source, and a checkout's `train.py`."""
    script = package.parent / "train.py"
    return sources(package) | ({"train.py": script} if script.exists() else {})


def _uncommitted(package: Path) -> str:
    """Changes of tracked files, and new Python files that are not ignored."""
    top = Path((_git(package, "rev-parse", "--show-toplevel") or str(package)).strip())
    parts = [_git(top, "diff", "HEAD", "--no-color", "--no-ext-diff") or ""]
    new = _git(top, "ls-files", "--others", "--exclude-standard", "-z") or ""
    for name in new.split("\0"):
        if name.endswith(".py"):
            arguments = ("diff", "--no-index", "--no-color", "--no-ext-diff", "--", "/dev/null")
            parts.append(_git(top, *arguments, name, codes=(0, 1)) or "")
    return "".join(parts)


def _git(folder: Path, *arguments: str, codes: tuple[int, ...] = (0,)) -> str | None:
    """The output of a git command; None if there is no git, or it says no."""
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode in codes else None
