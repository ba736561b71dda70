"""Two ranks that each hold a part of the policy, against two that each hold all of it."""

import shutil
import warnings
from functools import partial
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.fsdp import CPUOffloadPolicy

from gspo_lightning.checkpoint.files import find_checkpoint
from gspo_lightning.checkpoint.io import damage
from gspo_lightning.checkpoint.parts import remove, remove_unnamed
from gspo_lightning.checkpoint.rollout_checkpoint import RolloutCheckpoint
from gspo_lightning.data.prompts import PromptData
from gspo_lightning.engine.probe import reading
from gspo_lightning.evaluation import Evaluation
from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.module import GSPOModule
from gspo_lightning.policy.lora import LoRAConfig
from gspo_lightning.policy.policy import PolicyConfig
from gspo_lightning.run.memory import needs
from gspo_lightning.sampling import GroupSampler
from gspo_lightning.sharding import FSDP2, cut, whole_state
from gspo_lightning.sharding.ranks import Sharded
from support.fault_injection import NAN, every
from support.forked import on_ranks
from support.tiny_models import build_model, build_tokenizer
from support.tiny_run import make_module, make_trainer, write_prompts

pytestmark = pytest.mark.slow
DDP = partial(DDPStrategy, process_group_backend="gloo")
IN_STEP = partial(FSDP2, rollout="in_step")
PARTS = partial(FSDP2, checkpoints="parts")
LORA = LoRAConfig(rank=3)


class Keep(Callback):
    """What a rank has seen: rollouts, gradients, and the share of the policy that it holds."""

    def __init__(self):
        self.seen = {"rollouts": [], "gradients": [], "shares": []}

    def on_fit_start(self, trainer, module):
        for parameter in module.policy.parameters():
            if not hasattr(parameter, "to_local"):
                # A file's own memory begins anywhere, and products of vectors round by where.
                parameter.data = parameter.data.clone()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        parts = [p.grad for p in module.policy.parameters() if p.requires_grad]
        self.seen["gradients"].append(torch.cat([whole(p).flatten() for p in parts]))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        rollout = outputs["rollout"]
        kept = "completion_ids", "mask", "old_logprobs", "ref_logprobs", "rewards", "advantages"
        kept = {name: getattr(rollout, name) for name in kept}
        figures = {k: v for k, v in outputs["metrics"].items() if k.startswith("optim/")}
        self.seen["rollouts"].append({**kept, **figures})
        here = [getattr(p, "to_local", lambda p=p: p)() for p in module.policy.parameters()]
        total = sum(p.numel() for p in module.policy.parameters())
        self.seen["shares"].append(sum(p.numel() for p in here) / total)


def fork_ranks(folder, count, work):
    """What each of several ranks comes to; tensors are handed over in files."""
    folder.mkdir()

    def save(rank):
        torch.set_num_threads(1)
        warnings.simplefilter(
            "ignore"
        )  # a fault is told as a warning, of which pytest makes errors
        torch.save(work(rank), folder / f"{rank}.pt")

    assert on_ranks(save, count=count, seconds=150) == [None] * count
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def whole(tensor):
    return whole_state(tensor.detach(), wanted=True).clone() if tensor is not None else tensor


def fit(root, name, model_dir, strategy, ckpt=None, precision="32-true", callbacks=(), **options):
    """Train two rollouts on a rank of several, and give back what it has seen and ended with."""
    folder = root / name
    lora, count = options.pop("lora", None), options.pop("devices", 2)
    settings = {
        "policy": PolicyConfig(str(model_dir), lora=lora),
        "sampler": GroupSampler(group_size=2, max_new_tokens=24),
        "drop_flat_groups": True,
        "evaluation": Evaluation(num_samples=1, ks=(1,)),
        "reference": ReferencePolicy(device="policy"),
        "kl_coef": 0.05,
        "max_grad_norm": None,
    }
    module = make_module(str(model_dir), **(settings | options))
    prompts = str(root / "prompts.jsonl")
    held_out = str(root / "held_out.jsonl")  # batches of 2: rank 0 has one more than rank 1
    data = PromptData(prompts, held_out, prompts_per_rollout=2, num_rollouts=2, val_batch_size=2)
    keep, checkpoints = Keep(), RolloutCheckpoint(every_n_rollouts=1)
    checkpoints.accept_changes = count != 2
    trainer = make_trainer(
        folder,
        callbacks=[keep, checkpoints, *callbacks],
        devices=count,
        strategy=strategy(),
        use_distributed_sampler=False,
        precision=precision,
        enable_checkpointing=True,
    )
    trainer.fit(module, data, ckpt_path=ckpt)
    if ckpt is None:
        module.export(folder / "export")
    state = whole_state(trainer.optimizers[0].state_dict()["state"], wanted=True)
    return keep.seen | {
        "weights": [whole(p) for p in module.policy.parameters()],
        "moments": [s[k] for s in state.values() for k in ("exp_avg", "exp_avg_sq", "step")],
        "figures": {k: float(v) for k, v in trainer.callback_metrics.items() if "val/" in k},
        "way": reading(module.policy.model, module.device),
        "planned": needs(trainer, module).card["weights"],
    }


