"""Sources of training videos: lists of files and of members of tar shards, each opened by its number."""

import glob
import json
import re
import tarfile
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..video_io import VideoError, list_videos
from ..video_io.inputs import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, find_sequence
from .metadata import (
    METADATA_NAMES,
    choose_metadata,
    decode_text,
    find_metadata,
    read_captions,
    read_metadata,
    split_captions,
)
from .storage import RemotePath, fetched, open_path


_MAGIC = re.compile(r"[*?\[]|\{\d+\.\.\d+\}")
_SIDECARS = ("json", "txt", "cls")


class VideoSource(Protocol):
    """A fixed list of video and image files. Number `i` is the same file whenever the source is opened again."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """Return the name of the file for messages."""
        ...

    def metadata(self, number: int) -> dict[str, Any]:
        """Return `file_name` and the columns of the metadata file, or the captions or other metadata beside it."""
        ...

    def open(self, number: int) -> AbstractContextManager[Path]:
        """Give a path to read the file from, inside the `with` block."""
        ...


class FileSource:
    """The videos and images below a folder, or those that its metadata file lists, with its other columns.

    A file is a list of one, and so are frames by a pattern (`f_%04d.png`). Without a metadata file, the captions of
    `clip.mp4` are the lines of `clip.txt` beside it: `caption` if it is one, `captions` if there are several.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir() and not path.is_file() and not find_sequence(path):
            raise ValueError(f"`folder` must be an existing folder of videos, got {str(path)!r}.")
        self.folder = path if path.is_dir() else path.parent
        listing = find_metadata(path) if path.is_dir() else None
        self.rows = None if listing is None else read_metadata(listing)
        if self.rows is not None:
            self.paths = [path / row["file_name"] for row in self.rows]
        else:
            self.paths = list_videos(path) if path.is_dir() else [path]
        if not self.paths:
            raise ValueError(f"`folder` must hold at least one video, got none in {str(path)!r}.")
        for folder in sorted({file.parent for file in self.paths} - {self.folder}) if self.rows is None else ():
            for name in filter(lambda name: (folder / name).is_file(), METADATA_NAMES):
                warnings.warn(f"Not reading {str(folder / name)!r}: metadata must lie in {str(path)!r}.", stacklevel=2)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, number: int) -> str:
        return str(self.paths[number])

    def metadata(self, number: int) -> dict[str, Any]:
        if self.rows is not None:
            return dict(self.rows[number])
        path = self.paths[number]
        return _describe(path.relative_to(self.folder).as_posix(), read_captions(path))

    @contextmanager
    def open(self, number: int) -> Iterator[Path]:
        yield self.paths[number]


def _describe(file_name: str, captions: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"file_name": file_name}
    if not captions:
        return row
    return row | ({"caption": captions[0]} if len(captions) == 1 else {"captions": list(captions)})


class RemoteSource:
    """The videos and images below a folder at a URL, described as [`FileSource`] describes those of a local one.

    A file is downloaded whenever it is opened, and removed afterwards.
    """

    def __init__(self, folder: RemotePath) -> None:
        files = folder.list_files()
        self.folder = folder
        listing = choose_metadata("train", folder, files)
        if listing is None:
            self.rows = _describe_all(folder, files)
        else:
            with fetched(folder / listing) as path:
                self.rows = read_metadata(path, origin=folder / listing)
        if not self.rows:
            raise ValueError(
                f"`train` must be a folder of videos, or tar files such as 's3://bucket/{{000..003}}.tar', where it "
                f"is a URL, got no video in {str(folder)!r}."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, number: int) -> str:
        return str(self.folder / self.rows[number]["file_name"])

    def metadata(self, number: int) -> dict[str, Any]:
        return dict(self.rows[number])

    @contextmanager
    def open(self, number: int) -> Iterator[Path]:
        with fetched(self.folder / self.rows[number]["file_name"]) as path, _naming(path, self.name(number)):
            yield path


