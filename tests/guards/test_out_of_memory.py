"""Short memory: less at once, for the same gradient, or a stop in one line."""

import weakref
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gspo_lightning.checkpoint.files import find_checkpoint
from gspo_lightning.checkpoint.rollout_checkpoint import RolloutCheckpoint
from gspo_lightning.data.prompts import PromptData
from gspo_lightning.frozen.models import ReferencePolicy, RewardModel
from gspo_lightning.guards import out_of_memory
from gspo_lightning.guards.faults import Faults
from gspo_lightning.guards.out_of_memory import (
    MICRO,
    REFERRED,
    TOKENS,
    OutOfMemory,
    Sizes,
    is_out_of_memory,
)
from gspo_lightning.logprobs import LogProbs
from gspo_lightning.loss import LossChoices
from gspo_lightning.micro_batches import cut_rows
from gspo_lightning.objectives import Objective
from gspo_lightning.old_logprobs import Found
from gspo_lightning.rewards.terms import RewardTerm, score
from gspo_lightning.sampling import GroupSampler
from gspo_lightning.update import Updater
from support.observers import Outputs
from support.steps import make_step, one_rank, replace_policy_passes
from support.tiny_models import save_reward_model
from support.tiny_run import make_module, make_trainer, run, write_prompts

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to")
SHORT = "ignore:out of memory in rollout 1"


class State(Callback):
    """Keeps weights and optimizer state of the end, and every gradient on the way."""

    def __init__(self):
        self.gradients = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients += [p.grad.clone() for p in module.policy.parameters()]

    def on_train_end(self, trainer, module):
        state = trainer.optimizers[0].state_dict()["state"]
        moments = [value for entry in state.values() for value in entry.values()]
        self.tensors = [*(p.detach() for p in module.policy.parameters()), *moments]


@pytest.fixture(autouse=True)
def _no_sweeps(monkeypatch):
    """A sweep through all objects takes half a second here, and nothing below waits for one."""
    monkeypatch.setattr(out_of_memory.gc, "collect", lambda: 0)


@pytest.fixture
def memory(monkeypatch):
    """Makes a pass of the policy fail above some rows: with a gradient, without one, or both."""

    def limit(rows, where=(True, False), error=CUDA, times=99):
        failed = []

        def make(forward):
            def tight(model, prompt_ids, *args, **options):
                concerned = torch.is_grad_enabled() in where and len(failed) < times
                if len(prompt_ids) > rows and concerned:
                    failed.append(len(prompt_ids))
                    raise error
                return forward(model, prompt_ids, *args, **options)

            return tight

        replace_policy_passes(monkeypatch, make)
        return failed

    return limit


def ended(tmp_path, model_dir, **options):
    state, keep = State(), Outputs()
    options = {"entropy_coef": 0.1, "old_logprobs": "recompute"} | options
    module = run(tmp_path, model_dir, 2, [state, keep], **options)
    return state, keep.all, module


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def timeless(metrics):
    return {k: v for k, v in metrics.items() if not k.startswith(("time/", "memory/"))}


@pytest.mark.filterwarnings(SHORT)
@pytest.mark.parametrize(
    ("where", "error"), [((True,), CUDA), ((False,), CPU)], ids=["update", "old log-probs"]
)
def test_a_run_that_halves_has_the_bits_of_one_that_started_so(
    tmp_path, model_dir, memory, where, error
):
    options = {"reference": ReferencePolicy(device="cpu"), "kl_coef": 0.1}
    expected, rollouts, _ = ended(tmp_path, model_dir, micro_batch_size=2, **options)
    failed = memory(3, where, error)
    found, others, module = ended(tmp_path, model_dir, **options)
    assert failed == [8, 4] and module.sizes.now[MICRO] == 2
    assert same(found.gradients, expected.gradients) and same(found.tensors, expected.tensors)
    pairs = zip(rollouts, others, strict=True)
    assert all(timeless(a["metrics"]) == timeless(b["metrics"]) for a, b in pairs)
    assert others[0]["metrics"]["policy/ratio_noise"] == 0


def test_halving_is_one_line_that_names_place_setting_and_sizes(tmp_path, model_dir, memory):
    memory(4)
    with pytest.warns(UserWarning, match="out of memory") as said:
        ended(tmp_path, model_dir)
    lines = [str(w.message) for w in said if "LeafSpec" not in str(w.message)]
    assert lines == [
        "out of memory in rollout 1, old log-probs: micro_batch_size 8 -> 4 for the rest of the run"
    ]


