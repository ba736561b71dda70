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
    "ok": "As fast as it goes",
    "fallback": "Right, by a slower way",
    "refused": "Refused before training",
    "unbuilt": "Not tried",
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
    return NUMBER.sub("…", line)


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
    outcomes = dict.fromkeys([*TITLES, *(found["outcome"] for found in table["types"].values())])
    groups: dict[str, dict[str, list[str]]] = {outcome: defaultdict(list) for outcome in outcomes}
    without: dict[str, dict[str, list[str]]] = {extra: defaultdict(list) for extra in EXTRAS}
    for name, found in table["types"].items():
        if "/" in name:  # a variant
            continue
        groups[found["outcome"]]["; ".join(found["why"])].append(name)
        for extra in EXTRAS & found.keys():
            without[extra][found[extra]].append(name)
    text = f"Transformers {table['transformers']}, {sum(map(_count, groups.values()))} types.\n"
    for outcome, rows in groups.items():
        text += f"\n### {TITLES.get(outcome, outcome)} ({_count(rows)})\n\n{_rows(rows)}"
    for extra, rows in without.items():
        text += f"\n### Without {EXTRAS[extra]} ({_count(rows)})\n\n{_rows(rows)}"
    return text


def _count(rows: dict[str, list[str]]) -> int:
    return sum(map(len, rows.values()))


def _rows(rows: dict[str, list[str]]) -> str:
    """A table of reasons and types, the most frequent reason first; names alone without reason."""
    if set(rows) <= {""}:
        return ", ".join(f"`{name}`" for name in rows.get("", ["none"])) + "\n"
    text = "| What is said | Types |\n|---|---|\n"
    for why, names in sorted(rows.items(), key=lambda item: (-len(item[1]), item[0])):
        text += f"| {why.replace('|', '/')} | {', '.join(f'`{name}`' for name in names)} |\n"
    return text
