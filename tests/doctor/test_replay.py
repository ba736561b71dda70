"""A dump of a faulty step, computed again: the first tensor that is not finite has a name."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

import train
from gspo_lightning import loss as loss_file
from gspo_lightning import update as update_file
from gspo_lightning.checkpoint.io import AtomicCheckpointIO
from gspo_lightning.critic.critic import CriticConfig
from gspo_lightning.doctor import replay as replay_file
from gspo_lightning.doctor.dumps import load_dump
from gspo_lightning.doctor.replay import Looks, packed_rows, replay, watched
from gspo_lightning.frozen.models import ReferencePolicy
from gspo_lightning.logprobs import completion_logprobs
from gspo_lightning.policy.lora import LoRAConfig
from gspo_lightning.policy.policy import PolicyConfig
from gspo_lightning.rewards.terms import RewardTerm
from support.fault_injection import INF, NAN, Inject, every
from support.tiny_run import make_trainer, run


class Break(Callback):
    """Changes the weights behind the rollout's own passes, before the first optimizer step."""

    def __init__(self, change):
        self.change = change

    def on_train_start(self, trainer, module):
        learn = module.updater.learn

        def broken(rollout, step):
            with torch.no_grad():
                self.change(module.policy.model, module)
            step.choices = module.choices
            return learn(rollout, step)

        module.updater.learn = broken


def dump_of(tmp_path, model_dir, *callbacks, **options):
    """The dump of a run that stops at its first fault."""
    options = {"reference": ReferencePolicy(device="cpu"), "kl_coef": 0.1} | options
    with pytest.raises(FloatingPointError):
        run(tmp_path, model_dir, 2, [*callbacks], max_faults=1, **options)
    (path,) = (tmp_path / "faults").iterdir()
    return path


def see_losses(monkeypatch, look):
    """Show ``look`` the log-probs and the loss of each micro-batch, of runs and of replays."""
    plain = loss_file.micro_loss

    def watched(logprobs, *args):
        found = plain(logprobs, *args)
        look(logprobs, found)
        return found

    for file in (update_file, replay_file):
        monkeypatch.setattr(file, "micro_loss", watched)


def replayed(capsys, path, *options):
    """Exit code and lines of the command."""
    capsys.readouterr()
    code = train.main(["replay", str(path), *options])
    out, err = capsys.readouterr()
    assert err == ""
    return code, out.splitlines()


def found(lines):
    return lines[next(i for i, line in enumerate(lines) if line.startswith("first that")) :]


def test_an_overflow_in_the_model_is_named_with_its_layer_row_and_prompt(
    tmp_path, model_dir, capsys, caplog
):
    def overflow(model, _):
        mlp = model.model.layers[1].mlp
        for part in (mlp.up_proj, mlp.down_proj):
            part.weight.mul_(1e30)  # finite, but not the product

    path = dump_of(tmp_path, model_dir, Break(overflow))
    code, lines = replayed(capsys, path)
    assert code == 0
    first, row = found(lines)
    assert first.startswith("first that is not finite: output: model.layers.1.mlp.down_proj (")
    assert "row 0, prompt '" in row and "completion '" in row
    assert any(line.split()[:2] == ["weight", "finite"] for line in lines)
    assert any(line.split()[0] == "gradient" and "not finite" in line for line in lines)
    assert not [r for r in caplog.records if "padded" in r.message]  # packed, as in the run


def test_a_broken_weight_comes_before_what_it_does(tmp_path, model_dir, capsys):
    def infect(model, _):
        model.model.layers[0].mlp.up_proj.weight[2, 3] = NAN

    path = dump_of(tmp_path, model_dir, Break(infect))
    code, lines = replayed(capsys, path)
    assert code == 0
    assert found(lines) == [
        "first that is not finite: weight: model.layers.0.mlp.up_proj.weight (NaN, 1 of 512 values)"
    ]


@pytest.mark.parametrize("name", ["advantages", "old_logprobs", "ref_logprobs"])
def test_a_broken_input_of_the_loss_is_named_with_its_row(tmp_path, model_dir, capsys, name):
    path = dump_of(tmp_path, model_dir, Inject({(0, 2): (name, -INF)}))
    code, lines = replayed(capsys, path)
    assert code == 0
    first, row = found(lines)
    assert first == f"first that is not finite: {name} (infinite, 1 of 48 values)"
    dump = load_dump(path)
    prompt, text = dump.prompts[1], dump.minibatch.texts[1]
    assert row == f"  row 1, prompt {prompt!r}, completion {text!r}"


