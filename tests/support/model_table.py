"""What each type of model is expected to do: a table beside the tests, and its page in docs.

Decides how what happened to a type is written down, so that neither rounding nor the order of runs
changes a line. ``make models`` makes both anew.
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import transformers

from support.model_configs import TYPES, VARIANTS
from support.repository import ROOT

FILE = Path(__file__).with_name("model_types.json")
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- made by tests/support/model_table.py: begin -->", "<!-- end -->"
EXTRAS = {"lora": "LoRA on all linear layers", "checkpointed": "gradient checkpointing"}
NUMBER = re.compile(r"\d\.\de[-+]\d+")
TITLES = {
    "ok": "The fastest way",
    "fallback": "A slower way",
    "refused": "Refused",
    "unbuilt": "Not tried",
}
# The plainest way that a line speaks of, and what it means; the first is said nowhere.
SAMPLING = {
    "": "a group at once",
    "decodes with a cache of its own": "with the model's own cache",
    "decodes one row at a time": "a row at a time",
}
UPDATE = {
    "": "packed",
    "rows are padded": "padded, a group's prompt read once",
    "prompts are read once for each": "padded",
    "rows are run one by one": "a row at a time",
}


def read_table() -> dict[str, Any]:
    """Transformers' version, and an entry for each type and variant."""
    return json.loads(FILE.read_text())


def entry(record: dict[str, Any]) -> dict[str, Any]:
    """What the table says of a type, from a record of ``model_types.try_type``."""
    checks, kind = record["checks"], record["model"]
    written: dict[str, Any] = {"outcome": record["outcome"]}
    if record["outcome"] == "unbuilt":
        return written | {"why": [record["reason"]]}
    why = list(record["said"])
    for stage in ("load", "step"):
        if isinstance(checks.get(stage), str):
            why = [checks[stage].removeprefix("ValueError: ")]
            break
    written["why"] = [_plain(line, kind) for line in why]
    if record["outcome"] in ("ok", "fallback"):
        for extra in EXTRAS:
            value = checks[extra]
            if isinstance(value, str):
                written[extra] = _plain(value.removeprefix("ValueError: "), kind)
            elif value > record["tolerance"]:
                written[extra] = "wrong"
    return written


def _plain(line: str, kind: str) -> str:
    """A line without the model's class and without what rounding changes."""
    for start in (f"{kind}: ", f"{kind} "):
        line = line.removeprefix(start)
    return NUMBER.sub("…", line.replace(kind, "the model"))


def write(records: list[dict[str, Any]]) -> None:
    """Write the table, and the part of the page that is made from it.

    Args:
        records: Of all types and variants, or of some, whose lines replace those before.
    """
    known = json.loads(FILE.read_text())["types"] if FILE.exists() else {}
    types = known | {record["name"]: entry(record) for record in records}
    types = {name: types[name] for name in (*TYPES, *VARIANTS) if name in types}
    lines = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(types[name], ensure_ascii=False)}"
        for name in sorted(types)
    )
    version = json.dumps(transformers.__version__)
    FILE.write_text(f'{{\n"transformers": {version},\n"types": {{\n{lines}\n}}\n}}\n')
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{page(read_table())}{END}{after}")


def page(table: dict[str, Any]) -> str:
    """The part of docs/models.md that comes from the table."""
    types = {name: found for name, found in table["types"].items() if "/" not in name}
    text = f"Transformers {table['transformers']}, {len(types)} types.\n"
    for outcome in dict.fromkeys([*TITLES, *(found["outcome"] for found in types.values())]):
        names = [name for name, found in types.items() if found["outcome"] == outcome]
        text += f"\n### {TITLES.get(outcome, outcome)} ({len(names)})\n\n"
        if outcome == "ok":
            text += f"{_list(names)}\n"
        elif outcome == "fallback":
            heads = "Sampling", "Log-probs and update", "Types"
            text += _rows(heads, {name: _ways(types[name]["why"]) for name in names})
        else:
            text += _rows(("Reason", "Types"), {name: types[name]["why"] for name in names})
    for extra, what in EXTRAS.items():
        without = {name: [found[extra]] for name, found in types.items() if extra in found}
        text += f"\n### Without {what} ({len(without)})\n\n"
        text += _rows(("Reason", "Types"), without)
    return text


def _ways(lines: list[str]) -> list[str]:
    """How a model is sampled from, and how its log-probs are computed."""
    ways = []
    for known in (SAMPLING, UPDATE):
        said = [
            way for start, way in known.items() if any(line.startswith(start) for line in lines)
        ]
        ways.append(said[-1])
    return ways


def _list(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _rows(heads: tuple[str, ...], cells: dict[str, list[str]]) -> str:
    """A table of what types have in common, the most frequent first."""
    groups = defaultdict(list)
    for name, common in cells.items():
        groups[tuple(common)].append(name)
    lines = [heads, ("---",) * len(heads)]
    for common, names in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append((*(cell.replace("|", "/") for cell in common), _list(names)))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
