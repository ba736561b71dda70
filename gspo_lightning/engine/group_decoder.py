"""Decode the completions of many groups with one cache, in a batch that stays full.

Decides which rows run: a prompt is read once and stays as long as one of its group's rows does;
a row that ends leaves at once, the last row takes its place, and rows that wait come in. Prompts
and new tokens are given to the model without padding, as one row of tokens whose attention is
``GroupAttention``.
"""

import itertools
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gspo_lightning.engine.attention import open_attention
from gspo_lightning.engine.drawing import NotDecodable, draw, listed
from gspo_lightning.engine.group_attention import GroupAttention, Layout
from gspo_lightning.engine.padded import forward_arguments, text_config, unwrapped
from gspo_lightning.engine.step_graphs import Play, StepGraphs, rounded
from gspo_lightning.engine.turns import Turns, with_given

log = logging.getLogger(__name__)

REFILL_BELOW = 7 / 8  # share of running rows under which rows that wait come in
LONG = 32  # given tokens that are read at once: fewer come beside the other rows' draws
READ_AT_ONCE = 16_384  # prompt tokens of one forward pass, unless one prompt alone is longer


@dataclass
class Wanted:
    """What to draw.

    Attributes:
        prompts: Token ids of each prompt, (length,) int64 each, on the model's device.
        group_size: G, completions per prompt.
        uniform: Numbers in [0, 1) that decide each token, (P * G, T).
        temperature: Divides the logits.
        eos_ids: All ids that end a sequence.
        pad_id: Stands behind the end.
        num_rows: Rows that run at once.
        stopped: Told each row's new token, whether a stop string ends the row there; ``None``
            where there are no stop strings.
        computed: How many rows a step computes where so many run; what comes on top is not read.
        record: Makes a recording of a decode step of fixed shape; ``None`` computes each step
            anew, with no more rows and tokens than there are.
        turns: Gives rows tokens where they end a turn, and knows stop strings then; ``None`` where
            the first end of a row is its last.
    """

    prompts: list[Tensor]
    group_size: int
    uniform: Tensor
    temperature: float
    eos_ids: list[int]
    pad_id: int
    num_rows: int
    stopped: Callable[[int, int], bool] | None = None
    computed: Callable[[int], int] = lambda count: count
    record: Callable[[Play], Play] | None = None
    turns: Turns | None = None


def check_decodable(model: Any) -> None:
    """Raise ``NotDecodable`` unless tokens meet each other in the model's attention only."""
    base = unwrapped(model)
    kinds = set(getattr(text_config(base), "layer_types", None) or [])
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown or getattr(base, "_is_stateful", False):
        raise NotDecodable(f"it has layers of the kind {', '.join(sorted(unknown)) or 'recurrent'}")
    if not {"position_ids", "logits_to_keep"} <= forward_arguments(model):
        raise NotDecodable("it takes no position_ids or no logits_to_keep")
    if not open_attention(model):
        raise NotDecodable("its attention cannot be replaced")