@pytest.mark.filterwarnings(SHORT)
def test_the_second_micro_batch_may_fail_as_well_as_the_first(tmp_path, model_dir, monkeypatch):
    expected, _, _ = ended(tmp_path, model_dir, micro_batch_size=2)
    calls = []

    def make(forward):
        def second_fails(*args, **options):
            calls.append(torch.is_grad_enabled())
            if sum(calls) == 2 and calls[-1]:
                raise CUDA
            return forward(*args, **options)

        return second_fails

    replace_policy_passes(monkeypatch, make)
    found, _, module = ended(tmp_path, model_dir, micro_batch_size=4)
    assert module.sizes.now[MICRO] == 2 and same(found.tensors, expected.tensors)


@pytest.fixture
def tight_tokens(monkeypatch):
    """Makes a pass of the policy fail above some completion tokens; lists the rows of each try."""

    def limit(tokens):
        tries = []

        def make(forward):
            def tight(model, prompt_ids, prompt_mask, completion_ids, mask, **options):
                fails = int(mask.sum()) > tokens
                tries.append((mask.sum(1).tolist(), fails))
                if fails:
                    raise CUDA
                return forward(model, prompt_ids, prompt_mask, completion_ids, mask, **options)

            return tight

        replace_policy_passes(monkeypatch, make)
        return tries

    return limit


@pytest.mark.filterwarnings(SHORT)
def test_a_budget_of_tokens_is_halved_where_it_decides(tmp_path, model_dir, tight_tokens):
    tries = tight_tokens(15)
    found, _, module = ended(tmp_path, model_dir, micro_batch_tokens=40)
    tokens = module.sizes.now[TOKENS]
    assert tokens in (20, 10) and module.sizes.now[MICRO] is None
    assert 1 <= sum(fails for _, fails in tries) <= 2
    expected, _, _ = ended(tmp_path, model_dir, micro_batch_tokens=tokens)
    assert same(found.tensors, expected.tensors)


@pytest.mark.filterwarnings(SHORT)
@pytest.mark.parametrize("tokens", [48, 10_000])
def test_no_retry_is_the_pass_that_failed(tmp_path, model_dir, tight_tokens, tokens):
    # both limits are wide: what is halved must be what bounds the pass
    tries = tight_tokens(7)
    ended(tmp_path, model_dir, micro_batch_tokens=tokens, micro_batch_size=8)
    failed = [rows for rows, fails in tries if fails]
    assert len(failed) >= 2
    assert all(len(a) > len(b) for a, b in pairwise(failed))


def test_rows_are_halved_where_the_budget_of_tokens_does_not_decide(
    tmp_path, model_dir, tight_tokens
):
    tight_tokens(30)
    with pytest.warns(UserWarning, match=r"micro_batch_size 8 -> 4 for the rest"):
        _, _, module = ended(tmp_path, model_dir, micro_batch_tokens=10_000)
    assert (module.sizes.now[TOKENS], module.sizes.now[MICRO]) == (10_000, 4)


def test_one_row_at_once_under_a_budget_is_the_end(tmp_path, model_dir, tight_tokens):
    tries = tight_tokens(0)
    message = r"with one row at once \(micro_batch_size 8, micro_batch_tokens 1\)"
    with pytest.raises(OutOfMemory, match=message):
        ended(tmp_path, model_dir, micro_batch_tokens=1)
    assert len(tries) == 1


def test_a_budget_that_changes_nothing_at_half_is_halved_until_it_does():
    sizes = Sizes({MICRO: None, TOKENS: 64})
    cut = partial(cut_rows, [1] * 4, [59, 59, 9, 9], 1)
    # rows of 60, 60 and twice 10 tokens: so they are cut at 64, and at 32, too
    with pytest.warns(UserWarning, match=f"a test: {TOKENS} 64 -> 16 for the rest of the run"):
        sizes.halve(MICRO, 4, "a test", cut)
    with pytest.raises(OutOfMemory, match=rf"one row at once \({MICRO} 4, {TOKENS} 16\)"):
        sizes.halve(MICRO, 4, "a test", cut)


@pytest.mark.filterwarnings(SHORT)
def test_one_row_at_once_is_the_end(tmp_path, model_dir, memory):
    memory(0)
    with pytest.raises(OutOfMemory, match=r"rollout 1, old log-probs, with one row at once"):
        ended(tmp_path, model_dir)