def work(root, rank):
    """Everything that two ranks do, one training after the other in the same processes."""
    found = {}
    asked = []
    keep_company = Sharded._keep_company
    Sharded._keep_company = lambda self, n: (asked.append(n), keep_company(self, n))[1]
    for kind, lora in {"tied": None, "lora": LORA}.items():
        go = partial(fit, root, model_dir=root / ("untied" if lora else kind), lora=lora)
        found[kind] = {
            "ddp": go(f"{kind}-ddp", strategy=DDP),
            "fsdp2": go(f"{kind}-fsdp2", strategy=PARTS),
        }
    del asked[:]
    go = partial(fit, root, model_dir=root / "tied")
    found["in step"] = go("in-step", strategy=IN_STEP)
    found["company"] = len(asked)
    first = "checkpoints/rollout=000001.ckpt"
    found["from fsdp2"] = go("from-fsdp2", strategy=DDP, ckpt=root / "tied-fsdp2" / first)
    # parts in "host memory": nothing tells it from a device's here, but every step is taken
    pages = partial(CPUOffloadPolicy, pin_memory=False)
    with mock.patch.object(FSDP2, "_check"), mock.patch.object(cut, "CPUOffloadPolicy", pages):
        offloaded = partial(FSDP2, cpu_offload=True, process_group_backend="gloo")
        found["from ddp"] = go("from-ddp", strategy=offloaded, ckpt=root / "tied-ddp" / first)
    fault = every([(1, 1)] if rank == 1 else [], "loss", NAN)
    size = 1 + 2 * (rank == 0)
    found["fault"] = go("fault", strategy=FSDP2, callbacks=[fault], micro_batch_size=size)
    found["mixed"] = go("mixed", strategy=IN_STEP, precision="bf16-mixed")
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("fsdp2")
    # one in half precision, as models are published: ranks widen their parts of it
    for kind, dtype in {"tied": torch.bfloat16, "untied": torch.float32}.items():
        model = build_model("qwen3", tie_word_embeddings=kind == "tied").to(dtype)
        model.save_pretrained(root / kind)
        build_tokenizer().save_pretrained(root / kind)
    write_prompts(root / "prompts.jsonl")
    write_prompts(root / "held_out.jsonl", 5)
    return root


@pytest.fixture(scope="module")
def ranks(root):
    return fork_ranks(root / "ranks", 2, partial(work, root))


def same(first, second, rollouts=slice(None)):
    """Whether two trainings were the same to the bit."""
    for a, b in zip(first["rollouts"][rollouts], second["rollouts"], strict=True):
        assert a.keys() == b.keys()
        differing = [k for k in a if not torch.equal(*map(torch.as_tensor, (a[k], b[k])))]
        assert differing == []
    for kind in ("weights", "moments"):
        pairs = zip(first[kind], second[kind], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), kind
    assert first["figures"] == second["figures"] != {}
    return True


@pytest.mark.parametrize("kind", ["tied", "lora"])
def test_a_part_on_each_rank_trains_what_the_whole_does(ranks, root, kind):
    for rank in ranks:
        ddp, fsdp2 = rank[kind]["ddp"], rank[kind]["fsdp2"]
        assert same(ddp, fsdp2)
        assert all(map(torch.equal, ddp["gradients"], fsdp2["gradients"]))
        # a forgotten reshard would pass all else
        assert ddp["planned"] == 2 * fsdp2["planned"]
        assert ddp["shares"] == [1, 1] and max(fsdp2["shares"]) < 0.52
    exports(root, f"{kind}-ddp", f"{kind}-fsdp2")  # gathered on the disk


def exports(root, *names):
    """Whether two trainings have exported the same, to the byte."""
    one, other = (root / name / "export" for name in names)
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in other.iterdir())
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in files)


