"""What users get wrong in data."""

import gzip

from support.bad_input_cases import Case, key, loop

GOOD = '{"prompt": "1+2=", "answer": "3"}\n'
DATA = "data.path: prompts.jsonl"


def row(name, words, *lines, **more):
    """Training prompts of which a line is wrong."""
    content = b"".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    return Case(name, words, files={"prompts.jsonl": content}, **more)


TEMPLATE = b"""{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}
{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}{{ thinking }}="""


def chat(name, words, prompt='"1+2"', template=TEMPLATE, options=""):
    """A chat prompt of which something is wrong."""
    files = {
        "prompts.jsonl": f'{{"prompt": {prompt}, "answer": "1"}}\n'.encode(),
        "policy/chat_template.jinja": template,
    }
    return Case(name, words, f"--data.chat_template true {options}".strip(), files=files)


def directory(path):
    path.unlink(missing_ok=True)
    path.mkdir()


DATA_FILES = [
    key("data not there", ("data.path", "gone.jsonl"), "--data.path gone.jsonl"),
    key("held-out data not there", ("data.val_path", "gone.jsonl"), "--data.val_path gone.jsonl"),
    key("a wrong ending", ("data.path", "gspo.yaml", ".jsonl"), "--data.path gspo.yaml"),
    Case(
        "packed",
        ("data.path", "p.jsonl.gz", ".jsonl"),
        "--data.path p.jsonl.gz",
        files={"p.jsonl.gz": gzip.compress(GOOD.encode())},
    ),
    Case(
        "packed under the old name",
        (DATA, "gzip"),
        files={"prompts.jsonl": gzip.compress(GOOD.encode())},
    ),
    Case("a folder that is no dataset", ("data.path", "policy"), "--data.path policy"),
    Case(
        "a folder in place of the file",
        ("data.path", "prompts.jsonl", "save_to_disk"),
        files={"prompts.jsonl": directory},
    ),
    Case("a loop of links", ("data.path", "prompts.jsonl"), files={"prompts.jsonl": loop}),
    Case(
        "a path through a file", ("data.path", "gspo.yaml/p.jsonl"), "--data.path gspo.yaml/p.jsonl"
    ),
    Case(
        "unreadable data",
        ("data.path", "prompts.jsonl", "Permission", "owner"),
        files={"prompts.jsonl": lambda path: path.chmod(0)},
    ),
    Case(
        "a folder with a script",
        ("data.path", "d", "save_to_disk"),
        "--data.path d",
        files={"d/d.py": b"open('exploded', 'w')"},
    ),
    Case(
        "a broken Parquet file",
        ("data.path", "p.parquet"),
        "--data.path p.parquet",
        files={"p.parquet": b"PAR1 no"},
    ),
    row("empty", (DATA, "no rows")),
    row("blank lines only", (DATA, "no rows"), "\n \n"),
    row("no JSON", (f"{DATA}:2", "not JSON"), GOOD, "prompt\n"),
    row("Python for JSON", (f"{DATA}:1", "not JSON"), "{'prompt': '1'}\n"),
    row("two objects in a line", (f"{DATA}:1", "not JSON"), GOOD.strip() + GOOD),
    row("cut off", (f"{DATA}:2", "not JSON"), GOOD, '{"prompt": "1'),
    row("one array", (f"{DATA}:1", "list"), "[" + GOOD.strip() + "]\n"),
    row("an array over several lines", (f"{DATA}:1",), "[\n" + GOOD + "]\n"),
    row("NaN for a number", (f"{DATA}:1", "NaN"), '{"prompt": "1", "answer": NaN}\n'),
    row("a NUL byte", (f"{DATA}:2", "NUL"), GOOD, b'{"prompt": "1\0"}\n'),
    row(
        "a lone surrogate",
        (f"{DATA}:2", "surrogate"),
        GOOD,
        '{"prompt": "\\ud800", "answer": "1"}\n',
    ),
    row("not UTF-8", (f"{DATA}:2", "UTF-8"), GOOD, b'{"prompt": "\xe9"}\n'),
    row("UTF-16", (DATA, "UTF-8"), GOOD.encode("utf-16")),
    row("a huge line", (f"{DATA}:2", "MiB"), GOOD, b'{"prompt": "' + b"1" * (17 << 20) + b'"}\n'),
    row("deep nesting", (f"{DATA}:1",), "[" * 100_000 + "\n"),
    row("a huge number", (f"{DATA}:1",), '{"prompt": "1", "answer": ' + "9" * 5000 + "}\n"),
    row(
        "a column twice",
        (f"{DATA}:1", "prompt", "twice"),
        '{"prompt": "1", "answer": "1", "prompt": "2"}\n',
    ),
    row("no prompt", (f"{DATA}: row 2", "'prompt'", "answer"), GOOD, '{"answer": "3"}\n'),
    row(
        "a null prompt", (f"{DATA}: row 1", "'prompt'", "null"), '{"prompt": null, "answer": "3"}\n'
    ),
    row("an empty prompt", (f"{DATA}: row 1", "empty"), '{"prompt": "", "answer": "3"}\n'),
    row("a number for a prompt", (f"{DATA}: row 1", "int"), '{"prompt": 3, "answer": "3"}\n'),
    row(
        "messages without template",
        (f"{DATA}: row 1", "chat_template"),
        '{"prompt": [{"role": "user", "content": "1"}], "answer": "1"}\n',
    ),
    row("no answer", (f"{DATA}: row 2", "'answer'", "reward 'correct'"), GOOD, '{"prompt": "1"}\n'),
    row(
        "the same id twice",
        (f"{DATA}: row 3", "id", "row 1"),
        *(f'{{"id": {i}, "prompt": "1", "answer": "1"}}\n' for i in (7, 8, 7)),
    ),
    row(
        "a long prompt",
        (f"{DATA}: row 2", "max_prompt_tokens", "drop"),
        GOOD,
        '{"prompt": "' + "1+" * 99 + '", "answer": "1"}\n',
    ),
    row(
        "another prompt column",
        (f"{DATA}: row 1", "'prompt'", "question"),
        '{"question": "1+1=", "answer": "2"}\n',
    ),
    key("no template for chat", ("data.chat_template", "template"), "--data.chat_template true"),
    Case(
        "a message without content",
        (f"{DATA}: row 1", "content"),
        "--data.chat_template true",
        files={
            "prompts.jsonl": b'{"prompt": [{"role": "user"}], "answer": "1"}\n',
            "policy/chat_template.jinja": b"{% for m in messages %}{{ m.content }}{% endfor %}",
        },
    ),
    Case(
        "a message that is a text",
        (f"{DATA}: row 1", "role"),
        "--data.chat_template true",
        files={
            "prompts.jsonl": b'{"prompt": ["hello"], "answer": "1"}\n',
            "policy/chat_template.jinja": b"{% for m in messages %}{{ m.content }}{% endfor %}",
        },
    ),
    Case(
        "no messages",
        (f"{DATA}: row 1",),
        "--data.chat_template true",
        files={
            "prompts.jsonl": b'{"prompt": [], "answer": "1"}\n',
            "policy/chat_template.jinja": b"{% for m in messages %}{{ m.content }}{% endfor %}x",
        },
    ),
    Case(
        "a broken template",
        ("data.chat_template", "cannot be read", "mend"),
        "--data.chat_template true",
        files={"policy/chat_template.jinja": b"{% for m in %}"},
    ),
    Case(
        "a template that reaches out",
        (f"{DATA}: row 1", "template"),
        "--data.chat_template true",
        files={"policy/chat_template.jinja": b"{{ messages.__class__.__base__.__subclasses__() }}"},
    ),
    Case(
        "validate without held-out data",
        ("data.val_path", "validate"),
        "--data.val_path null",
        command="validate",
    ),
    row(
        "an answer beyond all numbers",
        (f"{DATA}:2", "1e999", "too large", "null"),
        GOOD,
        '{"prompt": "1", "answer": 1e999}\n',
    ),
    row(
        "a list of answers",
        (f"{DATA}: row 2", "'answer'", "list ['3']", "reward 'correct'"),
        GOOD,
        '{"prompt": "1+2=", "answer": ["3"]}\n',
    ),
    row(
        "an object for an answer",
        (f"{DATA}: row 1", "'answer'", "dict {}", "reward 'correct'"),
        '{"prompt": "1+2=", "answer": {}}\n',
    ),
    chat(
        "a picture in a message",
        (f"{DATA}: row 1", "message 1", "part", "image"),
        '[{"role": "user", "content": [{"type": "image", "url": "x"}]}]',
    ),
    chat(
        "a role that the template leaves out",
        (f"{DATA}: row 1", "message 2", "'human'"),
        '[{"role": "user", "content": "1"}, {"role": "human", "content": "2"}]',
    ),
    chat(
        "a system message where none is taken",
        (f"{DATA}: row 1", "data.system_prompt", "null", "No system"),
        options="--data.system_prompt 1+1",
    ),
    chat(
        "a template that writes without end",
        (f"{DATA}: row 1", "8,192 characters", "data.max_prompt_tokens 32"),
        template=b'{{ "x" * 10**9 }}',
    ),
    chat(
        "a template that writes half a character",
        (f"{DATA}: row 1", "surrogate", "mend the template"),
        template=b'{{ messages[0].content }}{{ "\\ud800" }}',
    ),
    chat(
        "an argument that the template does not read",
        ("data.chat_template_arguments", "'tinking'", "'thinking'"),
        options="--data.chat_template_arguments.tinking true",
    ),
    key(
        "arguments without a template",
        ("data.chat_template_arguments", "data.chat_template: true"),
        "--data.chat_template_arguments.thinking true",
    ),
    row(
        "megabytes in a prompt",
        (f"{DATA}: row 2", "9,000,000 characters", "data.max_prompt_tokens 32", "drop"),
        GOOD,
        b'{"answer": "1", "prompt": "' + b"1" * 9_000_000 + b'"}\n',
    ),
    Case(
        "broken held-out data",
        ("data.val_path: val.jsonl:1",),
        command="validate",
        files={"val.jsonl": b"x\n"},
    ),
    Case(
        "broken data for predict",
        ("data.predict_path: val.jsonl:1",),
        command="predict",
        files={"val.jsonl": b"x\n"},
    ),
]
DEMONSTRATIONS = [
    Case(
        "no completion",
        ("data.path: demos.jsonl: row 2", "'completion'"),
        config="sft.yaml",
        files={"demos.jsonl": b'{"prompt": "1", "completion": "1"}\n{"prompt": "1"}\n'},
    ),
    Case(
        "empty completion",
        ("data.path: demos.jsonl: row 1", "'completion'", "empty"),
        config="sft.yaml",
        files={"demos.jsonl": b'{"prompt": "1", "completion": ""}\n'},
    ),
    Case(
        "completion is a number",
        ("data.path: demos.jsonl: row 1", "'completion'", "int"),
        config="sft.yaml",
        files={"demos.jsonl": b'{"prompt": "1", "completion": 1}\n'},
    ),
    Case(
        "prompt is a list",
        ("data.path: demos.jsonl: row 1", "'prompt'", "list"),
        config="sft.yaml",
        files={"demos.jsonl": b'{"prompt": ["1"], "completion": "1"}\n'},
    ),
    Case(
        "demonstration too long",
        ("data.path: demos.jsonl: row 1", "max_tokens"),
        "--data.max_tokens 2",
        config="sft.yaml",
    ),
    Case(
        "megabytes in a demonstration",
        ("data.path: demos.jsonl: row 1", "9,000,000 characters", "data.max_tokens 1024"),
        config="sft.yaml",
        files={"demos.jsonl": b'{"prompt": "' + b"1" * 8_999_999 + b'", "completion": "1"}\n'},
    ),
    Case(
        "demonstration id twice",
        ("data.path: demos.jsonl: row 2", "id", "row 1"),
        config="sft.yaml",
        files={"demos.jsonl": b'{"id": "a", "prompt": "1", "completion": "1"}\n' * 2},
    ),
    Case(
        "prompts for demonstrations",
        ("data.path: prompts.jsonl: row 1", "'completion'", "answer"),
        "--data.path prompts.jsonl",
        config="sft.yaml",
    ),
    Case(
        "prompt data for SFT",
        ("SFTModule", "SFTData"),
        "--data gspo_lightning.PromptData --data.path prompts.jsonl",
        config="sft.yaml",
    ),
    Case(
        "demonstrations for GSPO",
        ("GSPOModule", "PromptData"),
        "--data gspo_lightning.SFTData --data.path demos.jsonl",
    ),
    Case(
        "chosen is rejected",
        ("data.path: pairs.jsonl: row 1", "'chosen'", "'rejected'"),
        config="pairs.yaml",
        files={"pairs.jsonl": b'{"prompt": "1", "chosen": "1", "rejected": "1"}\n'},
    ),
    Case(
        "empty chosen",
        ("data.path: pairs.jsonl: row 1", "'chosen'", "empty"),
        config="pairs.yaml",
        files={"pairs.jsonl": b'{"prompt": "1", "chosen": "", "rejected": "1"}\n'},
    ),
    Case(
        "no rejected",
        ("data.path: pairs.jsonl: row 1", "'rejected'"),
        config="pairs.yaml",
        files={"pairs.jsonl": b'{"prompt": "1", "chosen": "1"}\n'},
    ),
    Case(
        "centring below 0",
        ("model.centring", ">= 0", "-1"),
        "--model.centring -1",
        config="pairs.yaml",
    ),
    Case(
        "pair validate without held-out data",
        ("data.val_path", "validate"),
        "--data.val_path null",
        config="pairs.yaml",
        command="validate",
    ),
]
