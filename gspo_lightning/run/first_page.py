"""The page of text that loggers show of a run: what it will do, with which code and settings.

Decides what stands on it. Settings are those that loggers get as hyperparameters: what an object of
somebody else's holds may be a secret, and loggers may lie on other people's machines.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gspo_lightning.checkpoint.quoted import printable
from gspo_lightning.policy.settings import run_settings
from gspo_lightning.run.provenance import provenance

GUIDE = """\
**Does it learn?** The group `1 learning`: reward and held-out accuracy should rise, KL divergence
stay near its target, entropy fall slowly. `2 health`: something is wrong where the reward spread
is 0, or where most completions are truncated. Each chart says what it shows (the `i` beside its
name); `docs/curves.md` says what to turn.
"""


def first_page(trainer: Any, module: Any, plan: list[str]) -> str:
    """The page, in Markdown.

    Args:
        trainer: It is set up.
        module: What is trained.
        plan: The lines that the terminal shows.
    """
    file = Path(trainer.default_root_dir, "versions.yaml")
    versions = file.read_text(encoding="utf-8") if file.is_file() else provenance()[0]
    parts = {"Plan": plan, "Versions": versions.splitlines()}
    if trainer.enable_autolog_hparams:
        settings = run_settings(module).items()
        texts = (f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in settings)
        parts["Settings"] = [*texts]
    guide = GUIDE if hasattr(module, "sampler") else ""
    blocks = (f"### {title}\n\n{_verbatim(lines)}" for title, lines in parts.items())
    return "\n\n".join([guide, *blocks]).strip() + "\n"


def _verbatim(lines: Iterable[str]) -> str:
    """Lines as they are: indented, as nothing in them can end such a block."""
    return "\n".join(f"    {printable(line)}" for line in lines)