class GroupDecoder:
    """One rollout. Slots 0 to ``num`` - 1 of all per-row tensors are the rows that run."""

    def __init__(self, model: Any, wanted: Wanted) -> None:
        """Make all buffers.

        Raises:
            NotDecodable: If the model needs its own cache.
        """
        check_decodable(model)
        self.model = model
        self.wanted = wanted
        count, limit = wanted.uniform.shape
        device = wanted.uniform.device
        # of four dimensions: the model passes such a mask on unread and makes none of its own
        self.mask = torch.ones(1, 1, 1, 1, device=device)
        lengths = [len(prompt) for prompt in wanted.prompts]
        # long prompts first, so that prompts which run together are of similar length
        order = sorted(range(len(lengths)), key=lambda group: -lengths[group])
        size = wanted.group_size
        self.waiting = deque(group * size + g for group in order for g in range(size))
        self.unfinished = [size] * len(lengths)
        slots = self.slots = min(wanted.num_rows, count)
        num_prompts = min(slots, len(lengths))
        self.cache = GroupAttention(num_prompts, max(lengths), slots, max(1, limit - 1))
        self.ids = torch.full((count, limit), wanted.pad_id, device=device)
        self.logprobs = torch.zeros(count, limit, device=device)
        self.groups: list[int] = []  # the group in each prompt slot
        self.first_logits: dict[int, Tensor] = {}  # behind the prompt, while rows of it wait
        self.num = 0
        self.running: list[int] = []  # row number in each slot
        # where a row's next token lies in the flat tensors of all rows
        self.places = torch.zeros(slots, dtype=torch.long, device=device)
        self.tokens = torch.zeros_like(self.places)  # each row's newest, not in the cache yet
        self.lengths = torch.ones_like(self.places)  # tokens drawn; 1 in slots that are free
        self.admitted: list[int] = []  # the step at which each row came in
        self.step = 0
        self.layout: Layout | None = None
        self.graphs = None if wanted.record is None else StepGraphs(self._compute, wanted.record)

    def run(self) -> tuple[Tensor, Tensor]:
        """Decode all rows.

        Returns:
            Token ids (B, T) and their log-probs (B, T) float32, 0 behind the end, arbitrary where a
            token was given.

        Raises:
            NotDecodable: If a layer did not attend as the model's config says.
            FloatingPointError: If the logits are not finite.
        """
        # inference mode costs less a call, but FSDP2's tensors made in it cannot be trained later
        sharded = any(hasattr(parameter, "device_mesh") for parameter in self.model.parameters())
        try:
            with torch.no_grad() if sharded else torch.inference_mode():
                while self.waiting or self.num:
                    if self.waiting and self.num <= REFILL_BELOW * self.slots:
                        self._admit()
                    else:
                        self._drop(self._draw(0, self._forward()))
        finally:
            self.graphs = None  # at once: a recording that is freed during the next one breaks it
        return self.ids, self.logprobs

    def _admit(self) -> None:
        """Let rows in as long as there is room, and draw their first token."""
        size, start = self.wanted.group_size, self.num
        rows = [self.waiting.popleft() for _ in range(min(self.slots - start, len(self.waiting)))]
        new = dict.fromkeys(row // size for row in rows)
        self._read([group for group in new if group not in self.groups])
        logits = torch.stack([self.first_logits[row // size] for row in rows])
        for group in new:
            if not self.waiting or self.waiting[0] // size != group:
                del self.first_logits[group]
        self.running += rows
        self.admitted += [self.step] * len(rows)
        self.num += len(rows)
        self.places[start : self.num] = torch.tensor(rows) * self.ids.shape[1]
        self.lengths[start : self.num] = 0
        self.layout = None
        self._drop(self._draw(start, logits))

    def _read(self, groups: list[int]) -> None:
        """Bring prompts into the cache."""
        prompts, device = self.wanted.prompts, self.ids.device
        while groups:
            ends = itertools.accumulate(len(prompts[group]) for group in groups)
            count = max(1, sum(end <= READ_AT_ONCE for end in ends))
            now, groups = groups[:count], groups[count:]
            lengths = [len(prompts[group]) for group in now]
            free = range(len(self.groups), len(self.groups) + count)
            attend = self.cache.reading(free, lengths)
            self.groups += now
            ids = torch.cat([prompts[group] for group in now])
            positions = torch.cat([torch.arange(length) for length in lengths])
            last = torch.tensor(lengths).cumsum(0) - 1
            logits = self._call(ids, positions.to(device), attend, last.to(device))
            self.first_logits.update(zip(now, logits, strict=True))
            self._check_layers()

    def _check_layers(self) -> None:
        """What was attended must be what the config promises: all layers, each with its window."""
        config = text_config(self.model)
        windowed = [getattr(config, "sliding_window", None) is not None] * config.num_hidden_layers
        if kinds := getattr(config, "layer_types", None):
            windowed = [kind == "sliding_attention" for kind in kinds]
        found = self.cache.windows
        if [found.get(layer) is not None for layer in range(len(windowed))] != windowed:
            raise NotDecodable("its layers do not say their windows")
        if len(found) != len(windowed):
            raise NotDecodable(f"{len(found)} of its {len(windowed)} layers attend")

    def _forward(self) -> Tensor:
        """Logits behind the newest token of each row, (num, V)."""
        self.step += 1
        if self.layout is None:
            self.layout = self._arrange()
        first, last = min(self.admitted), max(self.admitted)
        longest = self.step - first
        if self.graphs is not None:
            length = rounded(longest, self.cache.length)
            try:
                return self.graphs.play(self.layout, length)[: self.num]
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                log.warning("decode steps are computed one by one, recording failed: %s", reason)
                self.graphs = None  # first: what is recorded rounds the number of rows up
                self.layout = self._arrange()
        return self._compute(self.layout, longest, equal=first == last)

    def _compute(self, layout: Layout, longest: int, equal: bool = False) -> Tensor:
        """Logits of one step; reads nothing but the layout and tensors that stay where they are."""
        count = len(layout.prompt_lengths)
        lengths = self.lengths[:count]
        attend = self.cache.extending(layout, lengths, longest, equal)
        positions = layout.prompt_lengths[:, 0] + lengths - 1
        computed = min(self.wanted.computed(count), self.slots)
        if computed > count:
            positions = torch.nn.functional.pad(positions, (0, computed - count))
        return self._call(self.tokens[:computed], positions, attend, 0)[:count]

    def _call(self, ids: Tensor, positions: Tensor, attend: Any, keep: Tensor | int) -> Tensor:
        return self.model(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=self.mask,
            use_cache=False,
            logits_to_keep=keep,
            attend=attend,
        ).logits[0]

    def _draw(self, start: int, logits: Tensor) -> list[int]:
        """Draw and keep a token of each slot from ``start`` on; return the slots that ended."""
        place = self.places[start : self.num]
        uniform = self.wanted.uniform.view(-1).index_select(0, place)
        token, logprob = draw(logits, uniform, self.wanted.temperature)
        turns = self.wanted.turns
        if turns is not None:
            token = with_given(turns.given(self.running[start:]), token)
        self.ids.view(-1).scatter_(0, place, token)
        self.logprobs.view(-1).scatter_(0, place, logprob)
        self.tokens[start : self.num] = token
        place += 1
        self.lengths[start : self.num] += 1
        full = self.step - (self.ids.shape[1] - 1)  # rows that came in at this step have T tokens
        if turns is not None:
            over = turns.over(self.running[start:], listed(token))
            ends = enumerate(over, start)
            ended = [slot for slot, end in ends if end or self.admitted[slot] == full]
            self._read_on(turns)
            return ended
        stopped = self.wanted.stopped
        return [
            slot
            for slot, newest in enumerate(listed(token), start)
            if newest in self.wanted.eos_ids
            or self.admitted[slot] == full
            or (stopped is not None and stopped(self.running[slot], newest))
        ]

    def _read_on(self, turns: Turns) -> None:
        """Bring long messages into the cache at once; short ones come one token a step."""
        size, wanted, limit = self.wanted.group_size, self.wanted, self.ids.shape[1]
        news = [(slot, turns.long(row, LONG)) for slot, row in enumerate(self.running)]
        news = [(slot, ids) for slot, ids in news if ids]
        while news:
            ends = itertools.accumulate(len(ids) for _, ids in news)
            count = max(1, sum(end <= READ_AT_ONCE for end in ends))
            now, news = news[:count], news[count:]
            pieces, tokens, positions = [], [], []
            for slot, ids in now:
                row = self.running[slot]
                prompt, start = len(wanted.prompts[row // size]), self.step - self.admitted[slot]
                pieces.append((slot, self.groups.index(row // size), prompt, start, len(ids)))
                tokens += [self.tokens[slot : slot + 1], self.ids.new_tensor(ids[:-1])]
                positions.append(torch.arange(len(ids)) + prompt + start)
                place = row * limit + start + 1
                self.ids.view(-1)[place : place + len(ids)] = self.ids.new_tensor(ids)
            last = torch.tensor([sum(map(len, positions)) - 1])  # logits that nobody reads
            there = torch.cat(positions).to(self.ids.device), self.cache.going_on(pieces)
            self._call(torch.cat(tokens), *there, last.to(self.ids.device))
            for slot, ids in now:
                self.tokens[slot] = ids[-1]
                self.places[slot] += len(ids)
                self.lengths[slot] += len(ids)
                self.admitted[slot] -= len(ids)  # as if it had come in so many steps before

    def _drop(self, ended: list[int]) -> None:
        """Free slots: the last rows that run move into them."""
        if not ended:
            return
        keep, gone = self.num - len(ended), set(ended)
        finished = [self.running[slot] // self.wanted.group_size for slot in ended]
        targets = [slot for slot in ended if slot < keep]
        sources = [slot for slot in range(keep, self.num) if slot not in gone]
        if sources:
            old, new = self.ids.new_tensor([sources, targets])  # on the device once, not per layer
            self.cache.move_rows(old, new, length=self.step - min(self.admitted))
            for tensor in (self.places, self.tokens, self.lengths):
                tensor[new] = tensor[old]
            for values in (self.running, self.admitted):
                for source, target in zip(sources, targets, strict=True):
                    values[target] = values[source]
        self.lengths[keep : self.num] = 1
        del self.running[keep:], self.admitted[keep:]
        self.num, self.layout = keep, None
        for group in finished:
            self.unfinished[group] -= 1
            if self.unfinished[group] == 0:
                slot = self.groups.index(group)
                last = self.groups.pop()
                if slot < len(self.groups):
                    self.groups[slot] = last
                    self.cache.move_prompt(len(self.groups), slot)

    def _arrange(self) -> Layout:
        """Say which row attends to which prompt."""
        size, prompts = self.wanted.group_size, self.wanted.prompts
        slot_of = {group: slot for slot, group in enumerate(self.groups)}
        members: list[list[int]] = [[] for _ in self.groups]
        for slot, row in enumerate(self.running):
            members[slot_of[row // size]].append(slot)
        lengths = [len(prompts[row // size]) for row in self.running]
        longest = max(len(prompts[group]) for group in self.groups)
        places = max(map(len, members))
        if self.graphs is not None:
            places = size
            longest = rounded(longest, self.cache.prompt_length)
            more = rounded(len(members), self.cache.num_prompts) - len(members)
            members += [[] for _ in range(more)]
            lengths += [1] * (rounded(self.num, self.slots) - self.num)
        source = [slot for slots in members for slot in slots + [0] * (places - len(slots))]
        cell = [0] * len(lengths)  # rows that rounding adds read the first cell
        for group, slots in enumerate(members):
            for place, slot in enumerate(slots):
                cell[slot] = group * places + place
        new, padded = self.ids.new_tensor, self.graphs is not None or min(lengths) < longest
        prompt_lengths = new(lengths)[:, None]
        return Layout(len(members), places, new(source), new(cell), prompt_lengths, longest, padded)
