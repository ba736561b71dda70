"""Where the repository lies, for tests that read its files or start processes of it."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # finds the package and `support`
