"""Runs `train.py` many times for one start of Python: a warm process that forks for each run.

As a program it reads one JSON line for each run, {"arguments", "environments", "output",
"file_limit"}, starts one process for each of the environments, and answers with their wait
statuses. It has one thread.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from support.repository import PYTHONPATH, ROOT


class Ended(NamedTuple):
    """How a run ended: exit code (negative: the signal that killed it) and what it printed."""

    code: int
    output: str


class Warm:
    """The side that asks; a context manager."""

    def __init__(self, **environment):
        self.environment = environment

    def __enter__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
        environment |= self.environment
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def run(self, folder, *arguments, file_limit=None, **environment) -> Ended:
        """Run to the end, however it comes."""
        return self.run_ranks(folder, arguments, [environment], file_limit)[0]

    def run_ranks(self, folder, arguments, environments, file_limit=None) -> list[Ended]:
        """Run several processes of one command to their ends; they share their output."""
        output = Path(folder, "output.txt")
        output.unlink(missing_ok=True)
        request = {"arguments": list(map(str, arguments)), "output": str(output)}
        request |= {"environments": environments, "file_limit": file_limit}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, "the warm process has died"
        codes = map(os.waitstatus_to_exitcode, json.loads(answer))
        return [Ended(code, output.read_text()) for code in codes]


def _child(request, environment):
    code = 1
    try:
        output = os.open(request["output"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.environ.update(environment)
        if request["file_limit"]:
            limit = request["file_limit"]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        os.chdir(ROOT)
        import train
        from support import phases

        if "PHASE_LOG" in os.environ:
            phases.begin("launch")
        sys.argv = ["train.py", *request["arguments"]]
        code = train.main(request["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def main():
    import torch

    torch.set_num_threads(1)
    import torch.utils.tensorboard

    import train  # noqa: F401
    from gspo_lightning.run.command import import_classes
    from support import phases  # noqa: F401

    import_classes()  # once, not in each process
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for environment in request["environments"]:
            children.append(os.fork())
            if children[-1] == 0:
                _child(request, environment)
        print(json.dumps([os.waitpid(child, 0)[1] for child in children]), file=answers, flush=True)


if __name__ == "__main__":
    main()
