"""Model folders: looked at before anything is loaded, and loaded without surprises.

Decides what a folder must hold and how a broken one is reported: with the setting, the file and the
way out. Only headers are read for that, and nothing in a folder is run. Models on the hub are left
to transformers to check. ``key`` is always the setting that names the folder, for messages.
"""

import json
import math
import os
import re
import socket
import traceback
import urllib.request
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from gspo_lightning.checkpoint.quoted import kind_of_value
from gspo_lightning.policy.shards import whole_tensor

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
AGAIN = "fetch or save the model again"
LONGEST = 300  # characters of a library's message: some quote what they were given, whole
# Numbers of a config.json below 1 surface as a division by zero or a negative size, without a name.
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
BEYOND = ("intermediate_size", "max_position_embeddings")
LARGEST = 2**31  # no size of a model comes near
SMALL = 2**24  # values that are made in no time, whatever is wrong with them
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # types in a header of safetensors


def check_model_path(key: str, path: str) -> None:
    """Refuse a model path that can be neither a folder here nor a name on the hub.

    Raises:
        ValueError: If ``path`` is a folder without ``config.json``, or looks like a folder and is
            not there.
    """
    if not path:
        raise ValueError(
            f"{key} is empty; give a folder that holds the model, or a name on the hub"
        )
    folder = Path(os.path.expanduser(path))
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
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        return None
    file = folder / "config.json"
    written = read_json(key, file)
    check_written(f"{key}: {file}", written)
    if not trust_remote_code:
        check_kernels(f"{key}: {file}", written)
    config = read_config(key, path, trust_remote_code)
    text = config.get_text_config()
    for name in SIZES:
        for value in sizes(text, name):
            if isinstance(value, int) and value < 1:
                raise ValueError(
                    f"{key}: {file}: {name} is {value}, must be at least 1; mend it, or {AGAIN}"
                )
    for name in (*SIZES, *BEYOND):
        for value in sizes(text, name):
            if isinstance(value, int) and value >= LARGEST:
                raise ValueError(
                    f"{key}: {file}: {name} is {value:.0e}, as of no model; mend it, or {AGAIN}"
                )
    if (folder / "generation_config.json").is_file():  # transformers would do without a broken one
        read_json(key, folder / "generation_config.json")
    quantized = "quantization_config" in written
    files = weight_files(key, folder) if weights else []
    values = sum(check_weights(key, weights_file, quantized) for weights_file in files)
    if files:
        check_room(f"{key}: {file}", text, values)
    return config


def check_room(where: str, config: Any, values: int) -> None:
    """Refuse sizes for which the weights are far too few, before such a model is made.

    A matrix that is missing or has another shape would be drawn at random, at any size.

    Args:
        where: Setting and file.
        config: Of the text model.
        values: Numbers in the files of weights.
    """

    def most(name: str) -> int:
        return max((x for x in sizes(config, name) if isinstance(x, int)), default=1)

    inner = {name: most(name) for name in ("vocab_size", "intermediate_size")}
    inner["num_attention_heads x head_dim"] = most("num_attention_heads") * most("head_dim")
    inner["num_key_value_heads x head_dim"] = most("num_key_value_heads") * most("head_dim")
    inner["num_hidden_layers"] = most("num_hidden_layers")
    for name, size in inner.items():
        needed = size * most("hidden_size")
        if needed > max(16 * values, SMALL):  # four bits a value, packed into whole numbers
            raise ValueError(
                f"{where}: hidden_size {most('hidden_size')} and {name} {size} need {needed:.0e} "
                f"values, and there are {values:.0e} in the weights; {AGAIN}"
            )


def sizes(config: Any, name: str) -> list[Any]:
    """What a config of text says of a size: one value, or one a layer where layers differ."""
    if getattr(config, "is_heterogeneous", False):
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    value = getattr(config, name, None)
    return value if isinstance(value, list) else [value]


