"""What users get wrong about models and checkpoints."""

import json
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gspo_lightning.checkpoint.io import AtomicCheckpointIO
from support.bad_input_cases import WEIGHTS, Case, key, scorer, yaml, zipped


def saved(content):
    return lambda path: AtomicCheckpointIO().save_checkpoint(content, path)


def changed(**values):
    """Change a JSON file; a value of None takes the key out."""

    def change(path):
        config = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


def tensors(change):
    """Change the tensors of a safetensors file."""

    def rewrite(path):
        found = load_file(path)
        change(found)
        save_file(found, path, {"format": "pt"})

    return rewrite


def whole_head(found):
    found["score.weight"] = found["score.weight"].int()


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def bomb_of_weights(path):
    """Weights of the old kind, which are a pickle, with code in it."""
    path.with_name("model.safetensors").unlink()
    torch.save({"weight": Bomb()}, path)


def no_tokenizer(path):
    for file in path.glob("tokenizer*"):
        file.unlink()


def no_end(path):
    """Take the end of sequence out of model and tokenizer."""
    for name in ("config.json", "generation_config.json"):
        changed(eos_token_id=None)(path / name)
    changed(eos_token=None)(path / "tokenizer_config.json")


def short_table(path):
    """A config of GPT-2 with seven positions; the prompts have four tokens each."""
    settings = {"model_type": "gpt2", "n_positions": 7, "n_embd": 16, "n_layer": 2, "n_head": 2}
    (path / "config.json").write_text(json.dumps(settings | {"vocab_size": 32}))


def checkpoint(state, **more):
    """Write a checkpoint as Lightning does, as far as it is looked at."""
    common = {"state_dict": state, "loops": {}, "epoch": 0, "global_step": 0}
    return saved(common | more)


