"""Folders on this machine or at a URL: a `pathlib.Path`, or a `RemotePath` with a few of its methods, by fsspec.

A file appears whole in both, or not at all.
"""

import json
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import cached_assets_path

from ..atomic import replace_file
from ..checks import reason_of
from ..description import read_json


# Stores in which an upload is an object when it is complete, and nothing before.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "cos", "obs", "oci", "r2", "hf", "memory"}


@dataclass(frozen=True)
class RemotePath:
    """A file or folder in a file system of fsspec.

    Args:
        file_system: An `fsspec.AbstractFileSystem`.
        path: Its path there, without the protocol.
    """

    file_system: Any
    path: str

    def __str__(self) -> str:
        return self.file_system.unstrip_protocol(self.path)

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.file_system, f"{self.path.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    @property
    def is_object(self) -> bool:
        protocol = self.file_system.protocol
        return not _OBJECT_STORES.isdisjoint((protocol,) if isinstance(protocol, str) else protocol)

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        if not self.is_object:  # object stores have no folders
            self.file_system.makedirs(self.path, exist_ok=exist_ok)

    def exists(self) -> bool:
        """Tell whether a file is there.

        Raises:
            ConnectionError: If that cannot be known; `exists` of fsspec takes every error for a no.
        """
        with _as_os_error(self):
            try:
                self.file_system.invalidate_cache(self.path)  # other processes write here, too
                self.file_system.info(self.path)
            except FileNotFoundError:
                return False
        return True

    def list_files(self) -> list[str]:
        """Return the names of all files below a folder, relative to it, in order; without hidden ones."""
        front = self.path.rstrip("/") + "/"
        with _as_os_error(self):
            self.file_system.invalidate_cache()  # of all, since some keep each folder below this one for itself
            found = self.file_system.find(self.path)
        names = [path.removeprefix(front).split("/") for path in found if path.startswith(front)]
        return ["/".join(parts) for parts in sorted(names) if not any(part.startswith(".") for part in parts)]

    def read_bytes(self) -> bytes:
        """Read a file.

        Raises:
            OSError: Whatever fails.
        """
        with _as_os_error(self):
            self.file_system.invalidate_cache(self.path)
            return self.file_system.cat_file(self.path)

    def read_files(self, names: Sequence[str]) -> dict[str, bytes]:
        """Read files below a folder, many at once where the file system can.

        Raises:
            OSError: Whatever fails.
        """
        with _as_os_error(self):
            contents = self.file_system.cat_ranges([(self / name).path for name in names], None, None)
        for name, content in zip(names, contents, strict=True):
            with _as_os_error(self / name):
                if isinstance(content, Exception):
                    raise content
        return dict(zip(names, contents, strict=True))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def unlink(self) -> None:
        """Remove a file."""
        with _as_os_error(self):
            self.file_system.rm_file(self.path)

    def replace(self, content: bytes) -> None:
        """Write a file that appears when it is whole."""
        with _as_os_error(self):
            if self.is_object:
                self.file_system.pipe_file(self.path, content)
                return
            front, _, name = self.path.rpartition("/")
            partial = f"{front}/.{name}.partial"
            self.file_system.pipe_file(partial, content)
            self.file_system.mv(partial, self.path)

    def download(self, target: Path) -> None:
        """Copy a file to this machine."""
        with _as_os_error(self):
            self.file_system.invalidate_cache(self.path)
            self.file_system.get_file(self.path, str(target))


AnyPath = Path | RemotePath


def open_path(place: str | Path | RemotePath) -> AnyPath:
    """Return the path that a name or a URL stands for; `file://` is this machine.

    Raises:
        ValueError: If fsspec does not know the protocol of a URL.
        ImportError: If the package that knows it is not installed, such as s3fs for `s3://`.
    """
    if not isinstance(place, str) or "://" not in place:
        return Path(place) if isinstance(place, str) else place
    import fsspec.core  # comes with torch and huggingface_hub
    from fsspec.implementations.local import LocalFileSystem

    try:
        file_system, path = fsspec.core.url_to_fs(place)
    except ImportError as error:
        raise ImportError(f"{place!r} cannot be reached without another package: {reason_of(error)}.") from error
    except ValueError as error:
        raise ValueError(f"A URL must have a protocol of fsspec, got {place!r}: {reason_of(error)}.") from error
    return Path(path) if isinstance(file_system, LocalFileSystem) else RemotePath(file_system, path)