def test_a_broken_coefficient_shows_in_its_loss(tmp_path, model_dir, capsys):
    def infinite(_, module):
        module.kl_coef = math.inf

    code, lines = replayed(capsys, dump_of(tmp_path, model_dir, Break(infinite)))
    assert code == 0
    assert found(lines) == ["first that is not finite: KL loss (infinite, 1 of 1 values)"]


def huge(rows, completions):
    return [1e38 * (i % 2) for i in range(len(completions))]


def test_a_gradient_that_overflows_behind_a_finite_loss_is_named(tmp_path, model_dir, capsys):
    options = {"rewards": {"huge": RewardTerm(huge)}, "advantages": "relative"}
    path = dump_of(tmp_path, model_dir, **options)
    assert load_dump(path).found == ("gradient",)
    code, lines = replayed(capsys, path)
    assert code == 0
    assert found(lines)[0].startswith("first that is not finite: gradient: model.")
    assert any(line.split() == ["loss", "finite"] for line in lines)


def test_a_fault_from_outside_is_not_blamed_on_the_mini_batch(tmp_path, model_dir, capsys):
    path = dump_of(tmp_path, model_dir, every([(0, 1)], "gradient"))
    code, lines = replayed(capsys, path)
    assert code == 1
    assert lines[0] == "recorded: gradient not finite"
    assert lines[-1].startswith("all is finite here: the fault lies outside")


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_losses_of_a_dump_have_the_bits_of_the_run(
    tmp_path, model_dir, monkeypatch, rank, precision
):
    if rank is not None:
        pytest.importorskip("peft")
    lora = None if rank is None else LoRAConfig(rank)
    seen = []

    see_losses(monkeypatch, lambda logprobs, loss: seen.append(loss.total.item()))
    monkeypatch.setattr("support.tiny_run.make_trainer", partial(make_trainer, precision=precision))
    options = {"policy": PolicyConfig(str(model_dir), lora=lora), "micro_batch_size": 3}
    inject = every([(1, 2)], "gradient")  # behind three steps: ratios are not 1
    path = dump_of(tmp_path, model_dir, inject, entropy_coef=0.1, **options)
    run_saw = seen[-3:]  # 8 rows in micro-batches of 3
    assert replay(load_dump(path), torch.device("cpu")).first is None
    assert seen[-3:] == run_saw and len(seen) == 15


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "replay: no file DUMP; dumps lie in faults/ of the run folder"),
        (b"text", "replay: DUMP is no dump of a faulty step"),
        ({"state_dict": {}}, "replay: DUMP is no dump of a faulty step"),
        ({"minibatch": {}, "found": [], "version": 9}, "replay: DUMP was written by another"),
    ],
)
def test_a_file_that_is_no_dump_is_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "dump.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        AtomicCheckpointIO().save_checkpoint(content, path)
    assert train.main(["replay", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: " + message.replace("DUMP", str(path))) and err.count("\n") == 1


def places(kwargs, ids):
    """Where some tokens stand one after the other in a packed row."""
    (row,) = kwargs["input_ids"].tolist()
    return [start for start in range(len(row)) if row[start : start + len(ids)] == ids]


@pytest.mark.parametrize("tokens", [None, 20])
def test_a_token_of_a_packed_row_is_named_with_its_own_row(
    tmp_path, model_dir, capsys, monkeypatch, tokens
):
    path = dump_of(tmp_path, model_dir, every([(0, 2)], "gradient"), micro_batch_tokens=tokens)
    batch = load_dump(path).minibatch
    pairs = zip(batch.completion_ids, batch.mask, strict=True)
    texts = [ids[keep].tolist() for ids, keep in pairs]
    row = next(i for i in (3, 2, 5, 6) if len(texts[i]) == 6 and texts.count(texts[i]) == 1)
    build, hits, passes = replay_file.build_policy, [], []

    def broken(dump, device):
        policy, found = build(dump, device), []

        def begin(_, args, kwargs):
            found[:] = [start + 2 for start in places(kwargs, texts[row][:-1])]
            passes.append(len(kwargs["input_ids"][0]))
            hits.extend(found)

        def spoil(_, __, output):
            for place in found:  # the third token of the completion
                output[0, place, 1] = NAN

        policy.model.register_forward_pre_hook(begin, with_kwargs=True)
        policy.model.model.layers[0].mlp.down_proj.register_forward_hook(spoil)
        return policy

    monkeypatch.setattr(replay_file, "build_policy", broken)
    code, lines = replayed(capsys, path)
    assert code == 0 and len(hits) == 1 and hits[0] > 2
    assert len(passes) == 1 if tokens is None else max(passes) <= tokens and len(passes) > 2
    first, named = found(lines)
    assert first.startswith(
        "first that is not finite: output: model.layers.0.mlp.down_proj (NaN, 1 "
    )
    assert named.startswith(f"  row {row}, prompt ")


def test_a_prompt_in_a_packed_row_is_named_with_the_first_row_of_its_group(make_rollout):
    rollout = make_rollout()
    owners = packed_rows(rollout)
    lengths, prompts = rollout.mask.sum(1).tolist(), rollout.prompt_mask.sum(1).tolist()
    expected = []
    for first in (0, 3):
        expected += [first] * prompts[first]
        for row in range(first, first + 3):
            expected += [row] * (lengths[row] - 1)  # nothing is predicted from the last token
    assert owners == expected


def test_a_budget_of_tokens_is_replayed_in_the_passes_of_the_run(tmp_path, model_dir, monkeypatch):
    seen = []
    see_losses(monkeypatch, lambda logp, loss: seen.append((len(logp), loss.total.item())))
    inject = every([(0, 2)], "gradient")
    path = dump_of(tmp_path, model_dir, inject, micro_batch_tokens=20)
    run_saw = list(seen)
    seen.clear()
    assert replay(load_dump(path), torch.device("cpu")).first is None
    assert len(seen) > 2 and seen == run_saw[-len(seen) :]


@pytest.mark.parametrize("in_reward", [True, False])
def test_a_critic_is_said_to_be_absent_and_its_kl_stays_out_of_the_loss(
    tmp_path, model_dir, capsys, in_reward
):
    config = CriticConfig(kl_in_reward=in_reward)
    options = {"critic": config, "advantages": "gae", "kl_coef": 1e39}  # the term is infinite
    path = dump_of(tmp_path, model_dir, every([(0, 2)], "gradient"), **options)
    _, lines = replayed(capsys, path)
    assert lines[1] == ("the run had a critic: its values, loss and gradient are not computed here")
    assert any(line.split()[:3] == ["KL", "loss", "finite"] for line in lines) == in_reward


# --- where in a model ----------------------------------------------------------------------------


def first_output(make_model, make_rollout, shape, place):
    """The first look at a pass in which layer 0's MLP gives NaN at a place of one output."""
    model, rollout, looks = make_model("qwen3"), make_rollout(), Looks()

    def broken(_, __, output):
        if tuple(output.shape[:2]) == shape:
            output = output.clone()
            output[place] = NAN
        return output

    model.model.layers[0].mlp.register_forward_hook(broken)
    with watched(model, looks, rollout, rows=[4, 5, 6, 9, 7, 8]):
        completion_logprobs(
            model,
            rollout.prompt_ids,
            rollout.prompt_mask,
            rollout.completion_ids,
            rollout.mask,
            group_size=3,
        )
    return looks.first


def test_a_row_is_counted_over_the_whole_mini_batch(make_model, make_rollout):
    # the fourth is row 9; 5 positions: the last prompt token and four of the completion
    first = first_output(make_model, make_rollout, (6, 5), (3, 1, 2))
    assert first.name == "output: model.layers.0.mlp" and first.row == 9
    assert first.remark == "NaN, 1 of 480 values"


def test_in_a_prompt_that_a_group_shares_the_first_row_of_the_group_is_named(
    make_model, make_rollout
):
    first = first_output(make_model, make_rollout, (2, 3), (1, 2, 0))
    assert first.name == "output: model.layers.0.mlp" and first.row == 9


@pytest.mark.parametrize(("shape", "place"), [((2, 3), (1, 0)), ((6, 5), (2, 3))])
def test_padding_is_looked_at_because_attention_reads_it(make_model, make_rollout, shape, place):
    # in front of a prompt, and behind a completion of one token: 0 times NaN is NaN
    first = first_output(make_model, make_rollout, shape, place)
    assert first.name == "output: model.layers.0.mlp"


@pytest.mark.parametrize("shape", [(4, 2), (6, 2), (1, 99, 2)])
def test_an_output_whose_first_axis_is_no_batch_names_no_row(make_rollout, shape):
    looks, router = Looks(), torch.nn.Linear(2, 2)
    with watched(torch.nn.Sequential(router), looks, make_rollout(), rows=list(range(6))):
        router(torch.full(shape, NAN))  # positions, or a row of them
    assert looks.first.name == "output: 0" and looks.first.row is None
