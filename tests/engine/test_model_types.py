"""Every type of causal language model does what the table says of it: right, or refused by name."""

import json

import pytest
import transformers

from support.model_configs import TYPES, UNBUILT, VARIANTS
from support.model_table import BEGIN, END, PAGE, TITLES, entry, page, read_table
from support.model_types import try_type

# plain, with experts, with windows, learned positions, recurrent, positions that depend on the
# length, a window in its mask alone, refused
FAST = ("llama", "qwen3_moe", "gemma3_text", "gpt2", "lfm2", "phi3/longrope", "doge/fresh", "mamba")
# what people train most often, though all of it takes one way
COMMON = (
    *("qwen2", "qwen3", "qwen2_moe", "mistral", "mixtral", "gemma2", "gemma3", "phi3", "gpt_oss"),
    *("olmo2", "deepseek_v3", "glm4", "glm4_moe", "cohere2", "granite", "smollm3", "starcoder2"),
)


def others():
    """All other types: one of each line of the table by CI, and the rest by ``make models``.

    Every type is CI's where transformers is another version than the table's, so that a new release
    shows what it breaks.
    """
    types = read_table()["types"]
    same = read_table()["transformers"] == transformers.__version__
    known = {json.dumps(types.get(name)) for name in FAST}
    for name in sorted({*TYPES, *VARIANTS} - {*FAST}):
        line = json.dumps(types.get(name))
        rare = same and line in known and name not in COMMON
        known.add(line)
        yield pytest.param(name, marks=pytest.mark.models if rare else ())


def check(name):
    record = try_type(name)
    assert entry(record) == read_table()["types"].get(name), record["checks"]


@pytest.mark.parametrize("name", FAST)
def test_a_type_does_what_the_table_says(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(others()))
def test_every_other_type_does_what_the_table_says(name):
    check(name)


@pytest.mark.slow
def test_the_table_has_every_type_of_this_transformers():
    assert read_table()["types"].keys() == {*TYPES, *VARIANTS}


def test_no_type_is_wrong_without_a_word():
    outcomes = {name: found["outcome"] for name, found in read_table()["types"].items()}
    assert {name: found for name, found in outcomes.items() if found not in TITLES} == {}
    unbuilt = {name for name, found in outcomes.items() if found == "unbuilt"}
    assert unbuilt == UNBUILT.keys()  # each with its reason


def test_the_page_for_users_is_made_from_the_table():
    written = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert written == "\n" + page(read_table())
