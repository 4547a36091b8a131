"""Damaged files through commands and training data: a right result or one sentence, and nothing left behind.

Each batch runs in a process of its own, which writes down what it begins: FFmpeg may crash, and the test can still say
on which file. Times and memory are measured file by file.
"""

import faulthandler
import gc
import json
import os
import resource
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import make_clip
from mutations import VIDEOS, bombs, make_bases, mutants
from processes import start
from test_matrix import TABLE
from tiny import make_tiny
from typer.testing import CliRunner


BASES = [*VIDEOS, "png.png", "jpeg.jpg", "tiff.tif", "webp.webp", "latents.safetensors", "shard.tar"]
NUM_MUTANTS = 16  # of each; with those that claim too much more than 200
SECONDS = 20  # of the processor, for one command and one file
MEMORY = 400 * 2**20  # bytes more than before a command: the largest small thing is x264
HANG = 300  # seconds of the clock, of a machine that may be busy
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny("leanvae").save_pretrained(folder)
    return folder


# --- In the process --------------------------------------------------------------------------------------------------


def commands(path: Path, model: Path, output: Path) -> dict[str, list[object]]:
    """The commands that people would give a file to."""
    small = ["--size", "32x32", "--model", model]
    if path.suffix == ".safetensors":
        return {"info": [path], "decode": [path, output / "out.mp4", "--model", model]}
    if path.suffix == ".tar":
        return {"info": [path]}
    return {
        "info": [path],
        "reconstruct": [path, output / "out.mp4", *small],
        "encode": [path, output / "out.safetensors", *small],
    }


