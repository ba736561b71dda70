"""Train, examine, validate, test or predict with a config.

python train.py fit --config configs/arithmetic.yaml
python train.py fit --config configs/arithmetic.yaml --ckpt_path last     continue
python train.py doctor --config configs/arithmetic.yaml                   examine, in seconds
python train.py validate --config configs/arithmetic.yaml --ckpt_path last
python train.py replay runs/arithmetic/faults/DUMP       which tensor of a skipped step was NaN

Later --config files and command-line options win over earlier ones. Every option has a default or
stands in the config; `python train.py fit --help` lists them, `--print_config` shows what a run
would use. --ckpt_path is `last` (newest checkpoint of the run folder trainer.default_root_dir),
`auto` (the same, or a fresh start), `best` (by what RolloutCheckpoint monitors) or a file.
SIGTERM, SIGHUP and Ctrl-C finish the rollout and save; once more stops at once. GSPO_TRACEBACK=1
shows where an error came from.
"""

import sys

if __name__ == "__main__" and sys.argv[1:] in (["--help"], ["-h"]):
    print(__doc__)  # before the imports below, which take seconds
    sys.exit(0)

import os
import signal

from gspo_lightning.run import launch

if __name__ == "__main__":
    launch.refuse()  # the imports below read these variables
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # until `main` has handlers
        if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:  # as of nohup
            signal.signal(number, lambda number, _: os._exit(128 + number))

from gspo_lightning.run.command import main
from gspo_lightning.run.leaving import leave

if __name__ == "__main__":
    leave(main())
