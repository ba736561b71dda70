"""The frozen reward model: a sequence classifier that scores prompt and completion.

A plain object, not a module, so that Lightning never sees it. Decides how prompt and completion
become one text and what happens to a text that is too long.
"""

import logging
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

from gspo_lightning.bounds import check_at_least
from gspo_lightning.engine.probe import some_ids
from gspo_lightning.engine.rotary import forget_lengths, rotary_limit
from gspo_lightning.guards.out_of_memory import Sizes, is_out_of_memory
from gspo_lightning.policy.chat import Chat, checked
from gspo_lightning.policy.folder import check_values, read_tokenizer, silence, unloadable
from gspo_lightning.policy.policy import fingerprint, make_ready
from gspo_lightning.policy.reads import positions
from gspo_lightning.start.shipped import find_data

log = logging.getLogger(__name__)


def freeze(model: Any, device: torch.device) -> Any:
    """Ready a model for scoring: on its device, dropout off, no gradients."""
    make_ready(model)
    return model.to(device).eval().requires_grad_(False)


@dataclass
class RewardModel:
    """A frozen sequence classifier that scores prompt and completion with one number.

    A reward function: use it as the ``fn`` of a reward term. Texts that were cut are counted as
    ``reward/<term>_truncated``.

    Args:
        path: Folder or hub name of a model that ``AutoModelForSequenceClassification`` loads.
        device: ``cuda:1``, ``cuda:+1``, ``policy`` or ``cpu``.
        dtype: Type of the weights.
        batch_size: Sequences per forward pass; halved for the rest of the run where memory is
            short.
        label: Which output is the score; needed if the model has more than one.
        separator: Text between prompt and completion, without a chat template.
        prompt_column: Column of the data with the prompt: a text, or a list of chat messages, which
            needs ``chat_template``.
        chat_template: Render prompt and completion as user and assistant with the chat template of
            the reward model's own tokenizer; otherwise prompt, separator and completion are joined.
        max_tokens: Longest text in tokens; ``None`` is what the model's positions allow.
        overlong: What becomes of a longer text: an ``error``, or its beginning is cut off
            (``truncate_left``), so that the end of the completion is what counts.
        revision: Branch, tag or commit of a model on the hub.
        trust_remote_code: Run Python code that lies beside the weights. Off unless asked.

    Attributes:
        counts: ``truncated``, the texts that were cut in the last call.
    """

    path: str
    device: str = "cuda:1"
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 16
    label: int | None = None
    separator: str = " "
    prompt_column: str = "prompt"
    chat_template: bool = False
    max_tokens: int | None = None
    overlong: Literal["error", "truncate_left"] = "error"
    revision: str | None = None
    trust_remote_code: bool = False
    model: Any = field(default=None, init=False, repr=False)
    tokenizer: Any = field(default=None, init=False, repr=False)
    chat: Chat | None = field(default=None, init=False, repr=False)
    fingerprint: str | None = field(default=None, init=False, repr=False)
    batches: str = field(default="any", init=False, repr=False)  # any lengths, alike, alone
    counts: dict[str, int] = field(default_factory=lambda: {"truncated": 0}, init=False, repr=False)

    def __post_init__(self) -> None:
        owner = "a reward model's "
        self.path = find_data(self.path)
        check_at_least(1, owner, batch_size=self.batch_size, max_tokens=self.max_tokens)

    @property
    def column(self) -> str:
        """The column that every row must have."""
        return self.prompt_column

    def load(self, device: torch.device) -> None:
        """Load weights and tokenizer.

        Raises:
            ValueError: If weights are missing, the model has several outputs and ``label`` does not
                choose one, its tokenizer has no chat template where one is asked for, or
                ``max_tokens`` is more than the model reads.
        """
        source: Any = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        self.tokenizer = read_tokenizer(self.path, padding_side="right", **source)
        if self.chat_template:
            key = f"chat_template of the reward model {self.path}"
            self.chat = Chat(self.tokenizer, key=key)
        options = source | {"dtype": getattr(torch, self.dtype), "output_loading_info": True}
        try:
            with silence():
                auto = AutoModelForSequenceClassification
                model, loading = auto.from_pretrained(self.path, **options)
        except Exception as error:  # whatever a model's code raises for sizes that do not fit
            raise unloadable("the reward model", self.path, error) from error
        if loading["missing_keys"]:  # transformers would draw them at random and go on
            raise ValueError(
                f"{self.path} is no trained sequence classifier: it has no weights for "
                f"{', '.join(sorted(loading['missing_keys'])[:3])}; RewardModelModule trains one"
            )
        check_values(self.path, model)
        labels = model.config.num_labels
        if labels > 1 and self.label is None:
            raise ValueError(f"the reward model {self.path} has {labels} labels; set label to one")
        if self.label is not None and not 0 <= self.label < labels:
            raise ValueError(f"label {self.label} is not among the {labels} of {self.path}")
        limit = positions(model.config)
        if self.max_tokens is not None and limit is not None and self.max_tokens > limit:
            raise ValueError(
                f"max_tokens {self.max_tokens} is more than the {limit} tokens that the reward "
                f"model {self.path} reads"
            )
        for config in (model.config, model.config.get_text_config()):  # a classifier reads either
            config.pad_token_id = self.tokenizer.pad_token_id
        self.model = freeze(model, device)
        self.fingerprint = fingerprint(self.model)
        try:
            self._find_batches()
        except Exception as error:  # short memory is said, with what to do, as texts are scored
            if not is_out_of_memory(error):
                self._score_one(error)

    def _find_batches(self) -> None:
        """Find what may share a batch with a text and leave its score as it is alone, by trying."""
        texts = [ids.tolist() for ids in some_ids(self.model, 3, 9)]
        texts[1] = texts[1][:5]
        alone = torch.tensor([self._score([text])[0] for text in texts])
        half = torch.finfo(next(self.model.parameters()).dtype).bits < 32
        close = (0.3 if half else 1e-3) * alone.std()

        def same(index: list[int]) -> bool:
            together = torch.tensor(self._score([texts[i] for i in index]))
            return bool((together - alone[index]).abs().max() <= close)

        if self.tokenizer.pad_token_id is not None and not same([0, 1, 2]):
            self.batches = "alike" if same([0, 2]) else "alone"
            which = "texts of one length only" if self.batches == "alike" else "one text"
            log.warning(
                "the reward model %s scores a text otherwise beside others; a batch holds %s",
                self.path,
                which,
            )

    def _score_one(self, trouble: Exception) -> None:
        """Leave texts alone that are more than ids to a model: some ask for an end of sequence."""
        try:
            self._score([self.tokenizer("1 + 2 = 3")["input_ids"]])
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            kind = type(error).__name__
            raise ValueError(f"{self.path} cannot score a text ({kind}: {line})") from error
        self.batches = "alone"
        line = (str(trouble).splitlines() or [type(trouble).__name__])[0]
        log.warning("the reward model %s: a batch holds one text: %s", self.path, line)

    def release(self) -> None:
        self.model = self.tokenizer = None

    @torch.no_grad()
    def __call__(self, rows: list[dict], completions: list[str]) -> list[float]:
        """Score B completions behind their prompts.

        Raises:
            ValueError: If a row has no prompt of the right kind, or a text is too long.
            OutOfMemory: If memory does not suffice for one text at once.
        """
        self.counts = {"truncated": 0}
        encoded = [self._encode(*pair) for pair in zip(rows, completions, strict=True)]
        sizes = Sizes({"batch_size": self.batch_size})

        def work() -> list[float]:
            self.batch_size = sizes.now["batch_size"] or len(encoded)
            return self._score_all(encoded)

        return sizes.fit("batch_size", len(encoded), f"the reward model {self.path}", work)

    def _score_all(self, encoded: list[list[int]]) -> list[float]:
        """Score all texts, ``batch_size`` at once."""
        # Sorted by length: little padding.
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        scores = [0.0] * len(encoded)
        while order:
            length, size = len(encoded[order[0]]), self.batch_size
            limit = rotary_limit(self.model)
            if self.batches == "alike" or (limit is not None and length > limit):
                size = min(size, sum(len(encoded[i]) == length for i in order))
            elif limit is not None:
                size = min(size, sum(len(encoded[i]) <= limit for i in order))
            if self.batches == "alone" or self.tokenizer.pad_token_id is None:
                size = 1  # without a pad token a classifier takes no batch
            chosen, order = order[:size], order[size:]
            if limit is not None and length > limit:
                forget_lengths(self.model)
            for i, value in zip(chosen, self._score([encoded[i] for i in chosen]), strict=True):
                scores[i] = value
        return scores

    def _encode(self, row: dict, completion: str) -> list[int]:
        """Token ids of prompt and completion, cut to what the model reads if that is wanted."""
        prompt = row.get(self.prompt_column)
        wanted = (str, list) if self.chat_template else str
        if not isinstance(prompt, wanted):
            found = f"a row has {sorted(row)}"
            if isinstance(prompt, list):
                found = "a row has a list of chat messages, which needs chat_template: true"
            raise ValueError(
                f"the reward model {self.path} reads the text in column {self.prompt_column!r}; "
                f"{found}"
            )
        if self.chat_template:
            text = self._conversation(prompt, completion)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            text = f"{prompt}{self.separator}{completion}"
            ids = self.tokenizer(text)["input_ids"]
        limit = self.max_tokens or positions(self.model.config)
        if limit is None or len(ids) <= limit:
            return ids
        if self.overlong == "error":
            raise ValueError(
                f"the reward model {self.path} reads {limit} tokens, a text has {len(ids)}: "
                f"{text[:60]!r}...; lower max_new_tokens or data.max_prompt_tokens, or set its "
                "overlong to truncate_left"
            )
        self.counts["truncated"] += 1
        return ids[-limit:]

    def _conversation(self, prompt: str | list[dict], completion: str) -> str:
        """Prompt and completion as the reward model's template writes them, nothing left out."""
        assert self.chat is not None
        try:
            messages = checked(prompt)
            begun = messages[-1].get("content") if messages[-1]["role"] == "assistant" else None
            if begun is not None:  # the policy continued it: one turn
                messages.pop()
            answer = {"role": "assistant", "content": f"{begun or ''}{completion}"}
            return self.chat.conversation([*messages, answer])
        except ValueError as error:
            column = self.prompt_column
            text = f"the reward model {self.path} cannot read column {column!r}: {error}"
            raise ValueError(text) from error

    def _score(self, encoded: list[list[int]]) -> list[float]:
        pad_id = self.tokenizer.pad_token_id or 0
        rows = [torch.tensor(text, dtype=torch.long) for text in encoded]
        ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        device = next(self.model.parameters()).device
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        return logits[:, self.label or 0].float().tolist()
