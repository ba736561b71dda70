"""Reward model training: what the loss is, what a fit does with it, what is exported."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from gspo_lightning.data.preferences import PreferenceBatch, PreferenceData
from gspo_lightning.frozen.models import RewardModel
from gspo_lightning.optim import OptimizerConfig
from gspo_lightning.policy.policy import PolicyConfig
from gspo_lightning.supervised.reward_model import RewardModelModule, bradley_terry
from support.observers import Logged
from support.tiny_data import write
from support.tiny_run import make_trainer

PAIRS = [
    {"prompt": "7+9=", "chosen": "7+9=16, answer: 16", "rejected": "answer: 16"},
    {"prompt": "1+2+3=", "chosen": "1+2=3, 3+3=6, answer: 6", "rejected": "answer: 1"},
    {"prompt": "8-5=", "chosen": "8-5=3, answer: 3", "rejected": "answer: 3"},
]


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs.jsonl", PAIRS)


def make(model_dir, rate=5e-3, centring=0.0, **options):
    torch.manual_seed(7)  # the score head is new
    module = RewardModelModule(
        PolicyConfig(str(model_dir), **options), OptimizerConfig(learning_rate=rate), centring
    )
    module.configure_model()
    return module


@pytest.fixture
def module(model_dir):
    return make(model_dir)


def fit(module, path, root, num_steps=20, callbacks=None, val_path=None, **options):
    data = PreferenceData(path, val_path, batch_size=3, num_steps=num_steps)
    make_trainer(root, callbacks=callbacks, **options).fit(module, data)
    return module


def batch_of(module, rows):
    """Pairs in one batch, encoded here and not by the data module."""
    texts = [f"{row['prompt']} {row[side]}" for side in ("chosen", "rejected") for row in rows]
    encoded = [module.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, encoded))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in encoded])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in encoded])
    return PreferenceBatch(ids, mask)


def test_loss_by_hand():
    # -log sigmoid(1) = log(1 + 1/e) = 0.313262 and -log sigmoid(-2) = 2.126928
    found = bradley_terry(torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 1.0]))
    assert found.loss.item() == pytest.approx((0.313262 + 2.126928 + 0.693147) / 3, abs=1e-6)
    assert found.accuracy.item() == pytest.approx(1 / 3)  # a tie is not put right
    assert found.margin.item() == pytest.approx(-1 / 3)


def test_centring_adds_the_mean_square_of_all_scores():
    scores = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0])
    added = bradley_terry(*scores, centring=0.1).loss - bradley_terry(*scores).loss
    assert added.item() == pytest.approx(0.1 * (4 + 0 + 1 + 9) / 4, abs=1e-6)


def test_the_loss_of_far_apart_scores_is_finite():
    scores = torch.tensor([-500.0], requires_grad=True)
    loss = bradley_terry(scores, torch.tensor([500.0])).loss
    loss.backward()
    assert loss.item() == 1000 and scores.grad.item() == -1


def test_the_loss_compares_each_chosen_text_with_its_own_rejected_one(module):
    batch = batch_of(module, PAIRS)
    one_by_one = []
    for row in PAIRS:
        better, worse = (
            module.model(
                torch.tensor([module.tokenizer(f"{row['prompt']} {row[side]}")["input_ids"]])
            ).logits.squeeze()
            for side in ("chosen", "rejected")
        )
        one_by_one.append(-torch.sigmoid(better - worse).log())
    expected = torch.stack(one_by_one).mean().item()
    assert module.loss(batch).loss.item() == pytest.approx(expected, abs=1e-6)


def test_padding_changes_nothing(module):
    batch = batch_of(module, PAIRS)
    pad = torch.nn.functional.pad
    wider = pad(batch.ids, (0, 3), value=9), pad(batch.mask, (0, 3))
    torch.testing.assert_close(
        module.scores(*wider), module.scores(batch.ids, batch.mask), atol=1e-6, rtol=0
    )


def test_a_causal_model_gives_its_body(module, tiny_policy):
    body = tiny_policy.model.state_dict()
    assert {name: tuple(w.shape) for name, w in module.model.score.state_dict().items()} == {
        "weight": (1, 16)
    }
    for name, weight in module.model.model.state_dict().items():
        assert torch.equal(weight, body[name]), name


def test_a_new_head_is_not_reported_as_a_fault(model_dir, capfd):
    make(model_dir)
    assert "score.weight" not in "".join(capfd.readouterr())


def test_a_classifier_goes_on_with_its_head(module, tmp_path):
    module.export(tmp_path)
    again = make(tmp_path)
    assert torch.equal(again.model.score.weight, module.model.score.weight)


def test_random_weights_come_from_the_config_alone(model_dir, module):
    other = make(model_dir, weights="random")
    assert not torch.equal(
        other.model.get_input_embeddings().weight, module.model.get_input_embeddings().weight
    )


def test_a_classifier_with_several_labels_is_refused(model_dir, tmp_path, tokenizer):
    AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=3).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it has 3 labels; start from one with 1"):
        make(tmp_path)


def test_a_body_without_weights_is_refused(model_dir, module, tmp_path):
    module.model.save_pretrained(tmp_path)
    module.tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no weights for model\.layers\.2"):
        make(tmp_path)


def test_dropout_is_off_so_training_sees_the_scores_that_are_exported(module, tmp_path):
    module.export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    dropping = make(tmp_path)
    batch = batch_of(module, PAIRS)
    assert dropping.model.training
    assert torch.equal(dropping.scores(batch.ids, batch.mask), module.scores(batch.ids, batch.mask))


def test_gradient_checkpointing_changes_memory_and_not_the_gradient(model_dir, module):
    gradients = []
    for part in (module, make(model_dir, gradient_checkpointing=True)):
        part.loss(batch_of(part, PAIRS)).loss.backward()
        gradients.append(part.model.get_input_embeddings().weight.grad)
    assert any(getattr(layer, "gradient_checkpointing", False) for layer in part.model.modules())
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_negative_centring_is_refused(model_dir):
    with pytest.raises(ValueError, match="centring must be >= 0 and finite, got -1"):
        RewardModelModule(PolicyConfig(str(model_dir)), centring=-1.0)


def test_a_text_longer_than_the_model_reads_is_an_error(module):
    ids = torch.full((2, 129), 5)
    with pytest.raises(ValueError, match="reads 128 tokens, a text has 129; lower data"):
        module.scores(ids, torch.ones_like(ids, dtype=torch.bool))


def test_a_fit_learns_a_simple_preference(module, tmp_path):
    rows = [
        {
            "prompt": f"{a}+{b}=",
            "chosen": f"{a}+{b}={a + b}, answer: {a + b}",
            "rejected": f"answer: {a + b}",
        }
        for a in range(1, 10)
        for b in range(1, 5)
    ]
    heldout = batch_of(module, rows[::6])
    fit(module, write(tmp_path / "p.jsonl", [row for i, row in enumerate(rows) if i % 6]), tmp_path)
    found = module.loss(heldout)
    assert found.accuracy == 1 and found.margin > 1 and found.loss < 0.3


def test_centring_keeps_scores_near_zero(model_dir, pairs, tmp_path):
    def size(centring):
        module = fit(make(model_dir, centring=centring), pairs, tmp_path)
        batch = batch_of(module, PAIRS)
        return module.scores(batch.ids, batch.mask).square().mean().item()

    assert size(0.5) < 0.3 * size(0.0)


def test_what_is_logged_is_loss_accuracy_and_margin(module, pairs, tmp_path):
    expected = module.loss(batch_of(module, PAIRS))
    logged = [Logged(f"train/{name}") for name in expected._fields]
    fit(module, pairs, tmp_path, num_steps=1, callbacks=logged)
    for watcher, value in zip(logged, expected, strict=True):
        assert watcher.values == pytest.approx([value.item()], abs=1e-6), watcher.name


def test_validation_is_the_mean_over_all_pairs(module, pairs, tmp_path):
    # batches of 2 pairs and of 1: a mean of their means would be another number
    data = PreferenceData(pairs, val_path=pairs, batch_size=2)
    (metrics,) = make_trainer(tmp_path).validate(module, data, verbose=False)
    for name, value in module.loss(batch_of(module, PAIRS))._asdict().items():
        assert metrics[f"val/{name}"] == pytest.approx(value.item(), abs=1e-6), name


def test_schedule_moves_once_per_optimizer_step(model_dir, pairs, tmp_path):
    settings = OptimizerConfig(learning_rate=1e-3, schedule="linear", warmup=2)
    rates = Logged("train/learning_rate")
    module = RewardModelModule(PolicyConfig(str(model_dir)), settings)
    fit(module, pairs, tmp_path, num_steps=3, max_epochs=2, callbacks=[rates])
    assert rates.values == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_reward_model_gives_the_scores_of_the_trained_module(module, pairs, tmp_path):
    fit(module, pairs, tmp_path, num_steps=3)
    module.export(tmp_path / "export")
    loaded = RewardModel(str(tmp_path / "export"), device="cpu", batch_size=6)
    loaded.load(torch.device("cpu"))
    batch = batch_of(module, PAIRS)
    chosen, rejected = module.scores(batch.ids, batch.mask).detach().chunk(2)
    for side, scores in (("chosen", chosen), ("rejected", rejected)):
        found = torch.tensor(loaded(PAIRS, [row[side] for row in PAIRS]))
        torch.testing.assert_close(found, scores, atol=1e-6, rtol=0)
    for name, weight in loaded.model.state_dict().items():
        assert torch.equal(weight, module.model.state_dict()[name]), name


def without_special_tokens(tokenizer, path, **kept):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **kept).save_pretrained(
        path
    )


def test_without_a_pad_token_texts_are_padded_with_the_end_of_sequence(
    make_model, tokenizer, pairs, tmp_path
):
    make_model("gpt2").save_pretrained(tmp_path / "gpt2")
    without_special_tokens(tokenizer, tmp_path / "gpt2", eos_token="<eos>")
    module = make(tmp_path / "gpt2")
    assert module.model.config.pad_token_id == 1
    batch = batch_of(module, PAIRS)
    scores = module.scores(batch.ids, batch.mask)
    for i, mask in enumerate(batch.mask):
        alone = module.model(batch.ids[i : i + 1, mask]).logits
        assert scores[i].item() == pytest.approx(alone.item(), abs=1e-6)
    module.export(tmp_path / "export")
    loaded = RewardModel(str(tmp_path / "export"), device="cpu")
    loaded.load(torch.device("cpu"))
    found = torch.tensor(loaded(PAIRS, [row["chosen"] for row in PAIRS]))
    torch.testing.assert_close(found, scores[:3].detach(), atol=1e-6, rtol=0)


def test_a_tokenizer_that_cannot_pad_is_refused(make_model, tokenizer, tmp_path):
    make_model("gpt2").save_pretrained(tmp_path)
    without_special_tokens(tokenizer, tmp_path)
    with pytest.raises(ValueError, match="neither pad_token nor eos_token"):
        make(tmp_path)
