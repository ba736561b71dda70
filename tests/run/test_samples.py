"""`gspo samples`: groups of a run on a terminal."""

import json
import subprocess
import sys

import pytest

from gspo_lightning.run import entry, samples
from gspo_lightning.start.layout import width


def row(rollout=1, prompt="2+3=", completion="5", reward=1.0, **others):
    values = {"parts": {"correct": reward}, "advantage": 0.5, "length": 3, "truncated": False}
    return {"rollout": rollout, "prompt": prompt, "completion": completion, "reward": reward} | (
        values | others
    )


def write(folder, rows, end=""):
    file = folder / "samples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return file


def printed(capsys, *words):
    assert samples.main([str(word) for word in words]) == 0
    return capsys.readouterr().out.splitlines()


GROUP = [
    row(5, completion="6", reward=0.25, parts={"correct": 0.0, "short": 0.25}, advantage=-0.5),
    row(5, completion="lost", reward=None, parts={"correct": None, "short": 1.0}, advantage=0.0),
    row(5, completion="5 or\n so", parts={"correct": 1.0, "short": 0.0}, truncated=True, length=40),
]


def test_the_newest_group_has_its_rewards_side_by_side_the_best_first(tmp_path, capsys):
    other = [row(5, "1+1=", "2"), row(5, "1+1=", "two")]
    write(tmp_path, [row(4), *GROUP, *other], end='{"rollout": 6, "pro')  # being written
    assert printed(capsys, tmp_path, "--width", 80) == [
        "rollout 5, + behind tokens: cut at the limit",
        "",
        "prompt    2+3=",
        "  reward  correct  short  advantage  tokens  completion",
        r"   1.000    1.000  0.000      +0.50     40+  5 or\n so",
        "   0.250    0.000  0.250      -0.50       3  6",
        "       –        –  1.000      +0.00       3  lost",
        "",
        "prompt    1+1=",
        "  reward  advantage  tokens  completion",
        "   1.000      +0.50       3  2",
        "   1.000      +0.50       3  two",
    ]
    assert printed(capsys, tmp_path, "--prompts", 1)[0].startswith("rollout 5, 1 of 2 prompts")
    assert printed(capsys, tmp_path / "samples.jsonl", "--rollout", 4)[0] == "rollout 4"
    write(tmp_path, [row(0), row(1)])  # as an earlier version counted
    assert printed(capsys, tmp_path)[0] == "rollout 2"


@pytest.mark.parametrize("size", [40, 80, 131])
def test_whatever_was_written_fits_the_width_and_moves_no_cursor(tmp_path, capsys, size):
    texts = [
        "a\x1b[31mred\x9b\u202e",
        "日本語で。" * 90,
        "x" * 900,
        "e\u0301 " * 300,
        "of words " * 99,
    ]
    parts = {f"a_long_n_{i}": 0.5 for i in range(9)}
    write(tmp_path, [row(completion=text, prompt=texts[1], parts=parts) for text in texts])
    for full in ([], ["--full"]):
        lines = printed(capsys, tmp_path, "--width", size, *full)
        assert max(map(width, lines)) <= size
        assert all(line.isprintable() for line in lines)
        said = "".join(line.strip() for line in lines)
        assert (said.count("日本語で。") > 170) == bool(full)
        assert ("…" in said) != bool(full)


def test_damaged_lines_are_left_out_and_counted(tmp_path, capsys):
    rows = [row(completion="good"), row() | {"reward": "x"}, row() | {"parts": 3}, {"rollout": 0}]
    write(tmp_path, rows, end="\x00\x00\n[1]\n")
    assert samples.main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.count("good") == 1 and "+0.50" in out
    assert err == f"{tmp_path}/samples.jsonl: damaged lines left out: 5\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rollout", "9"], "has nothing of rollout 9; it goes from 3 to 5"),
        (["--rollout", "4"], "has nothing of rollout 4; it goes from 3 to 5"),
        (["--rollout", "0"], "--rollout must be at least 1, got 0"),
        (["--width", "9"], "--width must be at least 40, got 9"),
        (["--prompts", "0"], "--prompts must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, words, said):
    write(tmp_path, [row(3), row(5)])
    assert samples.main([str(tmp_path), *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_the_command_is_in_the_table_among_those_that_start_at_once(tmp_path, capsys):
    write(tmp_path, [row(3)])
    assert entry.main(["samples", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("rollout 3\n")
    assert "samples" in entry.LIGHT and "chat" in entry.COMMANDS
    program = "import sys, gspo_lightning.run.samples; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_folder_without_samples_says_what_makes_them(tmp_path, capsys):
    assert samples.main([str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert samples.main([str(tmp_path)]) == 2
    assert "no gspo_lightning.SampleTable" in capsys.readouterr().err
    write(tmp_path, [], end='{"rollout": 1')
    assert samples.main([str(tmp_path)]) == 2
    assert "has no samples yet" in capsys.readouterr().err
