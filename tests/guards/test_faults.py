"""NaN and infinities in an optimizer step: skipped, counted, written down, and where a run ends."""

import math
import os
import warnings

import pytest
import torch
from lightning.pytorch import Callback

from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.guards.faults import LOOKED_AT, Faults
from gspo_lightning.rewards.terms import RewardError, RewardTerm
from gspo_lightning.tally import RolloutTally
from support.fault_injection import INF, NAN, PLACES, REWARDS, BrokenReward, Inject, every
from support.observers import Outputs
from support.reward_functions import digits
from support.tiny_run import make_module, run

FAULT = r"ignore:rollout \d+, optimizer step \d+. .* not finite"


class Optimizer(Callback):
    """Keeps the optimizer's state at the end."""

    def on_train_end(self, trainer, module):
        state = trainer.optimizers[0].state_dict()["state"]
        self.state = [value for entry in state.values() for value in entry.values()]


def final_state(tmp_path, model_dir, inject, rollouts=2, **options):
    """Weights and optimizer state at the end of a run, and what each rollout handed out."""
    end, keep = Optimizer(), Outputs()
    options = {"reference": ReferencePolicy(device="cpu"), "kl_coef": 0.1} | options
    module = run(tmp_path, model_dir, rollouts, [inject, end, keep], **options)
    return [*(p.detach() for p in module.policy.parameters()), *end.state], keep.all


def messages(said):
    """Our warnings; Lightning has one of its own about torch's LeafSpec."""
    return [str(w.message) for w in said if "LeafSpec" not in str(w.message)]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings(FAULT)
def test_every_place_of_a_nan_costs_one_step_and_no_bit_of_the_others(tmp_path, model_dir):
    faults = [(kind, value) for kind, values in PLACES.items() for value in values]
    # one in each rollout of two steps, in turn the first and the second
    steps = [(rollout, 1 + rollout % 2) for rollout in range(len(faults))]
    expected, _ = final_state(tmp_path, model_dir, every(steps, "left out"), len(faults))
    inject = Inject(dict(zip(steps, faults, strict=True)))
    found, rollouts = final_state(tmp_path, model_dir, inject, len(faults))
    lost = [int(r["metrics"]["optim/faults"]) for r in rollouts]
    figures = {"tried": inject.tried, "survived": len(rollouts), "lost": sum(lost)}
    assert figures == {"tried": 16, "survived": 16, "lost": 16}  # of 32 steps
    assert lost == [1] * 16 and same(found, expected)


@pytest.mark.filterwarnings("ignore:1 of 16 completions get no reward")
def test_a_reward_that_is_not_finite_costs_its_row_and_no_step(tmp_path, model_dir):
    broken = BrokenReward(digits, {(2 * i, 5): value for i, value in enumerate(REWARDS)})
    rewards = {"digits": RewardTerm(broken, on_error="skip")}
    found, rollouts = final_state(tmp_path, model_dir, Inject({}), 6, rewards=rewards)
    metrics = [r["metrics"] for r in rollouts]
    lost = {name: [m[name] for m in metrics] for name in ("optim/faults", "optim/skipped_steps")}
    figures = {"tried": broken.tried, "survived": len(rollouts), "lost": lost}
    assert figures == {"tried": 3, "survived": 6, "lost": dict.fromkeys(lost, [0.0] * 6)}
    assert [m["reward/missing"] for m in metrics] == [1, 0, 1, 0, 1, 0]
    assert [m["reward/digits_errors"] for m in metrics] == [0, 0, 1, 0, 1, 0]  # NaN is an answer
    for r in rollouts[::2]:
        advantages = r["rollout"].advantages[:, 0]
        assert advantages[5] == 0 and advantages[4:8].sum().abs() < 1e-5  # the others' own mean
    assert all(torch.isfinite(tensor).all() for tensor in found)
    assert all(math.isfinite(value) for m in metrics for value in m.values())


