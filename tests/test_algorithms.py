"""Every overlay of configs/algorithm: it trains the embedded task, and its loss is its paper's."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import train
from gspo_lightning.critic.critic import Critic
from gspo_lightning.loss import micro_loss
from gspo_lightning.objectives import picked_tokens, token_weights
from gspo_lightning.rewards.terms import RewardTerm
from gspo_lightning.rollout import Rollout, Samples
from support import paper_losses
from support.command import instantiated
from support.observers import Probe
from support.repository import ROOT
from support.steps import make_step

pytestmark = pytest.mark.usefixtures("at_the_root")

NAMES = sorted(path.stem for path in (ROOT / "configs" / "algorithm").glob("*.yaml"))
# each with a path of its own through sampling, rewards or updates; the others are other numbers
TRAINED = ("gspo", "dapo", "ppo", "rloo", "clip_cov", "reinforce_plus_plus")
UNCLIPPED = ("sapo", "vespo", "kl_cov", "gpg")  # have no range, or one that is a point
LIMIT = 10
LENGTHS = [10, 3, 1, 7, 9, 4, 6, 2]


def stack(name, folder, *options):
    names = ("base", "task/arithmetic", "hardware/cpu", f"algorithm/{name}")
    configs = [part for n in names for part in ("--config", f"configs/{n}.yaml")]
    return ["fit", *configs, "--trainer.default_root_dir", str(folder), *options]


@pytest.mark.parametrize("name", TRAINED)
def test_an_overlay_trains_the_embedded_task(name, tmp_path):
    quick = ["--data.num_rollouts=2", "--trainer.limit_val_batches=0"]
    quick += ["--trainer.num_sanity_val_steps=0", "--trainer.enable_progress_bar=false"]
    probe = "--trainer.callbacks+=support.observers.Probe"
    assert train.main(stack(name, tmp_path, *quick, probe)) == 0

    assert len(Probe.outputs) == 2
    for outputs in Probe.outputs:
        assert all(math.isfinite(value) for value in outputs["metrics"].values())
        assert outputs["metrics"]["optim/skipped_steps"] == 0
        assert outputs["metrics"]["policy/grad_norm"] > 0
    assert not any(torch.equal(a, b) for a, b in zip(Probe.start, Probe.end, strict=True))


# ---- loss and gradient against the papers' formulas ----------------------------------------------


def instantiate(name, folder, *options):
    return instantiated(*stack(name, folder, *options)[1:]).model


def make_batch(model):
    """B = 8 completions of up to 10 tokens, float64; ratios on both sides of the clip range."""
    generator = torch.Generator().manual_seed(0)

    def random():
        return torch.randn(8, LIMIT, generator=generator, dtype=torch.float64)

    width = model.objective.clip_width
    shares = {"sequence_sum": 0.7, "token": 1.2}  # a mean over tokens has less spread than they
    spread = min(shares.get(model.objective.ratio, 5) * width, 2.0)  # CISPO's cap is a ratio of 5
    if model.objective.clip_dual:
        spread = 1.0  # some ratios are above 3
    old = -random().abs()
    return SimpleNamespace(
        lp=(old + spread * random()).requires_grad_(),
        old=old,
        entropy=random().abs(),
        ref=old + 0.5 * random(),
        values=(0.3 * random()).requires_grad_(),
        old_values=0.3 * random(),
        rewards=[1.25, 0.0, 0.25, 0.5, 0.0, 0.0, 1.0, 0.75],
        lengths=LENGTHS,
        size=model.sampler.group_size,
        limit=model.sampler.max_new_tokens,
    )


def as_rollout(model, batch, step):
    """The rollout that the module makes of these numbers."""
    mask = torch.arange(LIMIT) < torch.tensor(LENGTHS)[:, None]
    ids = torch.ones(8, LIMIT, dtype=torch.long)
    samples = Samples(
        prompt_ids=ids[:, :4],
        prompt_mask=ids[:, :4].bool(),
        completion_ids=ids,
        mask=mask,
        finished=torch.ones(8, dtype=torch.bool),
        rows=[{}] * 8,
        texts=[""] * 8,
        group_size=batch.size,
    )
    raw = torch.tensor(batch.rewards, dtype=torch.float64)
    collector = model.collector
    collector.critic = model.critic
    collector.rewards = {"right": RewardTerm(lambda rows, texts: raw.tolist())}
    rewards, parts = collector.score(samples, step)
    rewards = rewards.double()
    reference = batch.ref if model.reference is not None else None
    arguments = (samples, rewards, batch.old_values, batch.old, reference, step)
    return Rollout(
        **{name: getattr(samples, name) for name in Samples.__dataclass_fields__},
        old_logprobs=batch.old,
        ref_logprobs=reference,
        rewards=rewards,
        reward_parts=parts,
        **collector.estimate(*arguments),
    )


def module_loss(model, batch):
    """What an update makes a gradient of, in two micro-batches, and the share of clipped tokens."""
    model.trainer = SimpleNamespace(
        default_root_dir="",
        global_rank=0,
        callbacks=[],
        datamodule=None,
        strategy=None,
        loggers=[],
        enable_autolog_hparams=False,
    )
    model.configure_model()
    model.on_fit_start()
    if model.critic_config is not None:
        model.critic = Critic(model.critic_config, hidden_size=2)
    step = make_step(model.choices)
    step.kl_coef = model.kl_coef
    rollout = as_rollout(model, batch, step)
    objective, limit = model.objective, model.sampler.max_new_tokens
    if objective.pick is not None:
        tokens = batch.lp.detach(), batch.old, batch.entropy, rollout.advantages, rollout.mask
        rollout = replace(rollout, picked=picked_tokens(*tokens, objective, seed=0))
        batch.drawn = {tuple(place) for place in rollout.picked.nonzero().tolist()}
    weights = token_weights(rollout.mask, objective.aggregation, limit, dtype=torch.float64)
    total = 0.0
    for rows in torch.arange(8).split(4):
        micro, value = rollout.select(rows), None
        if model.critic is not None:
            model.critic.forward = lambda policy, micro, rows=rows: batch.values[rows]
            value = model.critic.loss(None, micro, weights[rows]).loss
        loss = micro_loss(batch.lp[rows], None, micro, weights[rows], step.choices, value)
        step.tally.count_losses(loss.clip, *loss.parts[1:], micro.mask, 0.5)
        total = total + loss.total
    return total, step.tally.compute()["train/clip_fraction_tokens"]


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_those_of_the_paper(name, tmp_path):
    options = [f"--model.sampler.max_new_tokens={LIMIT}", "--model.entropy_coef=0"]
    model = instantiate(name, tmp_path, *options)
    batch = make_batch(model)
    ours, clipped = module_loss(model, batch)
    theirs = getattr(paper_losses, name)(batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    inputs = [batch.lp] + ([batch.values] if name == "ppo" else [])
    gradients = [torch.autograd.grad(loss, inputs) for loss in (ours, theirs)]
    for one, other in zip(*gradients, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert (0 < clipped < 1) == (name not in UNCLIPPED)