def read_config(
    key: str, path: str, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """The config of a model in a folder or on the hub."""
    try:
        with silence():
            config = AutoConfig.from_pretrained(
                path, trust_remote_code=trust_remote_code, revision=revision
            )
        config.get_text_config()  # raises for a model of several parts with text
        return config
    except Exception as error:  # each model's config checks itself, and may raise anything
        raise unloadable(key, path, error) from error


def check_written(where: str, written: dict[str, Any]) -> None:
    """Refuse values of a config.json that libraries stumble over without saying the key.

    Args:
        where: Setting and file.
        written: What stands in the file.
    """
    for name in ("quantization_config", "auto_map"):
        if not isinstance(written.get(name) or {}, dict):
            raise ValueError(
                f"{where}: {name} is {repr(written[name])[:80]}, not an object; mend it, or take "
                "it out where the weights are not quantized and have no code of their own"
            )
    for name in ("dtype", "torch_dtype"):
        value = written.get(name)
        known = isinstance(getattr(torch, str(value), None), torch.dtype)
        if value is not None and value != "auto" and not known:
            raise ValueError(f"{where}: {name} is {value!r}, no type of torch; write float32")


def check_kernels(where: str, written: dict[str, Any]) -> None:
    """Refuse a config.json that names an attention on the hub: that is code, which would be run."""
    parts: list[Any] = [written]
    while parts:  # not by recursion: JSON may be nested as deeply as Python calls may
        part = parts.pop()
        for name, value in part.items() if isinstance(part, dict) else enumerate(part):
            if "_implementation" in str(name) and "/" in str(value)[:200]:
                raise ValueError(
                    f"{where}: {name} is {value!r}, code on the hub; take it out, or set "
                    "trust_remote_code: true where you trust it"
                )
            if isinstance(value, dict | list):
                parts.append(value)


def read_json(key: str, file: Path) -> dict[str, Any]:
    """A JSON file with one object."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{key}: {file} is not JSON: {reason(error)}; {AGAIN}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{key}: {file} holds {kind_of_value(found)}, not an object; {AGAIN}")
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


def check_weights(key: str, file: Path, quantized: bool = False) -> int:
    """Refuse a file of weights that is cut off, a placeholder, or holds anything but real numbers.

    Args:
        quantized: Whether whole numbers may be weights.

    Returns:
        How many numbers there are in it.
    """
    with file.open("rb") as stream:
        if stream.read(32).startswith(b"version https://git-lfs"):
            raise ValueError(f"{key}: {file} is a Git LFS pointer; fetch the file: git lfs pull")
    try:
        if file.suffix == ".safetensors":
            # opening compares the header with the file's length
            with safe_open(file, framework="pt") as tensors:
                parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
                types = {name: part.get_dtype() for name, part in parts.items()}
                values = sum(math.prod(part.get_shape()) for part in parts.values())
            whole = [name for name, kind in types.items() if kind not in FLOATS]
        else:  # reads the pickle alone: on "meta" no tensor is loaded
            mapped = zipfile.is_zipfile(file)
            found = torch.load(file, map_location="meta", mmap=mapped, weights_only=True)
            parts = {name: t for name, t in found.items() if isinstance(t, torch.Tensor)}
            types = {name: part.dtype for name, part in parts.items()}
            values = sum(part.numel() for part in parts.values())
            whole = [name for name, kind in types.items() if not kind.is_floating_point]
    except UnpicklingError as error:
        raise ValueError(
            f"{key}: {file} holds more than tensors, such as code, and is not loaded; convert it "
            f"to {SAFE} where you trust it"
        ) from error
    except Exception as error:  # any, from a file that is made to break its reader
        raise ValueError(
            f"{key}: {file} ({file.stat().st_size} bytes) is broken: {reason(error)}; fetch or "
            "save it again"
        ) from error
    # masks and positions are whole numbers in files of older models, and are never called a weight
    whole = [name for name in whole if name.endswith("weight")]
    if whole and not quantized:  # loaded, they would be cast without a word
        kind = str(types[whole[0]]).removeprefix("torch.")
        raise ValueError(
            f"{key}: {file} has {whole[0]} in {kind}, which is no type of weights; {AGAIN}, in "
            "float32 or bfloat16"
        )
    return values


def check_values(where: str, model: torch.nn.Module) -> None:
    """Refuse weights that are no numbers, and say so where most matrices are all zeros.

    Args:
        where: Setting and path, for the message.

    Raises:
        ValueError: If a weight is NaN or infinite.
    """
    empty, count = [], 0
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or not weight.numel() or weight.is_meta:
            continue
        # Each rank has read its rows, and all must come to the same.
        total = whole_tensor(weight.detach().sum(dtype=torch.float32))  # finite where every one is
        if not total.isfinite():
            finite = int(whole_tensor(weight.isfinite().sum()))
            if bad := weight.numel() - finite:
                raise ValueError(
                    f"{where} has NaN or infinite weights: {bad} of {weight.numel()} in {name}; "
                    f"{AGAIN}"
                )
        if weight.ndim > 1 and not name.endswith("bias"):  # experts have theirs in one matrix
            count += 1
            if total == 0 and not whole_tensor(weight.abs().amax()):
                empty.append(name)
    if 2 * len(empty) > count:  # a few may be meant: added layers begin as if they were not there
        warnings.warn(
            f"{where}: {len(empty)} of {count} matrices are all zeros, such as {empty[0]}; such a "
            f"model has learnt nothing: {AGAIN}",
            stacklevel=2,
        )


@contextmanager
def silence() -> Iterator[None]:
    """Hide what transformers shows while a model is read: a mistake is one line of ours."""
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # a bar of tensors, gone in no time
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def check_hub(path: str) -> None:
    """Raise ValueError for a name on the hub whose host is not found: its library tries a minute.

    A name in the cache is left to the library.
    """
    if Path(os.path.expanduser(path)).is_dir() or not HUB_NAME.fullmatch(path):
        return
    if isinstance(try_to_load_from_cache(path, "config.json"), str):
        return
    if trouble := hub_trouble():
        raise ValueError(
            f"{path} is no folder, and of the hub not even the address is found ({trouble}); go "
            "online, or give a folder that holds the model"
        )


def hub_trouble() -> str | None:
    """Why the hub's address is not found; None if it is, or if a proxy has to find it."""
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return None
    host = urlsplit(constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        return f"{host}: {error}"
    return None


def read_tokenizer(path: str, **options: Any) -> Any:
    """Load a tokenizer that works.

    Args:
        path: Folder or hub name.
        options: Of ``AutoTokenizer.from_pretrained``.

    Raises:
        ValueError: If it cannot be loaded or used, naming the path.
    """
    check_hub(path)
    try:
        with silence():
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:  # tokenizers raises Exception itself
        there = Path(os.path.expanduser(path)).is_dir()
        way_out = "save it again" if there else "go online, or give a folder that holds the model"
        raise ValueError(
            f"cannot load the tokenizer of {path}: {reason(error)}; {way_out}"
        ) from error
    file = f"{path}/tokenizer_config.json"
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 1:
        raise ValueError(
            f"{file}: model_max_length is {longest!r}, must be a number above 0; mend it or take "
            "it out"
        )
    if tokenizer.vocab_size == 0:  # special tokens do not count
        raise ValueError(f"the tokenizer of {path} has an empty vocabulary; save it again")
    try:
        tokenizer("")
    except Exception as error:
        raise ValueError(
            f"the tokenizer of {path} fails on an empty text: {reason(error)}; save it again"
        ) from error
    return tokenizer


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
    try:
        with silence():  # else a table of several lines about missing tensors, which are errors
            model, loading = auto.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except Exception as error:  # whatever a model's code raises for sizes that do not fit
        if "attn_implementation" in str(error):
            key = "policy.attention"
        raise unloadable(key, path, error) from error
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
    check_values(f"{key}: {path}", model)
    return model


def unloadable(key: str, path: str, error: Exception) -> ValueError:
    """The one line for a model that some library could not load."""
    known = isinstance(error, (OSError, ImportError)) or "trust_remote_code" in str(error)
    way_out = "" if known else f"; mend {path}/config.json, or {AGAIN}"
    return ValueError(f"{key}: cannot load {path}: {reason(error)}{way_out}")


def reason(error: BaseException) -> str:
    """A library's message in one line; later lines advise callers of that library.

    What a model's own code raises says little: the keys of the config that the failing line had
    read are named with it.
    """
    if "trust_remote_code=True" in str(error):  # its advice is an argument that nobody here passes
        return "it comes with Python code of its own; trust_remote_code: true would run it"
    said = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", str(error)).replace("NoneType", "null")
    lines = said.strip().splitlines()
    text = lines[0].strip().removesuffix(".")[:LONGEST] if lines else ""
    if "alidation error for" in text and len(lines) > 1:  # the next line says key, value and want
        return re.sub(r"^\w+: |\. Errors: .*", "", lines[1].strip())[:LONGEST]
    if isinstance(error, (OSError, ValueError, ImportError, SafetensorError, UnpicklingError)):
        return text or type(error).__name__  # written for users
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if keys := re.findall(r"\bconfig\.([a-z]\w+)", frame.line or ""):
            text += f" (at {', '.join(dict.fromkeys(keys))} of its config)"
            break
    return f"{type(error).__name__}: {text}"