@pytest.mark.parametrize("value", REWARDS[1:])
def test_an_infinite_reward_ends_a_run_that_is_to_stop_before_a_step(tmp_path, model_dir, value):
    broken, keep = BrokenReward(digits, {(1, 5): value}), Outputs()
    rewards = {"digits": RewardTerm(broken)}
    with pytest.raises(RewardError, match=f"reward 'digits' gave {value} for the completion"):
        run(tmp_path, model_dir, 3, [keep], rewards=rewards)
    assert broken.tried == 1 and len(keep.all) == 1


@pytest.mark.filterwarnings(FAULT)
@pytest.mark.parametrize("kind", PLACES)
def test_a_fault_changes_neither_weights_nor_optimizer_and_leaves_no_gradient(
    tmp_path, model_dir, kind
):
    seen = []

    class Around(Callback):
        def on_train_start(self, trainer, module):
            update = module.updater.update

            def watched(*args):
                optimizer = trainer.optimizers[0]
                before = state(module, optimizer)
                result = update(*args)
                if module.faults.found:
                    grads = [p.grad for p in module.policy.parameters()]
                    seen.append((before, state(module, optimizer), grads, module.faults.found))
                return result

            module.updater.update = watched

    def state(module, optimizer):
        entries = [v.clone() for entry in optimizer.state.values() for v in entry.values()]
        return [p.detach().clone() for p in module.policy.parameters()] + entries

    final_state_of = every([(1, 2)], kind)
    options = {"reference": ReferencePolicy(device="cpu"), "kl_coef": 0.1}
    run(tmp_path, model_dir, 2, [final_state_of, Around()], **options)
    ((before, after, grads, found),) = seen
    assert same(before, after) and len(before) > len(grads)
    assert all(grad is None for grad in grads)
    assert kind in (*found, "logits")


@pytest.mark.filterwarnings(FAULT)
def test_a_skipped_step_is_counted_and_no_figure_becomes_nan(tmp_path, model_dir):
    _, rollouts = final_state(tmp_path, model_dir, every([(0, 1), (1, 1), (1, 2)], "logits"))
    counts = [(r["metrics"]["optim/faults"], r["metrics"]["optim/skipped_steps"]) for r in rollouts]
    assert counts == [(1.0, 1.0), (2.0, 2.0)]
    assert all(value == value for r in rollouts for value in r["metrics"].values())
    assert torch.equal(rollouts[1]["ratios"], torch.ones(16))


def test_the_warning_names_step_tensors_count_and_dump(tmp_path, model_dir):
    with pytest.warns(UserWarning, match="not finite") as said:
        final_state(tmp_path, model_dir, every([(1, 2)], "gradient"))
    (line,) = messages(said)
    dump = tmp_path / "faults" / "rollout=000002-step=002-rank0.pt"
    assert line == (
        "rollout 2, optimizer step 2: gradient not finite, so it is skipped (1 in a row; the run "
        f"stops at 3); what is it? gspo replay {dump}"
    )
    assert dump.is_file()


@pytest.mark.filterwarnings(FAULT)
@pytest.mark.parametrize(("max_faults", "last"), [(1, (1, 2)), (3, (2, 2))])
def test_faults_in_a_row_end_the_run_with_the_reason(tmp_path, model_dir, max_faults, last):
    inject = every([(0, 2), (1, 1), (1, 2)], "loss")
    with pytest.raises(FloatingPointError) as caught:
        final_state(tmp_path, model_dir, inject, rollouts=4, max_faults=max_faults)
    text = str(caught.value)
    assert text.startswith(
        f"rollout {last[0]}, optimizer step {last[1]}: loss, gradient not finite, the last of "
        f"{max_faults} such steps in a row"
    )
    assert text.endswith(f"rollout=00000{last[0]}-step=002-rank0.pt")


@pytest.mark.filterwarnings(FAULT)
def test_a_good_step_ends_the_row(tmp_path, model_dir):
    inject = every([(0, 1), (0, 2), (1, 2), (2, 1)], "loss")
    final_state(tmp_path, model_dir, inject, rollouts=3, max_faults=3)
    assert inject.tried == 4


