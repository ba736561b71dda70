"""What a policy, a prompt or a reward's error says is shown in each place, and obeyed in none."""

import json
import re
import sys
import warnings
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from gspo_lightning.callbacks.files import write_json_lines
from gspo_lightning.callbacks.report import markdown_table
from gspo_lightning.checkpoint.quoted import json_line, markdown, printable
from gspo_lightning.compare import __main__ as compare
from gspo_lightning.doctor import examine, replay
from gspo_lightning.doctor.findings import Finding, as_json
from gspo_lightning.rewards import RewardTerm, score_or_keep
from gspo_lightning.rewards.terms import RewardError
from gspo_lightning.run import ending
from gspo_lightning.run.command import Watch
from gspo_lightning.run.one_line import quiet
from gspo_lightning.run.terminal_log import TerminalLog, say

HOSTILE = {
    "colours": "\x1b[31mred\x1b[0m",
    "screen": "\x1b[2J\x1b[H\x1bc",
    "link of a terminal": "\x1b]8;;http://evil.example\x1b\\here\x1b]8;;\x1b\\",
    "title of a terminal": "\x1b]0;owned\x07 \x1b]2;cut off",
    "carriage return": "error: no reward\rall is well     ",
    "backspaces": "fail\b\b\b\bpass\x7f",
    "C1": "\x9b31m \x90q\x9c \x9d0;t\x9c \x85next",
    "direction": "\u202egnp.exe \u2066a\u2069 \u200f\u061c",
    "no width": "a\u200b\u200c\u200d\u2060\ufeff\u00ad\u180eb",
    "tags": "\U000e0041\U000e007f",
    "line ends": "a\u2028b\u2029c\x0bd\x0ce\x1cf\r\ng\nh\ti",
    "half a character": "a\ud800b\udc1b",
    "marks inside of Python-Markdown": "\x02klzzwxh:0000\x03 \x02amp\x03 \x00",
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)><!-- <iframe src='http://e'>",
    "end of a cell": "</td></tr></table><svg/onload=alert(1)>",
    "entities": "&lt;script&gt; &#60;b&#62; &amp;amp; &nbsp;",
    "links": "[a](http://evil.example) <http://e.example> http://e.org www.e.example a@e.example",
    "script link": '[a](javascript:alert(1) "t") [b](data:text/html;base64,PHM+)',
    "tracking picture": "![x](http://tracker.example/x.png)",
    "reference": "[a][b] ![b]\n\n[b]: http://evil.example",
    "table": "a | b || c\n| --- |\n|d|",
    "fences": "```html\n<b>\n```\n~~~\nx\n~~~",
    "backticks": "`a` ``b` ```c```` `",
    "blocks": "# h\n===\n---\n> q\n- l\n1. x\n    code",
    "emphasis": "**b** _i_ *i* __b__ ~~s~~ \\* \\|",
    "TeX": r"$\frac{1}{$ \href{http://evil.example}{x}",
    "plain": "7 + 9 = 16 € 日本\u3000語\u00a0é",
}
TEXT = "\n".join(HOSTILE.values())
# Independent of the code: what Unicode calls control, format, surrogate, line or paragraph end.
OBEYED = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def harmless(lines):
    """Whether text holds nothing that a terminal obeys, but for the ends of its lines."""
    return not OBEYED.search(lines.replace("\n", ""))


def begun():
    """What knows of a run in which an error comes up."""
    watch = Watch()
    watch.begun = True
    return watch


@pytest.fixture(params=HOSTILE.values(), ids=HOSTILE.keys())
def hostile(request):
    return request.param


# ---- the three functions -------------------------------------------------------------------------


def test_a_terminal_sees_one_line_of_letters(hostile):
    shown = printable(hostile)
    assert not OBEYED.search(shown)
    seen = OBEYED.sub("", hostile)
    assert len(shown) >= len(hostile) and set(seen) <= set(shown)  # nothing that is seen is lost
    assert printable(shown) == shown


