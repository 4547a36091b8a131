"""Settings and fixtures of all tests: one thread, one start of all random numbers, nothing left behind, clips.

`--shuffle SEED` runs files, and the tests in each file, in another order.
"""

import os
import tempfile


# Before torch and huggingface_hub are loaded, which read them once; inherited by processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-")  # for all its caches: those of the user stay as they are

import random
import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import tiny
import torch
from patterns import drifting_pattern
from tiny import make_tiny

from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.video_io import VideoWriter


HF_HOME = os.environ["HF_HOME"]
# Runners share their cores, and sums over one thread come out the same everywhere.
torch.set_num_threads(1)
# Derandomised: a red test must stay red until its cause is gone. No deadline: a loaded runner is no bug.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("tests")


# --- Tests are independent of each other -----------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in another order, drawn from SEED")


def pytest_report_header(config: pytest.Config) -> str:
    seed = config.getoption("shuffle")
    return "order of tests: as written" if seed is None else f"order of tests: --shuffle {seed}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.getoption("shuffle")
    if seed is not None:  # files stay whole, so that what a file sets up is set up once
        rng = random.Random(seed)
        order = {path: rng.random() for path in dict.fromkeys(item.path for item in items)}
        items.sort(key=lambda item: (order[item.path], rng.random()))


def pytest_unconfigure() -> None:
    shutil.rmtree(HF_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def keep_priority() -> Iterator[None]:
    """Undo what SVT-AV1 does to a root's thread that opens it by PyAV: a priority at which other processes starve."""
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    yield
    if os.sched_getscheduler(0) != before[0]:
        os.sched_setscheduler(0, *before)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    # Before the fixtures too, so that what a test draws without a seed of its own depends on no other test.
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


# Variables that PyTorch's compiler and Triton set for the processes that they start, and pytest for the present test.
FOREIGN_VARIABLES = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TRITON_", "CUDA_", "CUBLAS_")


def _read_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_VARIABLES)}


def _set_environment(value: dict[str, str]) -> None:
    for name in [name for name in os.environ if name not in value and not name.startswith(FOREIGN_VARIABLES)]:
        del os.environ[name]
    os.environ.update(value)


# Settings of the process under which every test runs: name, how to read it, how to set it.
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "environment": (_read_environment, _set_environment),
    "working directory": (os.getcwd, os.chdir),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
    "precision of products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "deterministic algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
}
AT_THE_START: dict[str, Any] = {}


def pytest_sessionstart() -> None:
    AT_THE_START.update({name: read() for name, (read, _) in SETTINGS.items()})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    """Fail a test that leaves a setting of the process changed, for itself or with a fixture of its file."""
    yield
    changed = {name: read() for name, (read, _) in SETTINGS.items() if read() != AT_THE_START[name]}
    for name in changed:
        SETTINGS[name][1](AT_THE_START[name])
    assert changed == {name: AT_THE_START[name] for name in changed}, "a test must leave these as they were"


# --- What many tests use ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def make_model() -> Callable[..., AutoencoderKLLeanVAE]:
    """`make_model(dtype, seed, **config)`: a tiny LeanVAE of `make_tiny`."""
    return partial(make_tiny, "leanvae")


@pytest.fixture(scope="session")
def make_video() -> Callable[..., torch.Tensor]:
    """`make_video(*shape, dtype, seed)`: uniform noise in [-1, 1]."""
    return tiny.make_video


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny clips that move, written once."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "nested").mkdir()
    for number, name in enumerate(["a.mp4", "b.mp4", "nested/c.mp4"]):
        with VideoWriter(folder / name, Fraction(24)) as writer:
            writer.write(drifting_pattern(12 + number, height=48, width=64, seed=number))
    return folder
