"""A whole run by one call: what `gspo fit` does, with what a program has in its hands.

Decides which of the settings have keywords, and how a command's messages read in a program. The
call is a command line of short flags on the same config, in which functions, rows and loaded models
are put in place of words for them: so checks, callbacks, run folder and continuing are those of
`gspo fit`, and config.yaml tells what was run.
"""

import inspect
import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Trainer

from gspo_lightning.callbacks import HFExport
from gspo_lightning.checkpoint.files import list_checkpoints
from gspo_lightning.data import PromptData
from gspo_lightning.data.sources import Given, check_source, in_words
from gspo_lightning.environments.episode import Environment
from gspo_lightning.environments.start import LeftOut
from gspo_lightning.module import GSPOModule
from gspo_lightning.policy import PolicyConfig
from gspo_lightning.policy.given import GivenPolicy, GivenTokenizer, as_policy
from gspo_lightning.policy.settings import plain
from gspo_lightning.rewards import GivenRewards, RewardError, as_terms
from gspo_lightning.rewards.left_out import in_config
from gspo_lightning.run import ending, launch
from gspo_lightning.run.command import GSPOCLI, Watch, taken_over
from gspo_lightning.run.one_line import OneLineParser, quiet, unknown, whole_key
from gspo_lightning.sampling import GroupSampler
from gspo_lightning.start import short, typed
from gspo_lightning.vllm.sampler import VLLMSampler

_ELSEWHERE = {  # keywords of TRL's trainer and of others
    "model": "policy",
    "train_dataset": "prompts",
    "dataset": "prompts",
    "eval_dataset": "val",
    "reward_funcs": "reward",
    "processing_class": "tokenizer",
    "max_steps": "rollouts",
    "output_dir": "run_folder",
    "resume_from_checkpoint": "ckpt_path",
    "args": "settings",
    "environment_factory": "environment",
}


@dataclass(frozen=True)
class TrainedRun:
    """What a run consists of, and what it has written.

    Attributes:
        module: Has the trained policy: ``module.generate(["..."])``.
        data: The prompts.
        trainer: Has ended.
        folder: The run folder, with curves, samples and config.
        checkpoint: The newest one, if there is one.
        export: The folder that ``AutoModelForCausalLM.from_pretrained`` loads, if there is one.
    """

    module: GSPOModule
    data: PromptData
    trainer: Trainer
    folder: Path
    checkpoint: Path | None
    export: Path | None

    def __repr__(self) -> str:
        """Paths alone: what a notebook shows of a cell that ends with this call."""
        paths = (
            f"{name}={str(getattr(self, name))!r}" for name in ("folder", "checkpoint", "export")
        )
        return f"TrainedRun(module, data, trainer, {', '.join(paths)})"


