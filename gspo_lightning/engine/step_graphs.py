"""Decode steps of fixed shapes, recorded once per shape and played again.

Decides which shapes there are: all sizes of a step are rounded up, so that few differ, and what a
recording reads lies in tensors that stay where they are. On a GPU a recording is a CUDA graph, one
launch instead of hundreds. Rows that rounding adds compute something that nobody reads.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from gspo_lightning.engine.group_attention import Layout

Play = Callable[[], Tensor]


def rounded(size: int, most: int) -> int:
    """Round a size up to a power of two, 8 at least: a recording costs as much as three steps.

    >>> [rounded(size, most=100) for size in (1, 9, 33, 64, 65, 99)]
    [8, 16, 64, 64, 100, 100]
    """
    return min(max(8, 1 << (size - 1).bit_length()), most)


def cuda_graph_recorder() -> Callable[[Play], Play]:
    """Makes recordings on the current GPU; see ``torch.cuda.graph`` for what they may not do.

    They share one pool of memory: only one plays at a time, each computes again whatever it reads
    that is not kept outside, and its output is read before another plays.
    """
    pool = torch.cuda.graph_pool_handle()

    def record(step: Play) -> Play:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # what kernels set up on first use cannot be recorded
            step()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        collected = gc.isenabled()
        gc.disable()  # garbage may hold recordings, which must not be freed while one is made
        try:
            with torch.cuda.graph(graph, pool=pool):
                output = step()
        finally:
            if collected:
                gc.enable()

        def play() -> Tensor:
            graph.replay()
            return output

        return play

    return record


@dataclass(eq=False)
class StepGraphs:
    """Plays a step for a layout, recorded on first use of its shape.

    Args:
        step: Logits (N, V) for a layout and the tokens of the longest row. Everything else that it
            reads or writes must stay where it is.
        record: Makes a recording of a call.
    """

    step: Callable[[Layout, int], Tensor]
    record: Callable[[Play], Play]
    recordings: dict[tuple[int, ...], tuple[Layout, Play]] = field(default_factory=dict)

    def play(self, layout: Layout, longest: int) -> Tensor:
        """The logits of ``step``; the next call may overwrite them."""
        sizes = (layout.num_groups, layout.num_places, layout.longest)
        key = (len(layout.prompt_lengths), *sizes, longest)
        if key not in self.recordings:
            fixed = layout.clone()
            # a new layout for each recording, which must contain what is computed once a layout
            self.recordings[key] = fixed, self.record(lambda: self.step(replace(fixed), longest))
        fixed, play = self.recordings[key]
        fixed.take(layout)
        return play()