@pytest.mark.filterwarnings(FAULT)
def test_the_newest_dumps_are_kept(tmp_path, model_dir):
    earlier = tmp_path / "faults" / "rollout=000099-step=001-rank0.pt"  # before going on from 0
    earlier.parent.mkdir()
    earlier.write_bytes(b"")
    os.utime(earlier, (1, 1))
    inject = every([(i, 1) for i in range(5)], "loss")
    final_state(tmp_path, model_dir, inject, rollouts=5)
    names = sorted(path.name for path in (tmp_path / "faults").iterdir())
    assert names == [f"rollout=00000{i}-step=001-rank0.pt" for i in (3, 4, 5)]


def full_disk(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)


def file_in_the_way(tmp_path, monkeypatch):
    (tmp_path / "faults").write_text("")


@pytest.mark.parametrize(
    ("disk", "reason"), [(full_disk, "No space left"), (file_in_the_way, "File exists")]
)
def test_a_disk_that_refuses_costs_the_dump_and_not_the_run(
    tmp_path, model_dir, monkeypatch, disk, reason
):
    disk(tmp_path, monkeypatch)
    with pytest.warns(UserWarning) as said:
        final_state(tmp_path, model_dir, every([(0, 1)], "loss"))
    lines = messages(said)
    assert "could not be written" in lines[0] and reason in lines[0]
    assert len(lines) == 2 and "replay" not in lines[1]


def test_max_faults_must_be_at_least_one(model_dir):
    with pytest.raises(ValueError, match="max_faults must be >= 1, got 0"):
        make_module(model_dir, max_faults=0)


@pytest.mark.filterwarnings(FAULT)
def test_the_row_of_faults_goes_on_after_a_checkpoint(tmp_path, model_dir):
    saved = []

    class Save(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            saved.append({})
            module.on_save_checkpoint(saved[-1])

    class Load(Callback):
        def on_train_start(self, trainer, module):
            module.on_load_checkpoint(saved[0])

    run(tmp_path, model_dir, 1, [every([(0, 2)], "loss"), Save()], max_faults=2)
    with pytest.raises(FloatingPointError, match="the last of 2 such steps"):
        run(tmp_path, model_dir, 1, [every([(0, 1)], "loss"), Load()], max_faults=2)


def test_a_row_that_is_not_finite_does_not_hide_what_the_others_show(make_rollout):
    rollout, tally = make_rollout(), RolloutTally(["x"])
    entropy = torch.full_like(rollout.old_logprobs, 2.0)
    entropy[1, 0] = NAN
    ref = rollout.old_logprobs.clone()
    ref[2, 0] = INF
    tally.count_logprobs(rollout.old_logprobs, entropy, ref, rollout.mask)
    figures = tally.compute()
    assert figures["policy/entropy"] == 2.0 and figures["train/kl_divergence"] == 0.0


# --- ranks ---------------------------------------------------------------------------------------


def settle(faults, others=(), **looks):
    """One step of a rank; its partners report what is named in ``others``."""
    faults.found, faults.flags = (), {}
    for name, value in looks.items():
        faults.look(name, torch.tensor([1.0, value]))
    theirs = torch.tensor([float(name in others) for name in LOOKED_AT]).double()
    return faults.settle(torch.tensor(1.0), lambda own: own + theirs)


def test_a_rank_without_a_fault_skips_with_the_others_and_writes_nothing():
    faults = Faults(3)
    assert settle(faults, ("loss", "gradient"), loss=2.0)
    assert faults.found == ("loss", "gradient") and not faults.own and faults.in_a_row == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        faults.tell("rollout 0, optimizer step 1", None)


def test_a_rank_at_fault_writes_its_mini_batch():
    faults = Faults(3)
    assert settle(faults, loss=NAN)
    assert faults.own and faults.found == ("loss",)


def test_a_gradient_that_nobody_explains_is_written_down_by_every_rank():
    faults = Faults(3)
    assert settle(faults, ("gradient",), loss=1.0)
    assert faults.own and faults.found == ("gradient",)


def test_a_later_micro_batch_does_not_hide_an_earlier_one():
    faults = Faults(3)
    faults.look("loss", torch.tensor(INF))
    faults.look("loss", torch.tensor(1.0))
    assert faults.settle(torch.tensor(1.0), lambda own: own)
    assert not settle(faults, loss=1.0) and faults.in_a_row == 0
