"""What tests of files at URLs share."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.utils._cache_assets as assets
import pytest
from fsspec.implementations.memory import MemoryFileSystem


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where copies of remote shards go, a folder of the test; what lies in memory is removed after it."""
    folder = tmp_path / "copies"
    monkeypatch.setattr(assets, "HF_ASSETS_CACHE", str(folder))  # which was read from the environment long ago
    yield folder
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
