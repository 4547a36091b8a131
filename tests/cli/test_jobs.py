"""What the commands read and write, by names alone: nothing is lost, read twice, or written over."""

import os
from pathlib import Path

import pytest

from diffusers_leanvae.cli.jobs import Naming, check_latents, check_outputs, find_jobs, output_names
from diffusers_leanvae.inference.files import default_suffix
from diffusers_leanvae.video_io.formats import is_sequence
from diffusers_leanvae.video_io.inputs import is_media, list_videos


RECONSTRUCT = Naming(list_videos, default_suffix, is_media)
ENCODE = Naming(list_videos, lambda _: ".safetensors", lambda _: False)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"content")


def paired(source: Path | str, target: Path | str, naming: Naming = RECONSTRUCT, **options) -> dict[str, str]:
    """Names of inputs -> names of outputs, relative to their folders where these are folders."""
    jobs = find_jobs(str(source), str(target), naming, **options)
    found = {}
    for path, output in jobs.pairs:
        key = Path(path).relative_to(source).as_posix() if jobs.is_folder else str(path)
        found[key] = Path(output).relative_to(target).as_posix() if jobs.is_folder else str(output)
    assert len(set(found.values())) == len(found)
    return found


def test_every_file_of_a_folder_has_an_output_of_its_own(tmp_path):
    source = tmp_path / "in"
    touch(
        source, "clip.mp4", "clip.mov", "clip.mkv", "alone.MTS", "deep/clip.mp4", "still.png", "still.jpg", "note.txt"
    )
    touch(source, "._clip.mp4", ".hidden/clip.mp4")
    assert paired(source, tmp_path / "out") == {
        "alone.MTS": "alone.mp4",
        "clip.mkv": "clip.mkv.mp4",
        "clip.mov": "clip.mov.mp4",
        "clip.mp4": "clip.mp4.mp4",
        "deep/clip.mp4": "deep/clip.mp4",
        "still.jpg": "still.jpg.png",
        "still.png": "still.png.png",
    }
    assert paired(source, tmp_path / "z", ENCODE)["clip.mov"] == "clip.mov.safetensors"


def test_names_that_are_alike_after_all():
    names = [Path(name) for name in ("a.mp4", "a.mov", "a.mov.mp4", "b.mp4")]
    outputs = output_names(names, [".mp4"] * 4)
    assert [path.name for path in outputs] == ["a.mp4.mp4", "a.mov.mp4", "a.mov.mp4.mp4", "b.mp4"]


def test_the_longest_names(tmp_path):
    long, other = "\u96ea" * 83 + ".mp4", "\u96ea" * 83 + "x.mp4"
    touch(tmp_path / "in", long, other)
    outputs = paired(tmp_path / "in", tmp_path / "out", ENCODE)
    assert all(len(os.fsencode(name)) <= 255 and name.endswith(".safetensors") for name in outputs.values())
    assert paired(tmp_path / "in", tmp_path / "out")[long] == long


def test_the_formats_of_a_folder(tmp_path):
    touch(tmp_path / "in", "clip.mov", "still.jpg", "anim.gif")
    for name, expected in (
        ("webm", ["anim.webm", "clip.webm", "still.png"]),
        ("png", ["anim/%06d.png", "clip/%06d.png", "still.png"]),
        ("jpg", ["anim/%06d.jpg", "clip/%06d.jpg", "still.jpg"]),
        ("webp", ["anim.webp", "clip.webp", "still.webp"]),
    ):
        naming = Naming(list_videos, lambda path, name=name: default_suffix(path, name), is_media)
        assert list(paired(tmp_path / "in", tmp_path / "out", naming).values()) == expected


def test_names_of_a_folder_are_no_patterns(tmp_path):
    touch(tmp_path / "in", "my%20dog.png", "f_%04d.png", "clip%20d.mp4")
    outputs = paired(tmp_path / "in", tmp_path / "out")
    assert list(outputs.values()) == ["clip%20d.mp4", "f_%%04d.png", "my%20dog.png"]
    assert not any(is_sequence(tmp_path / "out" / name) for name in outputs.values())


