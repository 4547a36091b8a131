"""Files and folders that are seen complete or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_leanvae.atomic import (
    commit,
    commit_files,
    partial_path,
    remove_stale_partials,
    replace_file,
    replace_folder,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def dead_partial(path: Path, kind: str) -> Path:
    """The name under which a process that lives no more would have written `path`."""
    code = "import sys; from pathlib import Path; from diffusers_leanvae.atomic import partial_path\n"
    code += "print(partial_path(Path(sys.argv[1]), sys.argv[2]))"
    output = subprocess.run([sys.executable, "-c", code, path, kind], capture_output=True, text=True, check=True)
    return Path(output.stdout.strip())


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    target = tmp_path / "result.json"
    for content in ("first", "second"):
        with replace_file(target) as partial:
            assert partial.parent == tmp_path and partial.name.startswith(".") and partial.suffix == ".json"
            partial.write_text(content)
            assert not target.exists() if content == "first" else target.read_text() == "first"
        assert target.read_text() == content and names(tmp_path) == ["result.json"]


@pytest.mark.parametrize("name", ["a" * 251 + ".mp4", "\u96ea" * 83 + ".mkv", "b" * 243 + ".safetensors"])
def test_a_name_as_long_as_a_file_system_takes(tmp_path, name):
    target = tmp_path / name
    stale = dead_partial(target, "partial")
    stale.write_text("of a killed process")
    other = tmp_path / ("c" + name[1:])
    with replace_file(other) as partial:  # a long name, too, that differs at its start only
        partial.write_text("")
        assert stale.exists()
    with replace_file(target) as partial:
        partial.write_text("content")
        assert partial.suffix == target.suffix and len(os.fsencode(partial.name)) <= 255
        assert not stale.exists() and partial_path(target) != partial_path(other)
    assert target.read_text() == "content" and names(tmp_path) == sorted([target.name, other.name])
    assert partial_path(tmp_path / "short.mp4").name.startswith(".short.mp4.partial-")


def test_an_error_leaves_the_former_file(tmp_path):
    target = tmp_path / "result.json"
    target.write_text("former")
    with pytest.raises(KeyboardInterrupt), replace_file(target) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "former" and names(tmp_path) == ["result.json"]
    with pytest.raises(FileNotFoundError), replace_file(target):
        pass  # nothing was written
    assert target.read_text() == "former"


def test_a_folder_is_replaced_when_it_is_complete(tmp_path):
    target = tmp_path / "runs" / "vae"
    for content in ("first", "second"):
        with replace_folder(target) as partial:
            assert names(partial) == []
            (partial / content).mkdir()
            (partial / content / "weights").write_text(content)
        assert names(target) == [content] and names(target.parent) == ["vae"]
    with pytest.raises(KeyboardInterrupt), replace_folder(target) as partial:
        (partial / "half").write_text("")
        raise KeyboardInterrupt
    assert names(target) == ["second"] and names(target.parent) == ["vae"]


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    target = tmp_path / "clip[1].mp4"  # brackets mean something in a glob
    stale, foreign = dead_partial(target, "partial"), dead_partial(tmp_path / "other.mp4", "partial")
    alive = partial_path(target)
    for path in (stale, foreign, alive):
        path.write_text("half")
    stale_folder = dead_partial(target, "spool")
    stale_folder.mkdir()
    (stale_folder / "file").write_text("")
    remove_stale_partials(target)
    assert names(tmp_path) == sorted([foreign.name, alive.name])
    assert str(os.getpid()) in alive.name and str(os.getpid()) not in foreign.name


def test_a_folder_moved_away_by_a_killed_process_gets_its_name_back(tmp_path):
    target = tmp_path / "vae"
    former, partial = dead_partial(target, "former"), dead_partial(target, "partial")
    former.mkdir()
    (former / "weights").write_text("former")
    partial.mkdir()
    with pytest.raises(KeyboardInterrupt), replace_folder(target):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["vae"] and (target / "weights").read_text() == "former"


def test_a_folder_moved_away_is_not_taken_for_one_whose_name_begins_alike(tmp_path):
    former = dead_partial(tmp_path / "vae.v2", "former")
    former.mkdir()
    (former / "weights").write_text("of the second version")
    with replace_folder(tmp_path / "vae") as partial:
        (partial / "weights").write_text("new")
    assert names(tmp_path) == [former.name, "vae"] and (tmp_path / "vae" / "weights").read_text() == "new"
    remove_stale_partials(tmp_path / "vae.v2")
    assert (tmp_path / "vae.v2" / "weights").read_text() == "of the second version"


def test_a_link_to_a_folder_stays(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for content in ("first", "second"):
        with replace_folder(tmp_path / "link") as partial:
            (partial / content).write_text("")
        assert names(tmp_path) == ["link", "real"] and names(tmp_path / "real") == [content]
        assert (tmp_path / "link").is_symlink()
    monkeypatch.chdir(tmp_path / "real")
    with replace_folder(".") as partial:
        (partial / "third").write_text("")
    assert names(tmp_path / "real") == ["third"] and names(tmp_path) == ["link", "real"]


def test_commit_gives_names(tmp_path):
    partial = tmp_path / "partial-7"
    partial.mkdir()
    (partial / "link").symlink_to(tmp_path / "nowhere")
    commit(partial, tmp_path / "step-7")
    assert names(tmp_path) == ["step-7"] and names(tmp_path / "step-7") == ["link"]


def test_files_move_into_a_folder_that_exists(tmp_path):
    folder, partial = tmp_path / "frames", tmp_path / ".frames.partial"
    for place, name, content in [(folder, "1.png", "old"), (folder, "x", "other"), (partial, "1.png", "new")]:
        place.mkdir(exist_ok=True)
        (place / name).write_text(content)
    commit_files(partial, folder)
    assert names(tmp_path) == ["frames"] and names(folder) == ["1.png", "x"]
    assert (folder / "1.png").read_text() == "new" and (folder / "x").read_text() == "other"
