"""Chat messages as text: in the styles of well-known templates, whole, bounded, of one date."""

import time
from datetime import datetime
from types import SimpleNamespace

import pytest
from transformers.utils import chat_template_utils

from gspo_lightning.policy import chat as chat_module
from gspo_lightning.policy.chat import Chat, TooLong, checked
from support.chat_templates import CHATML, GEMMA, STYLES, chat_tokenizer

LEAP_DAY = datetime(2024, 2, 29, 23, 59)
QUESTION = {"role": "user", "content": "2+3?"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n 5 "}
AGAIN = {"role": "user", "content": "  sure?\n"}
SYSTEM = {"role": "system", "content": "be kind"}
BEGUN = {"role": "assistant", "content": "It is: "}


@pytest.fixture(params=STYLES)
def style(request):
    return STYLES[request.param]


def make_chat(template, **options):
    tokenizer = SimpleNamespace(chat_template=template, special_tokens_map={})
    return Chat(tokenizer, now=LEAP_DAY, **options)


@pytest.fixture
def at_the_leap_day(monkeypatch):
    class Then(datetime):
        @classmethod
        def now(cls, *_):
            return LEAP_DAY

    monkeypatch.setattr(chat_template_utils, "datetime", Then)


# ---- well-known styles ---------------------------------------------------------------------------


def test_a_question_in_each_style(style):
    assert Chat(chat_tokenizer(style), now=LEAP_DAY).prompt([QUESTION]) == style.prompt


@pytest.mark.parametrize(
    "messages",
    [[QUESTION], [QUESTION, THOUGHT, AGAIN], [SYSTEM, QUESTION], [QUESTION, BEGUN]],
    ids=["question", "turns", "system", "begun"],
)
def test_each_style_gives_what_transformers_gives(style, messages, at_the_leap_day):
    tokenizer = chat_tokenizer(style)
    chat = Chat(tokenizer, now=LEAP_DAY)
    if messages[0] is SYSTEM and not style.system:
        with pytest.raises(ValueError, match="fails: System role not supported; mend the template"):
            chat.prompt(messages)
        return
    ours = chat.prompt(messages)
    begun = messages[-1] is BEGUN
    if "part" in str(style.template):
        parts = [{"type": "text", "text": m["content"]} for m in messages]
        messages = [
            {**m, "content": [part]} for m, part in zip(messages, parts, strict=True)
        ]  # as this template wants them
    assert ours == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
    )


def test_parts_of_a_text_are_the_text(style):
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "3?", "image": None}]
    chat = Chat(chat_tokenizer(style), now=LEAP_DAY)
    assert chat.prompt(checked([{"role": "user", "content": parts}])) == style.prompt


def test_a_role_that_a_template_does_not_know_is_never_lost_in_silence(style):
    chat = Chat(chat_tokenizer(style), now=LEAP_DAY)
    chat.prompt([QUESTION])  # its text is found, which says nothing of another role
    try:
        text = chat.prompt([{"role": "human", "content": "2+3?"}])
    except ValueError as error:
        assert "of message 1, of role 'human'" in str(error) or "alternate" in str(error)
    else:
        assert "human" in text and "2+3?" in text


def test_a_text_that_is_found_by_chance_is_lost_all_the_same():
    template = "You answer a question.{% for m in messages if m.role == 'user' %}{{ m.content }}"
    chat = make_chat(template + "{% endfor %}")
    for messages in ([QUESTION, {"role": "tool", "content": "a"}], [QUESTION, QUESTION, SYSTEM]):
        with pytest.raises(ValueError, match=f"message {len(messages)}, of role"):
            chat.prompt(messages)


def test_only_the_thoughts_of_an_answer_may_be_forgotten():
    half = "{% for m in messages %}{{ m.content.split('#')[INDEX] }}{% endfor %}"
    asked = {"role": "user", "content": "first # second"}
    answered = {"role": "assistant", "content": "first # second"}
    last, first = (make_chat(half.replace("INDEX", index)) for index in ("-1", "0"))
    assert last.conversation([answered]) == " second"
    for chat, message in ((last, asked), (first, asked), (first, answered)):
        with pytest.raises(ValueError, match="leaves out text of message 1"):
            chat.conversation([message])


def test_what_an_assistant_says_beside_a_tool_call_may_be_left_out():
    template = """{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls | tojson }}
{%- else %}{{ m.content }}{% endif %}{% endfor %}"""
    call = {"role": "assistant", "content": "let me see", "tool_calls": [{"name": "sum"}]}
    text = make_chat(template).prompt([QUESTION, call, {"role": "tool", "content": "5"}])
    assert text == '2+3?[{"name": "sum"}]5'


# ---- continuing ----------------------------------------------------------------------------------


def test_a_begun_answer_stays_open(style):
    text = Chat(chat_tokenizer(style), now=LEAP_DAY).prompt([QUESTION, BEGUN])
    assert text.endswith(("It is: ", "It is:")) and text.count("It is:") == 1


def test_the_thinking_switch_and_a_begun_thought():
    tokenizer = chat_tokenizer(STYLES["qwen3"])
    quick = Chat(tokenizer, {"enable_thinking": False}).prompt([QUESTION])
    assert quick == f"{STYLES['qwen3'].prompt}<think>\n\n</think>\n\n"
    begun = [QUESTION, {"role": "assistant", "content": "<s>5"}]
    assert make_chat(CHATML).prompt(begun) == STYLES["chatml"].prompt + "<s>5"