def write_whole(path: AnyPath, content: bytes) -> None:
    """Write a file, which appears under its name when it is complete, and replaces a former one in one step."""
    if isinstance(path, RemotePath):
        path.replace(content)
        return
    with replace_file(path) as partial:
        partial.write_bytes(content)


def write_json(path: AnyPath, value: Any) -> None:
    """Write a value as JSON, as [`write_whole`] writes files."""
    write_whole(path, as_json(value).encode())


def as_json(value: Any) -> str:
    """Return the content of a file that [`write_json`] writes."""
    return json.dumps(value, indent=2) + "\n"


def list_names(folder: AnyPath) -> list[str]:
    """Return the names of the files in a folder, in order."""
    return folder.list_files() if isinstance(folder, RemotePath) else sorted(path.name for path in folder.iterdir())


def load_json(path: AnyPath) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: If there is none in the file, which the message names.
    """
    return read_json(path)  # pyright: ignore[reportArgumentType]  # a `RemotePath` has all it needs of a `Path`


def begin_settings(
    path: AnyPath,
    settings: dict[str, Any],
    ignored: Collection[str] = (),
    recent: Collection[str] = (),
    discard: Callable[[], bool] = lambda: False,
) -> str | None:
    """Write the settings of new files, or compare them with those that the files were begun with.

    Args:
        path: The file of the settings.
        settings: The settings, as far as JSON goes.
        ignored: Keys that may differ.
        recent: Keys that files of earlier versions lack, and which then may be anything.
        discard: Called where something differs: removes the files if there is nothing in them yet, and tells whether
            so it was. Then they are new.

    Returns:
        What differs first, for an error: "`seed` was 3 and is now 4"; `None` if nothing does.

    Raises:
        ValueError: If there is no JSON object in the file.
    """
    if not path.exists():
        write_json(path, settings)
    begun, new = load_json(path), json.loads(json.dumps(settings))
    for key in {**begun, **new}:
        if key in ignored or begun.get(key) == new.get(key) or (key in recent and key not in begun):
            continue
        if discard():
            write_json(path, settings)
            return None
        return f"`{key}` was {begun.get(key)!r} and is now {new.get(key)!r}"
    return None


@contextmanager
def fetched(path: AnyPath) -> Iterator[Path]:
    """Give a file of this machine with the content of a path, inside the `with` block."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="leanvae-") as folder:
        local = Path(folder, path.name)
        path.download(local)
        yield local


def local_copy(path: AnyPath, key: str) -> Path:
    """Return a file of this machine with the content of a path: itself, or a copy, which is kept.

    Copies lie in the assets of the Hub's cache (`HF_ASSETS_CACHE`), once for all processes.

    Args:
        path: The file.
        key: A name for copies that is another one when the content is.
    """
    if isinstance(path, Path):
        return path
    local = cached_assets_path("diffusers_leanvae", "latents", key) / path.name
    if not local.exists():
        with replace_file(local) as partial:
            path.download(partial)
    return local


@contextmanager
def _as_os_error(path: RemotePath) -> Iterator[None]:
    """Let errors of a file system, of which each has its own, be that of a missing file, or else of a connection.

    So are those of credentials, which may have expired: like a lost connection, they say nothing of the file. A web
    server that answers that it forbids one file, or has it no longer, does: in a list of addresses that is usual.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        if getattr(error, "status", None) in (403, 404, 410, 451):  # as aiohttp's errors have it
            raise FileNotFoundError(f"{str(path)!r} cannot be had: {reason_of(error)}") from error
        raise ConnectionError(f"{str(path)!r} cannot be reached: {reason_of(error)}") from error
