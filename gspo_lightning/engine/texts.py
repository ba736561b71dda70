"""What text a completion is, and which texts and tokens end it beside an end of sequence.

Decides that a completion's text is what its tokens add to the text of their prompt; that special
tokens, and what ended the completion, are no part of it; and at which token a stop string ends it.
All of that is a function of token ids alone, the same for the decoders and for the mask, so that
tokens which another engine drew are read alike.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gspo_lightning.rollout import completion_mask

BROKEN = "\ufffd"  # what tokenizers write for bytes that are no whole character
CONTEXT = 8  # tokens of the prompt that are decoded before a completion
CHARACTER = 4  # bytes, so tokens, that a character has at most


class Continuation:
    """The text of tokens as it goes on behind others.

    Tokens alone would lose the space that they begin with (SentencePiece), and a character whose
    first bytes stand before them.

    Args:
        tokenizer: Has ``decode``.
        before: Ids that stand before the text; the last few of them are read.
        special: Keep special tokens in the text.
    """

    def __init__(self, tokenizer: Any, before: list[int], special: bool = False) -> None:
        self.tokenizer = tokenizer
        self.special = special
        # Begin with a whole character: bytes of half a one may spoil all bytes behind them.
        for size in (*range(CONTEXT, CONTEXT + CHARACTER), len(before)):
            self.before = before[-size:] if size else []
            head = self._decode(self.before)
            if head and not head.startswith(BROKEN):
                break
        self.heads = [head]
        if head.endswith(BROKEN):  # a character that ends behind ``before`` is no part of it
            cuts = range(1, min(CHARACTER, len(self.before)))
            self.heads += [self._decode(self.before[:-cut]) for cut in cuts]

    def text(self, ids: list[int]) -> str:
        """What ``ids`` add to the text."""
        whole = self._decode(self.before + ids)
        for head in self.heads:
            if whole.startswith(head):
                return whole[len(head) :]
        return self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        # Cleaning up would take spaces out that the tokens have, also before a stop string.
        return self.tokenizer.decode(
            ids, skip_special_tokens=not self.special, clean_up_tokenization_spaces=False
        )


class Read(NamedTuple):
    """What drawn tokens are: ``mask`` (B, T) and ``finished`` (B,), bool, and their texts.

    ``special_texts`` are the texts with special tokens kept, except for one that ended them.
    """

    mask: Tensor
    finished: Tensor
    texts: list[str]
    special_texts: list[str]


class Ends:
    """What ends a completion beside an end of sequence, and what text it leaves.

    A completion ends at the first token behind which its text has a stop string. That token belongs
    to the completion and is trained like any other; the text ends before the stop string.

    Args:
        tokenizer: The policy's.
        strings: Stop strings. One that is a single special token is that token's id.
        token_ids: Ids that end a completion like an end of sequence.
        included: Whether the stop string, or the text of the id, stays in the text.

    Attributes:
        strings: Those that are looked for in texts.
        token_ids: All ids that end a completion, those of strings included.

    Raises:
        ValueError: If a string is empty, or holds a special token and more, naming the setting.
    """

    def __init__(
        self,
        tokenizer: Any,
        strings: Sequence[str] = (),
        token_ids: Sequence[int] = (),
        included: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.included = included
        self.special = special_ids(tokenizer)
        self.token_ids = list(dict.fromkeys(token_ids))
        self.strings: list[str] = []
        for string in dict.fromkeys(strings):
            self._take(string)
        self._reach = max((len(string.encode()) for string in self.strings), default=0)
        self._last = {string[-1] for string in self.strings}
        self._pieces: dict[int, str] = {}

    def _take(self, string: str) -> None:
        if not string:
            raise ValueError("policy.stop_strings holds an empty text, which every text would end")
        ids = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        special = [i for i in ids if i in self.special and i != self.tokenizer.unk_token_id]
        if not special:
            self.strings.append(string)
        elif len(ids) > 1:
            token = self.tokenizer.convert_ids_to_tokens(special[0])
            raise ValueError(
                f"policy.stop_strings: {string!r} holds the special token {token!r}, which is in "
                f"no text; use policy.stop_token_ids: [{special[0]}]"
            )
        elif ids[0] not in self.token_ids:
            self.token_ids.append(ids[0])

    def completed(self, prompt: list[int], ids: list[int], count: int) -> bool:
        """Whether token number ``count`` of a completion completes a stop string.

        Only a token that can write a stop string's last character is looked at, together with as
        many tokens before it as a stop string has bytes.
        """
        piece = self._piece(ids[count - 1])
        if BROKEN not in piece and not any(last in piece for last in self._last):
            return False
        start, found = count, 0
        while start and found < self._reach:
            start -= 1
            found += bool(self._piece(ids[start]))  # special tokens write nothing
        longest = CONTEXT + CHARACTER
        before = [*prompt[-longest:], *ids[max(0, start - longest) : start]][-longest:]
        text = Continuation(self.tokenizer, before).text(ids[start:count])
        return any(string in text for string in self.strings)

    def _piece(self, token: int) -> str:
        """A text with every character that a token can write, behind others, too."""
        if token not in self._pieces:
            self._pieces[token] = Continuation(self.tokenizer, []).text([token, token])
        return self._pieces[token]

    def read(
        self, prompts: list[list[int]], ids: Tensor, eos_ids: Sequence[int], group_size: int
    ) -> Read:
        """Say how far each row goes, whether it ended, and what its text is.

        Args:
            prompts: Ids of each of the P prompts.
            ids: Drawn tokens of P * G rows, padded on the right, (B, T) int64.
            eos_ids: All ids that end a sequence, ``token_ids`` among them.
            group_size: G.
        """
        mask, finished = completion_mask(ids, eos_ids)
        lengths, ended = mask.sum(1).tolist(), finished.tolist()
        heads = [Continuation(self.tokenizer, prompt) for prompt in prompts]
        texts, special_texts = [], []
        for row, tokens in enumerate(ids.tolist()):
            tokens, group = tokens[: lengths[row]], row // group_size
            own, stopped = tokens[:-1] if ended[row] else tokens, None
            if self.strings:
                numbers = range(1, len(own) + 1)
                prompt = prompts[group]
                stopped = next((n for n in numbers if self.completed(prompt, own, n)), None)
            if stopped is not None:
                own, lengths[row], ended[row] = own[:stopped], stopped, True
            elif self.included and tokens[-1] in self.token_ids:
                own = tokens
            text = special = heads[group].text(own)
            if not self.special.isdisjoint(own):
                special = Continuation(self.tokenizer, prompts[group], special=True).text(own)
            if stopped is not None:
                text, special = self._cut(text, special)
            texts.append(text)
            special_texts.append(special)
        if self.strings:
            steps = torch.arange(ids.shape[1], device=ids.device)
            mask = steps < torch.tensor(lengths, device=ids.device)[:, None]
            finished = torch.tensor(ended, device=ids.device)
        return Read(mask, finished, texts, special_texts)

    def _cut(self, text: str, special: str) -> tuple[str, str]:
        """Both texts up to the stop string that is complete first; the longer one of two."""
        starts = [(text.find(string), len(string)) for string in self.strings if string in text]
        end, start = min(((at + size, at) for at, size in starts), default=(len(text),) * 2)
        kept = end if self.included else start
        return text[:kept], special.removesuffix(text[kept:])


class Watch:
    """Sees the tokens of a rollout as they are drawn, and says which complete a stop string.

    Args:
        ends: What ends a completion.
        prompts: Ids of the prompt of each row.
    """

    def __init__(self, ends: Ends, prompts: list[list[int]]) -> None:
        self.ends = ends
        self.prompts = prompts
        self.drawn: list[list[int]] = [[] for _ in prompts]

    def __call__(self, row: int, token: int) -> bool:
        """Take the next token of a row; whether the row ends with it."""
        ids = self.drawn[row]
        ids.append(token)
        return self.ends.completed(self.prompts[row], ids, len(ids))

    def go_on(self, row: int, ids: list[int]) -> None:
        """Begin anew behind tokens that the row is given: no stop string goes across them."""
        self.prompts[row] = [*self.prompts[row], *self.drawn[row], *ids]
        self.drawn[row] = []


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that decoding leaves out of a text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def ends_of(tokenizer: Any, config: Any = None, known: str | list[str] | None = None) -> Ends:
    """What ends a completion as a policy's settings say, beside its end-of-sequence ids.

    Args:
        tokenizer: The policy's.
        config: Has ``stop_strings``, ``stop_token_ids`` and ``include_stop_str_in_output``.
        known: Stop strings of the model folder, for settings that name none.

    Raises:
        ValueError: If a stop string or stop id is none of this tokenizer, naming it.
    """
    strings = None if config is None else config.stop_strings
    if strings is None:
        strings = [known] if isinstance(known, str) else known or []
    if config is None:
        return Ends(tokenizer, strings)
    ids = config.stop_token_ids or []
    if unknown := sorted(set(ids) - set(tokenizer.get_vocab().values() if ids else ())):
        raise ValueError(
            f"policy.stop_token_ids: the tokenizer has no token {unknown[0]}; it has "
            f"{len(tokenizer)} ids, from 0"
        )
    return Ends(tokenizer, strings, ids, config.include_stop_str_in_output)
