"""Files and folders that appear under their names only when they are complete.

Content is first written next to its target, under a hidden name, and then takes the target's place in one step. A
reader sees the old content or the new one, never a part, whenever the writer is killed. Content is flushed to the disk
before it gets its name, so the same holds for a loss of power.
"""

import glob
import hashlib
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


MAX_NAME_BYTES = 255  # in all common file systems


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Write a file next to `path`, which takes its place when the block ends without an error.

    The folder of `path` must exist. Leftovers of killed processes that wrote the same file are removed.

    Yields:
        The hidden path to write to; it ends in the extension of `path`.
    """
    path = Path(path)
    remove_stale_partials(path)
    partial = partial_path(path, "partial", path.suffix)
    try:
        yield partial
        commit(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Fill a folder next to `path`, which takes its place when the block ends without an error.

    Missing parents of `path` are made. A link to a folder stays; the folder that it leads to is replaced. Leftovers of
    killed processes that wrote the same folder are removed.

    Yields:
        The hidden folder to fill; it exists and is empty.
    """
    path = Path(path)
    if path.is_symlink() or path.name in ("", ".."):  # such as `.`, which has no name to put another next to
        path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_partials(path)
    partial = partial_path(path, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        commit(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(name: str, folder: Path, kind: str, is_former: Callable[[Path], bool]) -> None:
    """Refuse to replace the current folder or one above it, and any but an empty one or one of the same kind.

    Args:
        name: Where the folder was given, for the message.
        folder: What is to be replaced; need not exist.
        kind: What may be replaced, such as `"model folder"`.
        is_former: Tells whether a folder is one.

    Raises:
        ValueError: If it may not be replaced.
    """
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"{name} must not be the current folder, which would be replaced, got {str(folder)!r}.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{name} must be a folder, got {str(folder)!r}, which is a file.")
    if folder.exists() and any(folder.iterdir()) and not is_former(folder):
        raise ValueError(f"{name} must be new, empty or a {kind}, got {str(folder)!r}.")


def commit(partial: Path, path: Path) -> None:
    """Give a complete file or folder its name, for writers that are no `with` block.

    A former file is replaced in one step. A former folder is moved away first and removed afterwards; after a kill
    between the two, `remove_stale_partials` puts it back.

    Args:
        partial: The file or folder; in the folder of `path`.
        path: Its name from now on.
    """
    for written in (partial, *partial.rglob("*")):
        _sync(written)
    former = partial_path(path, "former")
    if path.is_dir() and partial.is_dir():
        os.replace(path, former)
    os.replace(partial, path)
    _sync(path.parent)
    shutil.rmtree(former, ignore_errors=True)


def commit_files(partial: Path, folder: Path) -> None:
    """Move the files of a complete folder `partial` into an existing folder, replacing those of the same names.

    The folder `partial` is gone afterwards. Each file is replaced in one step, but not all of them together.
    """
    files = sorted(partial.iterdir())
    for file in files:
        _sync(file)
    for file in files:
        os.replace(file, folder / file.name)
    _sync(folder)
    partial.rmdir()


def partial_path(path: Path, kind: str = "partial", suffix: str = "") -> Path:
    """Return the hidden name, next to `path`, under which this process writes it until it is complete."""
    return path.with_name(f".{_stem(path.name)}.{kind}-{_machine()}-{os.getpid()}{suffix}")


def _stem(name: str) -> str:
    """Shorten a name to what leaves room for the rest of a hidden one."""
    rest = len("..partial---") + len(os.fsencode(_machine())) + 10 + 16  # with a process number and an extension
    return shorten_name(name, MAX_NAME_BYTES - rest)


def shorten_name(name: str, num_bytes: int) -> str:
    """Shorten a name that is too long to so many bytes, of which the last are a checksum of all of it."""
    encoded = os.fsencode(name)
    if len(encoded) <= num_bytes:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    return f"{encoded[: num_bytes - len(digest) - 1].decode(errors='ignore')}~{digest}"


def _machine() -> str:
    return platform.node()[:64]


def remove_stale_partials(path: Path) -> None:
    """Remove unfinished versions of a file or folder `path` that killed processes of this machine left.

    A complete folder that such a process had moved away, but not yet replaced, gets its name back.
    """
    if os.name != "posix":
        return  # elsewhere there is no harmless way to ask whether a process lives
    # The kind has no dot: `.vae.v2.former-...` is of `vae.v2`, which is no version of `vae`.
    pattern = re.compile(rf"\.{re.escape(_stem(path.name))}\.\w+-{re.escape(_machine())}-(\d+)(\.\w+)?")
    for partial in path.parent.glob(f".{glob.escape(_stem(path.name))}.*"):
        match = pattern.fullmatch(partial.name)
        if match is None:
            continue
        try:
            os.kill(int(match[1]), 0)
        except ProcessLookupError:
            if ".former-" in partial.name and not path.exists():
                os.replace(partial, path)
            elif partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)
        except (PermissionError, OverflowError):
            continue


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name != "posix" or not (path.is_file() or path.is_dir()):
        return  # elsewhere neither can be opened for this
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some file systems know no such request
    finally:
        os.close(descriptor)
