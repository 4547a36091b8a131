"""Ray: the files of one process, whoever is killed on the way. Starting Ray takes seconds: one script does it all."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_runs import contents

from diffusers_leanvae.data.latent_cache import encode_dataset
from diffusers_leanvae.data.ray_cache import encode_with_ray
from diffusers_leanvae.video_io import write_video


needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray")
OPTIONS = {"clip_size": (5, 16, 24), "shard_size": 3, "batch_size": 2, "num_crops": 2, "flip": "both", "seed": 7}
SCRIPT = """
import json, os, shutil, signal, sys
from functools import partial
from pathlib import Path
import ray, torch
from diffusers_leanvae.data import latent_cache
from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE

folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])

def die(name, count):
    \"\"\"Kill this process at the `count`-th call of all processes.\"\"\"
    with open(folder / name, "a") as file:
        file.write(f"{os.getpid()}\\n")
    if len((folder / name).read_text().split()) == count:
        os.kill(os.getpid(), signal.SIGKILL)

def encode(vae, *arguments, **options):
    die("encoders", 4)
    return type(vae).encode(vae, *arguments, **options)

def open_reader(open_as_usual, clips, options):
    assert len(clips) == 18  # opened once, and sent
    read = open_as_usual(clips, options)
    def dying(number):
        for batch in read(number):
            yield batch
            die("readers", 3)
    return dying

def stop(num_clips, total):
    raise KeyboardInterrupt

def run(output, source="videos", vae=None, **more):
    vae = vae or AutoencoderKLLeanVAE.from_pretrained(folder / "model")
    return latent_cache.encode_dataset(vae, source, folder / output, **options | more)

def run_ray(output, **more):
    return run(output, engine="ray", num_workers=1, num_encoders=2, **more)

def quick():
    \"\"\"Finish what another run began, while one encoder and one reader are killed.\"\"\"
    run("one")
    (folder / "killed").mkdir()
    for name in ("settings.json", "latents-00001.safetensors"):
        shutil.copy2(folder / "one" / name, folder / "killed")
    vae = AutoencoderKLLeanVAE.from_pretrained(folder / "model")
    vae.encode = partial(encode, vae)
    latent_cache._open_reader, former = partial(open_reader, latent_cache._open_reader), latent_cache._open_reader
    run_ray("killed", vae=vae)

def slow():
    try:
        run_ray("stopped", progress=stop)
    except KeyboardInterrupt:
        times = {path.name: path.stat().st_mtime_ns for path in (folder / "stopped").iterdir()}
        (folder / "before.json").write_text(json.dumps(times))
    run_ray("stopped")
    run("stream-one", "hub:clean", num_clips=12)
    run_ray("stream-two", source="hub:clean", num_clips=12)
    vae = AutoencoderKLLeanVAE.from_pretrained(folder / "model")
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.fill_(1e6)
    try:
        run_ray("large", vae=vae, dtype="float16")
    except ValueError as error:
        (folder / "error").write_text(str(error))

os.chdir(folder)
ray.init(num_cpus=2, include_dashboard=False, logging_level="WARNING")
{"quick": quick, "slow": slow}[sys.argv[3]]()
ray.shutdown()
"""


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, nine videos, two of them damaged, and three sound ones."""
    folder = tmp_path_factory.mktemp("ray")
    make_model().save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    for name, numbers in (("videos", range(9)), ("clean", range(3))):
        (folder / name).mkdir()
        for number in numbers:
            frames = torch.randint(0, 256, (9, 20, 32, 3), generator=generator, dtype=torch.uint8)
            write_video(folder / name / f"{number}.mkv", frames, fps=8, codec="ffv1")
        rows = [{"file_name": f"{number}.mkv", "label": number, "text": f"no {number}"} for number in numbers]
        (folder / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in (3, 4):
        (folder / "videos" / f"{number}.mkv").write_bytes(b"nothing")
    (folder / "script.py").write_text(SCRIPT)
    return folder


@pytest.fixture(scope="module")
def quick(folder: Path) -> Path:
    return run(folder, "quick")


def run(folder: Path, part: str) -> Path:
    command = [sys.executable, str(folder / "script.py"), str(folder), json.dumps(OPTIONS), part]
    # Workers of Ray are nice to others, which on a busy machine is to do nothing; a token would lie at home.
    quiet = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | quiet
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    return folder


@needs_ray
@pytest.mark.slow
def test_ray_writes_the_files_of_one_process_whoever_is_killed(quick: Path):
    expected = contents(quick / "one")
    index = json.loads(expected["index.json"])
    assert [shard["num_items"] for shard in index["shards"]] == [6, 6, 0, 4, 6, 6] and index["num_skipped"] == 4
    for name, count in (("encoders", 4), ("readers", 3)):
        pids = (quick / name).read_text().split()
        assert pids[count - 1] not in pids[count:] and len(pids) > count, name  # it died, and others went on
    assert contents(quick / "killed") == expected


@needs_ray
@pytest.mark.slow
def test_ray_does_no_work_again(quick: Path):
    times = [(quick / name / "latents-00001.safetensors").stat().st_mtime_ns for name in ("one", "killed")]
    assert times[0] == times[1]


@pytest.mark.slow
@needs_ray
def test_stopped_runs_streams_and_errors(quick: Path):
    run(quick, "slow")
    before = json.loads((quick / "before.json").read_text())
    assert len([name for name in before if name.startswith("latents-")]) == 1 and "index.json" not in before
    assert contents(quick / "stopped") == contents(quick / "one")
    assert all((quick / "stopped" / name).stat().st_mtime_ns == time for name, time in before.items())
    assert contents(quick / "stream-two") == contents(quick / "stream-one")
    assert (quick / "error").read_text() == (
        "`dtype` (`--save-dtype`) must hold the latents, got float16, in which some are not finite."
    )


def test_bad_arguments_are_named(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    vae: Any = make_model()
    for options, message in (
        ({"engine": "spark"}, "`engine` must be one of 'processes', 'ray', got 'spark'"),
        ({"num_encoders": 2}, "`num_encoders` must be at least 1, and None without Ray, got 2"),
        ({"engine": "ray", "num_encoders": 0}, "`num_encoders` must be at least 1, and None without Ray, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_dataset(vae, "shapes", tmp_path / "bad", clip_size=(5, 16, 16), num_clips=2, **options)
        assert not (tmp_path / "bad").exists()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match='`engine` "ray" needs Ray: pip install "diffusers-leanvae\\[ray\\]"'):
        list(encode_with_ray([0], lambda: lambda number: iter([number]), vae, lambda model, batch: batch))
