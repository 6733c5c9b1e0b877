"""An activation to run FFNs on."""

import pytest
import torch
from torch import Tensor

from tests.models import WIDTH


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, WIDTH)
