"""Tokens of many sequences in one row without padding, a prompt before all its completions.

Decides the order of that row. Every linear layer then sees real tokens only, and a prompt once.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gspo_lightning.engine.packed_attention import PackedAttention, Sequence
from gspo_lightning.engine.padded import checkpoints


class Row(NamedTuple):
    """All tokens of a micro-batch, one after the other.

    Attributes:
        ids: (1, N) int64.
        position_ids: Position of each token in its own text, (1, N).
        source: Where in the row the completion tokens that count are predicted, (n,).
        target: Where these tokens are in a flattened (B, T), (n,).
        attend: The attention of every layer.
    """

    ids: Tensor
    position_ids: Tensor
    source: Tensor
    target: Tensor
    attend: PackedAttention


def pack(
    prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, context: Tensor, keep: Tensor
) -> Row:
    """Lay prompts and completions out in one row.

    Neighbours with the same prompt share it. The last token of a completion is left out, as nothing
    follows it, and so is a prompt without any completion.

    Args:
        prompt_ids: Left-padded, (B, L) int64, the same id in all padding.
        prompt_mask: True on real prompt tokens, (B, L) bool.
        completion_ids: Right-padded, (B, T) int64.
        context: True on the completion tokens that are part of the text, (B, T) bool.
        keep: True on those whose log-probs are wanted, (B, T) bool.
    """
    device = prompt_ids.device
    width, length = prompt_ids.shape[1], completion_ids.shape[1]
    same = (prompt_ids[1:] == prompt_ids[:-1]).all(1) & (prompt_mask[1:] == prompt_mask[:-1]).all(1)
    facts = [prompt_mask.sum(1), context.sum(1), nn.functional.pad(same.long(), (1, 0))]
    prompt_lengths, counts, continues = torch.stack(facts).tolist()  # one wait for a GPU, not three
    groups: list[list[int]] = []
    for row in range(len(counts)):
        if continues[row]:
            groups[-1].append(row)
        else:
            groups.append([row])
    groups = [group for group in groups if any(counts[row] for row in group)] or groups[:1]

    columns = width + length
    tokens, positions, source, target = [], [], [], []
    sequences: list[Sequence] = []
    end = 0
    for group in groups:
        first, prompt_length = end, prompt_lengths[group[0]]
        tokens.append(torch.arange(width - prompt_length, width) + group[0] * columns)
        positions.append(torch.arange(prompt_length))
        end += prompt_length
        bodies = []
        for row in group:
            offsets, forwarded = torch.arange(counts[row]), max(counts[row] - 1, 0)
            tokens.append(offsets[:forwarded] + (row * columns + width))
            positions.append(offsets[:forwarded] + prompt_length)
            target.append(offsets + row * length)
            source.append(offsets + (end - 1))
            source[-1][:1] = first + prompt_length - 1  # the prompt predicts the first token
            if forwarded:
                bodies.append(Sequence(end, forwarded, first, prompt_length))
            end += forwarded
        if len(bodies) == 1:  # nothing to share: one text like any other
            sequences.append(Sequence(first, prompt_length + bodies[0].length))
        else:
            sequences += [Sequence(first, prompt_length), *bodies]
    row_of = torch.cat(tokens).to(device)
    wanted = torch.cat(target).to(device)
    kept = keep.flatten()[wanted].nonzero()[:, 0]  # a GPU is waited for here, and once
    return Row(
        ids=torch.cat([prompt_ids, completion_ids], 1).flatten()[row_of][None],
        position_ids=torch.cat(positions).to(device)[None],
        source=torch.cat(source).to(device)[kept],
        target=wanted[kept],
        attend=PackedAttention(sequences, end, device),
    )


def rows_of(row: Row, length: int) -> Tensor:
    """The row of the batch that each token of a packed row belongs to, (N,) int64.

    A prompt that rows share is the first of theirs.

    Args:
        row: From :func:`pack`, with every token of the texts wanted.
        length: T, the columns of its completions.
    """
    # a token belongs to the row that is predicted from it, or else from the nearest one behind it
    order = row.source.argsort(stable=True)
    source, owners = row.source[order], row.target[order] // length
    return owners[torch.searchsorted(source, torch.arange(row.ids.shape[1], device=source.device))]


def run_packed(model: nn.Module, row: Row, **options: Any) -> Any:
    """Run a model on a packed row; it must have an open attention."""
    row.attend.recomputed = checkpoints(model)
    return model(
        input_ids=row.ids,
        # of four dimensions: the model passes such a mask on unread and makes none of its own
        attention_mask=row.ids.new_ones(1, 1, 1, 1),
        position_ids=row.position_ids,
        use_cache=False,
        attend=row.attend,
        **options,
    )
