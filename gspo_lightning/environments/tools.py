"""Ready tools: a calculator, Python in a process of its own, and a search over passages."""

import ast
import json
import math
import operator
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gspo_lightning.bounds import check_at_least, check_positive
from gspo_lightning.start.limited import run_program

OPERATIONS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
LONGEST = 1000  # characters of an expression
LARGEST = 10**30  # of a number: arithmetic on longer ones takes time

# What a program of the Python tool is wrapped in: its last expression is printed, as is its error.
WRAPPED = """
import ast as _ast, sys as _sys
_tree = None
try:
    _tree = _ast.parse({code!r})
    _last = _tree.body[-1] if _tree.body else None
    if isinstance(_last, _ast.Expr):
        _shown = _ast.Expression(_tree.body.pop().value)
    _names = {{"__name__": "__main__"}}
    exec(compile(_tree, "program", "exec"), _names)
    if isinstance(_last, _ast.Expr):
        _value = eval(compile(_shown, "program", "eval"), _names)
        if _value is not None:
            print(_value)
except SystemExit:
    pass
except BaseException as _error:
    print(f"{{type(_error).__name__}}: {{_error}}")
"""


def calculate(expression: str) -> str:
    """Calculate an expression of numbers with + - * / // % ** and brackets.

    Args:
        expression: What to calculate, such as (3 + 4) * 2.

    >>> calculate("(3 + 4) * 2"), calculate("2 ** 0.5")
    ('14', '1.4142135623730951')
    """
    if len(expression) > LONGEST:
        raise ValueError(f"the expression has over {LONGEST} characters")
    value = _value(ast.parse(expression.strip(), mode="eval").body)
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return str(int(value) if whole else value)


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value: Any = node.value
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATIONS:
        value = OPERATIONS[type(node.op)](_value(node.operand))
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, exponent = _value(node.left), _value(node.right)
        if abs(exponent) > 100:
            raise ValueError("an exponent must be at most 100")
        value = base**exponent
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        value = OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    else:
        raise ValueError("only numbers, + - * / // % ** and brackets")
    if isinstance(value, complex) or not abs(value) <= LARGEST:
        raise ValueError("the result is no number, or too large")
    return value


class PythonTool:
    """Runs Python in a new process: what it prints, its last expression, or its error.

    **This is no sandbox**: a program may read and write whatever its user may, and use the network.
    Run a policy that you do not trust in a container.

    Args:
        seconds: Longest time of a program, the start of Python (some 0.02 s) included.
        memory_mib: Address space of a program, in MiB; Python with numpy needs some 200.
        name: Of the tool.

    Raises:
        ValueError: If a limit is out of range.

    >>> PythonTool()("print(1 + 1)"), PythonTool()("sum(range(5))"), PythonTool()("1 / 0")
    ('2', '10', 'ZeroDivisionError: division by zero')
    """

    def __init__(self, seconds: float = 5.0, memory_mib: int = 512, name: str = "python") -> None:
        check_positive("PythonTool.", seconds=seconds)
        check_at_least(64, "PythonTool.", memory_mib=memory_mib)
        self.seconds, self.memory_mib, self.name = seconds, memory_mib, name

    def __call__(self, code: str) -> str:
        """Run a Python program. What it prints is the result, and so is the value of its last line.

        Args:
            code: The program.
        """
        with (
            tempfile.TemporaryDirectory(prefix="tool-", ignore_cleanup_errors=True) as folder,
            open(os.devnull, "rb") as nothing,
        ):
            program = Path(folder, "solution.py")
            program.write_text(WRAPPED.format(code=code), encoding="utf-8", errors="replace")
            memory = self.memory_mib << 20
            said, _ = run_program(Path(folder), nothing, self.seconds, memory)
        if said is None:
            return f"error: the program took over {self.seconds:g} s"
        return said.strip() or "(no output)"


class SearchTool:
    """Finds passages of a file that share rare words with a query (BM25).

    Args:
        path: JSON lines, each an object with the passage.
        column: Name of the passage.
        count: Passages given.
        name: Of the tool.

    Raises:
        ValueError: If the file is missing or broken, naming the line.

    Source:
        Robertson and Zaragoza, 2009, "The Probabilistic Relevance Framework: BM25 and Beyond",
        with k1 = 1.5 and b = 0.75.
    """

    def __init__(
        self, path: str, column: str = "text", count: int = 3, name: str = "search"
    ) -> None:
        check_at_least(1, "SearchTool.", count=count)
        self.path, self.column, self.count, self.name = path, column, count, name
        self.passages = _passages(path, column)
        self.words = [Counter(_words(text)) for text in self.passages]
        self.lengths = [sum(words.values()) for words in self.words]
        self.mean = sum(self.lengths) / len(self.lengths)
        self.having = Counter(word for words in self.words for word in words)

    def __call__(self, query: str) -> str:
        """Search for passages.

        Args:
            query: Words to look for.
        """
        scores = [self._score(_words(query), i) for i in range(len(self.passages))]
        best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: self.count]
        found = [self.passages[i] for i in best if scores[i] > 0]
        return "\n\n".join(found) or "(nothing found)"

    def _score(self, query: list[str], place: int) -> float:
        words, total = self.words[place], 0.0
        long = 0.25 + 0.75 * self.lengths[place] / self.mean
        for word in query:
            if word in words:
                having = self.having[word]
                rare = math.log(1 + (len(self.words) - having + 0.5) / (having + 0.5))
                total += rare * words[word] * 2.5 / (words[word] + 1.5 * long)
        return total


def _passages(path: str, column: str) -> list[str]:
    try:
        lines = Path(os.path.expanduser(path)).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"SearchTool.path: {path}: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[column]
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"SearchTool.path: {path}:{number}: no object with a text {column!r} ({reason})"
            ) from error
        if not isinstance(text, str):
            raise ValueError(f"SearchTool.path: {path}:{number}: {column!r} is no text")
        found.append(text)
    if not any(_words(text) for text in found):
        raise ValueError(f"SearchTool.path: {path} holds no passages")
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