def _describe_all(folder: RemotePath, files: Sequence[str]) -> list[dict[str, Any]]:
    """Describe the videos and images among the files of a folder, with their captions, which are read once for all."""
    texts = {name: f"{name.rpartition('.')[0]}.txt" for name in files if is_visual(name)}
    contents = folder.read_files(sorted(set(files).intersection(texts.values())))
    return [
        _describe(name, split_captions(decode_text(contents.get(text, b""), folder / text)))
        for name, text in texts.items()
    ]


class _Example(NamedTuple):
    """Members of a shard that belong together: offset and size of each by extension, one of which is the video."""

    shard: int
    key: str
    parts: dict[str, tuple[int, int]]
    video: str


class TarSource:
    """WebDataset shards: uncompressed tar files in which the members of one example share a key.

    The key of a member is what webdataset takes for it: its name up to the first dot of the last part of its path.
    What follows is the extension, of which the last suffix says what it is. Hidden members, such as the `._clip.mp4`
    of macOS, are none.

    The shards are indexed once (headers only), after which any member is one seek away. The video of an example, or
    else its image, is copied to a temporary file while it is read; `.json`, `.txt` and `.cls` members are its
    metadata.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = list(shards)
        self.examples: list[_Example] = []
        for number, shard in enumerate(self.shards):
            if is_compressed_tar(shard.name):
                raise ValueError(
                    f"`train` must name uncompressed tar files, got {str(shard)!r}: unpack it (`gunzip`), or stream "
                    f"it as '{shard.absolute().as_uri()}'."
                )
            self.examples += _index(number, shard)
        if not self.examples:
            raise ValueError(f"`train` must name tar files with at least one video, got none in {len(shards)} files.")

    def __len__(self) -> int:
        return len(self.examples)

    def name(self, number: int) -> str:
        _, key, _, video = self.examples[number]
        return f"{self.shard(number)}/{key}.{video}"

    def shard(self, number: int) -> Path:
        """Return the tar file that holds it."""
        return self.shards[self.examples[number][0]]

    def metadata(self, number: int) -> dict[str, Any]:
        _, key, parts, video = self.examples[number]
        row: dict[str, Any] = {}
        front = video.rpartition(".")[0]  # of "clip.v1.mp4", "clip.v1.txt" is the caption, or else "clip.txt"
        for kind in _SIDECARS:
            extension = next((name for name in (f"{front}.{kind}", kind) if name in parts), None)
            if extension is None:
                continue
            text = decode_text(self._read(number, extension), f"{self.shard(number)}/{key}.{extension}")
            try:
                value = json.loads(text) if kind == "json" else text
            except ValueError as error:
                warnings.warn(f"Skipping metadata: {self.name(number)!r} has a damaged .json: {error}", stacklevel=2)
                continue
            row |= value if isinstance(value, dict) else {kind: value}
        return row | {"file_name": self.name(number)}

    @contextmanager
    def open(self, number: int) -> Iterator[Path]:
        extension = self.examples[number].video
        with tempfile.TemporaryDirectory(prefix="leanvae-") as folder:
            path = Path(folder, f"video.{extension.rpartition('.')[2]}")
            path.write_bytes(self._read(number, extension))
            with _naming(path, self.name(number)):
                yield path

    def _read(self, number: int, extension: str) -> bytes:
        example = self.examples[number]
        offset, size = example.parts[extension]
        with open(self.shards[example.shard], "rb") as file:
            file.seek(offset)
            return file.read(size)


@contextmanager
def _naming(path: Path, name: str) -> Iterator[None]:
    """Let errors call a temporary copy by the name of what it is a copy of."""
    try:
        yield
    except VideoError as error:
        raise VideoError(str(error).replace(str(path), name)) from error


def open_source(train: str | Path) -> VideoSource:
    """Open the videos that `train` names: a folder, a video, a folder of tar shards, tar files, or a folder at a URL.

    Raises:
        ValueError: If it names nothing that is there, or a file of another kind.
    """
    path = open_path(train)
    if isinstance(path, RemotePath):
        return RemoteSource(path)
    if path.is_dir():
        shards = sorted(file for file in path.iterdir() if _is_tar(file.name) and file.is_file())
        if not shards:
            return FileSource(path)
        if list_videos(path):
            raise ValueError(f"`train` must be a folder of videos or of tar files, got both in {str(train)!r}.")
        return TarSource(shards)
    if (path.is_file() and not _is_tar(path.name) and is_visual(path.name)) or find_sequence(path):
        return FileSource(path)
    files = [Path(name) for pattern in expand_braces(str(train)) for name in _matches(pattern)]
    missing = [file for file in files if not file.is_file()]
    if files and not missing and all(_is_tar(file.name) for file in files):
        return TarSource(files)
    reason = "which is not there"
    if files and not missing:
        reason = "which is a file of another kind" if files == [path] else f"which matches {next(iter(files)).name!r}"
    elif missing and missing != [path]:
        reason = f"of which {str(missing[0])!r} is not there"
    raise ValueError(
        "`train` must be a folder of videos, a video or image, tar files such as 'shards/{000..003}.tar' or "
        f"'shards/*.tar', or a dataset such as 'hub:user/name', got {str(train)!r}, {reason}."
    )


def expand_braces(pattern: str) -> list[str]:
    """Expand `"{008..010}"` in a name to `"008"`, `"009"`, `"010"`."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match[1], match[2]
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [name for n in numbers for name in expand_braces(pattern[: match.start()] + n + pattern[match.end() :])]


