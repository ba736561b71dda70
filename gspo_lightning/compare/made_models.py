"""Two small models that behave as chat models and base models do, made from the shipped policy.

Decides their tokens, their template, and the texts that a short supervised training teaches them.
The chat model ends its answers with the end of turn of its template. The base model has read plain
text in which one worked example follows another, and never an end of sequence: behind an answer it
goes on with a question of its own.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from gspo_lightning.policy.chat import Chat

TASK = Path("data/arithmetic")
DEMOS = 3600  # at the end of the file, where demonstrations are as mixed as the shipped policy
EXAMPLES = 3  # of a text that the base model reads
POSITIONS = 256  # tokens: such a text is longer than what the shipped policy reads
START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHOTS = (
    "Q: 3+4=\nA: 3+4=7, answer: 7\n\nQ: 9-3+8=\nA: 9-3=6, 6+8=14, answer: 14\n\n"  # of each prompt
)
EPOCHS = {"chat": (4, 32), "base": (6, 8)}  # passes over the texts, and texts a step
KINDS = tuple(EPOCHS)


def prepare(kind: str, folder: Path) -> Any:
    """Write what a model of this kind is trained from, and the prompts that it is tried with.

    Below ``folder`` stand ``start``, the shipped policy with more tokens; ``demos.jsonl``; and
    ``train.jsonl`` and ``heldout.jsonl``, the prompts of the task as this kind is given them.

    Returns:
        The tokenizer that the trained model has.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a making that was broken off
    options = {"trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(
        TASK / "policy", model_max_length=POSITIONS, **options
    )
    teach = _chat if kind == "chat" else _plain
    texts, shown = teach(tokenizer, _rows("demos")[-DEMOS:])
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "demos.jsonl", texts)
    for name in ("train", "heldout"):
        prompts = [row | {"prompt": shown.format(row["prompt"])} for row in _rows(name)]
        _write(folder / f"{name}.jsonl", prompts)

    torch.manual_seed(0)  # the embeddings of new tokens are drawn
    model = AutoModelForCausalLM.from_pretrained(TASK / "policy", **options)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.max_position_embeddings = POSITIONS
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<eos>")]
    model.generation_config.eos_token_id = list(dict.fromkeys(ends))
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    if kind == "base":  # SFT puts an end behind each text: here what the next one begins with
        learner = AutoTokenizer.from_pretrained(folder / "start", eos_token="Q: ", **options)
        learner.save_pretrained(folder / "start")
    return tokenizer


def training(kind: str, folder: Path) -> list[str]:
    """The words of ``gspo`` that train the model prepared in ``folder``."""
    epochs, batch_size = EPOCHS[kind]
    return [
        *("fit", "--config", "configs/sft_arithmetic.yaml"),
        *("--data.path", str(folder / "demos.jsonl")),
        *("--model.policy.path", str(folder / "start"), "--model.policy.weights", "pretrained"),
        *("--model.optimizer.learning_rate", "3e-3"),
        *("--trainer.max_epochs", str(epochs), "--data.batch_size", str(batch_size)),
        *("--data.max_tokens", str(POSITIONS), "--data.shuffle", "true"),
        *("--trainer.default_root_dir", str(folder / "sft")),
        *("--trainer.enable_progress_bar", "false"),
    ]


def finish(kind: str, folder: Path, tokenizer: Any) -> None:
    """Move what was trained to ``policy``, its presence saying that the model is made.

    Of the chat model ``open`` is a copy that does not know the end of turn as an end: its
    ``generation_config.json`` names the end of sequence alone.
    """
    made = folder / "sft" / "export"
    tokenizer.save_pretrained(made)
    if kind == "chat":
        shutil.copytree(made, folder / "open", dirs_exist_ok=True)
        file = folder / "open" / "generation_config.json"
        ends = {"eos_token_id": tokenizer.convert_tokens_to_ids("<eos>")}
        file.write_text(json.dumps(json.loads(file.read_text()) | ends))
    made.rename(folder / "policy")


def _chat(tokenizer: Any, demos: list[dict[str, str]]) -> tuple[list[dict[str, str]], str]:
    """Give the tokenizer its template; demonstrations in it, and what prompts look like."""
    tokenizer.add_tokens([AddedToken(text, special=True) for text in (START, END)], True)
    tokenizer.add_tokens(["user", "assistant", "\n"])
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, END
    chat = Chat(tokenizer)
    messages = [[{"role": "user", "content": row["prompt"]}] for row in demos]
    texts = [row | {"prompt": chat.prompt(said)} for row, said in zip(demos, messages, strict=True)]
    return texts, "{}"  # the run renders them


def _plain(tokenizer: Any, demos: list[dict[str, str]]) -> tuple[list[dict[str, str]], str]:
    """Texts of several worked examples, and prompts that show two."""
    tokenizer.add_tokens(["Q: ", "A: ", "\n"])
    examples = [f"{row['prompt']}\nA: {row['completion']}\n\n" for row in demos]
    starts = range(0, len(examples), EXAMPLES)
    texts = ["Q: ".join(examples[start : start + EXAMPLES]) for start in starts]
    return [{"prompt": "Q: ", "completion": text} for text in texts], SHOTS + "Q: {}\nA: "


def _rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (TASK / f"{name}.jsonl").read_text().splitlines()]


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
