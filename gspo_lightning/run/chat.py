"""``gspo chat RUN``: talk to what a run has trained, read and drawn from as in its training.

Decides which weights speak, how a line becomes a prompt, and what is shown of an answer while it
grows. Template, stop strings, temperature and length are those of the run's config.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from string import Formatter
from types import SimpleNamespace
from typing import Any

import torch
import yaml

from gspo_lightning.bounds import check_at_least
from gspo_lightning.checkpoint.files import find_checkpoint, list_checkpoints
from gspo_lightning.checkpoint.io import AtomicCheckpointIO
from gspo_lightning.engine.rotary import fix_rotary
from gspo_lightning.engine.texts import BROKEN, Continuation, Ends
from gspo_lightning.policy import Chat, LoRAConfig, Policy, PolicyConfig, load_policy
from gspo_lightning.policy.folder import read_tokenizer
from gspo_lightning.policy.reads import overlength, positions
from gspo_lightning.rollout import PromptBatch
from gspo_lightning.run import ending, folder, one_line
from gspo_lightning.run.terminal_log import begin_here, shown
from gspo_lightning.sampling import GroupSampler
from gspo_lightning.start.layout import RED, printable, styled
from gspo_lightning.start.typed import program

EXPORT = "export"
LONGEST = 256  # tokens of an answer, where nothing else is said


@dataclass
class Manner:
    """How a run reads prompts and draws completions.

    Attributes:
        policy: Of the model, as its config says; ``None`` where there is no run.
        tokenizer: Its folder or hub name, where that is not the policy's.
        export: Name of the folder that holds the exported policy.
        chat: Whether the tokenizer's chat template is used; ``None`` if it has one.
        arguments: Of the template.
        system: System message.
        template: Of a prompt, with the name of a column in braces for what is typed.
        temperature: Divides the logits.
        max_new_tokens: Longest answer, in tokens; ``None`` is 256, or what the model has room for.
        max_prompt_tokens: Longest prompt that the run was made for, in tokens.
    """

    policy: PolicyConfig | None = None
    tokenizer: str | None = None
    export: str = EXPORT
    chat: bool | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    template: str | None = None
    temperature: float = 1.0
    max_new_tokens: int | None = None
    max_prompt_tokens: int = 512


def manner(run: Path) -> Manner:
    """What the newest config of a run says.

    Raises:
        ValueError: If there is none, or none of a run that samples.
    """
    file = folder.newest_config(run)
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        model, data = tree["model"]["init_args"], tree["data"].get("init_args") or {}
        policy = model["policy"]
        policy = {"path": policy} if isinstance(policy, str) else dict(policy)
        callbacks = tree["trainer"].get("callbacks") or []
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is no config of a run with a policy: it is damaged") from error
    known = {entry.name for entry in fields(PolicyConfig)}
    policy = {name: value for name, value in policy.items() if name in known}
    if policy.get("lora") is not None:
        policy["lora"] = LoRAConfig(**policy["lora"])
    sampler = (model.get("sampler") or {}).get("init_args") or {}
    exports = [
        (callback.get("init_args") or {}).get("path", EXPORT)
        for callback in callbacks
        if str(callback.get("class_path")).endswith("HFExport")
    ]
    standard = Manner()
    return Manner(
        policy=replace(PolicyConfig(**policy), gradient_checkpointing=False),
        tokenizer=model.get("tokenizer"),
        export=[*exports, EXPORT][0],
        chat=bool(data.get("chat_template")),
        arguments=data.get("chat_template_arguments") or {},
        system=data.get("system_prompt"),
        template=data.get("prompt_template"),
        temperature=sampler.get("temperature", standard.temperature),
        max_new_tokens=sampler.get("max_new_tokens", standard.max_new_tokens),
        max_prompt_tokens=data.get("max_prompt_tokens", standard.max_prompt_tokens),
    )


def find(run: Path, weights: str | None) -> tuple[Manner, Path]:
    """How to speak, and the weights that do: a folder that transformers loads, or a checkpoint.

    Args:
        run: A run folder, or an exported one, in a run folder or anywhere.
        weights: ``last``, ``best``, a checkpoint, or a folder; ``None`` is the export.

    Raises:
        ValueError: If there are no such weights, with the way out.
    """
    run = Path(os.path.expanduser(run))
    if not run.is_dir():
        raise ValueError(
            f"{run} is no run folder; a checkpoint is named by --weights, beside its run"
        )
    if (run / "config.json").is_file() and weights is None:
        inside = (run.parent / folder.CONFIG).is_file()
        return manner(run.parent) if inside else Manner(), run
    if not (run / folder.CONFIG).is_file():
        raise ValueError(
            f"{run} holds neither a run ({folder.CONFIG}) nor a model (config.json); name the "
            "folder of a run, or one that was exported"
        )
    how = manner(run)
    if weights is None:
        path = run / how.export
        if not path.is_dir():
            found = list_checkpoints(run)
            way_out = "wait for its first checkpoint"
            if found:
                way_out = f"--weights last takes the newest checkpoint, {found[-1].name}"
            raise ValueError(
                f"{run} has no {how.export} yet: a run exports its policy at its end, with "
                f"gspo_lightning.HFExport among trainer.callbacks; {way_out}"
            )
        return how, path
    for path in (run / weights, Path(os.path.expanduser(weights))):
        if path.is_dir():
            return how, path
    try:
        file = find_checkpoint(run, "last" if weights == "auto" else weights)
    except ValueError as error:  # its way out is that of a training
        said = str(error).partition("; ")[0].replace("ckpt_path", "--weights", 1)
        raise ValueError(f"{said}; last, best, a checkpoint or a folder can be named") from error
    assert file is not None  # one was named
    return how, file


def load(how: Manner, weights: Path) -> Policy:
    """The policy with these weights.

    Raises:
        ValueError: If they cannot be read, or are none of the run's policy.
    """
    if weights.is_dir() and (weights / "adapter_config.json").is_file():
        raise ValueError(
            f"{weights} holds adapters alone, without the model below them; --weights last takes "
            "both from the checkpoint and policy.path"
        )
    if weights.is_dir() and (weights / "config.json").is_file():
        check_writes(weights)
        config = how.policy or PolicyConfig(str(weights))
        others: dict[str, Any] = {
            "revision": None,
            "lora": None,
            "load_in_4bit": False,
            "weights": "pretrained",
        }
        return load_policy(replace(config, path=str(weights), **others))
    if how.policy is None or weights.is_dir():
        raise ValueError(f"{weights} is neither an exported model nor a checkpoint in one file")
    tokenizer = how.tokenizer and read_tokenizer(how.tokenizer, padding_side="left")
    policy = load_policy(how.policy, tokenizer)
    found = AtomicCheckpointIO().load_checkpoint(weights)  # sealed, and put together from parts
    state = {
        name.removeprefix("policy."): value
        for name, value in found["state_dict"].items()
        if name.startswith("policy.")
    }
    if not state:
        raise ValueError(f"{weights} holds no policy: its run has trained another kind of model")
    policy.load_state_dict(state)
    return policy


def check_writes(folder: Path) -> None:
    """Raise ValueError for a model that judges texts; it would load as a writer, of noise."""
    try:
        kinds = json.loads((folder / "config.json").read_bytes()).get("architectures") or []
    except (ValueError, AttributeError):
        return  # who loads the model says so
    judges = [str(kind) for kind in kinds if str(kind).endswith("Classification")]
    if judges:
        raise ValueError(f"{folder} holds a {judges[0]}, which judges texts and writes none")


def move(policy: Policy, device: str) -> None:
    """Move a policy to a device; a ValueError names one that is not there."""
    try:
        policy.to(device)
    except (RuntimeError, AssertionError) as error:  # of torch, which has no other
        said = str(error).partition("\n")[0]
        raise ValueError(f"--device {device}: {said}") from error


class Aloud:
    """The ends of a policy's completions, for a sampler; hands an answer on while it grows.

    What may yet become a stop string, or is half a character, is held back.
    """

    strings = ("",)  # the sampler asks at every token only where there are some

    def __init__(self, ends: Ends, eos_ids: Sequence[int], write: Callable[[str], Any]) -> None:
        self.ends, self.eos_ids, self.write = ends, eos_ids, write
        self.text = ""  # handed on so far

    def completed(self, prompt: list[int], ids: list[int], count: int) -> bool:
        """Whether a token ends the answer."""
        own = ids[:count] if ids[count - 1] not in self.eos_ids else ids[: count - 1]
        self.hand_on(self.ready(Continuation(self.ends.tokenizer, prompt).text(own)))
        return bool(self.ends.strings) and self.ends.completed(prompt, ids, count)

    def ready(self, text: str) -> str:
        """The part of a text that no later token can change."""
        text = text.rstrip(BROKEN)
        for string in self.ends.strings:
            text = text.partition(string)[0]
            sizes = range(min(len(string), len(text)), 0, -1)
            begun = next((size for size in sizes if text.endswith(string[:size])), 0)
            text = text[: len(text) - begun]
        return text

    def hand_on(self, text: str) -> None:
        """Write what a text has beyond what was written."""
        if len(text) > len(self.text):
            self.write(printable(text[len(self.text) :], keep="\n\t"))
            self.text = text

    def read(self, *arguments: Any) -> Any:
        """As the policy's own ends read drawn tokens."""
        return self.ends.read(*arguments)


