"""Fixtures: a policy and a tokenizer small enough to build in code, and a rollout factory."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may download
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from support.tiny_models import build_model, build_rollout, build_tokenizer

torch.set_num_threads(1)  # the same sums in the same order on every machine


@pytest.fixture
def make_model():
    """A builder of tiny models, called with a model type, a seed and settings of its config."""
    return build_model


@pytest.fixture
def tiny_policy():
    return build_model("qwen3")


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A folder that from_pretrained loads the tiny policy and its tokenizer from."""
    path = tmp_path_factory.mktemp("policy")
    build_model("qwen3").save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def make_rollout():
    """A builder of rollouts of P=2 prompts, G=3, L=4, T=5, called with seed and with_ref."""
    return build_rollout