def test_a_line_of_json_loses_nothing(hostile):
    line = json_line({"text": hostile, hostile: [1.5, None]})
    assert json.loads(line) == {"text": hostile, hostile: [1.5, None]}
    assert line.splitlines(keepends=True) == [line] and harmless(line)
    line.encode()  # half a character has no bytes


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text of each cell."""

    def __init__(self, page):
        super().__init__()
        self.found, self.cells = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.add((tag, *attributes))
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")
def test_tensorboard_shows_a_table_and_nothing_else(hostile):
    from tensorboard.plugin_util import markdowns_to_safe_html

    sample = {"prompt": hostile, "completion": hostile, "reward": 0.5, "parts": {hostile: None}}
    sample |= {"advantage": -1.5, "length": 3, "truncated": True, "ratio": 1.0001}
    source = markdown_table([sample | {"group": 0}, sample | {"group": 1}])
    page = Elements(markdowns_to_safe_html([source], "".join))
    parts = ("table", "thead", "tbody", "tr", "th", "td")
    assert page.found == {(name,) for name in parts}
    assert len(page.cells) == 3 * 8
    words = printable(hostile, keep="\n\r\t").split()
    for cell in (3, 8, 9, 16, 17):
        assert page.cells[cell].split() == words
    assert [cell.strip() for cell in page.cells[10:16]] == ["0.5", "None", "-1.5", "3", "True", "1"]


def test_other_readers_of_markdown_see_text_as_well(hostile):
    reader = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    page = Elements(reader.render(f"| a |\n| --- |\n| {markdown(hostile)} |\n\n{markdown('x')}"))
    assert page.found == {(name,) for name in ("table", "thead", "tbody", "tr", "th", "td", "p")}


# ---- the places ----------------------------------------------------------------------------------


def test_lines_and_the_log_are_harmless(tmp_path, capsys):
    log = TerminalLog()
    log.open(tmp_path / "log.txt", ["train.py", "fit"])
    say(TEXT, sys.stdout)
    say(TEXT)
    print(TEXT.replace("\ud800", "").replace("\udc1b", ""))  # as a reward function may
    log.close()
    out, err = capsys.readouterr()
    assert harmless(err) and len(err.split("\n")) == len(TEXT.split("\n")) + 1
    assert out.startswith(err)
    written = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert harmless(written.replace("\t", ""))
    assert "gnp.exe" in written and r"error: no reward\rall is well" in written


def test_an_error_and_a_warning_are_one_line_each(hostile, capsys):
    error = RewardError(f"reward 'a' failed: {hostile}", "a")
    assert not OBEYED.search(str(error))
    assert ending.report(error, begun(), lambda _: "") == 2
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("always")
        warnings.warn(f"no reward: {hostile}", stacklevel=1)
    error, warning, rest = capsys.readouterr().err.split("\n")
    assert error == f"error: reward 'a' failed: {printable(hostile)}"
    assert warning.startswith("warning: no reward:") and not OBEYED.search(warning)
    assert rest == ""


@pytest.mark.parametrize("text", ["Expected a path but x", "gspo_lightning.time_limit.TimeLimit"])
def test_a_completion_that_an_error_quotes_is_not_read_as_a_parsers_message(text, capsys):
    error = RewardError(f"reward 'a' failed: no number in {text}", "a")
    ending.report(error, begun(), lambda _: "")
    assert capsys.readouterr().err == f"error: reward 'a' failed: no number in {text}\n"


def test_a_traceback_is_harmless(capsys, monkeypatch):
    monkeypatch.setenv("GSPO_TRACEBACK", "1")
    assert ending.report(KeyError(TEXT), begun(), lambda _: "") == 1
    error = RuntimeError(TEXT)
    assert ending.report(error, begun(), lambda _: "") == 1
    examine.attempt("rewards", lambda: (_ for _ in ()).throw(error))
    assert harmless(capsys.readouterr().err)


def test_the_doctor_quotes_in_lines_and_loses_nothing_in_json(monkeypatch, capsys):
    found = [Finding(f"reward {name}", "error", text, text) for name, text in HOSTILE.items()]

    def look(*arguments):
        arguments[-1](found)
        return found

    monkeypatch.setattr(examine, "set_up_and_examine", look)
    trainer = SimpleNamespace(is_global_zero=True)
    assert examine.main(trainer, None, None, None, None, False, json=False) == 1
    out = capsys.readouterr().out
    assert harmless(out) and out.count("\n") == 2 * len(found) + 1
    assert [entry["text"] for entry in json.loads(as_json(found))] == [*HOSTILE.values()]
    assert harmless(as_json(found))


def test_a_replayed_dump_is_quoted(monkeypatch, capsys, tmp_path):
    looks = replay.Looks()
    looks.all.append(replay.Look(TEXT, False, 0, "NaN"))
    dump = SimpleNamespace(found=[TEXT], prompts=[TEXT], minibatch=SimpleNamespace(texts=[TEXT]))
    dump.settings = SimpleNamespace(device=TEXT, critic=False)
    monkeypatch.setattr(replay, "load_dump", lambda *_: dump)
    monkeypatch.setattr(replay, "replay", lambda *_: looks)
    assert replay.main([str(tmp_path / "dump.pt"), "--device=cpu"]) == 0
    out = capsys.readouterr().out
    assert harmless(out)
    last = [line.partition(" ")[0] for line in out.splitlines()[-4:]]
    assert last == ["recorded:", "", "first", ""]


def test_samples_and_predictions_come_back_as_they_were(tmp_path):
    rows = [{"rollout": 0, "prompt": text, "completion": text} for text in HOSTILE.values()]
    for _ in range(2):
        write_json_lines(tmp_path / "samples.jsonl", rows)
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in lines.splitlines()] == 2 * rows
    assert harmless(lines)


def test_samples_are_not_written_through_a_link(tmp_path):
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / "samples.jsonl").symlink_to("theirs")
    with pytest.raises(OSError, match="symbolic links"):
        write_json_lines(tmp_path / "samples.jsonl", [{}])
    assert (tmp_path / "theirs").read_text() == "precious"


def test_completions_that_could_not_be_scored_come_back_as_they_were(tmp_path, capsys):
    def broken(rows, completions):
        raise KeyError(completions[0])

    class Drawn(list):
        special_texts, finished = None, [True] * len(HOSTILE)
        rows = property(lambda self: [{"word": text} for text in self])
        texts = property(list)

    texts = Drawn(HOSTILE.values())
    with pytest.raises(RewardError):
        score_or_keep({"a": RewardTerm(broken)}, texts, tmp_path / "failed.jsonl")
    lines = (tmp_path / "failed.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["text"] for line in lines.splitlines()] == texts
    assert [json.loads(line)["row"]["word"] for line in lines.splitlines()] == texts
    assert harmless(lines)


@pytest.mark.usefixtures("at_the_root")
def test_a_comparison_quotes_the_log_of_a_run_that_failed(monkeypatch, tmp_path, capsys):
    def fail(words, stdout, **_):
        stdout.buffer.write(b"begun\n\xff " + TEXT.replace("\n", " ").encode(errors="ignore"))
        return 1

    monkeypatch.setattr(compare.subprocess, "call", fail)
    plan = "configs/compare/arithmetic.yaml"
    assert compare.main([plan, "--runs", str(tmp_path), "--jobs=1"]) == 2
    err = capsys.readouterr().err
    assert harmless(err) and err.startswith("error: ") and err.count("\n") == 1