class Talk:
    """A conversation with a policy.

    Args:
        policy: It is loaded.
        how: How it reads and draws.
        seed: Of the first answer; each has its own.
    """

    def __init__(self, policy: Policy, how: Manner, seed: int = 0) -> None:
        self.policy, self.how, self.seed = policy, how, seed
        templated = bool(policy.tokenizer.chat_template) if how.chat is None else how.chat
        self.chat = Chat(policy.tokenizer, how.arguments) if templated else None
        if how.system is not None and self.chat is None:
            raise ValueError("--system: the run has no chat template, so no system message")
        self.messages: list[dict] = []

    def start_anew(self) -> None:
        """Forget what was said."""
        self.messages = []

    def prompt_ids(self, said: str) -> list[int]:
        """The tokens from which the policy goes on."""
        # bytes that are no text in this locale came as halves of characters
        said = said.encode(errors="surrogateescape").decode(errors="replace")
        said = filled(self.how.template, said)
        if self.chat is None:
            return self.policy.tokenizer(said)["input_ids"]
        system = [] if self.how.system is None else [{"role": "system", "content": self.how.system}]
        text = self.chat.prompt([*system, *self.messages, {"role": "user", "content": said}])
        return self.policy.tokenizer(text, add_special_tokens=False)["input_ids"]

    def room(self, prompt_tokens: int) -> int:
        """Tokens of the longest answer, where nobody has said how long one may be."""
        most = positions(self.policy.model.config)
        return LONGEST if most is None else max(1, min(LONGEST, most - prompt_tokens))

    def answer(self, said: str, write: Callable[[str], Any]) -> int | None:
        """Answer, token by token; without a chat template what was said before does not count.

        Args:
            said: What the user said.
            write: Is given the answer, piece by piece.

        Returns:
            The length in tokens at which the answer was cut; None if it ended by itself.

        Raises:
            ValueError: If the text is longer than the model reads.
        """
        ids = self.prompt_ids(said)
        longest = self.how.max_new_tokens or self.room(len(ids))
        if trouble := overlength(self.policy.model.config, len(ids), longest):
            raise ValueError(
                f"the conversation has {len(ids)} tokens; {trouble[0]}; an empty line starts a new "
                "one, --max-new-tokens lowers the length of answers"
            )
        trained = self.how.max_prompt_tokens + longest
        fix_rotary(self.policy.model, max(trained, len(ids) + longest))
        device = next(self.policy.model.parameters()).device
        tokens = torch.tensor([ids], device=device)
        batch = PromptBatch(tokens, torch.ones_like(tokens).bool(), [{}])
        aloud = Aloud(self.policy.ends, self.policy.eos_ids, write)
        speaker = SimpleNamespace(
            model=self.policy.model,
            tokenizer=self.policy.tokenizer,
            eos_ids=self.policy.eos_ids,
            pad_id=self.policy.pad_id,
            ends=aloud,
        )
        sampler = GroupSampler(1, longest, self.how.temperature)
        samples = sampler.sample(speaker, batch, seed=self.seed)
        aloud.hand_on(samples.texts[0])
        self.seed += 1
        if self.chat is not None:
            said_so_far = [
                ("user", filled(self.how.template, said)),
                ("assistant", samples.texts[0]),
            ]
            self.messages += [{"role": role, "content": text} for role, text in said_so_far]
        return None if samples.finished[0] else longest


