"""Write the files of the turns demo: chain sums that are said term by term.

They are made of the prompts of data/arithmetic, whose held-out prompts stay held out. Only the
standard library is used, and a second run writes the same bytes.

    python data/turns/make.py            # rewrites the files next to this script
"""

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent
NUM = {"train": 1024, "heldout": 128}


def said(prompt: str) -> dict | None:
    """A sum as a conversation; None for one of two terms, which is over with the first turn.

    >>> said("7+9-4=")
    {'prompt': '7+9=', 'replies': ['-4='], 'answers': ['16', '12']}
    """
    terms = re.findall(r"[+-]?\d", prompt)
    if len(terms) < 3:
        return None
    totals = [sum(map(int, terms[: end + 1])) for end in range(1, len(terms))]
    replies = [f"{term}=" for term in terms[2:]]
    return {"prompt": "".join(terms[:2]) + "=", "replies": replies, "answers": [*map(str, totals)]}


def main() -> None:
    """Write both files."""
    for name, count in NUM.items():
        lines = (FOLDER.parent / "arithmetic" / f"{name}.jsonl").read_text().splitlines()
        rows = filter(None, (said(json.loads(line)["prompt"]) for line in lines))
        kept = [json.dumps(row) + "\n" for row, _ in zip(rows, range(count), strict=False)]
        (FOLDER / f"{name}.jsonl").write_text("".join(kept))


if __name__ == "__main__":
    main()