def train(
    policy: GivenPolicy | str,
    prompts: Given,
    reward: "GivenRewards | str",
    *,
    val: Given | None = None,
    environment: Environment | None = None,
    tokenizer: GivenTokenizer = None,
    rollouts: int | None = None,
    prompts_per_rollout: int | None = None,
    group_size: int | None = None,
    max_new_tokens: int | None = None,
    learning_rate: float | None = None,
    devices: int | None = None,
    run_folder: str | Path | None = None,
    seed: int | None = None,
    ckpt_path: str | Path | None = None,
    config: str | Path | Sequence[str | Path] = "base",
    settings: Mapping[str, Any] | None = None,
    **others: Any,
) -> TrainedRun:
    """Train a policy as `gspo fit` does, and give back what it trained.

    Args:
        policy: A folder, a name on the hub, a loaded model (which is trained in place), or a
            ``PolicyConfig``.
        prompts: A file, a folder, a dataset's name on the hub, a list (of texts, of chats or of
            rows), or a ``datasets.Dataset``.
        reward: A function of rows and completions, a ``RewardTerm``, a list or a dict of them, or
            the import path of a function.
        val: Held-out prompts, of the same kinds.
        environment: Answers the policy's turns; ``reward`` then has an ``EnvironmentReward``.
        tokenizer: Of a loaded model that comes from no folder; a path, or a loaded one.
        rollouts: Length of the run. What is not given, here and below, is the config's.
        prompts_per_rollout: Prompts, per rank.
        group_size: Completions of a prompt.
        max_new_tokens: Longest completion, in tokens.
        learning_rate: Of AdamW.
        devices: Number of devices.
        run_folder: Where the run writes.
        seed: Of everything that is drawn.
        ckpt_path: ``last``, ``auto``, ``best`` or a file, to go on from.
        config: Names of the package's configs, or files; later ones win.
        settings: Any key of the command line with its value: ``{"model.kl_coef": 0.1}``. They win.
        others: No further keyword is taken; one is told which was meant.

    Returns:
        Module, data, Trainer and what was written, once the run has ended.

    Raises:
        ValueError: For a setting that cannot be, in one line, before anything is written.
        TypeError: For a keyword that does not exist.
        KeyboardInterrupt: After Ctrl-C, when the rollout is done and saved.
    """
    known = inspect.signature(train).parameters
    for name in others:
        raise TypeError(f"train: {_no_keyword(name, [n for n in known if n != 'others'])}")
    given = {name: value for name, value in locals().items() if name in known}
    flags = ("rollouts", "prompts_per_rollout", "group_size", "max_new_tokens", "learning_rate")
    words = ["fit"]
    for each in _configs(config):
        words += ["--config", str(each)]
    for name in (*flags, "devices", "run_folder", "seed"):
        if given[name] is not None:
            words += [f"--{name}", str(given[name])]
    made = _Made()
    words += made.policy(policy, tokenizer) + made.prompts(prompts, val) + made.rewards(reward)
    own = made.environment(environment)
    if ckpt_path is not None:
        words += ["--ckpt_path", str(ckpt_path)]
    taken = {word.partition("=")[0] for word in short.written_out(words + own)}
    for key, value in _checked(settings).items():
        for each in (key, *_inside(key, value)):
            short_key = each.replace(".init_args", "")
            if f"--{short_key}" in taken or short_key.startswith(made.whole()):
                raise ValueError(f"settings: {each} is set by a keyword already; leave one out")
        words.append(f"--{key}={value if isinstance(value, str) else json.dumps(plain(value))}")
    try:
        cli = _run(words + own, made)  # the sampler that the environment is for is known by then
    except ValueError as error:
        if "environment.init_args" not in str(error):
            raise
        taker = "the sampler of this config takes none; GroupSampler and VLLMSampler do"
        raise ValueError(f"environment: {taker}") from None
    callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
    export = next((c.path for c in callbacks if isinstance(c, HFExport)), None)
    folder = Path(cli.trainer.default_root_dir)
    return TrainedRun(
        cli.model,
        cli.datamodule,
        cli.trainer,
        folder,
        next(reversed(list_checkpoints(folder)), None),
        folder / export if export is not None and (folder / export).is_dir() else None,
    )


def _inside(key: str, value: Any) -> list[str]:
    """The keys that a setting sets which is a whole tree of them."""
    if not isinstance(value, Mapping):
        return []
    return [each for k, v in value.items() for each in (f"{key}.{k}", *_inside(f"{key}.{k}", v))]


def _no_keyword(name: str, names: list[str]) -> str:
    """The line about a keyword that `train` does not have."""
    if meant := _ELSEWHERE.get(name):
        return f"unknown keyword `{name}`, did you mean `{meant}`?"
    if (key := whole_key(name)) and key.rpartition(".")[2] not in names:
        return f'unknown keyword `{name}`; give it as settings={{"{key}": ...}}'
    return f"{unknown(name, names)}; other settings go into settings={{...}}"


def _configs(given: Any) -> list[Any]:
    configs = [given] if isinstance(given, str | Path) else given
    if not isinstance(configs, list | tuple) or not all(isinstance(c, str | Path) for c in configs):
        raise ValueError(f"config: expected a file or a name, or a list of them; got {given!r}")
    return list(configs)


def _checked(settings: Any) -> Mapping[str, Any]:
    such = 'such as {"model.kl_coef": 0.1}'
    if not isinstance(settings, Mapping | None):
        raise ValueError(f"settings: expected a dict, {such}; got {type(settings).__name__}")
    for key in settings or {}:
        if not isinstance(key, str) or key.startswith("-"):
            raise ValueError(f"settings: expected keys without dashes, {such}; got {key!r}")
    return settings or {}


