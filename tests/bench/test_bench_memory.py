"""The bench of a long run: what its lines say, and that the run makes all that a run can leave."""

from argparse import Namespace
from queue import SimpleQueue

import pytest

from gspo_lightning.bench import __main__ as bench
from gspo_lightning.bench import memory, shards
from gspo_lightning.run import command
from support.forked import free_port, on_ranks


def look(rollout, resident, files=8, threads=4):
    return {"rollout": rollout, "resident": resident, "files": files, "threads": threads}


def test_a_line_has_least_and_most_of_its_stretch(monkeypatch):
    monkeypatch.setattr(memory, "STRETCHES", 2)
    looks = [look(1, 40.0), look(2, 60.25, files=9), look(3, 50.0), look(4, 55.0, threads=6)]
    head, *lines = memory.rows([*looks, look(5, 45.5)])
    assert head == ["rollouts", "least MiB", "most MiB", "open files", "threads"]
    assert lines == [["1 to 3", "40.0", "60.2", "9", "4"], ["4 to 5", "45.5", "55.0", "8", "6"]]


@pytest.mark.slow
def test_the_run_makes_all_that_a_run_can_leave(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    left = set()

    def in_this_process(arguments, threads):
        assert command.main(arguments[2:]) == 0
        left.update(path.name for path in tmp_path.glob("*/run/**/*"))

    monkeypatch.setattr(memory, "output_of", in_this_process)
    assert bench.main(["memory", "--rollouts=5"]) == 0
    out = capsys.readouterr().out
    rollouts = [line.split()[1] for line in out.splitlines() if line.startswith("|")][2:]
    assert rollouts == ["1", "2", "3", "4", "5"]
    wanted = {"curves.png", "samples.jsonl", "log.txt", "rollout=000005.ckpt", "export"}
    assert wanted <= left and any(name.startswith("events.out") for name in left)
    assert list(tmp_path.iterdir()) == []  # nothing stays


@pytest.mark.parametrize("option", ["--rollouts=0", "--threads=0"])
def test_a_number_below_one_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        bench.main(["memory", option])
    assert "must be >= 1" in capsys.readouterr().err


def one_rank(number, root, address, parted):
    answers = SimpleQueue()
    shards.rank(number, 2, address, str(root), parted, 1, answers)
    return answers.get()


@pytest.mark.slow
def test_ranks_export_the_same_from_memory_and_from_the_disk(tmp_path):
    size = shards.make_model(tmp_path / "policy", Namespace(hidden=256, layers=2))
    for parted in (False, True):
        address = f"tcp://127.0.0.1:{free_port()}"
        (first, found), _ = on_ranks(one_rank, tmp_path, address, parted)
        assert first == 0 and size / 2 < found["loading"] < 4 * size and found["s export"] > 0
    one, other = (tmp_path / f"export{parted}" / "model.safetensors" for parted in (False, True))
    assert one.read_bytes() == other.read_bytes()
