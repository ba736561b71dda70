"""Weights that are not finite: found, named, and never saved as something to go on from."""

import math

import pytest
import torch

from gspo_lightning.checkpoint.files import list_checkpoints
from gspo_lightning.checkpoint.rollout_checkpoint import RolloutCheckpoint, broken_weights
from gspo_lightning.data.prompts import PromptData
from gspo_lightning.optim import OptimizerConfig
from support.tiny_run import make_module, make_trainer, write_prompts

LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_anywhere_is_found_and_its_tensor_named(value, dtype):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 5), "b": torch.nn.Linear(5, 2)}).to(dtype)
    assert broken_weights(model.named_parameters()) == []
    with torch.no_grad():
        model["b"].weight[1, 3] = value
    assert broken_weights(model.named_parameters()) == ["b.weight"]
    model["b"].requires_grad_(False)  # not trained here
    assert broken_weights(model.named_parameters()) == []


def test_the_largest_numbers_and_empty_tensors_are_fine():
    tensors = [torch.tensor([LARGEST, -LARGEST]), torch.empty(0, 3)]
    named = [(str(i), torch.nn.Parameter(tensor)) for i, tensor in enumerate(tensors)]
    assert broken_weights(named) == [] == broken_weights([])


def test_a_step_with_a_finite_gradient_that_overflows_ends_the_run_unsaved(tmp_path, model_dir):
    # a step goes to the end of float32, and the decay of a weight beyond it
    optimizer = OptimizerConfig(learning_rate=3.3e38, weight_decay=1.0, betas=(0.0, 0.99))
    module = make_module(model_dir, optimizer=optimizer, num_minibatches=1)
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    data = PromptData(str(prompts), prompts_per_rollout=4, num_rollouts=2)
    callbacks = [RolloutCheckpoint(every_n_rollouts=1)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True)
    message = r"^after 1 rollouts the weights are not finite .*; there is no earlier one$"
    with pytest.raises(FloatingPointError, match=message):
        trainer.fit(module, data)
    assert module.faults.found == () and list_checkpoints(tmp_path) == []
