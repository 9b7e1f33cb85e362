"""A checkpoint that transformers wrote."""

import pytest

from tests.model.checkpoint_samples import transformers_lm, write


@pytest.fixture(scope="module")
def state():
    """The state of a transformers model, untied."""
    return {name: tensor.clone() for name, tensor in transformers_lm().state_dict().items()}


@pytest.fixture
def folder(tmp_path, state):
    return write(tmp_path / "checkpoint", state)
