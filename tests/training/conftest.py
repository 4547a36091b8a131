"""What the tests of both scripts share: settings of the process are put back."""

import pytest
import torch
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    torch.set_num_threads(1)  # the script sets both for its process
    torch.set_float32_matmul_precision("highest")
    AcceleratorState._reset_state(reset_partial_state=True)
