"""The loop of GSPO, by behaviour: what one rollout and its updates do."""

import math
import os
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from gspo_lightning.data.prompts import PromptData
from gspo_lightning.evaluation import Evaluation
from gspo_lightning.frozen.models import ReferencePolicy, ReferenceSync
from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.objectives import Objective
from gspo_lightning.optim import OptimizerConfig
from gspo_lightning.policy import LoRAConfig, PolicyConfig
from gspo_lightning.rewards.terms import RewardTerm
from gspo_lightning.sampling import GroupSampler
from support.observers import Outputs, Steps
from support.reward_functions import digits, even_prompts_teach, ones
from support.tiny_run import gradients_of, make_module, make_trainer, outputs_of, run, write_prompts


def test_ratio_is_exactly_one_and_nothing_is_clipped_before_the_first_step(tmp_path, model_dir):
    # fact 18: with one step per rollout every forward pass is a first one
    (outputs,) = outputs_of(tmp_path, model_dir, num_minibatches=1)
    assert torch.equal(outputs["ratios"], torch.ones(16))
    assert outputs["metrics"]["policy/ratio_max"] == outputs["metrics"]["policy/ratio_min"] == 1.0
    assert outputs["metrics"]["train/clip_fraction_sequences"] == 0.0


def test_old_logprobs_are_the_bits_of_the_first_forward_pass(tmp_path, model_dir):
    # fact 18: recomputed with the same kernels and shapes, so float32 noise is exactly 0
    options = {"num_minibatches": 2, "micro_batch_size": 4, "old_logprobs": "recompute"}
    (outputs,) = outputs_of(tmp_path, model_dir, **options)
    assert outputs["metrics"]["policy/ratio_noise"] == 0.0


def test_later_minibatches_of_a_rollout_are_off_policy_and_clipped(tmp_path, model_dir):
    (outputs,) = outputs_of(tmp_path, model_dir, num_minibatches=4)
    assert (outputs["ratios"] == 1).sum() == 4  # the first of four mini-batches
    assert outputs["metrics"]["train/clip_fraction_sequences"] > 0


def test_logged_ratio_of_a_row_is_its_own(tmp_path, model_dir):
    # one epoch of two steps: the rows with ratio 1 are whole groups, the first mini-batch
    (outputs,) = outputs_of(tmp_path, model_dir, num_minibatches=2)
    groups = outputs["ratios"].view(4, 4)
    assert sorted((groups == 1).all(1).tolist()) == [False, False, True, True]


@pytest.mark.parametrize("size", [1, 3, 4, 8, None])
def test_gradient_is_the_same_for_every_micro_batch_size(tmp_path, model_dir, size):
    options = {
        "reference": ReferencePolicy(device="cpu"),
        "kl_coef": 0.1,
        "entropy_coef": 0.01,
        "optimizer": OptimizerConfig(learning_rate=1e-4),
    }
    whole = gradients_of(tmp_path, model_dir, micro_batch_size=8, **options)
    cut = gradients_of(tmp_path, model_dir, micro_batch_size=size, **options)
    torch.testing.assert_close(cut[0], whole[0], atol=1e-5, rtol=1e-5)  # float32


def test_tokens_picked_by_statistics_of_a_mini_batch_do_not_depend_on_micro_batches(
    tmp_path, model_dir
):
    """Fact 52."""
    picking = Objective("token", pick="high_entropy", pick_share=0.3)
    whole, cut, plain = (
        gradients_of(tmp_path, model_dir, micro_batch_size=size, objective=objective)[0]
        for size, objective in ((8, picking), (3, picking), (8, Objective("token")))
    )
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=1e-5)  # float32
    assert (whole - plain).abs().max() > 1e-3


