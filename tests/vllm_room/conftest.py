"""A server for the tests of this room."""

import pytest

from support.fake_vllm import serving
from support.tiny_models import build_model


@pytest.fixture
def fake():
    with serving(build_model("qwen3", seed=5)) as fake:  # not the policy's weights
        yield fake
