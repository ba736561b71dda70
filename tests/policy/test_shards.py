"""Two ranks that each read their rows of a model's files, against one that reads all of them."""

import errno
import os
import shutil
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from gspo_lightning.policy.lora import LoRAConfig
from gspo_lightning.policy.policy import PolicyConfig, fingerprint, load_policy
from gspo_lightning.policy.shards import whole_tensor
from gspo_lightning.sharding.cut import cut, gathered
from gspo_lightning.sharding.ranks import Sharded
from support.forked import on_ranks
from support.model_configs import config_of
from support.tiny_models import build_model, build_tokenizer

# tied and untied, positions in a table, matrices stored the other way round, experts one by one in
# the file and one tensor in the model, experts that the file has in one, recurrent layers
ARCHITECTURES = ("llama", "qwen3", "gpt2", "gemma2", "qwen3_moe", "gpt_oss", "qwen3_next", "lfm2")
LORA = LoRAConfig(rank=3, modules_to_save=["norm"])


def save(root, name, model, **options):
    model.save_pretrained(root / name, **options)
    build_tokenizer().save_pretrained(root / name)
    return root / name


def changed(root, name, change):
    """A copy of the plain policy, its tensors changed."""
    shutil.copytree(root / "qwen3", root / name)
    file = root / name / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    for kind in ARCHITECTURES:
        untied = {} if kind in ("qwen3", "gemma2", "gpt2") else {"tie_word_embeddings": False}
        save(root, kind, build_model(kind, **untied))
    save(root, "narrow", build_model().bfloat16())
    save(root, "in files", build_model(), max_shard_size="5KB")
    pickled = save(root, "pickled", build_model())
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    # gates and values are one tensor in its file, and two weights of the model
    save(root, "split", AutoModelForCausalLM.from_config(config_of("hrm_text")))
    embedding = "model.embed_tokens.weight"
    changed(root, "tied twice", lambda t: t.update({"lm_head.weight": t[embedding].clone()}))
    changed(root, "too long", lambda t: t.update({embedding: t[embedding][:31].clone()}))
    changed(root, "missing", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    changed(root, "nan", lambda t: t[embedding][-1].fill_(torch.nan))  # rank 1 reads it
    return root


def compared(path, mesh, **options):
    """How a model read in parts differs from one that is read whole."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        whole, parts = (PolicyConfig(str(path), **options).own(m) for m in (None, mesh))
    first, second = (
        dict(m.named_parameters(remove_duplicate=False)) | dict(m.named_buffers())
        for m in (whole, parts)
    )
    assert first.keys() == second.keys()
    same = lambda a, b: a.dtype == b.dtype and torch.equal(a, b)  # noqa: E731
    matrices = [n for n, p in whole.named_parameters() if p.ndim > 1]
    read = [n for n in matrices if isinstance(second[n], DTensor)]
    return {
        "differ": [n for n, t in first.items() if not same(t, whole_tensor(second[n].detach()))],
        "tied": [sum(m[n] is t for n in m for t in m.values()) for m in (first, second)],
        "whole": [n for n in matrices if n not in read],
        "share": sum(second[n].to_local().numel() for n in read),
        "all": sum(first[n].numel() for n in matrices),
        "marks": [fingerprint(whole), fingerprint(parts)],
        "said": [str(each.message) for each in said],
    }


def adapted(path, mesh):
    """What differs: weights with and without adapters, and logits once the model is cut."""
    found = []
    for lora in (LORA, None):
        policies = []
        for m in (None, mesh):
            torch.manual_seed(0)  # adapters are drawn
            policies.append(load_policy(PolicyConfig(str(path), lora=lora), mesh=m))
        whole, parts = policies
        assert getattr(whole, "start", 0) == getattr(parts, "start", 0)
        pairs = zip(whole.named_parameters(), parts.named_parameters(), strict=True)
        for (name, a), (_, b) in pairs:
            if not torch.equal(a, whole_tensor(b.detach())) or a.requires_grad != b.requires_grad:
                found.append(name)
        cut(parts.model, mesh, None, reshard=True, cpu_offload=False)
        ids = torch.arange(3, 12)[None]
        with gathered(parts.model), torch.no_grad():
            found += [] if torch.equal(whole.model(ids).logits, parts.model(ids).logits) else ["x"]
        found += [n for n, p in parts.model.named_parameters() if p.to_local().is_meta]
    return found


def full_disk(path, mesh, rank):
    """What each rank says of an export that rank 0 has no room for on its disk."""
    model = PolicyConfig(str(path)).own(mesh)
    cut(model, mesh, None, reshard=True, cpu_offload=False)
    weights = Sharded(torch.device("cpu"))
    weights.large = True
    full = OSError(errno.ENOSPC, "no space left")
    try:
        with mock.patch.object(os, "posix_fallocate", side_effect=full):
            weights.state_beside(model, rank == 0, path.parent / "export")
    except OSError as error:
        return error.strerror or str(error)


def refused(path, mesh):
    try:
        PolicyConfig(str(path)).own(mesh)
    except ValueError as error:
        return str(error).replace(str(path), "PATH")


def work(rank, root):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    names = (*ARCHITECTURES, "narrow", "in files", "pickled", "split", "tied twice")
    found = {name: compared(root / name, mesh) for name in names}
    found["half"] = compared(root / "qwen3", mesh, dtype="bfloat16")
    found["adapted"] = adapted(root / "qwen3", mesh)
    found["full"] = full_disk(root / "qwen3", mesh, rank)
    for name in ("too long", "missing", "nan"):
        found[name] = refused(root / name, mesh)
    return found


@pytest.fixture(scope="module")
def ranks(root):
    return on_ranks(work, root)


@pytest.mark.parametrize(
    "name", [*ARCHITECTURES, "narrow", "in files", "pickled", "split", "tied twice", "half"]
)
def test_parts_put_together_are_the_model_to_the_bit(ranks, name):
    for rank in ranks:
        found = rank[name]
        assert found["differ"] == []
        first, second = found["tied"]
        assert first == second
        first, second = found["marks"]
        assert first == second
        if name != "split":
            assert found["whole"] == [] and found["said"] == []
            assert found["share"] < 0.54 * found["all"]


def test_weights_that_lie_in_another_form_are_loaded_whole_and_rank_0_says_so(ranks):
    one, other = (rank["split"] for rank in ranks)
    assert len(one["whole"]) > 1 and one["whole"] == other["whole"] and other["said"] == []
    (line,) = one["said"]
    assert f"{len(one['whole'])} weights" in line and "lie in another form" in line


def test_adapters_are_made_beside_parts_and_a_cut_model_computes_what_the_whole_does(ranks):
    assert [rank["adapted"] for rank in ranks] == [[], []]


def test_a_full_disk_ends_an_export_on_every_rank_before_anything_is_gathered(ranks):
    said = [rank["full"] for rank in ranks]
    assert said == ["no space left", "another rank has found no room on the disk"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too long", "PATH has model.embed_tokens.weight in the shape (31, 16)"),
        ("missing", "PATH has no weights for model.layers.1.mlp.up_proj.weight"),
        ("nan", "PATH has NaN or infinite weights: 16 of 512 in model.embed_tokens.weight"),
    ],
)
def test_all_ranks_refuse_what_one_of_them_reads(ranks, name, message):
    assert ranks[0][name] == ranks[1][name] and message in ranks[0][name]