def test_gradient_is_the_same_for_every_micro_batch_size_to_the_last_bits_in_float64(
    tmp_path, make_model, tokenizer
):
    # fact 13; GPT-2, because the other architectures keep float32 inside their norms
    model_dir = tmp_path / "gpt2"
    make_model("gpt2").save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    keep = Outputs()
    os.environ["PL_GLOBAL_SEED"] = "0"
    module = make_module(model_dir, num_minibatches=1, entropy_coef=0.1)

    class Double(Callback):
        def on_train_start(self, trainer, module):
            module.policy.double()

    steps = Steps()
    data = PromptData(
        str(write_prompts(tmp_path / "p.jsonl")), prompts_per_rollout=4, num_rollouts=1
    )
    make_trainer(tmp_path, callbacks=[Double(), steps, keep]).fit(module, data)
    rollout = keep.all[0]["rollout"]
    assert steps.gradients[0].dtype == torch.float64
    found = {}
    limits = [(1, None), (3, None), (5, None), (None, 9), (3, 20), (None, 40), (None, None)]
    for size, tokens in limits:
        options = {"micro_batch_size": size, "micro_batch_tokens": tokens}
        module = make_module(model_dir, num_minibatches=1, entropy_coef=0.1, **options)
        steps = Steps()
        data = PromptData(str(tmp_path / "p.jsonl"), prompts_per_rollout=4, num_rollouts=1)
        module.report = lambda rollout, ratios, step: {}

        class Given(Callback):
            def on_train_start(self, trainer, module):
                module.collector.collect = lambda batch, step: rollout

        make_trainer(tmp_path, callbacks=[Double(), Given(), steps]).fit(module, data)
        found[size, tokens] = steps.gradients[0]
    for gradient in found.values():
        torch.testing.assert_close(gradient, found[None, None], atol=1e-12, rtol=1e-12)


def test_num_epochs_and_minibatches_count_the_optimizer_steps(tmp_path, model_dir):
    assert len(gradients_of(tmp_path, model_dir, num_epochs=3, num_minibatches=2)) == 6


