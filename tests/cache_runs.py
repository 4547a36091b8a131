"""Runs of `encode_dataset` in processes of their own: by one, by two, and by one that is killed on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


LAUNCH = """
import json, os, shutil, signal, sys
import torch
from accelerate.launchers import debug_launcher
from diffusers_leanvae.atomic import partial_path
from diffusers_leanvae.data import latent_cache, storage, text_cache
from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from torch.multiprocessing.spawn import ProcessExitedException

def run(model, source, output, options, fatal):
    torch.set_num_threads(1)
    def write(path, content):
        if fatal is not None and path.name.startswith(fatal):
            partial_path(path, "partial").write_bytes(content[:99])
            os.kill(os.getpid(), signal.SIGKILL)
        storage.write_whole(path, content)
    latent_cache.write_whole = text_cache.write_whole = write
    latent_cache.encode_dataset(AutoencoderKLLeanVAE.from_pretrained(model), source, output, **options)

if __name__ == "__main__":
    folder, source, options, fatal = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
    model = f"{folder}/model"
    debug_launcher(run, (model, source, f"{folder}/one", options, None), 1)
    debug_launcher(run, (model, source, f"{folder}/two", options, None), 2)
    try:
        debug_launcher(run, (model, source, f"{folder}/killed", options, fatal), 1)
    except ProcessExitedException as error:
        assert error.signal_name == "SIGKILL"
    else:
        raise SystemExit("was not killed")
    shutil.copytree(f"{folder}/killed", f"{folder}/before")
    debug_launcher(run, (model, source, f"{folder}/killed", options, None), 1)
"""


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def launch_runs(folder: Path, source: str, options: dict[str, Any], fatal: str) -> None:
    """Encode clips to the folders `one`, `two` (by two processes) and `killed`, a run that is killed and resumed.

    Args:
        folder: An existing folder for all of it; the autoencoder is in `model`.
        source: The clips.
        options: Arguments of `encode_dataset`, as JSON holds them.
        fatal: What the name of the file starts with whose writing kills; what was there by then is kept in `before`.
    """
    (folder / "launch.py").write_text(LAUNCH)
    # One thread from the start: MKL sums in another order where the number is lowered later, as in this process.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "launch.py"), str(folder), source, json.dumps(options), fatal]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
