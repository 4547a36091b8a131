"""What the tests of the scripts share: settings of the process are put back, and a script with a tiny autoencoder."""

import pytest
import torch
from accelerate.state import AcceleratorState
from runs import Script
from tiny import make_tiny


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    torch.set_num_threads(1)  # the script sets both for its process
    torch.set_float32_matmul_precision("highest")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Script:
    """`train_lvdm.py` by its smallest recipe; a test file may have a script of its own."""
    folder = tmp_path_factory.mktemp("vae")
    make_tiny("leanvae").save_pretrained(folder)
    return Script("train_lvdm", "lvdm_smoke.yaml", f"vae={folder}")