def test_behind_the_first_step_of_a_rollout_the_run_stops(tmp_path, model_dir, monkeypatch):
    calls = []

    def make(forward):
        def third_fails(*args, **options):
            calls.append(torch.is_grad_enabled())
            if sum(calls) == 4:  # two steps of rollout 1, the first of rollout 2, this one
                raise CUDA
            return forward(*args, **options)

        return third_fails

    replace_policy_passes(monkeypatch, make)
    with pytest.raises(OutOfMemory, match=r"rollout 2, optimizer step 2 .*after the first step"):
        ended(tmp_path, model_dir)


@pytest.mark.filterwarnings(SHORT)
def test_sampling_halves_what_it_decodes_and_draws_the_same(tmp_path, model_dir, monkeypatch):
    _, rollouts, _ = ended(tmp_path, model_dir)
    decode = GroupSampler._decode

    def tight(self, policy, batch, uniform, *rest):
        if min(self.batch_size or len(uniform), len(uniform)) > 5:
            raise CUDA
        return decode(self, policy, batch, uniform, *rest)

    monkeypatch.setattr(GroupSampler, "_decode", tight)
    sampler = GroupSampler(group_size=4, max_new_tokens=6)
    _, others, _ = ended(tmp_path, model_dir, sampler=sampler)
    assert sampler.batch_size == 4
    first, second = (r[0]["rollout"].completion_ids for r in (rollouts, others))
    assert torch.equal(first, second)


@pytest.mark.filterwarnings(SHORT)
def test_the_reference_halves_its_own_batches(tmp_path, model_dir, monkeypatch):
    logprobs = ReferencePolicy.logprobs

    def tight(self, samples, temperature, batch_size):
        if min(batch_size, len(samples)) > 6:
            raise CUDA
        return logprobs(self, samples, temperature, batch_size)

    monkeypatch.setattr(ReferencePolicy, "logprobs", tight)
    _, _, module = ended(tmp_path, model_dir, reference=ReferencePolicy(device="cpu"))
    assert module.sizes.now[REFERRED] == 4  # from 16 rows


@pytest.fixture
def taste(tmp_path, tokenizer, monkeypatch):
    """Makes reward models whose passes fail above some rows."""
    folder = save_reward_model(tmp_path / "reward", tokenizer, num_labels=1)
    score = RewardModel._score
    allowed = {"rows": 99}

    def tight(self, encoded):
        if len(encoded) > allowed["rows"]:
            raise CUDA
        return score(self, encoded)

    def make(rows, **options):
        allowed["rows"] = rows
        return RewardModel(folder, device="cpu", **options)

    monkeypatch.setattr(RewardModel, "_score", tight)
    return make


@pytest.mark.filterwarnings("ignore:out of memory in the reward model")
def test_a_reward_model_halves_what_it_scores_and_gives_the_same(tmp_path, model_dir, taste):
    expected, rollouts, _ = ended(tmp_path, model_dir, rewards={"taste": RewardTerm(taste(99))})
    model = taste(5)
    found, others, _ = ended(tmp_path, model_dir, rewards={"taste": RewardTerm(model)})
    assert model.batch_size == 4  # from 16
    for one, other in zip(rollouts, others, strict=True):
        torch.testing.assert_close(one["rollout"].rewards, other["rollout"].rewards)
    for one, other in zip(expected.tensors, found.tensors, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)  # shapes round differently


def test_the_halving_of_a_reward_model_is_one_line(tmp_path, model_dir, taste):
    model = taste(8)
    with pytest.warns(UserWarning, match="out of memory") as said:
        ended(tmp_path, model_dir, rewards={"taste": RewardTerm(model)})
    lines = [str(w.message) for w in said if "LeafSpec" not in str(w.message)]
    change = "batch_size 16 -> 8 for the rest of the run"
    assert lines == [f"out of memory in the reward model {model.path}: {change}"]


@pytest.mark.filterwarnings("ignore:out of memory in the reward model")
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_reward_model_that_cannot_score_one_text_ends_the_run(
    tmp_path, model_dir, taste, on_error
):
    rewards = {"taste": RewardTerm(taste(0), on_error=on_error)}
    with pytest.raises(OutOfMemory, match=r"the reward model .*, with one row at once"):
        ended(tmp_path, model_dir, rewards=rewards)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_short_memory_inside_a_reward_function_is_no_error_of_the_function(on_error):
    def short(rows, texts):
        raise CUDA

    with pytest.raises(OutOfMemory, match=r"^out of memory in reward 'x': CUDA out of memory"):
        score({"x": RewardTerm(short, on_error=on_error)}, [{}] * 2, ["a", "b"])


