"""What a message becomes behind what the policy drew, under the templates of well-known models."""

from importlib.resources import files
from types import SimpleNamespace

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gspo_lightning.environments import Messages, Turn
from gspo_lightning.policy.chat import Chat

TEMPLATES = files("trl") / "chat_templates"
RESULTS = Turn(
    [
        {"role": "tool", "name": "add", "content": "R1", "tool_call_id": "call00000"},
        {"role": "tool", "name": "add", "content": "R2", "tool_call_id": "call00001"},
    ]
)
IM = ["<|im_end|>"]
EOT = ["<|eot_id|>", "<|eom_id|>"]
# Name of a template, what ends a completion, what the policy drew, the message, what it is given.
CASES = [
    ("qwen3", IM, 0, "Hi", "\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    (
        *("qwen3", IM, 0, RESULTS),
        "\n<|im_start|>user\n<tool_response>\nR1\n</tool_response>\n<tool_response>\nR2\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n",
    ),
    # a stop string ended the turn: the template's end is given as well
    (
        "qwen3",
        IM,
        None,
        "Hi",
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    ),
    # it drew another end than the template's, which stands in for it
    (
        *("qwen3", ["<|im_end|>", "<|endoftext|>"], 1, "Hi"),
        "\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        *("llama3_1", EOT, 0, RESULTS),
        '<|start_header_id|>ipython<|end_header_id|>\n\n"R1"<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"R2"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    (
        *("gemma3", ["<eos>", "<end_of_turn>"], 1, "Hi"),
        "\n<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    ),
    # what opens the next turn ended this one
    ("glm4moe", ["<|endoftext|>", "<|user|>", "<|observation|>"], 1, "Hi", "\nHi<|assistant|>"),
    ("glm4moe", ["<|endoftext|>", "<|user|>"], 0, "Hi", "<|user|>\nHi<|assistant|>"),
    # the last answer ends otherwise than those before it
    (
        *("gptoss", ["<|return|>", "<|call|>"], 0, "Hi"),
        "<|start|>user<|message|>Hi<|end|><|start|>assistant",
    ),
    # results stand behind calls alone
    (
        *("gptoss", ["<|return|>", "<|call|>"], 1, RESULTS),
        '<|start|>functions.add to=assistant<|channel|>commentary<|message|>"R1"<|end|>'
        '<|start|>functions.add to=assistant<|channel|>commentary<|message|>"R2"<|end|>'
        "<|start|>assistant",
    ),
]


def letters(special):
    """One token a character, but for special tokens."""
    names = ["<pad>", *special]
    vocabulary = {name: i for i, name in enumerate([*names, *map(chr, range(9, 127))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


def chat(name, tokenizer=None):
    tokenizer = tokenizer or SimpleNamespace(special_tokens_map={})
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return Chat(tokenizer)


@pytest.mark.parametrize(("name", "ends", "drawn", "message", "given"), CASES)
def test_what_is_given_goes_on_where_the_policy_ended(name, ends, drawn, message, given):
    more = ["<|im_start|>", "<|user|>", "<|assistant|>", "<|end|>", "<|start|>"]
    tokenizer = letters(list(dict.fromkeys([*ends, *more])))
    eos = [tokenizer.convert_tokens_to_ids(end) for end in ends]
    turn = message if isinstance(message, Turn) else Turn(message)
    messages = Messages(chat(name, tokenizer))
    ids = messages.ids(tokenizer, turn, eos, None if drawn is None else eos[drawn])
    assert tokenizer.decode(ids) == given


def test_without_a_template_a_message_goes_in_as_it_is(tokenizer):
    messages = Messages()
    assert messages.ids(tokenizer, Turn("3+"), [1], 1) == tokenizer("3+")["input_ids"]
    assert messages.ids(tokenizer, Turn([{"role": "tool", "content": "3"}]), [1], 1) == [6]


def test_a_turn_and_its_message_are_what_the_template_writes_of_the_whole_chat():
    """Drawn and given tokens together are the rendering of the conversation, token by token."""
    tokenizer = letters(["<|im_end|>", "<|im_start|>"])
    template = chat("qwen2_5", tokenizer)
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    said += [{"role": "user", "content": "and +1?"}]
    prompt = tokenizer(template.prompt(said[:1]))["input_ids"]
    drawn = [*tokenizer("2")["input_ids"], eos]
    given = Messages(template).ids(tokenizer, Turn("and +1?"), [eos], eos)
    assert prompt + drawn + given == tokenizer(template.prompt(said))["input_ids"]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0].content }}=", "does not write the answer once"),
        (
            "{% for m in messages[:2] %}{{ m.content }}{% endfor %}",
            "does not write the message once",
        ),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "answer once"),
        (
            "{{ raise_exception('two at most') if messages | length > 2 }}"
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            "two at most",
        ),
    ],
)
def test_a_template_that_takes_no_message_is_refused(template, text):
    made = Chat(SimpleNamespace(chat_template=template, special_tokens_map={}))
    with pytest.raises(ValueError, match=f"no message of the role 'user'.*{text}"):
        Messages(made).check(Turn("MESSAGE"))


def test_results_behind_a_call_that_no_end_of_sequence_ends_are_refused():
    """Else the rest of a call that the template writes would be given to the policy."""
    tokenizer = letters(["<|return|>", "<|call|>"])
    with pytest.raises(ValueError, match=r"ends a tool call with.*<\|call\|>.*stop_token_ids"):
        Messages(chat("gptoss", tokenizer)).ids(tokenizer, RESULTS, [1], 1)
