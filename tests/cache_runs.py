"""Runs of `encode_dataset` in processes of their own: by one, by two, and by one that is killed on the way."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

from accelerate.launchers import debug_launcher
from processes import start
from torch.multiprocessing.spawn import ProcessExitedException

from diffusers_leanvae.atomic import partial_path
from diffusers_leanvae.data import latent_cache, storage, text_cache
from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def launch_runs(folder: Path, source: str, options: dict[str, Any], fatal: str) -> None:
    """Encode clips to the folders `one`, `two` (by two processes) and `killed`, a run that is killed and resumed.

    Args:
        folder: An existing folder for all of it; the autoencoder is in `model`.
        source: The clips.
        options: Arguments of `encode_dataset`.
        fatal: What the name of the file starts with whose writing kills; what was there by then is kept in `before`.
    """
    process = start(_run_all, folder, source, options, fatal, output=folder / "said.txt")
    process.join()
    assert process.exitcode == 0, (folder / "said.txt").read_text()


def _run_all(folder: Path, source: str, options: dict[str, Any], fatal: str) -> None:
    def run(output: str, kills_at: str | None = None) -> tuple:
        return str(folder / "model"), source, folder / output, options, kills_at

    debug_launcher(_run, run("one"), 1)
    debug_launcher(_run, run("two"), 2)
    try:
        debug_launcher(_run, run("killed", fatal), 1)
    except ProcessExitedException as error:
        assert error.signal_name == "SIGKILL"
    else:
        raise SystemExit("was not killed")
    shutil.copytree(folder / "killed", folder / "before")
    debug_launcher(_run, run("killed"), 1)


def _run(model: str, source: str, output: Path, options: dict[str, Any], kills_at: str | None) -> None:
    def write(path: Any, content: bytes) -> None:
        if kills_at is not None and path.name.startswith(kills_at):
            partial_path(path, "partial").write_bytes(content[:99])
            os.kill(os.getpid(), signal.SIGKILL)
        storage.write_whole(path, content)

    latent_cache.write_whole = text_cache.write_whole = write
    latent_cache.encode_dataset(AutoencoderKLLeanVAE.from_pretrained(model), source, output, **options)