@pytest.mark.filterwarnings("ignore:1 of 3 completions get no reward")
def test_a_text_that_asks_for_too_large_a_number_costs_its_own_row():
    def value(rows, texts):
        return [float(len(bytes(int(text)))) for text in texts]  # MemoryError, at once

    scores = score({"x": RewardTerm(value, on_error="skip")}, [{}] * 3, ["1", f"{2**60}", "3"])
    assert scores.total.isnan().tolist() == [False, True, False]


def test_a_sampler_without_a_batch_size_is_named(tmp_path, model_dir):
    class Own:
        group_size, max_new_tokens, temperature = 4, 6, 1.0

        def sample(self, policy, batch, *, seed):
            raise CUDA

        def like(self, *settings):
            return self

    with pytest.raises(OutOfMemory, match=r"sampling, and there is no sampler.batch_size to make"):
        ended(tmp_path, model_dir, sampler=Own())


def test_the_memory_of_a_failed_pass_is_free_before_the_next():
    sizes, held = Sizes({"size": 8}), []

    def work():
        assert all(ref() is None for ref in held)
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        if sizes.now["size"] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")  # one of its own, with its frames
        return sizes.now["size"]

    with pytest.warns(UserWarning, match="out of memory in a test: size"):
        assert sizes.fit("size", 8, "a test", work) == 2
    assert len(held) == 3