class _Made:
    """What a program gives that has no place in a config, by the class that takes it."""

    def __init__(self) -> None:
        self.module: dict[str, Any] = {}
        self.data: dict[str, Any] = {}
        self.sampler: dict[str, Any] = {}

    def whole(self) -> tuple[str, ...]:
        """Keys of which no part can be set beside the object that is given."""
        names = (*self.module, *(f"sampler.{name}" for name in self.sampler))
        return tuple(f"model.{name}." for name in names)

    def policy(self, policy: Any, tokenizer: Any) -> list[str]:
        """Words for the policy and its tokenizer."""
        words = []
        if tokenizer is not None:
            self.module["tokenizer"] = tokenizer
            words = [f"--model.tokenizer={plain(tokenizer)}"]
        if isinstance(policy, str | Path):
            return [*words, "--policy", str(policy)]
        config = as_policy(policy)
        if config is policy:
            if not isinstance(policy, PolicyConfig | Mapping):
                wanted = "a folder, a name on the hub, a loaded model, or a PolicyConfig"
                got = f"the class {policy.__name__}" if isinstance(policy, type) else repr(policy)
                raise ValueError(f"model.policy: expected {wanted}; got {got[:80]}")
            return [*words, f"--model.policy={json.dumps(plain(policy))}"]
        self.module["policy"] = config
        same = {"dtype": config.dtype, "gradient_checkpointing": False}
        return [*words, f"--model.policy={json.dumps({'path': config.path} | same)}"]

    def prompts(self, prompts: Any, val: Any) -> list[str]:
        """Words for the data."""
        words = []
        for flag, key, source in (("data", "path", prompts), ("val", "val_path", val)):
            if source is None and flag == "val":
                continue
            if not isinstance(source, str | Path):
                check_source(f"data.{key}", source)
                self.data[key] = source
            words += [f"--data.{key}", str(in_words(source))]
        return words

    def rewards(self, reward: Any) -> list[str]:
        """Words for the rewards."""
        if isinstance(reward, str):
            return ["--reward", reward]
        terms = self.module["rewards"] = as_terms(reward)
        told = {name: plain(term) | {"fn": in_config(term.fn)} for name, term in terms.items()}
        return [f"--model.rewards={json.dumps(told)}"]

    def environment(self, environment: Any) -> list[str]:
        """Words for the environment."""
        if environment is None:
            return []
        if not isinstance(environment, Environment):
            is_class = isinstance(environment, type)
            got = f"the class {environment.__name__}" if is_class else repr(environment)
            raise ValueError(f"environment: expected an Environment; got {got[:80]}")
        self.sampler["environment"] = environment
        kind = type(environment)
        stand_in = {
            "class_path": f"{LeftOut.__module__}.{LeftOut.__qualname__}",
            "init_args": {"what": f"{kind.__module__}.{kind.__qualname__}"},
        }
        return [f"--model.sampler.environment={json.dumps(stand_in)}"]


class _Parser(OneLineParser):
    """Raises where a command would end."""

    def refuse(self, line: str) -> NoReturn:
        raise ValueError(line)


class _CLI(GSPOCLI):
    """The command, with objects in the places of words."""

    kind_of_parser = _Parser

    def __init__(self, words: list[str], watch: Watch, made: _Made) -> None:
        self.made = made
        super().__init__(words, watch)

    def instantiate_classes(self) -> None:
        """Make what a config names of its settings and of what the program has given."""
        made = self.made
        takers = (GSPOModule, PromptData, GroupSampler, VLLMSampler)
        parts = (made.module, made.data, made.sampler, made.sampler)
        for kind, given in zip(takers, parts, strict=True):
            make = partial(_make, given)
            self.parser.add_instantiator(make, kind, subclasses=True, prepend=True)
        super().instantiate_classes()


def _make(given: dict[str, Any], kind: type, *args: Any, **settings: Any) -> Any:
    return kind(*args, **settings | given)


def _run(words: list[str], made: _Made) -> GSPOCLI:
    """Run the command in this process, which stays as it is."""
    watch = Watch()
    with typed.called("train"), taken_over(watch, words):
        try:
            launch.check_variables()
            with quiet():
                cli = _CLI(words, watch, made)
        except BaseException as error:
            if not watch.begun:
                watch.refuse()
            line = None if watch.begun else ending.mistake(error)
            if line is None:
                raise
            # What a reward function raised is the program's; other causes are frames of ours.
            whole = isinstance(error, RewardError) or os.environ.get("GSPO_TRACEBACK") == "1"
            raise ValueError(typed.as_called(line)) from (error if whole else None)
        if watch.signals.number == signal.SIGINT:
            raise KeyboardInterrupt
        if watch.signals.number is not None:
            raise SystemExit(watch.signals.exit_code)
    return cli
