"""What an examination found: three levels of it, as lines for people and as JSON for programs."""

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_only

from gspo_lightning.guards.out_of_memory import is_out_of_memory
from gspo_lightning.run.terminal_log import say

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: Name of the check.
        status: ``ok``; ``warning``, the run would go on, but probably not as wanted; ``error``, it
            would fail, or train something else than the config says.
        text: What was found, in one line.
        remedy: The setting or file to change; empty where nothing needs to be.
        value: The figures behind the text, plain values.
    """

    check: str
    status: Status
    text: str
    remedy: str = ""
    value: Any = None


def worst(findings: Iterable[Finding]) -> Status:
    """The most serious status of all.

    >>> worst([Finding("eos", "ok", ""), Finding("bos", "warning", "")])
    'warning'
    """
    found = {finding.status for finding in findings}
    return "error" if "error" in found else "warning" if "warning" in found else "ok"


@contextmanager
def announced(name: str) -> Iterator[None]:
    """Say on standard error what is examined, and its seconds when that ends.

    On a terminal the line goes when it has ended, as what was found takes its place.
    """
    stream, start = sys.stderr, time.perf_counter()
    if getattr(rank_zero_only, "rank", 0):
        yield
        return
    print(f"{name} ...", end="", file=stream, flush=True)
    try:
        yield
    finally:
        end = "\r\x1b[K" if stream.isatty() else f" {time.perf_counter() - start:.1f} s\n"
        print(end, end="", file=stream, flush=True)


def as_lines(findings: Sequence[Finding], width: int = 0) -> list[str]:
    """One line per finding, and one below it for its remedy; names take ``width`` columns or more.

    >>> for line in as_lines([Finding("pad", "error", "id 99 of 32", "mend the tokenizer")]):
    ...     print(line)
    error    pad  id 99 of 32
                  -> mend the tokenizer
    """
    width = max([width, *(len(finding.check) for finding in findings)])
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<8} {finding.check:<{width}}  {finding.text}")
        if finding.remedy:
            lines.append(" " * (width + 11) + f"-> {finding.remedy}")
    return lines


def as_json(findings: Sequence[Finding]) -> str:
    """A JSON list of ``{check, status, text, remedy, value}``; what is not finite becomes null."""
    return json.dumps([_plain(asdict(finding)) for finding in findings], indent=1)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def attempt(check: str, examine: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    """Run a check; an error in it is a finding, so that the later checks still run."""
    try:
        found = examine()
    except Exception as error:  # any error here would end a run, so every one is a finding
        if os.environ.get("GSPO_TRACEBACK") == "1":
            say("".join(traceback.format_exception(error)))
        text = " ".join(str(error).split())[:400] or type(error).__name__
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        remedy = "GSPO_TRACEBACK=1 shows where"
        if is_out_of_memory(error):
            remedy = "lower model.micro_batch_size and sampler.batch_size, or use a larger device"
        return [Finding(check, "error", f"{kind}{text}", remedy)]
    return as_list(found)


def as_list(found: Finding | list[Finding]) -> list[Finding]:
    """One finding as a list of it."""
    return found if isinstance(found, list) else [found]
