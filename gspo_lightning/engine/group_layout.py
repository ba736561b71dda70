"""Which row of a rollout attends to which prompt.

Decides how rows in any order meet their prompts in one matrix product: as a grid of groups and
places, reached and left by one gather each. Leaves out the products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class Layout:
    """Which row attends to which prompt; constant between two changes of the batch.

    The rows of a group lie side by side in a grid of groups and places. Where a group has fewer
    rows than places, the rest of the grid repeats some row and is not read.

    Attributes:
        num_groups: Prompt slots in use.
        num_places: The most rows of one group.
        source: The row in each cell of the grid, (groups * places,) int64.
        cell: The cell of each row, (N,) int64.
        prompt_lengths: Tokens of each row's prompt, (N, 1) int64.
        longest: Tokens of the longest prompt in use.
        padded: Whether some prompt in use is shorter.
    """

    num_groups: int
    num_places: int
    source: Tensor
    cell: Tensor
    prompt_lengths: Tensor
    longest: int
    padded: bool

    def clone(self) -> Layout:
        """The same in other tensors."""
        tensors = ("source", "cell", "prompt_lengths")
        return replace(self, **{name: getattr(self, name).clone() for name in tensors})

    def take(self, other: Layout) -> None:
        """Write the tensors of another layout of the same sizes into those of this one."""
        self.source.copy_(other.source)
        self.cell.copy_(other.cell)
        self.prompt_lengths.copy_(other.prompt_lengths)

    def to_grid(self, num_heads: int) -> Tensor:
        """Of (N, heads, ...) flattened: what lies in a grid of (groups, heads, places)."""
        rows = self.source.view(self.num_groups, 1, -1) * num_heads
        heads = torch.arange(num_heads, device=rows.device)[:, None]
        return (rows + heads).flatten()

    def to_rows(self, num_heads: int) -> Tensor:
        """Of a grid of (groups, heads, places) flattened: what belongs to (N, heads)."""
        group = self.cell.div(self.num_places, rounding_mode="floor")
        first = self.cell + group * ((num_heads - 1) * self.num_places)
        heads = torch.arange(num_heads, device=first.device) * self.num_places
        return (first[:, None] + heads).flatten()
