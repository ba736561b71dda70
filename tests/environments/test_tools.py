"""Functions as tools, the forms of calls, and the tools that are ready."""

import json
from importlib.resources import files
from types import SimpleNamespace

import pytest

from gspo_lightning.environments import (
    GuessNumber,
    Messages,
    PythonTool,
    ScriptedUser,
    SearchTool,
    ToolEnvironment,
    calculate,
)
from gspo_lightning.environments.tool_calls import FORMS
from gspo_lightning.policy.chat import Chat
from support.command import instantiated
from support.environments import add

TEMPLATES = files("trl") / "chat_templates"
MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}
{{- '[INST] ' ~ (tools | tojson if tools else '') ~ m.content ~ '[/INST]' }}
{%- elif m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}
{{- c.function | tojson }}{{ ', ' if not loop.last }}{% endfor %}]{{ eos_token }}
{%- elif m.role == 'assistant' %}{{ ' ' ~ m.content ~ eos_token }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' ~ m.content ~ '[/TOOL_RESULTS]' }}{% endif %}
{%- endfor %}"""
CALL = '{"name": "add", "arguments": {"a": 1, "b": 2}}'


def chat(name):
    text = MISTRAL if name == "mistral" else (TEMPLATES / f"{name}.jinja").read_text()
    known = {"bos_token": "<s>", "eos_token": "</s>"}
    return Chat(SimpleNamespace(chat_template=text, special_tokens_map=known))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(("qwen2_5", "hermes"), ("qwen3", "hermes"), ("llama3_1", "llama"), ("gptoss", "gpt_oss")),
        ("mistral", "mistral"),
    ],
)
def test_the_template_says_in_which_form_calls_are_written(name, form):
    """The calls of a turn are read from what the template itself writes of two calls."""
    template, environment = chat(name), ToolEnvironment([add])
    environment.describe(template)
    environment.prepare(Messages(template))
    episode = environment.begin({}, 0)
    assert episode.read is FORMS[form]
    question = {"role": "user", "content": "1+2?"}
    assert "Add two numbers." in template.prompt([question])
    one = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [one]}
    text = template.render([question, answer]).rpartition("1+2?")[2]
    end = {"hermes": "<|im_end|>", "llama": "<|eot_id|>", "gpt_oss": "<|call|>", "mistral": "</s>"}
    head = "<|end_header_id|>\n\n" if form == "llama" else ""
    drawn = (
        text.rpartition(end[form])[0].rpartition(head)[2] if head else text.rpartition(end[form])[0]
    )
    turn = episode.step(drawn)
    assert turn.text == "3" and turn.message[0]["name"] == "add"
    assert episode.step("so it is 3").message is None


@pytest.mark.parametrize(
    ("form", "text", "found"),
    [
        ("hermes", f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}", [3, 3]),
        ("hermes", "<tool_call>{'name': 'add'}</tool_call>", ["cannot be read: it is no JSON"]),
        ("hermes", "<tool_call>[1]</tool_call>", ['must be an object with "name"']),
        (
            "hermes",
            f"<tool_call>{CALL.replace('add', 'sub')}",
            ["no tool 'sub'; there are ['add']"],
        ),
        ("hermes", '<tool_call>{"name": "add"}', ["error: add: missing a required argument: 'a'"]),
        ("hermes", '<tool_call>{"name": "add", "arguments": 3}', ["must be an object"]),
        (
            *("hermes", f"<tool_call>{CALL.replace('2', 'null')}"),
            ["error: TypeError: unsupported operand"],
        ),
        ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 5}"}', [6]),
        ("llama", CALL.replace("arguments", "parameters"), [3]),
        ("llama", f"<|python_tag|>{CALL}; {CALL}", [3, 3]),
        ("llama", '{"name": "add", "parameters": {"a": 1', ["it is no JSON"]),
        ("llama", '{"answer": 3}', []),
        ("mistral", f"[TOOL_CALLS][{CALL}, {CALL}]", [3, 3]),
        ("mistral", '[TOOL_CALLS]add[CALL_ID]x1[ARGS]{"a": 1, "b": 2}', [3]),
        ("mistral", "[TOOL_CALLS][{", ["it is no JSON"]),
        ("mistral", "[TOOL_CALLS]add", ["its arguments are no JSON"]),
        (
            "gpt_oss",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary "
            'to=functions.add <|constrain|>json<|message|>{"a": 1, "b": 2}',
            [3],
        ),
        ("gpt_oss", "<|channel|>final<|message|>to=functions.add", []),
    ],
)
def test_calls_are_answered_in_their_order_and_those_gone_wrong_with_what_is_wrong(
    form, text, found
):
    environment = ToolEnvironment([add], form=form, call_reward=0.25, error_reward=-1)
    turn = environment.begin({}, 0).step(text)
    answers = [message["content"] for message in turn.message or []]
    assert len(answers) == len(found)
    for answer, wanted in zip(answers, found, strict=True):
        assert answer == str(wanted) if isinstance(wanted, int) else wanted in answer
    assert turn.reward == sum(0.25 if isinstance(wanted, int) else -1 for wanted in found)


def test_a_long_result_is_cut_and_a_user_may_say_it():
    def long(n: int) -> list:
        """Count.

        Args:
            n: How far.
        """
        return [*range(n)]

    environment = ToolEnvironment([long], form="hermes", role="user", longest=9)
    text = '<tool_call>{"name": "long", "arguments": {"n": 99}}</tool_call>'
    assert environment.begin({}, 0).step(text).message == "[0, 1, 2, ... (cut)"


def undescribed(a: int) -> int:
    """Has an argument that is described nowhere."""
    return a


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"tools": []}, "tools is empty"),
        ({"tools": [undescribed]}, "undescribed cannot become a tool.*describe"),
        ({"tools": [lambda a: a]}, "<lambda> cannot become a tool"),
        ({"tools": [add, add]}, "two tools have the same name"),
        ({"tools": [add], "longest": 0}, "ToolEnvironment.longest must be >= 1"),
    ],
)
def test_a_tool_that_is_none_is_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        ToolEnvironment(**arguments)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("gemma3", {}, "tells of no tools; set described: false"),
        ("gemma3", {"described": False}, "no message of the role 'tool'.*or another role"),
        ("gemma3", {"described": False, "role": "user"}, "writes no tool call.*set form"),
        (None, {}, "ToolEnvironment.form must be one of"),
    ],
)
def test_what_a_template_cannot_write_is_refused_before_a_run(name, options, text):
    template = None if name is None else chat(name)
    environment = ToolEnvironment([add], **options)
    with pytest.raises(ValueError, match=text):
        if template is not None:
            environment.describe(template)
        environment.prepare(Messages(template))


def test_tools_of_a_config_are_functions_and_objects(at_the_root, tmp_path):
    passages = tmp_path / "passages.jsonl"
    passages.write_text('{"text": "a cat"}\n')
    search = {
        "class_path": "gspo_lightning.environments.SearchTool",
        "init_args": {"path": str(passages)},
    }
    python = {"class_path": "gspo_lightning.environments.PythonTool"}
    tools = ["gspo_lightning.environments.calculate", python, search]
    settings = {"tools": tools, "form": "hermes"}
    environment = {"class_path": "gspo_lightning.ToolEnvironment", "init_args": settings}
    reward = {"earned": {"fn": {"class_path": "gspo_lightning.EnvironmentReward"}}}
    module = instantiated(
        *("--config", "configs/arithmetic.yaml", "--trainer.default_root_dir", tmp_path / "run"),
        f"--model.sampler.environment={json.dumps(environment)}",
        f"--model.rewards={json.dumps(reward)}",
        "--model.evaluation.correct=earned",
    ).model
    made = module.sampler.environment
    assert [*made.by_name] == ["calculate", "python", "search"]
    assert made.by_name["calculate"] is calculate
    assert module.eval_samplers["greedy"].environment is made


# --- tools and environments that are ready ------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        *(("__import__('os')", "only numbers"), ("9**9**9", "exponent"), ("1/0", "zero")),
        *(("1e999", "too large"), ("(-1)**0.5", "no number"), ("1+" * 600, "over 1000")),
    ],
)
def test_the_calculator_calculates_and_nothing_else(expression, text):
    with pytest.raises((ValueError, ArithmeticError), match=text):
        calculate(expression)
    assert calculate(" 7 // 2 * (1 - 3) ") == "-6" and calculate("0.5 + 0.25") == "0.75"


def test_python_has_limits_of_time_and_memory():
    tool = PythonTool(seconds=0.5, memory_mib=256)
    assert tool("while True: pass") == "error: the program took over 0.5 s"
    assert tool("x = 'a' * (1 << 30)").startswith("MemoryError")
    assert tool("x = 3\nprint(x)\nx * 2") == "3\n6"
    assert tool("if True print()").startswith("SyntaxError") and tool("x = 1") == "(no output)"


def test_search_finds_passages_with_rare_words_first(tmp_path):
    texts = ["the cat sat", "the dog sat on the mat", "the the the", "a zebra and a cat"]
    path = tmp_path / "passages.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tool = SearchTool(str(path), count=2)
    assert tool("the zebra") == "a zebra and a cat\n\nthe the the"
    assert tool("Cat!") == "the cat sat\n\na zebra and a cat"  # the shorter one first
    assert tool("unicorn") == "(nothing found)"
    path.write_text('{"text": "x"}\n{"words": "x"}\n')
    with pytest.raises(ValueError, match=r"passages.jsonl:2: no object with a text 'text'"):
        SearchTool(str(path))
    with pytest.raises(ValueError, match=r"SearchTool\.path: gone"):
        SearchTool("gone.jsonl")


def test_a_guess_is_the_last_number_and_costs_a_try():
    game = GuessNumber(tries=3, discount=0.25).begin({"answer": 7}, 0)
    turns = [game.step(text) for text in ("not 7 but 8", "seven", "7")]
    assert [turn.message for turn in turns] == ["lower", "a number, please", None]
    assert [turn.reward for turn in turns] == [0, 0, 0.5]
    lost = GuessNumber(tries=1).begin({"answer": "7"}, 0).step("6")
    assert (lost.message, lost.reward) == (None, 0)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({}, "column 'replies' must be a list of texts, got None"),
        ({"replies": ["a"], "answers": ["1"]}, "one answer for each of 2 turns, got 1"),
    ],
)
def test_a_script_that_is_none_is_refused(row, text):
    with pytest.raises(ValueError, match=text):
        ScriptedUser().begin(row, 0)


def test_a_script_counts_the_answers_that_may_be_wrong():
    row = {"replies": ["and?", "so?"], "answers": ["1", None, "3"]}
    script = ScriptedUser().begin(row, 0)
    turns = [script.step(text) for text in ("1", "whatever", "4")]
    assert [(turn.message, turn.reward) for turn in turns] == [("and?", 0.5), ("so?", 0), (None, 0)]
    short = ScriptedUser(stop_at_wrong=True).begin(row, 0)
    assert short.step("2").message is None
    with pytest.raises(ValueError, match="has no group"):
        ScriptedUser(pattern="x")
