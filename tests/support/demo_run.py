"""The embedded demo made short by an overlay, as a command and as a process that is killed."""

import os
import signal
import subprocess
import sys

from support.repository import PYTHONPATH


def arguments(overlay, folder, *options):
    configs = ["--config", "configs/arithmetic.yaml", "--config", str(overlay)]
    return ["fit", *configs, "--trainer.default_root_dir", str(folder), *options]


def killed(overlay, folder, at, *options):
    """Run until SIGKILL in the middle of the updates of rollout `at`."""
    kill = ["--trainer.callbacks+=support.dummies.Killer", f"--trainer.callbacks.at={at}"]
    done = subprocess.run(
        [sys.executable, "train.py", *arguments(overlay, folder, *options, *kill)],
        env=os.environ | {"PYTHONPATH": PYTHONPATH, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