def filled(template: str | None, said: str) -> str:
    r"""What is typed, in the place of the column of a prompt template.

    A template of several columns is left out: what is typed is a whole prompt then.

    >>> filled("Question: {question}\\nAnswer in {{}}:", "1+1?")
    'Question: 1+1?\\nAnswer in {}:'
    >>> filled("{a}+{b}=", "1+1="), filled(None, "1+1=")
    ('1+1=', '1+1=')
    """
    parts = [(text, name) for text, name, *_ in Formatter().parse(template or "")]
    if len({name for _, name in parts} - {None}) != 1:
        return said
    return "".join(text if name is None else text + said for text, name in parts)


def converse(talk: Talk) -> int:
    """Answer line by line until the input ends; returns the exit code."""
    asks = sys.stdin.isatty()
    if asks:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() takes keys for editing and history from it
    while True:
        try:
            said = input("> " if asks else "")
        except EOFError:
            if asks:
                print()
            return 0
        except KeyboardInterrupt:
            print()
            return 130
        if not said.strip():
            talk.start_anew()
            continue
        try:
            say_answer(talk, said)
        except KeyboardInterrupt:
            print("\n[stopped]")
        except ValueError as error:
            complain(str(error))


def say_answer(talk: Talk, said: str) -> None:
    """Print an answer while it grows."""

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    cut = talk.answer(said, write)
    print()
    if cut is not None:
        sys.stderr.write(f"[cut at {cut} tokens; --max-new-tokens raises that]\n")