def test_animations_are_videos_whatever_their_names_say(tmp_path):
    from PIL import Image

    pictures = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(3)]
    for suffix in (".png", ".webp", ".gif", ".avif"):
        pictures[0].save(tmp_path / f"still{suffix}")
        pictures[0].save(tmp_path / f"moving{suffix}", save_all=True, append_images=pictures[1:])
        assert default_suffix(tmp_path / f"moving{suffix}") == ".mp4"
        assert default_suffix(tmp_path / f"still{suffix}") == (".mp4" if suffix == ".gif" else ".png")


def test_a_folder_stays_a_folder_with_one_file_or_none(tmp_path):
    touch(tmp_path / "in", "a.mp4")
    jobs = find_jobs(str(tmp_path / "in"), str(tmp_path / "out.mp4"), RECONSTRUCT)
    assert jobs.is_folder and jobs.pairs == [(tmp_path / "in" / "a.mp4", tmp_path / "out.mp4" / "a.mp4")]
    touch(tmp_path, "file.mp4")
    with pytest.raises(ValueError, match="OUT must be a folder when IN is one, got '.*file.mp4'"):
        find_jobs(str(tmp_path / "in"), str(tmp_path / "file.mp4"), RECONSTRUCT)
    with pytest.raises(ValueError, match="OUT must be a folder when IN is one, got '-'"):
        find_jobs(str(tmp_path / "in"), "-", RECONSTRUCT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="IN must hold at least one file that can be read, got none in '.*empty'"):
        find_jobs(str(tmp_path / "empty"), str(tmp_path / "out"), RECONSTRUCT)
    with pytest.raises(ValueError, match="IN must exist, got '.*nothing'"):
        find_jobs(str(tmp_path / "nothing"), str(tmp_path / "out"), RECONSTRUCT)


def test_outputs_inside_the_input_are_not_read_again(tmp_path):
    source = tmp_path / "in"
    touch(source, "a.mp4", "done/a.mp4", "other/b.mp4")
    (tmp_path / "link").symlink_to(source / "done")
    for target in (source / "done", tmp_path / "link"):
        assert list(paired(source, target)) == ["a.mp4", "other/b.mp4"]
    assert list(paired(source / "other", source, ENCODE)) == ["b.mp4"]  # above it there is nothing to leave out
    touch(tmp_path / "all", "out/a.mp4")
    with pytest.raises(ValueError, match="at least one file"):
        find_jobs(str(tmp_path / "all"), str(tmp_path / "all" / "out"), RECONSTRUCT)


def test_links_to_folders_are_followed_once(tmp_path):
    touch(tmp_path / "in", "a.mp4")
    touch(tmp_path / "elsewhere", "b.mp4")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "circle").symlink_to(tmp_path / "in")
    assert list(paired(tmp_path / "in", tmp_path / "out")) == ["a.mp4", "link/b.mp4"]