@pytest.mark.parametrize("given", ["", " \n"])
def test_an_answer_that_is_not_begun_yet_leaves_the_header_whole(given):
    messages = [QUESTION, {"role": "assistant", "content": given}]
    for name in ("gemma", "llama-3"):  # these trim contents
        assert Chat(chat_tokenizer(STYLES[name])).prompt(messages) == STYLES[name].prompt


def test_a_begun_answer_keeps_its_thoughts():
    messages = [QUESTION, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is"}]
    with pytest.raises(ValueError, match="leaves out the beginning of the last message"):
        Chat(chat_tokenizer(STYLES["deepseek"])).prompt(messages)  # the policy would not see them
    kept = Chat(chat_tokenizer(STYLES["qwen3"])).prompt(messages)
    assert kept.endswith("assistant\n<think>\nhm\n</think>\n\nIt is")


def test_an_answer_that_a_template_leaves_out_cannot_be_continued():
    users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="leaves out the last message, of role 'assistant'"):
        make_chat(users).prompt([QUESTION, BEGUN])


# ---- messages and templates that are refused -----------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ("", "must be a text or a list of messages"),
        ([], "must be a text or a list of messages"),
        (["2+3?"], "must be a text or a list of messages with role and content, got \"['2+3?']\""),
        ([{"role": "user"}], "must be a text or a list of messages"),
        (
            [SYSTEM, {"role": "user", "content": [{"type": "image", "url": "x.png"}]}],
            "a part in message 2 that is no text, \"{'type': 'image', 'url': 'x.png'}\"",
        ),
        ([{"role": "user", "content": ["2+3?"]}], "part in message 1 that is no text, '2+3?'"),
    ],
)
def test_what_is_no_chat_of_texts_is_refused(prompt, line):
    with pytest.raises(ValueError) as caught:
        checked(prompt)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (GEMMA, "System role not supported"),
        ("{{ messages[0].content }}{{ '\\ud800' }}", r"a lone surrogate '\\ud800', which is no ch"),
        ("{{ 10 ** 99999 }}", "a power of more than 4096 bits"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_template_that_fails_is_one_line(template, line):
    with pytest.raises(ValueError, match=line) as caught:
        make_chat(template).prompt([SYSTEM, QUESTION])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "arguments", "line"),
    [
        (None, {}, "data.chat_template is true, but the tokenizer has no chat template"),
        ("{% for m in %}", {}, "data.chat_template: the tokenizer's chat template cannot be read"),
        ({"rag": CHATML}, {}, r"chat templates are \['rag'\]; set chat_template to one of them"),
        (CHATML, {"chat_template": "rag"}, r"chat templates are \['default'\]; .*got 'rag'"),
        (
            STYLES["qwen3"].template,
            {"enable_thinkin": False},
            "data.chat_template_arguments: the chat template reads no 'enable_thinkin', did you "
            "mean 'enable_thinking'?",
        ),
        (CHATML, {"date_string": "today"}, "reads no 'date_string'; take it out, or mend the name"),
        (CHATML, {"messages": []}, "'messages' is set by the rows and the run"),
        (CHATML, {"add_generation_prompt": False}, "'add_generation_prompt' is set by the rows"),
    ],
)
def test_what_a_template_cannot_use_is_refused_before_any_row(template, arguments, line):
    with pytest.raises(ValueError, match=line):
        make_chat(template, arguments=arguments)


def test_each_argument_changes_the_prompt():
    values = {
        "date_string": "1 Jan 2000",
        "enable_thinking": False,
        "reasoning_effort": "high",
        "chat_template": "tool_use",
    }
    for style in STYLES.values():
        for name in style.arguments:
            chat = Chat(chat_tokenizer(style), {name: values[name]}, LEAP_DAY)
            assert chat.prompt([QUESTION]) != style.prompt, name
    tools = make_chat("{{ tools | tojson }}{{ messages[0].content }}", arguments={"tools": [1]})
    assert tools.prompt([QUESTION]) == "[1]2+3?"


def test_the_date_is_the_one_that_is_given():
    chat = make_chat("{{ strftime_now('%d %b %Y %H:%M') }}: {{ messages[0].content }}")
    assert chat.prompt([QUESTION]) == "29 Feb 2024 23:59: 2+3?" and chat.reads_clock
    assert not make_chat(CHATML).reads_clock


# ---- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        '{{ "x" * 10**9 }}',
        "{{ messages[0].content * 10**9 }}",
        "{{ 10**9 * messages[0].content }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ 'x' | center(100000000) }}",  # which compiling it would compute in seconds
    ],
)
def test_a_template_that_writes_without_end_is_stopped_at_the_limit(template):
    start = time.process_time()
    with pytest.raises(TooLong, match="the chat template writes over 1,000 characters"):
        make_chat(template, limit=1000).prompt([QUESTION])
    assert time.process_time() - start < 0.5


def test_the_limit_counts_characters():
    exact = len(STYLES["chatml"].prompt)
    assert make_chat(CHATML, limit=exact).prompt([QUESTION]) == STYLES["chatml"].prompt
    with pytest.raises(TooLong):
        make_chat(CHATML, limit=exact - 1).prompt([QUESTION])
    with pytest.raises(TooLong, match="the messages have 1,001 characters, over 1,000"):
        make_chat("{{ 1 / 0 }}", limit=1000).prompt([{"role": "user", "content": "x" * 1001}])


def test_a_template_that_computes_without_end_is_stopped_in_time(monkeypatch):
    monkeypatch.setattr(chat_module, "SECONDS", 0.1)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match=r"fails: it takes over 0.1 s; mend the template"):
        make_chat(loops).prompt([QUESTION])