def test_training_changes_the_policy_and_never_the_reference(tmp_path, model_dir):
    reference = ReferencePolicy(device="cpu")
    marks = []

    class Mark(Callback):
        def on_train_end(self, trainer, module):
            marks.append([p.clone() for p in reference.model.parameters()])

    module = run(tmp_path, model_dir, 2, [Mark()], reference=reference, kl_coef=0.1)
    fresh = make_module(model_dir)
    fresh.configure_model()
    start = list(fresh.policy.model.parameters())
    trained = list(module.policy.model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(start, trained, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(start, marks[0], strict=True))
    assert reference.model is None  # released


def test_frozen_models_are_no_part_of_the_module(tmp_path, model_dir):
    module = run(tmp_path, model_dir, reference=ReferencePolicy(device="cpu"))
    assert all(name.startswith("policy.model.") for name, _ in module.named_parameters())
    assert all(name.startswith("policy.model.") for name in module.state_dict())


def test_kl_of_the_first_rollout_is_exactly_zero_and_grows_after(tmp_path, model_dir):
    keep = Outputs()
    run(tmp_path, model_dir, 2, [keep], reference=ReferencePolicy(device="cpu"))
    first, second = (outputs["metrics"]["train/kl_divergence"] for outputs in keep.all)
    assert first == pytest.approx(0, abs=1e-9)
    assert second > 1e-5


def test_kl_penalty_pulls_towards_the_reference(tmp_path, model_dir):
    def last(kl_coef):
        keep = Outputs()
        reference = ReferencePolicy(device="cpu")
        run(tmp_path, model_dir, 8, [keep], reference=reference, kl_coef=kl_coef)
        return keep.all[-1]["metrics"]["train/kl_divergence"]

    assert last(5.0) < 0.5 * last(0.0)


def test_entropy_bonus_keeps_entropy(tmp_path, model_dir):
    def last(entropy_coef):
        keep = Outputs()
        run(tmp_path, model_dir, 8, [keep], entropy_coef=entropy_coef)
        return keep.all[-1]["metrics"]["policy/entropy"]

    assert last(0.5) > last(0.0) + 0.01


def test_entropy_loss_is_minus_coefficient_times_entropy(tmp_path, model_dir):
    # fact 38; on the first of one step the update's entropy is the rollout's
    (outputs,) = outputs_of(tmp_path, model_dir, entropy_coef=0.25, num_minibatches=1)
    metrics = outputs["metrics"]
    assert metrics["train/entropy_loss"] == pytest.approx(-0.25 * metrics["policy/entropy"])


def test_policy_loss_at_ratio_one_is_minus_the_mean_advantage(tmp_path, model_dir):
    # fact 10, by hand from the rollout
    options = {"num_minibatches": 1, "advantages": "leave_one_out", "truncated": "mask"}
    (outputs,) = outputs_of(tmp_path, model_dir, **options)
    rollout = outputs["rollout"]
    kept = rollout.mask.any(1)
    mean = rollout.advantages[kept, 0].mean().item()
    assert outputs["metrics"]["train/policy_loss"] == pytest.approx(-mean, abs=1e-7)


def test_old_logprobs_use_the_sampling_temperature(tmp_path, model_dir):
    # fact 16, against a plain forward pass of one row
    sampler = GroupSampler(group_size=4, max_new_tokens=6, temperature=0.5)
    options = {"sampler": sampler, "optimizer": OptimizerConfig(learning_rate=1e-12)}
    options["old_logprobs"] = "recompute"
    keep = Outputs()
    module = run(tmp_path, model_dir, 1, [keep], **options)
    row = keep.all[0]["rollout"].select(torch.tensor([5]))
    prompt, completion = row.prompt_ids[row.prompt_mask], row.completion_ids[row.mask]
    with torch.no_grad():
        logits = module.policy.model(torch.cat([prompt, completion])[None]).logits[0]
    expected = (logits / 0.5).log_softmax(-1)[len(prompt) - 1 : -1]
    expected = expected.gather(1, completion[:, None])[:, 0]
    torch.testing.assert_close(row.old_logprobs[row.mask], expected, atol=1e-5, rtol=0)


def test_truncated_keep_leaves_rows_in_the_loss(tmp_path, model_dir):
    (outputs,) = outputs_of(tmp_path, model_dir, truncated="keep")
    assert outputs["rollout"].mask.any(1).all()


def test_truncated_mask_takes_rows_out_of_loss_and_group_statistics(tmp_path, model_dir):
    # fact 25
    (outputs,) = outputs_of(tmp_path, model_dir, truncated="mask")
    rollout = outputs["rollout"]
    cut = ~rollout.finished
    assert 0 < cut.sum() < 16
    assert not rollout.mask[cut].any() and rollout.mask[~cut].any(1).all()
    assert rollout.rewards[cut].isnan().all() and (rollout.advantages[cut] == 0).all()
    assert (outputs["lengths"][cut] == 6).all()  # still logged at the length it was drawn


def test_truncated_zero_reward_counts_in_the_group(tmp_path, model_dir):
    # fact 25
    (outputs,) = outputs_of(
        tmp_path, model_dir, truncated="zero_reward", rewards={"one": RewardTerm(ones)}
    )
    rollout = outputs["rollout"]
    assert torch.equal(rollout.rewards, rollout.finished.float())
    assert torch.equal(rollout.reward_parts["one"], torch.ones(16))  # the raw term stays


def test_overlong_ramp_punishes_long_completions(tmp_path, model_dir):
    (outputs,) = outputs_of(tmp_path, model_dir, overlong_ramp=3, rewards={"one": RewardTerm(ones)})
    expected = 1 - (outputs["lengths"] - 3).clamp(0, 3) / 3
    torch.testing.assert_close(outputs["rollout"].rewards, expected)
    assert outputs["metrics"]["reward/overlong"] == pytest.approx(expected.mean().item() - 1)


def test_kl_term_is_never_multiplied_by_the_ratio(tmp_path, model_dir):
    # fact 34: flat rewards leave the KL term alone in the loss; its gradient in the second step,
    # which takes the stored old log-probs, must not feel a ratio of exp(0.5)
    found = {}
    for shift in (0.0, 0.5):

        class Off(Callback):
            def on_train_start(self, trainer, module, shift=shift):
                with torch.no_grad():
                    for parameter in module.policy.parameters():
                        parameter.mul_(1.1)  # away from the reference, so that there is a KL
                collect = module.collector.collect

                def shifted(batch, step):
                    rollout = collect(batch, step)
                    return replace(rollout, old_logprobs=rollout.old_logprobs - shift)

                module.collector.collect = shifted

        steps, keep = Steps(), Outputs()
        options = {"rewards": {"one": RewardTerm(ones)}, "num_minibatches": 2, "kl_coef": 0.5}
        options |= {"optimizer": OptimizerConfig(learning_rate=1e-12)}
        options |= {"reference": ReferencePolicy(device="cpu")}
        run(tmp_path, model_dir, 1, [Off(), steps, keep], **options)
        largest = keep.all[0]["metrics"]["policy/ratio_max"]
        assert largest == pytest.approx(math.exp(shift), rel=1e-5)
        found[shift] = steps.gradients[1]
    assert found[0.0].abs().max() > 1e-3
    torch.testing.assert_close(found[0.5], found[0.0], atol=1e-8, rtol=1e-6)


def test_flat_groups_have_no_policy_gradient_but_keep_the_kl_term(tmp_path, model_dir):
    # fact 31; at ratio 1 and KL 0 everything vanishes, so look at the second step
    flat = {"rewards": {"one": RewardTerm(ones)}}
    without = gradients_of(tmp_path, model_dir, num_minibatches=1, **flat)
    assert without[0].abs().max() == 0
    keep = Outputs()
    steps = Steps()
    options = flat | {"reference": ReferencePolicy(device="cpu"), "kl_coef": 0.5}

    class Nudge(Callback):
        def on_train_start(self, trainer, module):
            with torch.no_grad():
                for parameter in module.policy.parameters():
                    parameter.mul_(1.1)

    run(tmp_path, model_dir, 1, [keep, steps, Nudge()], num_minibatches=1, **options)
    assert steps.gradients[0].abs().max() > 0
    assert keep.all[0]["metrics"]["train/kl_loss"] > 0
    assert keep.all[0]["metrics"]["train/policy_loss"] == 0


def test_drop_flat_groups_draws_other_prompts(tmp_path, model_dir):
    # fact 31
    rewards = {"even": RewardTerm(even_prompts_teach)}
    (kept,) = outputs_of(tmp_path, model_dir, rewards=rewards)
    assert (kept["rollout"].advantages[:, 0].view(4, 4) == 0).all(1).any()
    (outputs,) = outputs_of(
        tmp_path, model_dir, rewards=rewards, drop_flat_groups=True, max_draws=10
    )
    assert (outputs["rollout"].advantages[:, 0].view(4, 4) != 0).all()
    assert all(row["prompt"].count("+") % 2 for row in outputs["rollout"].rows)
    assert outputs["metrics"]["rollout/prompts_drawn"] > 4


def test_drop_flat_groups_gives_up_at_the_cap(tmp_path, model_dir):
    with pytest.warns(UserWarning, match="max_draws further draws of prompts left 4 of"):
        (outputs,) = outputs_of(
            tmp_path,
            model_dir,
            rewards={"one": RewardTerm(ones)},
            drop_flat_groups=True,
            max_draws=3,
        )
    assert outputs["metrics"]["rollout/prompts_drawn"] == 16  # 4 + 3 draws of 4
    assert len(outputs["rollout"]) == 16


def test_a_rollout_without_any_token_to_train_is_skipped_and_counted(tmp_path, model_dir):
    # fact 15: with a limit of one token nearly nothing ends, and `mask` leaves nothing
    sampler = GroupSampler(group_size=4, max_new_tokens=1)
    keep = Outputs()

    class NeverEnds(Callback):
        def on_train_start(self, trainer, module):
            module.policy.eos_ids = [31]  # an id that these weights hardly draw

    before = make_module(model_dir)
    before.configure_model()
    module = run(tmp_path, model_dir, 1, [keep, NeverEnds()], sampler=sampler, truncated="mask")
    (outputs,) = keep.all
    if outputs["rollout"].finished.any():
        pytest.fail("choose an id that is not drawn")
    assert outputs["metrics"]["optim/skipped_steps"] == 2
    assert not any(math.isnan(value) for value in outputs["metrics"].values())
    pairs = zip(before.policy.parameters(), module.policy.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def some_missing(rows, completions):
    return [None if i % 4 == 1 else value for i, value in enumerate(digits(rows, completions))]


def test_missing_rewards_are_counted_and_teach_nothing(tmp_path, model_dir):
    # fact 30
    (outputs,) = outputs_of(tmp_path, model_dir, rewards={"some": RewardTerm(some_missing)})
    assert outputs["metrics"]["reward/missing"] == 4
    assert (outputs["rollout"].advantages[1::4] == 0).all()
    assert outputs["rollout"].advantages.isfinite().all()


def test_gradient_norm_is_measured_before_and_bounded_by_clipping(tmp_path, model_dir):
    norms = []

    class Norm(Callback):
        def on_train_batch_end(self, trainer, module, *_):  # the last step's gradient
            grads = [p.grad.flatten() for p in module.policy.parameters()]
            norms.append(torch.cat(grads).norm().item())

    keep = Outputs()
    run(tmp_path, model_dir, 1, [keep, Norm()], max_grad_norm=1e-3)
    assert keep.all[0]["metrics"]["policy/grad_norm"] > 1e-2
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)


def test_a_non_finite_reward_stops_with_the_name_of_the_term(tmp_path, model_dir):
    rewards = {"broken": RewardTerm(lambda rows, texts: [float("inf")] * len(texts))}
    with pytest.raises(ValueError, match="reward 'broken' gave inf"):
        run(tmp_path, model_dir, rewards=rewards)


def test_learning_rate_schedule_moves_once_per_rollout_of_all_epochs(tmp_path, model_dir):
    keep = Outputs()
    config = OptimizerConfig(learning_rate=0.01, schedule="linear", warmup=2)
    module = make_module(model_dir, optimizer=config, num_minibatches=4)
    path = write_prompts(tmp_path / "prompts.jsonl")
    data = PromptData(str(path), prompts_per_rollout=4, num_rollouts=2)
    make_trainer(tmp_path, callbacks=[keep], max_epochs=2).fit(module, data)
    rates = [outputs["metrics"]["optim/learning_rate"] for outputs in keep.all]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.005])


