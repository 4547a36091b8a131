"""The notebooks are run, cell after cell, and stored without outputs."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState


ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(ROOT.glob("examples/notebooks/*.ipynb"))


@pytest.fixture(autouse=True)
def settings_of_the_process():
    yield
    torch.set_num_threads(1)  # training sets these for its process
    torch.set_float32_matmul_precision("highest")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == {"compare_three_vaes", "replace_the_vae_of_wan", "train_on_my_clips"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    namespace = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), f"{path.name}, {cell['id']}", "exec"), namespace)