def complain(text: str) -> None:
    sys.stderr.write(f"{styled('error:', RED, sys.stderr)} {printable(shown(text))}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Talk; returns the exit code, 2 after a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog=f"{program(alone=True)} chat",
        description="Talk to what a run has trained, with the template, stop strings, temperature "
        "and length of its training. Ctrl-D ends; an empty line starts a new conversation.",
    )
    parser.add_argument("run", type=Path, help="run folder, or a folder with an exported model")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this alone, and end")
    parser.add_argument(
        "--weights", help="last, best, a checkpoint, or a folder of the run; else its export"
    )
    parser.add_argument("--temperature", type=float, help="0 takes the most likely token")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer, in tokens")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--seed", type=int, default=0, help="of the first answer (default: 0)")
    parser.add_argument("--device", help="such as cuda:0 or cpu; else the first GPU, if any")
    options = parser.parse_args(argv)
    begin_here()
    try:
        with one_line.quiet():
            how, weights = find(options.run, options.weights)
            given = {
                name: value
                for name in ("temperature", "max_new_tokens", "system")
                if (value := getattr(options, name)) is not None
            }
            how = replace(how, **given)
            check_at_least(0, "--", temperature=how.temperature)
            check_at_least(1, "--", **{"max-new-tokens": how.max_new_tokens})
            policy = load(how, weights)
            move(policy, options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
            talk = Talk(policy, how, options.seed)
            if options.prompt is not None:
                say_answer(talk, options.prompt)
                return 0
            if sys.stdin.isatty():
                reads = "no chat template: each line is a prompt of its own"
                if talk.chat is not None:
                    reads = "the conversation goes on; an empty line starts a new one"
                sys.stderr.write(
                    f"{shown(str(weights))}, temperature {how.temperature:g}, answers of at most "
                    f"{how.max_new_tokens or LONGEST} tokens\n{reads}; Ctrl-D ends\n"
                )
            return converse(talk)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        text = ending.mistake(error)
        if text is None:
            raise
        complain(text)
        return 2