def test_every_curve_is_logged_and_finite(tmp_path, model_dir):
    from gspo_lightning.metrics import CURVES

    (outputs,) = outputs_of(tmp_path, model_dir, reference=ReferencePolicy(device="cpu"))
    for name in CURVES:  # fact 39
        assert math.isfinite(outputs["metrics"][f"train/{name}"])


def test_relative_advantage_is_around_zero(tmp_path, model_dir):
    (outputs,) = outputs_of(tmp_path, model_dir)
    assert outputs["metrics"]["train/relative_advantage"] == pytest.approx(0, abs=1e-6)


def test_the_same_seed_gives_the_same_weights_and_another_one_others(tmp_path, model_dir):
    first, second = (run(tmp_path, model_dir, 2) for _ in range(2))
    pairs = list(zip(first.policy.parameters(), second.policy.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)


def test_dropout_is_off_in_train_mode(tmp_path, make_model, tokenizer):
    # fact 17, on a model that has dropout by default
    from gspo_lightning.policy.policy import Policy

    model = make_model("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    policy = Policy(model, tokenizer)
    ids = torch.tensor([[5, 6, 7, 8]])
    on = torch.ones_like(ids, dtype=torch.bool)
    policy.train()
    train = completion_logprobs(policy.model, ids, on, ids, on, temperature=1.0).logprobs
    policy.eval()
    assert torch.equal(
        train, completion_logprobs(policy.model, ids, on, ids, on, temperature=1.0).logprobs
    )


def test_no_rollout_stays_half_trained_by_a_stop_iteration(tmp_path, model_dir):
    class Breaks(Callback):
        def on_before_optimizer_step(self, *_):
            raise StopIteration

    with pytest.raises(RuntimeError, match=r"^a StopIteration left GSPOModule.training_step"):
        run(tmp_path, model_dir, callbacks=[Breaks()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_epochs": 0}, "model.num_epochs must be >= 1, got 0"),
        ({"num_minibatches": 0}, "model.num_minibatches must be >= 1"),
        ({"micro_batch_size": 0}, "model.micro_batch_size must be >= 1"),
        ({"micro_batch_tokens": 0}, "model.micro_batch_tokens must be >= 1"),
        ({"sampler": GroupSampler(group_size=1)}, "sampler.group_size must be >= 2, got 1"),
        (
            {"sampler": GroupSampler(temperature=0.0)},
            "temperature must be above 0, got 0.0",
        ),
        ({"rewards": {}}, "model.rewards is empty"),
        ({"rewards": {"missing": RewardTerm(digits)}}, "reward/missing would be logged twice"),
        ({"rewards": {"group_std": RewardTerm(digits)}}, "reward/group_std would be logged twice"),
        (
            {"rewards": dict.fromkeys(("a", "a_errors"), RewardTerm(digits, on_error="skip"))},
            "reward/a_errors would be logged twice",
        ),
        ({"kl_coef": 0.1}, "there is no reference"),
        ({"kl_coef": -0.1}, "model.kl_coef must be >= 0, got -0.1"),
        ({"kl_estimator": "k1"}, "k1"),
        ({"kl_in_reward": True}, "needs something to compare; set model.reference"),
        (
            {
                "policy": PolicyConfig("folder", lora=LoRAConfig()),
                "reference": ReferencePolicy(sync=ReferenceSync()),
            },
            "reference.sync with policy.lora: the reference is the policy without its adapters",
        ),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0"),
        ({"overlong_ramp": 99}, "overlong_ramp must be in"),
        ({"evaluation": Evaluation(correct="right")}, "evaluation.correct is 'right'"),
    ],
)
def test_the_constructor_names_the_bad_argument(model_dir, options, message):
    with pytest.raises(ValueError, match=message):
        make_module(model_dir, **options)


def test_minibatches_that_do_not_divide_the_rollout_are_refused_before_training(
    tmp_path, model_dir
):
    with pytest.raises(ValueError, match="num_minibatches must divide the 16 completions"):
        run(tmp_path, model_dir, num_minibatches=3)


@pytest.mark.filterwarnings("ignore:a clip range of 0.2")
def test_objective_reaches_the_update(tmp_path, model_dir):
    objective = Objective(clip_low=0.2, clip_high=0.2)
    (wide,) = outputs_of(tmp_path, model_dir, num_minibatches=4, objective=objective)
    narrow = replace(objective, clip_low=3e-4, clip_high=4e-4)
    (tight,) = outputs_of(tmp_path, model_dir, num_minibatches=4, objective=narrow)
    name = "train/clip_fraction_sequences"
    assert wide["metrics"][name] < tight["metrics"][name]


def test_lightning_sees_no_frozen_model_move(tmp_path, model_dir):
    reference = ReferencePolicy(device="cpu", dtype="bfloat16")
    seen = []

    class Look(Callback):
        def on_train_start(self, trainer, module):
            seen.append({p.dtype for p in reference.model.parameters()})

    run(tmp_path, model_dir, 1, [Look()], reference=reference)
    assert seen == [{torch.bfloat16}]
