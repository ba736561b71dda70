"""The doctor reads chat templates in the styles of well-known ones without a false alarm."""

from types import SimpleNamespace

import pytest
import torch

from gspo_lightning.doctor import text
from gspo_lightning.engine.texts import Ends
from gspo_lightning.policy.chat import Chat
from support.chat_templates import STYLES, chat_tokenizer


def examined(style, template=None, eos=None):
    """A policy and data that render with this style, as the checks see them."""
    tokenizer = chat_tokenizer(style)
    tokenizer.chat_template = template or style.template
    ids = tokenizer.convert_tokens_to_ids(eos or [style.ends or "</s>"])
    data = SimpleNamespace(chat_template=True, chat=Chat(tokenizer), prompt_column="prompt")
    data.chat.prompt([{"role": "user", "content": "2+3?"}])  # as the data's prompts were rendered
    policy = SimpleNamespace(tokenizer=tokenizer, eos_ids=ids, ends=Ends(tokenizer), model=Model())
    return policy, data


class Model:
    def get_input_embeddings(self):
        return SimpleNamespace(weight=torch.zeros(999, 1))


@pytest.mark.parametrize("name", STYLES)
def test_a_well_known_style_is_healthy(name):
    policy, data = examined(STYLES[name])
    for finding in (text.eos(policy, data), text.template(policy, data, [])):
        assert finding.status == "ok", finding
    assert text.turn_end(data.chat)[:1] == (policy.eos_ids if STYLES[name].ends else [])


@pytest.mark.parametrize("name", STYLES)
def test_an_end_is_advised_only_if_it_is_no_ordinary_text(name):
    style = STYLES[name]
    policy, data = examined(style, eos=["<pad>"])
    policy.tokenizer.eos_token = "<pad>"  # what completions end at, and no turn of the template
    found = text.eos(policy, data)
    if not style.ends or "eos_token" in str(style.template):  # the template then ends with it
        assert found.status == "ok"
    else:
        end = policy.tokenizer.convert_tokens_to_ids(style.ends)
        assert found.status == "error" and f"{style.ends!r} ({end})" in found.text


@pytest.mark.parametrize("name", ["chatml", "gemma", "solar", "qwen3", "command-r"])
def test_a_template_that_opens_no_turn_is_still_found(name):
    style = STYLES[name]
    silent = style.template.partition("{% if add_generation_prompt %}")[0]
    found = text.template(*examined(style, template=silent), [])
    assert found.status == "warning" and "opens no turn for the answer" in found.text


def test_special_tokens_are_marked_and_a_long_prompt_keeps_its_end():
    style = STYLES["chatml"]
    policy, data = examined(style)
    shown = []
    for question in ("<|im_end|>", "x" * 999):
        prompt = data.chat.prompt([{"role": "user", "content": question}])
        ids = torch.tensor([policy.tokenizer(prompt)["input_ids"]])
        samples = SimpleNamespace(prompt_ids=ids, prompt_mask=ids >= 0, completion_ids=ids[:, :3])
        samples.mask, samples.finished = samples.completion_ids >= 0, torch.tensor([False])
        samples.lengths = samples.mask.sum(1)
        shown.append(text.example(policy, samples))
    (first, completion), (long, _) = shown
    assert first.value == (
        "«<|im_start|>»user\n«<|im_end|>»«<|im_end|>»\n«<|im_start|>»assistant\n"
    )
    assert first.text == f"{first.value!r} (« » marks special tokens)"
    assert completion.text == "'«<|im_start|>»us' (3 tokens, cut off)"
    assert len(long.value) > 999 and len(long.text) < 450
    assert long.text.startswith("'«<|im_start|>»user\\nxxx")
    assert "xxx … xxx" in long.text and "x«<|im_end|>»\\n«<|im_start|>»assistant\\n'" in long.text