class Journal:
    """What a process begins, one JSON a line, and how it ended, one on the next."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "w", buffering=1, encoding="utf-8")
        gc.freeze()  # imported code is no garbage, and looking at it before each command would take minutes
        # A claim that is believed should fail here, and not take the machine's memory.
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**32
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def run(self, name: str, command: str, work: Any) -> None:
        from diffusers_leanvae.clock import end_of_peak, start_of_peak

        self.file.write(json.dumps({"file": name, "command": command}) + "\n")
        faulthandler.dump_traceback_later(HANG, exit=True)
        gc.collect()  # what the last command left behind
        before, cpu = start_of_peak(CPU), time.process_time()
        ended = work()
        ended |= {"seconds": time.process_time() - cpu, "bytes": end_of_peak(before, CPU)}
        faulthandler.cancel_dump_traceback_later()
        self.file.write(json.dumps(ended) + "\n")


def run_commands(paths: list[Path], model: Path, output: Path, journal: Path) -> None:
    """Give each file to each command that may get it."""
    from diffusers_leanvae.cli import app
    from diffusers_leanvae.inference.latents_file import open_latents
    from diffusers_leanvae.video_io import read_video

    torch.set_num_threads(1)
    book = Journal(journal)
    for path in paths:
        for command, arguments in commands(path, model, output).items():

            def work(command: str = command, arguments: list[object] = arguments) -> dict[str, Any]:
                result = CliRunner().invoke(app, [command, *map(str, arguments)])
                raised = result.exception
                left = sorted(entry.name for entry in output.rglob("*"))
                ended = {"code": result.exit_code, "stderr": result.stderr, "left": left}
                if raised is not None and not isinstance(raised, SystemExit):
                    ended["raised"] = repr(raised)
                for entry in output.iterdir():
                    if result.exit_code == 0 and entry.suffix == ".mp4":
                        ended["shape"] = list(read_video(entry)[0].shape)
                    elif result.exit_code == 0:
                        with open_latents(entry) as (latents, _):
                            ended["shape"] = latents.get_shape()
                    entry.unlink()
                return ended

            book.run(path.name, command, work)


def open_for_training(sources: list[Path], journal: Path) -> None:
    """Decode all of each folder or shard as training does, and draw clips; a `ValueError` is written down."""
    from diffusers_leanvae.data import open_training_data

    torch.set_num_threads(1)
    book = Journal(journal)
    for source in sources:

        def work(source: Path = source) -> dict[str, Any]:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                ended: dict[str, Any] = {}
                try:
                    data: Any = open_training_data(str(source), batch_size=1, clip_sizes=[[1, 16, 16]], cache_gib=0.1)
                except ValueError as error:
                    ended["error"] = str(error)
                else:
                    for index in range(2 * len(data)):
                        clip = data[index]
                        assert clip.pixels.shape == (3, 1, 16, 16) and clip.pixels.dtype == torch.uint8
                    ended["counts"] = [len(data), data.num_cached, data.num_skipped]
            return ended | {"warnings": [str(warning.message) for warning in caught]}

        book.run(source.name, "training", work)


# --- What is asked of it ---------------------------------------------------------------------------------------------


def run_process(function: Any, *arguments: object, folder: Path) -> list[dict[str, Any]]:
    """Run a batch in a process and return its journal; the last entry has no end where the process died."""
    journal, printed, temporary = folder / "journal", folder / "printed.txt", folder / "temporary"
    temporary.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        patch.delenv("LEANVAE_TRACEBACK", raising=False)
        process = start(function, *arguments, journal, output=printed)
    process.join()
    lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    entries = [begun | ended for begun, ended in zip(lines[::2], [*lines[1::2], {}], strict=False)]
    if process.exitcode:
        code = process.exitcode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        where = f"{entries[-1]['file']}, {entries[-1]['command']}" if entries else "start"
        pytest.fail(f"the process died of {how} at {where}:\n{printed.read_text(errors='replace')[-3000:]}")
    assert list(temporary.iterdir()) == [], "temporary files were left"
    return entries


def faults(entry: dict[str, Any]) -> list[str]:
    """What is wrong with the end of a command."""
    lines = entry["stderr"].splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    found = []
    if entry.get("raised") or "Traceback" in entry["stderr"] or "LEANVAE_TRACEBACK" in entry["stderr"]:
        found.append(f"an error that is not meant for people: {entry.get('raised') or lines}")
    if entry["code"] not in (0, 1):
        found.append(f"exit code {entry['code']}")
    if entry["code"] == 1 and (len(errors) != 1 or lines[-1] != errors[0]):
        found.append(f"not one sentence: {lines}")
    if any(not line.startswith(("error: ", "warning: ")) for line in lines):
        found.append(f"lines of something else: {lines}")
    if entry["code"] == 1 and entry["left"]:
        found.append(f"left behind: {entry['left']}")
    if entry["code"] == 0 and entry["command"] != "info" and (len(entry["left"]) != 1 or 0 in entry["shape"]):
        found.append(f"not one good file: {entry['left']}")
    if "out of memory" in entry["stderr"]:
        found.append("it tried to allocate what the file claims")
    return found + too_much(entry)


def too_much(entry: dict[str, Any]) -> list[str]:
    """What took too long or too much memory."""
    found = []
    if entry["seconds"] > SECONDS:
        found.append(f"{entry['seconds']:.0f} s of the processor")
    if entry["bytes"] is not None and entry["bytes"] > MEMORY:
        found.append(f"{entry['bytes'] / 2**20:.0f} MiB")
    return found


def check_commands(files: dict[str, bytes], model: Path, tmp_path: Path) -> list[dict[str, Any]]:
    paths = write(files, tmp_path / "in")
    (tmp_path / "out").mkdir()
    entries = run_process(run_commands, paths, model, tmp_path / "out", folder=tmp_path)
    assert {entry["file"] for entry in entries} == set(files)
    bad = [f"{entry['file']}, {entry['command']}: {fault}" for entry in entries for fault in faults(entry)]
    assert not bad, "\n" + "\n".join(bad)
    assert sorted(entry.name for entry in (tmp_path / "in").iterdir()) == sorted(files)
    return entries


def write(files: dict[str, bytes], folder: Path) -> list[Path]:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from Linux's /proc")


@needs_proc
def test_good_files_go_through(bases, model, tmp_path):
    entries = check_commands(bases, model, tmp_path)
    assert [entry["file"] for entry in entries if entry["code"]] == ["shard.tar"]  # which `info` does not know
    assert max(entry["seconds"] for entry in entries) < SECONDS / 4


OF_COMMANDS = [name for name in BASES if name != "shard.tar"]  # of which no command knows a thing


@needs_proc
@pytest.mark.parametrize("name", OF_COMMANDS)
def test_damaged_files_give_a_result_or_one_sentence(bases, model, tmp_path, name):
    files = dict(mutants(bases, name, range(NUM_MUTANTS)))
    assert len(files) == NUM_MUTANTS and bases[name] not in files.values()
    entries = check_commands(files, model, tmp_path)
    assert {entry["code"] for entry in entries} >= {1}  # they are damaged indeed


@pytest.mark.slow  # two minutes of one core
@needs_proc
@pytest.mark.parametrize("name", OF_COMMANDS)
def test_more_damaged_files_give_a_result_or_one_sentence(bases, model, tmp_path, name):
    check_commands(dict(mutants(bases, name, range(NUM_MUTANTS, 8 * NUM_MUTANTS))), model, tmp_path)


@pytest.mark.slow  # minutes of one core
@needs_proc
@pytest.mark.parametrize("part", range(8))
def test_damaged_files_of_all_containers_give_a_result_or_one_sentence(model, tmp_path, part):
    originals = {}
    for number, footage in enumerate(TABLE[part::8]):
        path = make_clip(tmp_path / f"{number}{footage.extension}", replace(footage, num_frames=5))
        originals[path.name] = path.read_bytes()
        path.unlink()
    files = {}
    for name in originals:
        files |= dict(mutants(originals, name, range(10)))
    check_commands(files, model, tmp_path)


@needs_proc
def test_what_is_claimed_is_not_allocated(bases, model, tmp_path):
    entries = check_commands(bombs(bases), model, tmp_path)
    accepted = {
        (entry["file"], entry["command"]) for entry in entries if entry["code"] == 0 and entry["command"] != "info"
    }
    assert accepted == set()


@needs_proc
def test_training_goes_past_damaged_files(bases, tmp_path):
    files = {name: bases[name] for name in ("h264.mp4", "png.png", "gif.gif")}
    for name in BASES:
        files |= dict(mutants(bases, name, range(NUM_MUTANTS)))
    files |= bombs(bases)
    files = {name: content for name, content in files.items() if not name.endswith((".safetensors", ".tar"))}
    write(files, tmp_path / "in")
    (entry,) = run_process(open_for_training, [tmp_path / "in"], folder=tmp_path)
    total, cached, skipped = entry["counts"]
    assert total == len(files) and cached >= 3 and total / 4 < skipped < total
    skipping = [text for text in entry["warnings"] if text.startswith("Skipping a video: ")]
    assert len(skipping) == skipped
    assert [text for text in entry["warnings"] if "allocate" in text or "\n" in text] == []
    claims = {name for name in files if name.startswith("bomb.")}
    assert {name for name in claims if not any(name in text for text in skipping)} == set()
    assert too_much(entry) == []


@needs_proc
def test_training_goes_past_damaged_shards(bases, tmp_path):
    """A shard that cannot be indexed is named in one sentence; of the others the good members are taken."""
    files = {"good.tar": bases["shard.tar"]} | dict(mutants(bases, "shard.tar", range(NUM_MUTANTS)))
    files |= {name: content for name, content in bombs(bases).items() if name.endswith(".tar")}
    entries = run_process(open_for_training, write(files, tmp_path / "in"), folder=tmp_path)
    assert entries[0]["counts"] == [3, 3, 0]
    assert {"error" in entry for entry in entries[1:]} == {False, True}
    for entry in entries:
        assert entry["file"] in entry["error"] if "error" in entry else entry["counts"][0] >= 1, entry
        assert "\n" not in entry.get("error", "") and too_much(entry) == [], entry