@pytest.mark.parametrize("how", ["name", "symbolic link", "hard link", "folder", "linked folder"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_read_is_not_written(tmp_path, how, overwrite):
    source = tmp_path / "in" / "a.mp4"
    touch(tmp_path, "in/a.mp4")
    target = {"name": source, "folder": source.parent}.get(how, tmp_path / "b.mp4")
    if how == "symbolic link":
        target.symlink_to(source)
    elif how == "hard link":
        os.link(source, target)
    elif how == "linked folder":
        target.symlink_to(source.parent)
    with pytest.raises(ValueError, match="OUT must not be a file that is read"):
        find_jobs(str(source), str(target), RECONSTRUCT, overwrite=overwrite)
    assert source.read_bytes() == b"content"


def test_a_folder_is_not_written_into_itself(tmp_path):
    source = tmp_path / "in"
    touch(source, "a.mp4", "b.mov")
    (tmp_path / "link").symlink_to(source)
    for target in (source, tmp_path / "link"):
        with pytest.raises(ValueError, match="OUT must not be the folder that is read"):
            find_jobs(str(source), str(target), RECONSTRUCT, overwrite=True)
    # Latents next to their videos are read by no one who encodes.
    assert paired(source, source, ENCODE) == {"a.mp4": "a.safetensors", "b.mov": "b.safetensors"}
    # One output may also be the source of another.
    (tmp_path / "out").mkdir()
    os.link(source / "b.mov", tmp_path / "out" / "a.mp4")
    with pytest.raises(ValueError, match="OUT must not be a file that is read, got '.*out/a.mp4'"):
        find_jobs(str(source), str(tmp_path / "out"), RECONSTRUCT)
    touch(tmp_path, "sound.mp4")
    with pytest.raises(ValueError, match="OUT must not be a file that is read, got '.*sound.mp4'"):
        find_jobs(str(source / "a.mp4"), str(tmp_path / "sound.mp4"), RECONSTRUCT, also_read=[tmp_path / "sound.mp4"])


def test_one_output_is_replaced_only_if_asked(tmp_path):
    touch(tmp_path, "a.mov", "b.mp4", "out/a.mp4")
    for target in ("b.mp4", "out"):
        with pytest.raises(ValueError, match="OUT must not exist without `--overwrite`, got '.*mp4'"):
            find_jobs(str(tmp_path / "a.mov"), str(tmp_path / target), RECONSTRUCT)
        assert len(find_jobs(str(tmp_path / "a.mov"), str(tmp_path / target), RECONSTRUCT, overwrite=True).pairs) == 1
    touch(tmp_path, "f_0007.png", "100%.mp4")
    with pytest.raises(ValueError, match="OUT must not exist without `--overwrite`, got '.*f_0007.png'"):
        find_jobs(str(tmp_path / "a.mov"), str(tmp_path / "f_%04d.png"), RECONSTRUCT)
    assert paired(tmp_path / "a.mov", tmp_path / "g_%04d.png") == {
        str(tmp_path / "a.mov"): str(tmp_path / "g_%04d.png")
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_devices_are_there_to_be_written(tmp_path):
    touch(tmp_path, "a.mov")
    os.mkfifo(tmp_path / "pipe.mkv")
    for target in (tmp_path / "pipe.mkv", Path("/dev/null")):
        assert find_jobs(str(tmp_path / "a.mov"), str(target), RECONSTRUCT).pairs[0][1] == target


def test_names_for_one_input_in_a_folder(tmp_path, monkeypatch):
    touch(tmp_path, "clip.mov", "shot_0001.png", "shot_0002.png", "scene 1/1.png", "my%20dog.png", "well%2done.png")
    folder = f"{tmp_path}/new/"
    for source, name in (
        (tmp_path / "clip.mov", "clip.mp4"),
        ("-", "stdin.mp4"),
        ("https://host/path/film.webm?size=1", "film.mp4"),
        ("hf://datasets/user/name/pictures/cat.jpg", "cat.png"),
        (tmp_path / "shot_%04d.png", "shot.mp4"),
        (tmp_path / "my%20dog.png", "my%20dog.png"),
        (tmp_path / "well%2done.png", "well%%2done.png"),
    ):
        assert list(paired(source, folder).values()) == [f"{folder}{name}"], source
    assert list(paired(tmp_path / "scene 1", folder, frames=True).values()) == [f"{folder}scene 1.mp4"]
    assert find_jobs("https://host/a.mp4", "-", RECONSTRUCT).pairs == [("https://host/a.mp4", "-")]
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "-")
    ((source, target),) = find_jobs("./-", "new/-", RECONSTRUCT).pairs
    assert source == tmp_path / "-" and target == Path("new/-")
    with pytest.raises(ValueError, match="OUT must be a file, a folder or '-', got 'https://host/b.mp4'"):
        find_jobs("clip.mov", "https://host/b.mp4", RECONSTRUCT)


def test_frames(tmp_path):
    touch(tmp_path / "in", "1.png", "2.png")
    jobs = find_jobs(str(tmp_path / "in"), str(tmp_path / "out.mp4"), RECONSTRUCT, frames=True)
    assert not jobs.is_folder and jobs.pairs == [(tmp_path / "in", tmp_path / "out.mp4")]
    for target in ("in/out_%d.png", "in/all.png"):
        with pytest.raises(ValueError, match="OUT must not be in the folder of frames that is read"):
            find_jobs(str(tmp_path / "in"), str(tmp_path / target), RECONSTRUCT, frames=True)
    with pytest.raises(ValueError, match="OUT must not be a file that is read, got '.*1.png'"):
        find_jobs(str(tmp_path / "in"), str(tmp_path / "in" / "%d.png"), RECONSTRUCT, frames=True)
    with pytest.raises(ValueError, match="OUT must not be a file that is read, got '.*1.png'"):
        find_jobs(str(tmp_path / "in" / "%d.png"), str(tmp_path / "in" / "%d.png"), RECONSTRUCT, overwrite=True)
    with pytest.raises(ValueError, match="IN must be a folder with `--frames`, got '.*1.png'"):
        find_jobs(str(tmp_path / "in" / "1.png"), str(tmp_path / "out.mp4"), RECONSTRUCT, frames=True)
    touch(tmp_path / "in", "5.png")
    with pytest.raises(ValueError, match="number 3 is missing between 1 and 5"):
        find_jobs(str(tmp_path / "in" / "%d.png"), str(tmp_path / "out.mp4"), RECONSTRUCT)


@pytest.mark.parametrize(
    "target, options, message",
    [
        ("out.xyz", {}, "the extension must be one of .mp4"),
        ("out", {}, "the extension must be one of .mp4"),
        ("out.webm", {"codec": "libx264"}, "`codec` must be one of libvpx-vp9, libsvtav1 for .webm, got 'libx264'"),
        ("new/out.webm", {"codec": "libx264"}, "`codec` must be one of libvpx-vp9, libsvtav1 for .webm, got"),
        ("out.mp4", {"crf": 52}, "`crf` must be 0 to 51 for libx264, got 52"),
        ("out.mp4", {"pixel_format": "yuv400"}, "`pixel_format` must be one of yuv420p, .*, got 'yuv400'"),
        ("-", {"container": "mp4"}, "`container` must be one of mkv, webm, y4m for '-', got 'mp4'"),
        ("a.mov/out.mp4", {}, "the folder '.*a.mov' is no folder"),
        ("\u96ea" * 90 + ".mp4", {}, "OUT must have a name of at most 255 bytes, got 274"),
    ],
)
def test_outputs_are_looked_at_before_any_work(tmp_path, target, options, message):
    touch(tmp_path, "a.mov")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        check_outputs(
            find_jobs(str(tmp_path / "a.mov"), target if target == "-" else str(tmp_path / target), RECONSTRUCT),
            options,
        )
    assert sorted(tmp_path.rglob("*")) == before


def test_latents_have_their_extension(tmp_path):
    touch(tmp_path, "a.mov")
    with pytest.raises(ValueError, match="OUT must end in .safetensors, got '.*a.mp4'"):
        check_latents(find_jobs(str(tmp_path / "a.mov"), str(tmp_path / "a.mp4"), ENCODE))
    check_latents(find_jobs(str(tmp_path / "a.mov"), str(tmp_path / "new" / "deeper" / "a.safetensors"), ENCODE))
    with pytest.raises(ValueError, match="OUT must lead to a folder to write to, got"):
        check_latents(find_jobs(str(tmp_path / "a.mov"), str(tmp_path / "a.mov" / "a.safetensors"), ENCODE))
