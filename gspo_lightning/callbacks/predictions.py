"""What ``predict`` leaves: JSON lines.

Decides where they lie. Leaves out what a prediction is (``evaluation.describe``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from gspo_lightning.callbacks.files import check_file_name
from gspo_lightning.callbacks.json_lines import write_json_lines


class PredictionWriter(Callback):
    """Write what ``predict`` returns as JSON lines, one prompt a line.

    Ranks other than 0 write files of their own, ``predictions.rank1.jsonl`` and so on. A plain
    callback: Lightning's prediction writer warns about every loader it cannot index.

    Args:
        path: Name of the file inside the run folder; a file of that name is replaced.
    """

    def __init__(self, path: str = "predictions.jsonl") -> None:
        check_file_name(path)
        self.path = path

    def file(self, trainer: Any) -> Path:
        file = Path(trainer.default_root_dir) / self.path
        rank = trainer.global_rank
        return file if rank == 0 else file.with_name(f"{file.stem}.rank{rank}{file.suffix}")

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self.file(trainer).unlink(missing_ok=True)

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        write_json_lines(self.file(trainer), outputs)
