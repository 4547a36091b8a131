"""Sources of training videos: lists of files and of members of tar shards, each opened by its number."""

import glob
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from ..video_io import list_videos
from ..video_io.reader import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS


_MAGIC = re.compile(r"[*?\[]|\{\d+\.\.\d+\}")
_SIDECARS = ("json", "txt", "cls")


class VideoSource(Protocol):
    """A fixed list of video and image files. Number `i` is the same file whenever the source is opened again."""

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """Return the name of the file for messages."""
        ...

    def metadata(self, number: int) -> dict[str, Any]:
        """Return `file_name` and the columns of `metadata.jsonl`, or the sidecar members of a tar."""
        ...

    def open(self, number: int) -> AbstractContextManager[Path]:
        """Give a path to read the file from, inside the `with` block."""
        ...


class FileSource:
    """The videos and images below a folder, or those that its `metadata.jsonl` lists, with its other columns."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"`folder` must be an existing folder of videos, got {str(folder)!r}.")
        listing = folder / "metadata.jsonl"
        self.folder = folder
        self.rows = _listed(listing) if listing.is_file() else None
        files = list_videos(folder) if self.rows is None else [folder / row["file_name"] for row in self.rows]
        self.paths = [Path(path) for path in files]
        if not self.paths:
            raise ValueError(f"`folder` must hold at least one video, got none in {str(folder)!r}.")

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, number: int) -> str:
        return str(self.paths[number])

    def metadata(self, number: int) -> dict[str, Any]:
        if self.rows is not None:
            return dict(self.rows[number])
        return {"file_name": self.paths[number].relative_to(self.folder).as_posix()}

    @contextmanager
    def open(self, number: int) -> Iterator[Path]:
        yield self.paths[number]


class TarSource:
    """WebDataset shards: uncompressed tar files in which the members of one example share the name up to a dot.

    The shards are indexed once (headers only), after which any member is one seek away. The video or image of an
    example is copied to a temporary file while it is read; `.json`, `.txt` and `.cls` members are its metadata.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = list(shards)
        self.examples: list[tuple[int, dict[str, tuple[int, int]], str]] = []  # shard, (offset, size) of members, key
        for number, shard in enumerate(self.shards):
            members: dict[str, dict[str, tuple[int, int]]] = {}
            try:
                with tarfile.open(shard, "r:") as archive:
                    for member in archive:
                        key, extension = _key_and_extension(member.name)
                        if member.isreg() and (extension in _SIDECARS or _is_visual(extension)):
                            members.setdefault(key, {})[extension] = (member.offset_data, member.size)
            except (OSError, tarfile.TarError) as error:
                raise ValueError(f"`train` must name uncompressed tar files, got {str(shard)!r}: {error}.") from error
            self.examples += [(number, parts, key) for key, parts in members.items() if any(map(_is_visual, parts))]
        if not self.examples:
            raise ValueError(f"`train` must name tar files with at least one video, got none in {len(shards)} files.")

    def __len__(self) -> int:
        return len(self.examples)

    def name(self, number: int) -> str:
        shard, parts, key = self.examples[number]
        return f"{self.shards[shard]}/{key}.{next(filter(_is_visual, parts))}"

    def metadata(self, number: int) -> dict[str, Any]:
        parts = self.examples[number][1]
        row: dict[str, Any] = {}
        for extension in filter(_SIDECARS.__contains__, parts):
            text = self._read(number, extension).decode("utf-8", "replace")
            value = json.loads(text) if extension == "json" else text
            row |= value if isinstance(value, dict) else {extension: value}
        return row | {"file_name": self.name(number)}

    @contextmanager
    def open(self, number: int) -> Iterator[Path]:
        extension = next(filter(_is_visual, self.examples[number][1]))
        with tempfile.TemporaryDirectory(prefix="leanvae-") as folder:
            path = Path(folder, f"video.{extension}")
            path.write_bytes(self._read(number, extension))
            yield path

    def _read(self, number: int, extension: str) -> bytes:
        shard, parts, _ = self.examples[number]
        offset, size = parts[extension]
        with open(self.shards[shard], "rb") as file:
            file.seek(offset)
            return file.read(size)


def open_source(train: str | Path) -> VideoSource:
    """Open the local videos that `train` names: a folder, a folder of tar shards, or tar files as a pattern.

    Raises:
        ValueError: If it names nothing that is there.
    """
    path = Path(train)
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        if not shards:
            return FileSource(path)
        if list_videos(path):
            raise ValueError(f"`train` must be a folder of videos or of tar files, got both in {str(train)!r}.")
        return TarSource(shards)
    shards = [Path(name) for pattern in expand_braces(str(train)) for name in _matches(pattern)]
    if not shards or any(shard.suffix != ".tar" or not shard.is_file() for shard in shards):
        raise ValueError(
            "`train` must be a folder of videos, tar files such as 'shards/{000..003}.tar' or 'shards/*.tar', or a "
            f"dataset such as 'hub:user/name', got {str(train)!r}, which is not there."
        )
    return TarSource(shards)


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


def _key_and_extension(name: str) -> tuple[str, str]:
    # As WebDataset has it: "a/b.front.mp4" is the part "front.mp4" of "a/b"; of that the last suffix says what it is.
    folder, _, base = name.rpartition("/")
    key, _, rest = base.partition(".")
    return f"{folder}/{key}" if folder else key, rest.lower()


def _is_visual(extension: str) -> bool:
    return f".{extension.rpartition('.')[2]}" in (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS)


def _listed(listing: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            if line.strip():
                row = json.loads(line)
                Path(row["file_name"])
                rows.append(row)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"Every line of `metadata.jsonl` must be a JSON object with `file_name`, got {error!r} in line "
                f"{number} of {str(listing)!r}."
            ) from error
    return rows