def test_ranks_in_step_draw_what_they_draw_apart(ranks, root):
    for rank in ranks:
        assert same(rank["tied"]["fsdp2"], rank["in step"])
        assert max(rank["in step"]["shares"]) < 0.52
    exports(root, "tied-ddp", "in-step")  # gathered in memory
    assert sum(rank["company"] for rank in ranks) > 0  # ranks have needed unequal numbers of steps


@pytest.mark.parametrize("way", ["from ddp", "from fsdp2"])
def test_either_strategy_goes_on_where_the_other_was_stopped(ranks, way):
    for rank in ranks:
        assert same(rank["tied"]["ddp"], rank[way], rollouts=slice(1, None))


def test_ranks_with_other_micro_batches_make_the_same_gradient(ranks):
    for rank in ranks:
        even, uneven = rank["tied"]["fsdp2"]["gradients"][0], rank["fault"]["gradients"][0]
        torch.testing.assert_close(uneven, even, rtol=1e-5, atol=1e-6)


def test_a_fault_of_one_rank_is_skipped_by_both_and_its_dump_has_whole_weights(ranks, root):
    assert [[r["optim/faults"] for r in rank["fault"]["rollouts"]] for rank in ranks] == [
        [0, 1]
    ] * 2
    assert all(map(torch.equal, ranks[0]["fault"]["weights"], ranks[1]["fault"]["weights"]))
    (dump,) = root.glob("fault/faults/*.pt")
    assert dump.stem.endswith("rank1")
    policy = torch.load(dump, weights_only=True)["policy"]
    own = dict(build_model("qwen3", tie_word_embeddings=True).named_parameters())
    assert {n: policy[f"model.{n}"].shape for n in own} == {n: p.shape for n, p in own.items()}


def test_mixed_precision_still_packs_and_keeps_gradients_in_float32(ranks):
    for rank in ranks:
        assert rank["mixed"]["way"] == "packed"
        assert {g.dtype for g in rank["mixed"]["gradients"]} == {torch.float32}
        wide, narrow = rank["tied"]["fsdp2"]["gradients"][0], rank["mixed"]["gradients"][0]
        assert 0.5 < narrow.norm() / wide.norm() < 2


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_ranks_goes_on_with_the_same_weights_and_moments(ranks, root, count):
    ckpt = root / "tied-fsdp2" / "checkpoints" / "rollout=000002.ckpt"
    go = partial(fit, root, f"to-{count}", root / "tied", FSDP2, ckpt=ckpt, devices=count)
    for rank in fork_ranks(root / f"ranks{count}", count, lambda _: go()):
        assert rank["rollouts"] == []  # all were done
        for kind in ("weights", "moments"):
            expected = ranks[0]["tied"]["fsdp2"][kind]
            assert all(map(torch.equal, rank[kind], expected))


def test_a_checkpoint_in_parts_is_whole_or_the_one_before_it_is_used(ranks, root, tmp_path):
    broken = {
        "does not give": lambda file: file.write_bytes(b"x" + file.read_bytes()[1:]),
        "is not a file": lambda file: file.unlink(),
        "of another checkpoint": lambda file: shutil.copy(
            file.parents[1] / "rollout=000001.parts0" / file.name, file
        ),
    }
    for reason, harm in broken.items():
        copy = tmp_path / reason
        shutil.copytree(root / "tied-fsdp2", copy)
        newest = copy / "checkpoints" / "rollout=000002.ckpt"
        assert damage(newest) is None
        harm(newest.with_name("rollout=000002.parts0") / "rank00001.pt")
        with pytest.warns(UserWarning, match="the one before it is used"):
            assert find_checkpoint(copy, "last").name == "rollout=000001.ckpt"
        assert "rank00001.pt" in damage(newest)
    # what a kill before the last step of a save leaves, and nothing else, is removed
    left = newest.with_name("rollout=000009.parts0")
    left.mkdir()
    remove_unnamed(left.parent)
    remove(newest)
    assert sorted(path.name for path in left.parent.iterdir()) == [
        "rollout=000001.ckpt",
        "rollout=000001.parts0",
    ]


def test_weights_in_parts_are_never_taken_for_values(ranks, root):
    path = root / "tied-fsdp2" / "checkpoints" / "rollout=000002.ckpt"
    with pytest.raises(ValueError, match="tensors lie in parts"):
        GSPOModule.load_from_checkpoint(path)