MODELS = [
    key("no such folder", ("policy.path", "nowhere"), "--model.policy.path ./nowhere"),
    key(
        "a file for a folder",
        ("policy.path", "gspo.yaml", "folder"),
        "--model.policy.path gspo.yaml",
    ),
    Case(
        "no config.json",
        ("policy.path", "policy", "config.json"),
        files={"policy/config.json": Path.unlink},
    ),
    Case(
        "broken config.json",
        ("policy.path", "policy/config.json", "JSON"),
        files={"policy/config.json": b"{"},
    ),
    Case(
        "config.json is a list",
        ("policy.path", "policy/config.json"),
        files={"policy/config.json": b"[]"},
    ),
    Case(
        "unknown model type",
        ("policy.path", "policy", "nosuch"),
        files={"policy/config.json": changed(model_type="nosuch", architectures=None)},
    ),
    Case(
        "remote code",
        ("policy.path", "trust_remote_code: true"),
        files={
            "policy/config.json": changed(
                model_type="own",
                auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
            ),
            "policy/own.py": b"open('exploded', 'w')\n",
        },
    ),
    Case(
        "no weights",
        ("policy.path", "policy", "safetensors"),
        files={"policy/model.safetensors": Path.unlink},
    ),
    Case(
        "truncated weights",
        ("policy.path", "policy/model.safetensors", "bytes"),
        files={"policy/model.safetensors": cut},
    ),
    Case(
        "weights that are none",
        ("policy.path", "policy/model.safetensors"),
        files={"policy/model.safetensors": b"no weights at all, but long enough"},
    ),
    Case(
        "empty weights",
        ("policy.path", "policy/model.safetensors"),
        files={"policy/model.safetensors": b""},
    ),
    Case(
        "a pointer for weights",
        ("policy.path", "policy/model.safetensors", "git lfs pull"),
        files={"policy/model.safetensors": b"version https://git-lfs.github.com/spec/v1\noid 1\n"},
    ),
    Case(
        "a shard missing",
        ("policy.path", "policy", "b.safetensors"),
        files={
            "policy/model.safetensors.index.json": json.dumps(
                {"weight_map": {"a": "b.safetensors"}}
            ).encode(),
            "policy/model.safetensors": Path.unlink,
        },
    ),
    Case(
        "a tensor missing",
        ("policy.path", "policy", "layers.1"),
        files={
            "policy/model.safetensors": tensors(
                lambda t: [t.pop(n) for n in list(t) if "layers.1" in n]
            )
        },
        work=WEIGHTS,
    ),
    Case(
        "a tensor of another shape",
        ("policy.path", "policy", "norm"),
        files={
            "policy/model.safetensors": tensors(
                lambda t: t.update({"model.norm.weight": torch.ones(3)})
            )
        },
        work=WEIGHTS,
    ),
    Case(
        "code in the weights",
        ("policy.path", "pytorch_model.bin"),
        files={"policy/pytorch_model.bin": bomb_of_weights},
        work=WEIGHTS,
    ),
    Case("no tokenizer", ("policy.path", "policy", "tokenizer"), files={"policy": no_tokenizer}),
    Case(
        "broken tokenizer",
        ("policy.path", "policy", "tokenizer"),
        files={"policy/tokenizer.json": b"{"},
    ),
    Case(
        "a prompt with an id that the model lacks",
        ("data.path", "prompts.jsonl", "row 1", "'='", "id 16", "embeds 16 ids"),
        files={"policy/config.json": changed(vocab_size=16)},
    ),
    Case(
        "no attention heads",
        ("policy.path", "policy/config.json", "num_attention_heads is 0", "at least 1"),
        files={"policy/config.json": changed(num_attention_heads=0)},
    ),
    Case(
        "a pad id that no layer takes",
        ("policy.path", "policy/config.json", "Padding_idx must be within", "vocab_size"),
        files={"policy/config.json": changed(pad_token_id=99)},
        work=WEIGHTS,
    ),
    Case(
        "a tokenizer with a word for a length",
        ("policy.path", "policy/tokenizer_config.json", "model_max_length is 'x'"),
        files={"policy/tokenizer_config.json": changed(model_max_length="x")},
    ),
    Case(
        "weights that are not a number",
        ("policy.path", "NaN", "1 of 16 in model.norm.weight"),
        files={
            "policy/model.safetensors": tensors(
                lambda t: t["model.norm.weight"].__setitem__(0, float("inf"))
            )
        },
        work=WEIGHTS,
    ),
    Case(
        "weights of whole numbers",
        ("policy.path", "policy/model.safetensors", "model.norm.weight in I32"),
        files={
            "policy/model.safetensors": tensors(
                lambda t: t.update({"model.norm.weight": torch.ones(16).int()})
            )
        },
    ),
    Case(
        "reference of whole numbers",
        ("reference.path", "scorer/model.safetensors", "score.weight in I32"),
        "--model.reference.path ./scorer",
        files={"scorer/model.safetensors": tensors(whole_head)},
    ),
    yaml(
        "reward model of whole numbers",
        ("rewards.a.fn", "scorer/model.safetensors", "score.weight in I32"),
        scorer("scorer"),
        files={"scorer/model.safetensors": tensors(whole_head)},
    ),
    yaml(
        "reward model of NaN",
        ("rewards.a.fn", "scorer", "NaN", "score.weight"),
        scorer("scorer"),
        files={
            "scorer/config.json": changed(id2label={"0": "a"}, label2id={"a": 0}),
            "scorer/model.safetensors": tensors(
                lambda t: t.update({"score.weight": torch.full((1, 16), float("nan"))})
            ),
        },
        work=WEIGHTS,
    ),
    Case(
        "prompts beyond a table of positions",
        ("policy.path", "data.path", "4 tokens", "4 new tokens", "sampler.max_new_tokens to 3"),
        files={"policy": short_table},
    ),
    Case(
        "no end of sequence",
        ("policy.path", "eos_token_id", "generation_config.json"),
        files={"policy": no_end},
        work=WEIGHTS,
    ),
    key("unknown attention", ("policy", "flush"), "--model.policy.attention flush", work=WEIGHTS),
    key("reference not there", ("reference.path", "nowhere"), "--model.reference.path ./nowhere"),
    yaml("reward model not there", ("rewards.a.fn", "./nowhere"), scorer("./nowhere")),
    yaml(
        "reward model of several labels",
        ("rewards.a.fn", "3 labels", "label"),
        scorer("scorer"),
        work=WEIGHTS,
    ),
    yaml(
        "policy for a reward model",
        ("rewards.a.fn", "policy", "classifier", "RewardModelModule"),
        scorer("policy"),
        work=WEIGHTS,
    ),
    Case(
        "reward model of several labels for training",
        ("policy.path", "scorer", "3 labels", "language model"),
        "--model.policy.path scorer",
        config="pairs.yaml",
        work=WEIGHTS,
    ),
]
CHECKPOINTS = [
    Case("no checkpoint yet", ("ckpt_path", "run/checkpoints", "fresh start"), "--ckpt_path last"),
    Case(
        "checkpoint not there",
        ("ckpt_path", "gone.ckpt"),
        "--ckpt_path gone.ckpt",
        command="validate",
    ),
    Case(
        "weights for a checkpoint",
        ("ckpt_path", "model.safetensors"),
        "--ckpt_path policy/model.safetensors",
        command="validate",
    ),
    Case(
        "another zip",
        ("ckpt_path", "a.ckpt"),
        "--ckpt_path a.ckpt",
        command="validate",
        files={"a.ckpt": zipped},
    ),
    Case(
        "code in a checkpoint",
        ("ckpt_path", "a.ckpt"),
        "--ckpt_path a.ckpt",
        command="validate",
        files={
            "a.ckpt": lambda path: AtomicCheckpointIO().save_checkpoint(
                {"state_dict": {"x": Bomb()}}, path
            )
        },
    ),
    Case(
        "a pickle",
        ("ckpt_path", "a.ckpt"),
        "--ckpt_path a.ckpt",
        command="validate",
        files={"a.ckpt": pickle.dumps(Bomb())},
    ),
    Case(
        "checkpoint of SFT",
        ("ckpt_path", "a.ckpt", "GSPOModule", "policy.path"),
        "--ckpt_path a.ckpt",
        files={"a.ckpt": checkpoint({"policy.model.lm_head.weight": torch.ones(1)})},
    ),
    Case(
        "checkpoint of another model",
        ("ckpt_path", "a.ckpt", "model.norm.weight", "(3,)", "(16,)", "policy.path"),
        "--ckpt_path a.ckpt",
        command="validate",
        files={"a.ckpt": checkpoint({"policy.model.model.norm.weight": torch.ones(3)}, gspo={})},
    ),
    Case(
        "weights saved by torch",
        ("ckpt_path", "a.ckpt"),
        "--ckpt_path a.ckpt",
        command="validate",
        files={
            "a.ckpt": lambda path: AtomicCheckpointIO().save_checkpoint({"w": torch.ones(1)}, path)
        },
    ),
]
