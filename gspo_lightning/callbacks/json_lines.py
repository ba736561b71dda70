"""Files of one JSON object a line that a run adds to.

Decides how lines get there and how those of rollouts that run again are dropped. Leaves out what
the objects say (``report``) and when they are written (``callbacks``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gspo_lightning.callbacks.report import plain
from gspo_lightning.checkpoint.io import replacing


def write_json_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """Append one line per row, in one write."""
    lines = "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8", newline="\n") as stream:
        stream.write(lines)


def keep_rollouts_before(file: Path, rollout: int) -> None:
    """Drop the lines of ``rollout`` and later ones, and a last line that was cut off."""
    with file.open("rb") as old, replacing(file) as new:
        for line in old:
            if line.endswith(b"\n") and json.loads(line)["rollout"] < rollout:
                new.write(line)
