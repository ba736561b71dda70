"""Short chat templates in the styles of well-known ones, and a tokenizer with their tokens.

Written for these tests: each keeps what is peculiar to its style, such as a system message inside
of the first question, thoughts that are forgotten, trimmed contents, a date, or an answer that no
header opens.
"""

from dataclasses import dataclass, field

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Style:
    """A template, the token behind an answer, its special tokens, and what it makes of a chat."""

    template: str | dict[str, str]
    ends: str  # "" where ordinary text ends a turn
    special: list[str]
    prompt: str  # of the user's message "2+3?"
    system: bool = True  # whether a system message is taken
    arguments: list[str] = field(default_factory=list)


LLAMA_2 = """{{ bos_token }}{% for m in messages %}
{% if m.role == 'system' %}{% set first = m.content %}
{% elif m.role == 'user' %}
{{ '[INST] ' }}{% if loop.index0 == 1 and messages[0].role == 'system' %}
{{ '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' }}{% endif %}{{ m.content | trim }}
{{- ' [/INST]' }}{% elif m.role == 'assistant' %}
{{ ' ' ~ m.content | trim ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"""

MISTRAL = """{{ bos_token }}{% if messages[0].role == 'system' %}
{% set system = messages[0].content %}{% set turns = messages[1:] %}{% else %}
{% set turns = messages %}{% endif %}{% for m in turns %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('After the optional system message, roles must alternate') }}{% endif %}
{% if m.role == 'user' %}[INST] {% if loop.last and system is defined %}{{ system ~ '\\n\\n' }}
{%- endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ ' ' ~ m.content ~ eos_token }}
{%- endif %}{% endfor %}"""

LLAMA_3 = """{% for m in messages %}{% set text = '<|start_header_id|>' ~ m.role ~
'<|end_header_id|>\\n\\n' ~ m.content | trim ~ '<|eot_id|>' %}
{{ bos_token ~ text if loop.first else text }}{% endfor %}{{ OPEN }}"""
HEADER = "<|start_header_id|>assistant<|end_header_id|>\\n\\n"

LLAMA_3_1 = """{{ bos_token }}{% if not date_string is defined %}
{% set date_string = '26 Jul 2024' %}{% endif %}
{% set system = messages[0].content | trim if messages[0].role == 'system' else '' %}
{% set turns = messages[1:] if messages[0].role == 'system' else messages %}
{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' ~ date_string ~ '\\n\\n' ~ system
~ '<|eot_id|>' }}{% for m in turns %}{% if m.role == 'tool' %}
{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' ~ m.content | tojson ~ '<|eot_id|>' }}
{%- else %}
{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' ~ m.content | trim ~ '<|eot_id|>' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ HEADER }}{% endif %}"""

