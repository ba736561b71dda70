"""Fixtures: a policy and a tokenizer small enough to build in code, and a rollout factory."""

import os
from collections import Counter

os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that tests start: no test may download
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import huggingface_hub.constants
import pytest
import torch

from support.repository import ROOT
from support.tiny_models import build_model, build_rollout, build_tokenizer

huggingface_hub.constants.HF_HUB_OFFLINE = True  # pytest's settings have it imported before
torch.set_num_threads(1)  # the same sums in the same order on every machine


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Slow tests first, those of one file together: they share a long run, and no core waits."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path] if item.get_closest_marker("slow") else 0)


@pytest.fixture
def at_the_root(monkeypatch):
    """Work where the paths in configs begin."""
    monkeypatch.chdir(ROOT)


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
