"""The tiny model in both activation dtypes."""

import pytest
import torch

from tests.tiny import make_model


@pytest.fixture(scope="session", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request):
    return make_model(request.param)
