import io
import os
import sys

import pytest

from gspo_lightning.run.one_line import quiet
from gspo_lightning.run.terminal_log import TerminalLog


@pytest.fixture
def log(tmp_path, capsys):
    """Opens the log when called: pytest replaces the streams between a fixture and its test."""
    log = TerminalLog()

    def start():
        log.open(tmp_path / "log.txt", ["train.py", "fit", "a b"])
        return log

    yield start
    log.close()


def lines(tmp_path):
    first, *rest = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert first.startswith("# 20") and first.endswith(" train.py fit 'a b'")
    return rest


def test_lines_of_both_streams_reach_terminal_and_file(log, tmp_path, capsys):
    log()
    print("plan €")
    print("warning", file=sys.stderr)
    print("half", end="")
    assert lines(tmp_path) == ["plan €", "warning"]  # while the run is still going on
    assert capsys.readouterr() == ("plan €\nhalf", "warning\n")


def test_of_a_bar_the_last_state_is_kept(log, tmp_path):
    log()
    for i in range(3):
        sys.stdout.write(f"\rtraining {i}/3 |##|")
    sys.stdout.write("\r        \r\x1b[1mrollout 3\x1b[0m\n")
    sys.stdout.write("\rtraining 3/3 |####|\n\n")
    assert lines(tmp_path) == ["rollout 3", "training 3/3 |####|"]


def test_the_streams_are_given_back_and_the_file_grows(log, tmp_path, capsys):
    before = sys.stdout
    opened = log()
    copy = sys.stdout
    opened.close()
    assert sys.stdout is before is not copy
    print("unseen")
    copy.write("late\n")  # by someone who kept the stream
    log()
    print("seen")
    assert lines(tmp_path)[1:] == ["seen"]


def test_what_a_stream_can_do_it_still_can(log, capsys):
    log()
    assert sys.stdout.isatty() is False
    assert sys.stdout.encoding.lower().startswith("utf")


@pytest.fixture
def nobody(monkeypatch, capsys):
    """Standard output into a pipe whose reader has gone, as `| head` leaves it."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="ascii") as stream:
        yield lambda: monkeypatch.setattr(sys, "stdout", stream)


def test_a_stream_that_nobody_reads_is_said_once_and_lost_lines_are_in_the_file(
    nobody, log, tmp_path, capsys
):
    nobody()
    stream, opened = sys.stdout, log()
    for number in range(3):
        print(f"line {number}", flush=True)
    first, gone, *rest = lines(tmp_path)
    assert [first, *rest] == ["line 0", "line 1", "line 2"]
    assert gone.startswith("standard output is gone (broken pipe): the run goes on, its lines are")
    assert capsys.readouterr().err == f"{gone}\n"
    os.write(stream.fileno(), b"by a library")  # leads nowhere now
    opened.close()
    assert sys.stdout is stream
    print("as Python ends", flush=True)


def test_without_a_file_nothing_is_said_of_a_lost_stream(nobody, capsys):
    nobody()
    log = TerminalLog()
    log.take()
    print("of `doctor | head`")
    log.close()
    assert capsys.readouterr().err == ""


def test_a_full_device_and_a_closed_stream_are_lost_alike(log, tmp_path, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", None)  # as `2>&-` leaves it
        opened = log()
        print("plan", flush=True)
        print("warning", file=sys.stderr)
        plan, gone, warning = lines(tmp_path)
        assert (plan, warning) == ("plan", "warning")
        assert gone.startswith("standard output is gone (no space left on device)")
        opened.close()
    assert sys.stderr is None


def test_characters_that_a_terminal_lacks_are_shown_by_their_codes(log, tmp_path, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    log()
    print("5 €", flush=True)
    assert shown.buffer.getvalue() == b"5 \\u20ac\n"
    assert lines(tmp_path) == ["5 €"]


def test_what_lightning_asks_of_torch_is_no_warning_to_a_user():
    functional = pytest.importorskip("torch.distributed.nn.functional")
    with quiet():  # a warning that it lets through is an error of tests
        getattr(functional, "_deprecated", lambda *_: None)("all_gather", "another")
