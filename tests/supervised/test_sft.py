"""Warm start: what the loss counts, and what a fit does with it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from gspo_lightning.data import SFTBatch, SFTData
from gspo_lightning.optim import OptimizerConfig
from gspo_lightning.policy.lora import LoRAConfig
from gspo_lightning.policy.policy import PolicyConfig
from gspo_lightning.supervised.sft import SFTModule
from support.observers import Logged
from support.passes import tried
from support.tiny_run import make_trainer

DEMOS = [
    {"prompt": "7+9=", "completion": "answer: 16"},
    {"prompt": "1+2+3=", "completion": "1+2=3, 3+3=6, answer: 6"},
    {"prompt": "8-5=", "completion": "answer: 3"},
]


@pytest.fixture
def demos(tmp_path):
    path = tmp_path / "demos.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in DEMOS))
    return str(path)


@pytest.fixture
def module(model_dir):
    module = SFTModule(PolicyConfig(str(model_dir)), OptimizerConfig(learning_rate=1e-2))
    module.configure_model()
    return module


@pytest.fixture
def batch(module, demos):
    return batch_of(module, demos)


def batch_of(module, path):
    """All demonstrations in one batch, as training sees them."""
    data = SFTData(path, val_path=path, batch_size=len(DEMOS))
    data.trainer = type("Stub", (), {"lightning_module": module, "world_size": 1})
    data.setup("validate")
    return next(iter(data.val_dataloader()))


def token_losses(module, rows):
    """Negative log-probs of all tokens but the first, one row at a time, without padding."""
    for row in rows:
        prompt = module.tokenizer(row["prompt"]).input_ids
        completion = [*module.tokenizer(row["completion"]).input_ids, 1]  # 1 ends a sequence
        ids = torch.tensor([prompt + completion])
        logits = module.policy.model(ids).logits[0, :-1]
        losses = -logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        yield losses, len(completion)


def test_loss_is_the_mean_over_completion_tokens_and_their_end(module, batch):
    by_hand = torch.cat([losses[-length:] for losses, length in token_losses(module, DEMOS)])
    assert len(by_hand) == 4 + 15 + 3
    assert module.loss(batch).item() == pytest.approx(by_hand.mean().item(), abs=1e-6)


def test_predictions_inside_the_prompt_get_no_gradient(module, batch):
    head = tried(module.policy.model).get_output_embeddings()
    gradients = []
    head.register_full_backward_hook(lambda *hook: gradients.append(hook[2][0]))
    module.loss(batch).backward()
    predictions = sum(int(gradient.any(-1).sum()) for gradient in gradients)
    assert predictions == batch.mask.sum()  # one for each completion token, none beside


def test_padding_changes_nothing(module, batch):
    pad = torch.nn.functional.pad
    wider = SFTBatch(
        prompt_ids=pad(batch.prompt_ids, (3, 0), value=9),
        prompt_mask=pad(batch.prompt_mask, (3, 0)),
        completion_ids=pad(batch.completion_ids, (0, 2), value=9),
        mask=pad(batch.mask, (0, 2)),
    )
    assert module.loss(wider).item() == pytest.approx(module.loss(batch).item(), abs=1e-6)


def fit(module, path, root, **options):
    data_options = {"batch_size": 1, "num_steps": 6, "shuffle": False}
    data_options |= options.pop("data", {})
    make_trainer(root, **options).fit(module, SFTData(path, **data_options))


def test_fit_lowers_the_loss(module, demos, batch, tmp_path):
    before = module.loss(batch).item()
    fit(module, demos, tmp_path, data={"batch_size": 3, "num_steps": 10})
    assert module.loss(batch).item() < 0.7 * before


@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedule_moves_once_per_optimizer_step(model_dir, demos, tmp_path, accumulate):
    settings = OptimizerConfig(learning_rate=1e-3, schedule="linear", warmup=2)
    rates = Logged("train/learning_rate")
    fit(
        SFTModule(PolicyConfig(str(model_dir)), settings),
        demos,
        tmp_path,
        data={"num_steps": 3 * accumulate},
        max_epochs=2,
        callbacks=[rates],
        accumulate_grad_batches=accumulate,
    )
    assert rates.values == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_schedule_ends_where_max_steps_does(model_dir, demos, tmp_path):
    settings = OptimizerConfig(learning_rate=1e-3, schedule="linear")
    rates = Logged("train/learning_rate")
    module = SFTModule(PolicyConfig(str(model_dir)), settings)
    fit(module, demos, tmp_path, max_steps=4, max_epochs=9, callbacks=[rates])
    assert rates.values == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_a_falling_schedule_needs_an_end(model_dir, demos, tmp_path):
    module = SFTModule(PolicyConfig(str(model_dir)), OptimizerConfig(schedule="cosine"))
    with pytest.raises(ValueError, match="needs the length of the run"):
        fit(module, demos, tmp_path, max_epochs=-1)


def test_learning_rate_of_the_config_wins_over_the_checkpoint(model_dir, demos, tmp_path):
    rates = Logged("train/learning_rate")
    for rate, max_epochs in ((1e-3, 1), (2e-3, 2)):
        module = SFTModule(PolicyConfig(str(model_dir)), OptimizerConfig(learning_rate=rate))
        trainer = make_trainer(tmp_path, callbacks=[rates], max_epochs=max_epochs)
        data = SFTData(demos, batch_size=1, num_steps=2)
        resumed = {"ckpt_path": tmp_path / "first.ckpt", "weights_only": True}
        trainer.fit(module, data, **(resumed if max_epochs == 2 else {}))
        trainer.save_checkpoint(tmp_path / "first.ckpt", weights_only=False)
    assert rates.values == pytest.approx([1e-3, 1e-3, 2e-3, 2e-3])


def test_training_loss_is_logged(module, demos, batch, tmp_path):
    losses = Logged("train/loss")
    before = module.loss(batch).item()
    fit(module, demos, tmp_path, data={"batch_size": 3, "num_steps": 2}, callbacks=[losses])
    assert losses.values[0] == pytest.approx(before, abs=1e-6)


def test_validation_loss_is_the_mean_over_all_tokens(module, demos, batch, tmp_path):
    # batches of 2 and 1 demonstrations: a mean of their means would be another number
    trainer = make_trainer(tmp_path)
    data = SFTData(demos, val_path=demos, batch_size=2)
    (metrics,) = trainer.validate(module, data, verbose=False)
    assert metrics["val/loss"] == pytest.approx(module.loss(batch).item(), abs=1e-6)


def test_random_weights_follow_the_seed(model_dir):
    def weights(seed):
        torch.manual_seed(seed)
        module = SFTModule(PolicyConfig(str(model_dir), weights="random"))
        module.configure_model()
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_export_is_the_trained_policy(module, demos, tmp_path):
    fit(module, demos, tmp_path)
    module.export(tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    for name, weight in module.policy.model.state_dict().items():
        assert torch.equal(exported[name], weight), name


def test_a_warm_start_may_train_adapters_and_exports_them_merged(model_dir, demos, tmp_path):
    policy = PolicyConfig(str(model_dir), lora=LoRAConfig(rank=3))
    module = SFTModule(policy, OptimizerConfig(learning_rate=1e-2))
    losses = Logged("train/loss")
    data = SFTData(demos, batch_size=3)
    make_trainer(tmp_path, max_epochs=20, callbacks=[losses]).fit(module, data)
    assert losses.values[-1] < 0.7 * losses.values[0]
    start = SFTModule(PolicyConfig(str(model_dir)))
    start.configure_model()
    own = dict(start.policy.model.named_parameters())
    for name, parameter in module.policy.model.get_base_model().named_parameters():
        if "lora_" not in name:  # the weights themselves stayed
            assert torch.equal(parameter, own[name.replace(".base_layer", "")]), name
    module.export(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.equal(again.model.layers[0].mlp.up_proj.weight, own[UP])


UP = "model.layers.0.mlp.up_proj.weight"
