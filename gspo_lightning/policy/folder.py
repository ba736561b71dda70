"""Model folders: looked at before anything is loaded, and loaded without surprises.

Decides what a folder must hold and how a broken one is reported: with the setting, the file and the
way out. Only headers are read for that, and nothing in a folder is run. Models on the hub are left
to transformers to check. ``key`` is always the setting that names the folder, for messages.
"""

import json
import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
AGAIN = "fetch or save the model again"
# what transformers and the libraries below it raise for a folder that cannot be loaded
BROKEN = (OSError, ValueError, ImportError, RuntimeError, KeyError, TypeError, SafetensorError)


def check_model_path(key: str, path: str) -> None:
    """Refuse a model path that can be neither a folder here nor a name on the hub.

    Raises:
        ValueError: If ``path`` is a folder without ``config.json``, or looks like a folder and is
            not there.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{key}: {path} has no config.json, so it is not a model folder; give one that "
                "save_pretrained wrote"
            )
    elif folder.exists():
        raise ValueError(f"{key}: {path} is a file; give the folder that holds it")
    # "data/x" could be a name on the hub, but where there is a folder "data" a path was meant
    elif not HUB_NAME.fullmatch(path) or ("/" in path and folder.parent.is_dir()):
        raise ValueError(
            f"{key}: there is no folder {path} (and it is no model name); mend the path"
        )


def check_model_folder(key: str, path: str, trust_remote_code: bool, weights: bool = True) -> Any:
    """Look at a model folder without loading it.

    Args:
        path: The folder; a name on the hub is let pass.
        trust_remote_code: Whether Python code in the folder may be run.
        weights: Whether weights are needed.

    Returns:
        The model's config, None for a name on the hub.

    Raises:
        ValueError: If config or weights are missing or broken, naming key and file.
    """
    check_model_path(key, path)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    read_json(key, folder / "config.json")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except BROKEN as error:
        raise ValueError(f"{key}: cannot load {path}: {reason(error)}") from error
    for file in weight_files(key, folder) if weights else []:
        check_weights(key, file)
    return config


def read_json(key: str, file: Path) -> dict[str, Any]:
    """A JSON file with one object."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{key}: {file} is not JSON: {reason(error)}; {AGAIN}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{key}: {file} holds a {type(found).__name__}, not an object; {AGAIN}")
    return found


def weight_files(key: str, folder: Path) -> list[Path]:
    """The files that transformers would read, each of which is there."""
    for name in (SAFE, PICKLED):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            shards = read_json(key, index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ValueError(f"{key}: {index} has no weight_map; {AGAIN}")
            files = sorted({folder / str(shard) for shard in shards.values()})
            for file in files:
                if not file.is_file():
                    named = f"{file}, which {index.name} names,"
                    raise ValueError(f"{key}: {named} is not there; fetch it")
            return files
    raise ValueError(
        f"{key}: {folder} has no weights, neither {SAFE} nor {PICKLED}; save them there, or train "
        "from scratch with policy.weights: random"
    )


def check_weights(key: str, file: Path) -> None:
    """Refuse a file of weights that is cut off, a placeholder, or holds anything but tensors."""
    with file.open("rb") as stream:
        if stream.read(32).startswith(b"version https://git-lfs"):
            raise ValueError(f"{key}: {file} is a Git LFS pointer; fetch the file: git lfs pull")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):  # compares the header with the file's length
                return
        # reads the pickle alone: on "meta" no tensor is loaded
        torch.load(file, map_location="meta", mmap=zipfile.is_zipfile(file), weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{key}: {file} holds more than tensors, such as code, and is not loaded; convert it "
            f"to {SAFE} where you trust it"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError) as error:
        raise ValueError(
            f"{key}: {file} ({file.stat().st_size} bytes) is broken: {reason(error)}; fetch or "
            "save it again"
        ) from error


def load_weights(key: str, auto: Any, path: str, new_head: bool = False, **options: Any) -> Any:
    """``auto.from_pretrained`` that refuses missing tensors instead of drawing them at random.

    Args:
        auto: ``AutoModelForCausalLM`` or another of the auto classes.
        path: Folder or hub name.
        new_head: Tensors outside the model's body may be missing, and are then drawn at random.
        options: Of ``from_pretrained``.

    Raises:
        ValueError: If the model cannot be loaded, naming key and path.
    """
    level = transformers_logging.get_verbosity()
    # hides a table of several lines about missing tensors, which are errors here
    transformers_logging.set_verbosity_error()
    try:
        model, loading = auto.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (*BROKEN, UnpicklingError) as error:
        if "attn_implementation" in str(error):
            key = "policy.attention"
        raise ValueError(f"{key}: cannot load {path}: {reason(error)}") from error
    finally:
        transformers_logging.set_verbosity(level)
    for name, found, wanted in sorted(loading["mismatched_keys"]):
        raise ValueError(
            f"{key}: {path} has {name} in the shape {tuple(found)}, its config.json says "
            f"{tuple(wanted)}; weights and config do not belong together"
        )
    body = f"{model.base_model_prefix}." if new_head else ""
    missing = sorted(name for name in loading["missing_keys"] if name.startswith(body))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{key}: {path} has no weights for {missing[0]}{more}; {AGAIN}")
    return model


def reason(error: BaseException) -> str:
    """The first line of a library's message; later lines advise callers of that library."""
    if "trust_remote_code=True" in str(error):  # its advice is an argument that nobody here passes
        return "it comes with Python code of its own; policy.trust_remote_code: true would run it"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