def _matches(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern)) if _MAGIC.search(pattern) else [pattern]


def is_compressed_tar(name: str) -> bool:
    """Tell whether a file is a compressed tar file by its name."""
    return name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst"))


def is_visual(name: str) -> bool:
    """Tell whether a file is a video or an image by its name."""
    return _is_video(name) or name.lower().endswith(IMAGE_EXTENSIONS)


def _is_video(name: str) -> bool:
    return name.lower().endswith(VIDEO_EXTENSIONS)


def _is_tar(name: str) -> bool:
    return not name.startswith(".") and (name.lower().endswith(".tar") or is_compressed_tar(name))


def split_member(name: str) -> tuple[str, str] | None:
    """Split the name of a member of a tar file into key and extension as webdataset does; `None` for hidden ones."""
    if name.rpartition("/")[2].startswith("."):
        return None
    match = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", name, re.DOTALL)
    return None if match is None else (match[1], match[2].lower())


def _index(number: int, shard: Path) -> list[_Example]:
    """List the examples of a shard, in the order of their first members."""
    members: dict[str, dict[str, tuple[int, int]]] = {}
    twice: list[str] = []
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                split = split_member(member.name) if member.isreg() else None
                if split is None:
                    continue
                key, extension = split
                if extension.rpartition(".")[2] in _SIDECARS or is_visual(f".{extension}"):
                    parts = members.setdefault(key, {})
                    if extension in parts:
                        twice.append(f"{key}.{extension}")
                    parts[extension] = (member.offset_data, member.size)
            file.seek(archive.offset)  # where `tarfile` takes whatever it does not know for the end
            if file.read(tarfile.BLOCKSIZE).strip(tarfile.NUL):
                raise tarfile.ReadError("what follows is no member")
    except (OSError, tarfile.TarError, MemoryError, OverflowError) as error:
        if isinstance(error, MemoryError | OverflowError):
            error = tarfile.HeaderError("a member claims to be larger than memory")
        if not members:
            raise ValueError(f"`train` must name uncompressed tar files, got {str(shard)!r}: {error}.") from error
        warnings.warn(f"Skipping the end of {str(shard)!r}, which is damaged: {error}.", stacklevel=2)
    if twice:
        others = f" and {len(twice) - 1} others" if len(twice) > 1 else ""
        raise ValueError(f"`train` must hold every name once, got {twice[0]!r}{others} twice in {str(shard)!r}.")
    examples = []
    for key, parts in members.items():
        videos = [name for name in parts if _is_video(f".{name}")] or [name for name in parts if is_visual(f".{name}")]
        if len(videos) > 1:
            # They would become one example, and all but one be lost.
            raise ValueError(
                f"`train` must hold one video for each key, which is a name up to its first dot, got {key!r} with "
                f"{' and '.join(map(repr, videos))} in {str(shard)!r}: leave no dots in names but the last."
            )
        examples += [_Example(number, key, parts, video) for video in videos]
    return examples
