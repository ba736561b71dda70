"""Several turns by an engine that completes token ids.

Decides what it is asked behind an answer of the environment: the whole history in ids, of which an
engine that keeps prefixes computes what is new.
"""

from collections.abc import Callable, Sequence

from gspo_lightning.engine.turns import Turns
from gspo_lightning.vllm.engine import Completion

# Ids to go on from, the tokens that may be drawn, and a name that no other draw of a rollout has.
Asked = tuple[list[int], int, str]


def drawn_in_turns(
    turns: Turns,
    prompts: Sequence[list[int]],
    complete: Callable[[list[Asked]], list[Completion]],
) -> tuple[list[list[int]], list[list[float]]]:
    """Ask for one turn of all rows at a time, until all are over.

    What an engine drew behind the end of a turn is dropped. One that stopped where no turn ends, as
    its own reader saw a stop string there, is asked to go on.

    Args:
        turns: What was drawn, and what comes next.
        prompts: Ids of each row's prompt.
        complete: Draws behind each of the ids.

    Returns:
        Ids behind each prompt, those that rows were given included, and their log-probs, 0 of
        those given; the latter are empty where the engine gives none.
    """
    ids: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    going, number = list(range(len(prompts))), 0
    while going:
        drawn = complete(
            [(prompts[i] + ids[i], turns.limit - len(ids[i]), f"{i}/{number}") for i in going]
        )
        over = turns.over_with(going, [each.ids for each in drawn])
        for row, each in zip(going, drawn, strict=True):
            own = turns.lengths[row] - len(ids[row])
            given = turns.long(row, 1)
            ids[row] += [*each.ids[:own], *given]
            if each.logprobs:
                logprobs[row] += [*each.logprobs[:own], *(0.0 for _ in given)]
        pairs = zip(going, over, strict=True)
        going = [row for row, done in pairs if not done and len(ids[row]) < turns.limit]
        number += 1
    return ids, logprobs