CHATML = """{% for m in messages %}
{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>' ~ '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

QWEN_3 = """{% set last = namespace(at=-1) %}{% for m in messages %}{% if m.role == 'user' %}
{% set last.at = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}
{% if m.role in ['user', 'system'] %}
{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% elif m.role == 'assistant' %}
{% set content = m.content.split('</think>')[-1].lstrip('\\n') %}
{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content
else '' %}{{ '<|im_start|>assistant\\n' }}{% if loop.index0 > last.at %}
{{ '<think>\\n' ~ thought.strip('\\n') ~ '\\n</think>\\n\\n' }}{% endif %}
{{ content ~ '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{ '<|im_start|>user\\n<tool_response>\\n' ~ m.content ~ '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}{% endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}{% set role = 'model' if m.role == 'assistant' else m.role %}
{{ '<start_of_turn>' ~ role ~ '\\n' ~ m.content | trim ~ '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

PHI_3 = """{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}
{{ '<|' ~ m.role ~ '|>\\n' ~ m.content ~ '<|end|>\\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

ZEPHYR = """{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}
{{ '<|' ~ m.role ~ '|>\\n' ~ m.content ~ eos_token ~ '\\n' }}{% endif %}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"""

SOLAR = """{% for m in messages %}{% if m.role == 'system' %}
{{ '### System:\\n' ~ m.content ~ '\\n\\n' }}{% elif m.role == 'user' %}
{{ '### User:\\n' ~ m.content ~ '\\n\\n' }}{% elif m.role == 'assistant' %}
{{ '### Assistant:\\n' ~ m.content ~ '\\n\\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"""

DEEPSEEK = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}
{%- endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}
{%- elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] ~ eos_token }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"""

GPT_OSS = """{{ '<|start|>system<|message|>You are a model.\\nCurrent date: ' ~
strftime_now('%Y-%m-%d') ~ '\\n\\nReasoning: ' ~ reasoning_effort | default('medium') ~ '<|end|>' }}
{%- for m in messages %}{% if m.role in ['system', 'developer'] %}
{{ '<|start|>developer<|message|># Instructions\\n\\n' ~ m.content ~ '<|end|>' }}
{%- elif m.role == 'user' %}{{ '<|start|>user<|message|>' ~ m.content ~ '<|end|>' }}
{%- elif m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' ~ m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}<|start|>assistant{% endif %}"""

COMMAND_R = """{{ bos_token }}{% if messages[0].role == 'system' %}
{% set turns = messages[1:] %}{% set system = messages[0].content %}{% else %}
{% set turns = messages %}{% set system = false %}{% endif %}{% if system %}
{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' ~ system ~ '<|END_OF_TURN_TOKEN|>' }}{% endif %}
{% for m in turns %}{% if m.role in ['user', 'assistant'] %}
{% set who = {'user': 'USER', 'assistant': 'CHATBOT'}[m.role] %}
{{ '<|START_OF_TURN_TOKEN|><|' ~ who ~ '_TOKEN|>' ~ m.content.strip() ~ '<|END_OF_TURN_TOKEN|>' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}
{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""

PARTS = """{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' }}{% for part in m.content %}
{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}{% endfor %}
{{ '<|im_end|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def with_header(template: str, always: bool = False) -> str:
    """The template with the text that opens an answer, or with that text behind every chat."""
    opened = "{% if add_generation_prompt %}{{ HEADER }}{% endif %}"
    template = template.replace("{{ OPEN }}", "{{ HEADER }}" if always else opened)
    return template.replace("HEADER", f"'{HEADER}'")


_HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_TURN = ["<|im_start|>", "<|im_end|>"]
_ASKED = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2+3?<|eot_id|>"
_OPENED = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_DATED = "<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
_CHATML = "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n"

STYLES = {
    "llama-2": Style(LLAMA_2, "</s>", ["<s>", "</s>"], "<s>[INST] 2+3? [/INST]"),
    "mistral": Style(
        MISTRAL, "</s>", ["<s>", "</s>", "[INST]", "[/INST]"], "<s>[INST] 2+3?[/INST]"
    ),
    "llama-3": Style(with_header(LLAMA_3), "<|eot_id|>", _HEADERS, _ASKED + _OPENED),
    "llama-3, header always": Style(
        with_header(LLAMA_3, always=True), "<|eot_id|>", _HEADERS, _ASKED + _OPENED
    ),
    "llama-3.1": Style(
        with_header(LLAMA_3_1),
        "<|eot_id|>",
        _HEADERS,
        _ASKED.replace(">", f">{_DATED}", 1) + _OPENED,
        arguments=["date_string"],
    ),
    "chatml": Style(CHATML, "<|im_end|>", _TURN, _CHATML),
    "qwen3": Style(QWEN_3, "<|im_end|>", _TURN, _CHATML, arguments=["enable_thinking"]),
    "gemma": Style(
        GEMMA,
        "<end_of_turn>",
        ["<bos>", "<start_of_turn>", "<end_of_turn>"],
        "<bos><start_of_turn>user\n2+3?<end_of_turn>\n<start_of_turn>model\n",
        system=False,
    ),
    "phi-3": Style(
        PHI_3,
        "<|end|>",
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        "<|user|>\n2+3?<|end|>\n<|assistant|>\n",
    ),
    "zephyr": Style(ZEPHYR, "</s>", ["<s>", "</s>"], "<|user|>\n2+3?</s>\n<|assistant|>\n"),
    "solar": Style(SOLAR, "", ["<s>", "</s>"], "### User:\n2+3?\n\n### Assistant:\n"),
    "deepseek": Style(
        DEEPSEEK,
        "</s>",
        ["<s>", "</s>", "<|User|>", "<|Assistant|>"],
        "<s><|User|>2+3?<|Assistant|><think>\n",
    ),
    "gpt-oss": Style(
        GPT_OSS,
        "<|return|>",
        ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"],
        "<|start|>system<|message|>You are a model.\nCurrent date: 2024-02-29\n\nReasoning: medium"
        "<|end|><|start|>user<|message|>2+3?<|end|><|start|>assistant",
        arguments=["reasoning_effort"],
    ),
    "command-r": Style(
        COMMAND_R,
        "<|END_OF_TURN_TOKEN|>",
        ["<BOS>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"],
        "<BOS><|START_OF_TURN_TOKEN|><|USER_TOKEN|>2+3?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    ),
    "parts": Style(PARTS, "<|im_end|>", _TURN, _CHATML),
    "several": Style(
        {"default": CHATML, "tool_use": CHATML.replace("'\\n' ~ m.content", "'\\n#' ~ m.content")},
        "<|im_end|>",
        _TURN,
        _CHATML,
        arguments=["chat_template"],
    ),
}


def chat_tokenizer(style: Style) -> PreTrainedTokenizerFast:
    """Printable characters one by one, and the style's own tokens whole."""
    signs = ["<pad>", "<unk>", "\n", *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({s: i for i, s in enumerate(signs)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    begins = [token for token in style.special if token in ("<s>", "<bos>", "<BOS>", _HEADERS[0])]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token=begins[0] if begins else None,
        eos_token=style.ends or "</s>",
        additional_special_tokens=style.special,
        padding_side="left",
    )
    tokenizer.chat_template = style.template
    return tokenizer
