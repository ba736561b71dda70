"""``gspo vllm-serve --config …``: start the vLLM server that a run's config wants.

Decides how the config is read, by the parser of the training itself, what is said while the server
starts, and that nothing of it is left when the command ends.
"""

import argparse
import contextlib
import io
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import yaml

from gspo_lightning.run import one_line
from gspo_lightning.run.terminal_log import begin_here
from gspo_lightning.start.typed import program
from gspo_lightning.vllm import serve

COMMAND = "gspo_lightning.run.command"  # which stands beside this file, as a command of its own
PATIENCE = 15.0  # seconds that a server has to end by itself


def main(argv: Sequence[str] | None = None) -> int:
    """Start a server, or print how; returns the exit code, 2 after a mistake of the user's."""
    options, training, further = parsed(list(sys.argv[1:] if argv is None else argv))
    begin_here()
    try:
        with one_line.quiet():
            config = read(training)
        url, line = server_of(config, options.number, options.python)
        line += further
        if options.print:
            print(serve.written(line))
            return 0
        check_python(options.python)
        return start(url, line)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def parsed(words: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """This command's own options, the words that are the training's, and those that are vLLM's."""
    parser = argparse.ArgumentParser(
        prog=f"{program(alone=True)} vllm-serve",
        description="Start the vLLM server that a training with these configs and options wants, "
        "and tell when it is ready.",
        epilog="All other options are those of the training; words behind -- go to vLLM.",
        allow_abbrev=False,
    )
    parser.add_argument("--number", type=int, default=0, help="which of several servers, from 0")
    parser.add_argument("--python", default=sys.executable, help="the Python that has vLLM")
    parser.add_argument("--print", action="store_true", help="print the command, start nothing")
    mark = words.index("--") if "--" in words else len(words)
    options, training = parser.parse_known_args(words[:mark])
    return options, training, words[mark + 1 :]


def read(words: list[str]) -> dict[str, Any]:
    """The whole config of a training with these words behind `fit`."""
    command = import_module(COMMAND)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            command.GSPOCLI(["fit", *words, "--print_config"], command.Watch())
        except SystemExit as ended:
            if ended.code:
                raise
    return yaml.safe_load(printed.getvalue())


def server_of(config: dict[str, Any], number: int, python: str) -> tuple[str, list[str]]:
    """Address and command of a server.

    Raises:
        ValueError: If the config's sampler asks no server of vLLM.
    """
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    sampler = model.get("sampler") or {"class_path": "GroupSampler"}
    name, settings = sampler["class_path"], sampler.get("init_args", {})
    if name.endswith(".AsyncSampler"):
        name, settings = settings["inner"]["class_path"], settings["inner"].get("init_args", {})
    if not name.endswith(".VLLMSampler") or settings.get("server_class"):
        raise ValueError(
            f"model.sampler is {name}, which asks no vLLM; add --config sampler/vllm_server"
        )
    url = serve.address(settings, number)
    held_out = (model.get("evaluation") or {}).get("max_new_tokens") or 0
    longest = data["max_prompt_tokens"] + max(settings["max_new_tokens"], held_out)
    engine = settings["engine"]
    return url, serve.command(python, url, model["policy"], engine, longest, is_for_cpus(python))


def is_for_cpus(python: str) -> bool:
    """Whether the vLLM of an interpreter is there, and built for CPUs."""
    ask = "import sys; from vllm.platforms import current_platform as p; sys.exit(not p.is_cpu())"
    try:
        return subprocess.run([python, "-c", ask], capture_output=True, check=False).returncode == 0
    except OSError:  # there is no such Python: ``check_python`` says so
        return False


def check_python(python: str) -> None:
    """Refuse an interpreter in which the server could not start."""
    for name, remedy in (
        ("vllm", "docs/vllm.md says how to install it, and --python names the one that has it"),
        ("gspo_lightning.vllm.worker", f"{python} -m pip install --no-deps gspo_lightning"),
    ):
        find = f"import importlib.util as u, sys; sys.exit(u.find_spec({name!r}) is None)"
        try:
            code = subprocess.run([python, "-c", find], capture_output=True, check=False).returncode
        except OSError as error:
            raise ValueError(f"--python {python}: {error.strerror}") from error
        if code:
            raise ValueError(f"{python} has no {name.partition('.')[0]}: {remedy}")


def start(url: str, line: list[str]) -> int:
    """Run a server until it ends, or this process is told to; returns its exit code."""
    sys.stderr.write(f"{serve.written(line)}\n")
    host = url.rpartition(":")[0].partition("//")[2]
    if host not in ("127.0.0.1", "localhost", "[::1]"):
        sys.stderr.write(
            f"warning: {url}: whoever reaches this address can replace the weights and run code; "
            "use it in a private network alone\n"
        )
    began = time.monotonic()
    # a group of its own: the engine is a process that would outlive the server, with its memory
    server = subprocess.Popen(line, env=os.environ | serve.VARIABLES, start_new_session=True)

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    handlers = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    ready = False
    try:
        while server.poll() is None:
            if not ready and is_ready(url):
                ready = True
                print(f"ready  {url}  {time.monotonic() - began:.0f} s", flush=True)
            time.sleep(0.5)
        return server.returncode
    except KeyboardInterrupt:
        return 0 if ready else 130
    finally:
        end_all(server)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def is_ready(url: str) -> bool:
    """Whether a server answers."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


def end_all(server: subprocess.Popen) -> None:
    """End a server and all its processes, asked first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(PATIENCE)
