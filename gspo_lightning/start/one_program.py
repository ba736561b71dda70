"""The process of ``limited``: limits itself, then runs a program, and a test behind it if asked.

Run as a program, with the standard library alone: what is imported here costs time in every
program.
"""

import os
import resource
import signal
import site
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType


def limit(memory: int, seconds: int, largest_file: int) -> None:
    """Limit what this process and its children may use."""
    wanted = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: largest_file,
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_NPROC: 4096,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    signal.alarm(seconds)  # ends the process also where the run that waits for it is gone


def main(kind: str, folder: str, memory: str, seconds: str, largest: str, *paths: str) -> None:
    """Run ``solution.py`` of a folder as a program, or its ``test.py`` behind it."""
    limit(int(memory), int(seconds), int(largest))
    sys.path += paths  # Python starts three times as fast if it does not look for packages itself
    site.setquit()  # nor has exit() then
    name = "__main__" if kind == "program" else "solution"  # its "main" part runs in a program only
    module = sys.modules[name] = ModuleType(name)  # dataclasses look the module of a class up
    sys.argv = ["solution.py"]
    if kind == "check":
        word = sys.stdin.buffer.read()
        path = os.path.join(folder, "test.py")  # read first: the program may write to its file
        with open(path, "rb") as file:
            test = compile(file.read(), path, "exec")
        os.unlink(os.path.join(folder, "input"))  # the program is not to read the word
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        printed = os.dup(1)
    SourceFileLoader(name, os.path.join(folder, "solution.py")).exec_module(module)
    if kind == "check":
        exec(test, vars(module))
        os.write(printed, word)


if __name__ == "__main__":
    main(*sys.argv[1:])
