"""What an exported model has beside its weights: a model card, a picture, how it is sampled from.

Decides what the card says and how ``generate`` draws unless it is told otherwise. A card may be
published: of paths on this machine only the last part stands in it.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gspo_lightning.checkpoint.quoted import printable
from gspo_lightning.policy.settings import run_settings

GENERATION = "generation_config.json"
METRICS = {"greedy": "accuracy", "sampled": "accuracy", "pass": "pass@k", "accuracy": "accuracy"}
METRICS |= {"reward": "reward", "loss": "loss"}  # what a model is judged by, in words of the hub
TAGS = ("pytorch-lightning", "gspo_lightning")
PACKAGES = ("gspo_lightning", "torch", "lightning", "transformers")


def dress(
    folder: Path,
    trainer: Any,
    module: Any,
    *,
    name: str,
    held_out: Mapping[str, Any],
    picture: Path | None,
) -> None:
    """Put card, picture and generation settings into a folder with a model.

    Args:
        folder: Of the export.
        trainer: It trained the model.
        module: What it trained.
        name: What people load the model by: a folder, or a name on the hub.
        held_out: ``before`` and ``after`` training, figures by name, and after how many
            ``rollouts``.
        picture: Curves as a PNG, if there are any.
    """
    if picture is not None and picture.is_file():
        shutil.copyfile(picture, folder / "curves.png")
    sampler, policy = getattr(module, "sampler", None), getattr(module, "policy", None)
    if sampler is not None and (folder / GENERATION).is_file():
        sample_as_trained(folder / GENERATION, sampler, policy)
    text = card(trainer, module, name, held_out, (folder / "curves.png").is_file(), folder)
    (folder / "README.md").write_text(text, encoding="utf-8")


def sample_as_trained(file: Path, sampler: Any, policy: Any) -> None:
    """Have ``generate`` draw as training did: by the temperature alone, up to the same end.

    What the base model's file advises (top-k, top-p, penalties) would draw from a distribution that
    was not trained, and top-k is 50 where nothing is said.
    """
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "stop_strings", "transformers_version")
    old = json.loads(file.read_text(encoding="utf-8"))
    settings = {name: old[name] for name in kept if old.get(name) is not None}
    if policy.eos_ids:
        settings.setdefault("eos_token_id", policy.eos_ids)
    settings.setdefault("pad_token_id", policy.pad_id)
    settings |= {"do_sample": True, "temperature": sampler.temperature, "top_k": 0, "top_p": 1.0}
    settings["max_new_tokens"] = sampler.max_new_tokens
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def card(
    trainer: Any,
    module: Any,
    name: str,
    held_out: Mapping[str, Any],
    has_picture: bool,
    folder: Path,
) -> str:
    """The card: front matter that the hub reads, then what was trained on what, and how it did."""
    settings = {key: _public(value) for key, value in run_settings(module).items()}
    base, data = settings.get("model.policy.path"), settings.get("data.path")
    adapter = (folder / "adapter_config.json").is_file()
    rollouts = hasattr(module, "sampler")
    done = trainer.fit_loop.total_batch_idx + 1
    data_words = f" on {_code(data)}" if data else ""
    unit = "rollouts" if rollouts else "steps"
    what = type(module).__name__.removesuffix("Module")
    # A folder inside a run is named after the run, or every model would be called "export".
    title = name if "/" in name else f"{Path(trainer.default_root_dir).resolve().name}/{name}"
    parts = [
        _front_matter(module, settings, adapter, what, title, held_out.get("after", {})),
        f"# {_heading(title)}\n\n{_code(base)}, trained{data_words} for {done:,} {unit}, by "
        f"{_code(type(module).__name__)} of gspo_lightning.",
        _results(held_out, unit),
        "![Curves of the training](curves.png)" if has_picture else "",
        "## How to load it\n\n" + _loading(title, adapter, what, _is_chat(trainer)),
        "## Settings\n\n" + _verbatim(f"{key}: {value}" for key, value in settings.items()),
        "## Versions\n\n" + _verbatim(f"{package}: {_version(package)}" for package in PACKAGES),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(
    module: Any,
    settings: Mapping[str, Any],
    adapter: bool,
    what: str,
    name: str,
    after: Mapping[str, float],
) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # only who exports pays the import

    on_hub = _on_hub(getattr(module, "policy_config", None))
    hub_base = settings.get("model.policy.path") if on_hub else None
    data = settings.get("data.val_path") or settings.get("data.path") or "held-out data"
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name=str(data),
            metric_type=METRICS.get(figure.partition("@")[0], figure),
            metric_name=f"{figure}, held out",
            metric_value=round(value, 6),
        )
        for figure, value in after.items()
        if figure.partition("@")[0] in METRICS
    ]
    front = ModelCardData(
        base_model=hub_base,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-classification" if what == "RewardModel" else "text-generation",
        tags=[what.lower(), *(["reinforcement-learning"] * hasattr(module, "sampler")), *TAGS],
        model_name=name if results else None,
        eval_results=results or None,
    )
    if hub_base is not None:
        front["base_model_relation"] = "adapter" if adapter else "finetune"
    return f"---\n{front.to_yaml().strip()}\n---"


def _results(held_out: Mapping[str, Any], unit: str) -> str:
    """A table of what held-out data said before and after."""
    before, after = held_out.get("before", {}), held_out.get("after", {})
    if not after:
        return "## Results\n\nNothing was held out."
    rows = [
        f"| {_code(name)} | {f'{before[name]:.3f}' if name in before else ''} | {value:.3f} |"
        for name, value in after.items()
    ]
    head = f"| held out | before training | after {held_out['rollouts']:,} {unit} |"
    return "\n".join(["## Results", "", head, "| --- | --- | --- |", *rows])


def _loading(name: str, adapter: bool, what: str, is_chat: bool) -> str:
    scores = what == "RewardModel"
    kind = "AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM"
    lines = [f"from transformers import {kind}, AutoTokenizer", ""]
    if adapter:
        kind = "AutoPeftModelForCausalLM"
        lines = [f"from peft import {kind}", "from transformers import AutoTokenizer", ""]
    lines += [
        f"tokenizer = AutoTokenizer.from_pretrained({_literal(name)})",
        f"model = {kind}.from_pretrained({_literal(name)})",
    ]
    if not scores:
        call = 'tokenizer("your prompt", return_tensors="pt")'
        if is_chat:
            lines += ['messages = [{"role": "user", "content": "your question"}]']
            call = (
                "tokenizer.apply_chat_template(\n    messages, add_generation_prompt=True, "
                'return_dict=True, return_tensors="pt"\n)'
            )
        lines += [f"inputs = {call}", "output = model.generate(**inputs)"]
        lines += ['length = inputs["input_ids"].shape[1]']
        lines += ["print(tokenizer.decode(output[0, length:], skip_special_tokens=True))"]
    return "```python\n" + "\n".join(lines) + "\n```"


def _is_chat(trainer: Any) -> bool:
    """Whether prompts were chats: a base model's tokenizer may have a template, too."""
    return bool(getattr(trainer.datamodule, "chat_template", False))


def _on_hub(config: Any) -> bool:
    """Whether a policy came from the hub by its name."""
    path = getattr(config, "path", None)
    return path is not None and not Path(os.path.expanduser(path)).exists()


def _code(text: Any) -> str:
    """Text of others in Markdown, where no mark in it has a meaning."""
    return f"`{printable(str(text)).replace('`', chr(39)).replace('|', '/')}`"


def _heading(name: str) -> str:
    """A name of a model in Markdown; as it stands if it is of letters and the usual marks."""
    return name if re.fullmatch(r"[\w./-]+", name) else _code(name)


def _literal(name: str) -> str:
    """A name in Python, within a block of code, which backticks would end."""
    return repr(name).replace("`", r"\x60")


def _public(value: Any) -> Any:
    """A setting without the folders of this machine."""
    if isinstance(value, str) and value.startswith(("/", "~", "../", "./")):
        return os.path.basename(value.rstrip("/"))
    return value


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _verbatim(lines: Any) -> str:
    return "\n".join(f"    {printable(line)}" for line in lines)
