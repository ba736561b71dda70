"""The table of sub-commands, and what is said before anything is imported."""

from pkgutil import resolve_name

import pytest

import train
from gspo_lightning.run import entry, launch


def test_every_sub_command_is_a_function_and_is_listed(capsys):
    assert train.main(["help"]) == 0
    assert train.main(["--help"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[: len(shown) // 2] == shown[len(shown) // 2 :]
    assert max(map(len, shown)) <= 100
    for name, (path, text) in entry.COMMANDS.items():
        assert callable(resolve_name(path)), name
        assert f"  {name:<12}{text}" in shown
    assert set(entry.LIGHT) < set(entry.COMMANDS)


def test_the_first_line_names_command_and_configs(monkeypatch):
    monkeypatch.setattr(entry, "installed", lambda: "1.2")
    assert entry.first_line(["fit", "--config", "base", "--x", "1", "-c=mine.yaml"]) == (
        "gspo_lightning 1.2: fit base mine.yaml; loading torch and lightning ..."
    )


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),  # the first of the second machine
        ({"LOCAL_RANK": "1"}, False),  # as Lightning starts the others
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_one_rank_says_it(monkeypatch, variables, first):
    for name in launch.RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch.is_first() == first