class Made(TorchDispatchMode):
    """Keeps weak references to the memory of all tensors that are made within."""

    def __init__(self):
        super().__init__()
        self.storages = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        tensors = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        self.storages += [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
        return found


@pytest.mark.filterwarnings(SHORT)
@pytest.mark.parametrize("trains", [True, False], ids=["update", "old log-probs"])
def test_nothing_of_a_failed_pass_is_held_while_it_is_repeated(
    tmp_path, model_dir, monkeypatch, trains
):
    """Not by the error, whose traceback has all frames, and not until garbage is collected."""
    made, alive, calls = Made(), [], []

    def fail(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory")  # with frames of its own

    def make(forward):
        def second_fails(model, *arguments, **options):
            concerned = torch.is_grad_enabled() == trains and not alive
            calls.append(concerned)
            if not concerned or sum(calls) == 1:  # in the first one the model is tried out
                return forward(model, *arguments, **options)
            if made.storages:  # the pass that is made again
                kept = {id(storage()): storage() for storage in made.storages}
                alive.append(len(kept.keys() - {id(None)} - weights(model)))
                return forward(model, *arguments, **options)
            with made:
                found = forward(model, *arguments, **options)
                if not trains:
                    fail(None)
            found.logprobs.register_hook(fail)
            return found

        return second_fails

    def weights(model):
        return {id(p.untyped_storage()) for p in (*model.parameters(), *model.buffers())}

    replace_policy_passes(monkeypatch, make)
    options = {"old_logprobs": "recompute", "num_epochs": 2, "micro_batch_size": 4}
    run(tmp_path, model_dir, 1, **options)
    assert len(made.storages) > 50 and alive == [0]


@pytest.mark.parametrize(
    "error",
    [
        CUDA,
        CPU,
        MemoryError(),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("unable to mmap 9 bytes from file <w>: Cannot allocate memory (12)"),
    ],
)
def test_want_of_memory_has_many_names(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(("reason", "short"), [(CUDA, True), (ValueError("shape"), False)])
def test_want_of_memory_in_a_recording_hides_behind_its_end(reason, short):
    """``torch.cuda.graph`` ends the capture on its way out, which fails in turn."""
    with pytest.raises(RuntimeError) as ended:
        try:
            raise reason
        finally:
            text = "CUDA error: operation failed due to a previous error during capture"
            raise RuntimeError(text)
    assert is_out_of_memory(ended.value) == short


def test_other_errors_are_no_want_of_memory():
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    try:
        raise CUDA
    except RuntimeError:
        assert not is_out_of_memory(KeyError("out of memory"))
    with pytest.raises(KeyError):
        Sizes({"x": 4}).fit("x", 4, "a test", lambda: {}["y"])


@pytest.mark.parametrize("synced", [True, False])
def test_a_pass_that_ranks_share_is_not_repeated(synced, make_rollout, monkeypatch):
    """Another rank may have the half of a gradient that this one was sending.

    Nor is asked again which tokens are picked: the other ranks would not answer.
    """
    tries, asked, picked = [], [], []

    def gather(value):
        asked.append(value)
        return value[None]

    choices = LossChoices(Objective("token", pick="high_entropy", pick_share=0.3))
    step = make_step(choices, index=3, ranks=one_rank(count=2, gather=gather))

    def double(model, micro, *_, **__):  # as of a policy in float64
        values = torch.rand(micro.mask.shape, dtype=torch.float64)
        return LogProbs(-values, values)

    monkeypatch.setattr("gspo_lightning.update.samples_logprobs", double)

    class Breaks(Updater):
        def _accumulate(self, minibatch, weights, step):
            tries.append(step.num_updates)
            picked.append(minibatch.picked)
            step.synced = synced
            raise CUDA if len(tries) == 1 else KeyboardInterrupt

    rollout = make_rollout().select(torch.arange(4))
    sizes = Sizes({MICRO: 4, TOKENS: None})
    old = SimpleNamespace(find=lambda rollout, step: Found(rollout.old_logprobs, None))
    shell = SimpleNamespace(
        optimizers=lambda: SimpleNamespace(zero_grad=lambda: None),
        untoggle_optimizer=lambda optimizer: None,
    )
    parts = (SimpleNamespace(model=None), None, GroupSampler(2, 5), old, sizes, Faults(1), {})
    updater = Breaks(shell, *parts, num_epochs=1, num_minibatches=1, max_grad_norm=None)
    if synced:
        with pytest.raises(OutOfMemory, match=r"rollout 4, optimizer step 1.* other ranks share"):
            updater.learn(rollout, step)
        assert tries == [1] and sizes.now[MICRO] == 4
    else:
        with pytest.warns(UserWarning, match="4 -> 2"), pytest.raises(KeyboardInterrupt):
            updater.learn(rollout, step)
        assert tries == [1, 1] and sizes.now[MICRO] == 2 and picked[0].equal(picked[1])
    assert len(asked) == 2  # how many tokens each has, and the tokens


# --- continuing ----------------------------------------------------------------------------------


def resumable(tmp_path, model_dir, rollouts, ckpt=None, **options):
    """A run with a checkpoint after each rollout; its last weights and its module."""
    path = tmp_path / "prompts.jsonl"
    data = PromptData(str(write_prompts(path)), prompts_per_rollout=4, num_rollouts=rollouts)
    state, module = State(), make_module(model_dir, entropy_coef=0.1, **options)
    callbacks = [state, RolloutCheckpoint(every_n_rollouts=1)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(module, data, ckpt_path=find_checkpoint(tmp_path, ckpt), weights_only=True)
    return state.tensors, module


@pytest.mark.filterwarnings(SHORT)
def test_a_continued_run_keeps_the_halved_size_and_ends_with_the_same_bits(
    tmp_path, model_dir, memory, monkeypatch
):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    memory(4, times=1)  # another card, or another process beside this one, the second time
    expected, module = resumable(whole, model_dir, 4)
    assert module.sizes.now[MICRO] == 4
    monkeypatch.undo()
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    memory(4, times=1)
    resumable(cut, model_dir, 2)
    monkeypatch.undo()
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    found, module = resumable(cut, model_dir, 4, "last")
    assert module.sizes.now[MICRO] == 4 and same(found, expected)


@pytest.mark.filterwarnings("ignore:out of memory in the reward model")
def test_a_continued_run_keeps_the_size_of_a_reward_model(tmp_path, model_dir, taste):
    resumable(tmp_path, model_dir, 1, rewards={"taste": RewardTerm(taste(5))})
    model = taste(99)  # nothing fails any more
    resumable(tmp_path, model_dir, 2, "last", rewards={"taste": RewardTerm(model)})
    assert model.batch_size == 4


def test_sizes_of_a_checkpoint_find_their_settings_where_one_is_gone():
    state = Sizes({"one": None, "gone": 32, "other": 16}).state([[8, 4, 2]])
    sizes = Sizes({"one": None, "other": 16, "new": 64})
    sizes.load(state, 0)
    assert sizes.now == {"one": 8, "other": 2, "new": 64}


def test_a_new_setting_wins_over_the_size_of_a_checkpoint():
    before = Sizes({"size": None})
    before.now["size"] = 4
    state = before.state([[2], [4]])
    for start, rank, expected in [(None, 0, 2), (None, 1, 4), (16, 1, 16)]:
        sizes = Sizes({"size": start})
        sizes.load(state, rank)
        assert sizes.now == {"size": expected}
