"""What a model can read: its ids and its positions, from its config alone.

Decides which prompts are too long for a model. Asked before weights are loaded; the doctor asks the
same of the loaded model.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gspo_lightning.policy.policy import PolicyConfig

POSITIONS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
Prompts = Mapping[str, Sequence[tuple[list[int], Any]]]


class Limits(NamedTuple):
    """What no text may exceed; None where a config sets no limit."""

    ids: int | None
    tokens: int | None


def limits(config: PolicyConfig) -> Limits:
    """Ids that a policy embeds, and the tokens that it can read at all."""
    found = _text_config(config)
    tokens = positions(found) if has_fixed_positions(found) else None
    return Limits(getattr(found, "vocab_size", None), tokens)


def positions(config: Any) -> int | None:
    """Tokens of a text that a model of this config was made for, None if it does not say."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in POSITIONS]
    # -1 stands for texts of any length
    return next((most for most in found if isinstance(most, int) and most > 0), None)


def has_fixed_positions(config: Any) -> bool:
    """Whether a model has a table of positions, which ends; rotary ones go on without end."""
    return getattr(config.get_text_config(), "rope_parameters", None) is None


def overlength(config: Any, prompt_tokens: int, new_tokens: int) -> tuple[str, str] | None:
    """What is wrong with texts of these lengths, and the way out; None where they fit.

    Args:
        config: Of a transformers model.
        prompt_tokens: Longest prompt.
        new_tokens: Longest completion.
    """
    limit = positions(config)
    if limit is None or prompt_tokens + new_tokens <= limit:
        return None
    found = f"with {new_tokens} new tokens that is more than the {limit} the model reads"
    remedy = "data.max_prompt_tokens with data.overlong_prompts: drop"
    if limit > prompt_tokens:
        remedy = f"sampler.max_new_tokens to {limit - prompt_tokens}, or {remedy}"
    return found, f"lower {remedy}"


def check_lengths(config: PolicyConfig, prompts: Prompts, new_tokens: int, held_out: int) -> None:
    """Say before a run that its texts are longer than the model reads.

    Args:
        config: The policy.
        prompts: Token ids of the prompts, by the key of their file.
        new_tokens: Longest completion in training and prediction.
        held_out: Longest completion in evaluation.

    Raises:
        ValueError: If the model has a fixed table of positions, where the next token would fail.
    """
    model_config = _text_config(config)
    for key, rows in prompts.items():
        longest = max((len(ids) for ids, _ in rows), default=0)
        evaluated = key in ("val_path", "test_path")
        if trouble := overlength(model_config, longest, held_out if evaluated else new_tokens):
            found, remedy = trouble
            line = f"policy.path: prompts of data.{key} have up to {longest} tokens; {found}"
            if evaluated:
                remedy = remedy.replace("sampler.", "evaluation.")
            if has_fixed_positions(model_config):
                raise ValueError(f"{line}; {remedy}")
            warnings.warn(f"{line}, and it was not trained on longer texts; {remedy}", stacklevel=2)
            return


def _text_config(config: PolicyConfig) -> Any:
    return config.model_config().get_text_config()
