"""Files and folders that appear under their names only when they are complete.

Whatever is written goes beside its target first, under a hidden name, and takes the target's place in one step. A
reader sees the former content or the new one, never a part, whenever the writer is killed; and what has got its name
is on the disk, so that a loss of power does not take it back either.
"""

import glob
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Write a file beside `path`, which takes its place when the block ends without an error.

    The folder of `path` must exist. What killed processes left of the same file is removed.

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
    """Fill a folder beside `path`, which takes its place when the block ends without an error.

    Missing parents of `path` are made. What killed processes left of the same folder is removed.

    Yields:
        The hidden folder to fill; it exists and is empty.
    """
    path = Path(path)
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


def partial_path(path: Path, kind: str = "partial", suffix: str = "") -> Path:
    """Return the hidden name, beside `path`, under which this process writes it until it is complete."""
    return path.with_name(f".{path.name}.{kind}-{platform.node()}-{os.getpid()}{suffix}")


def remove_stale_partials(path: Path) -> None:
    """Remove what killed processes of this machine left of an unfinished file or folder `path`.

    A complete folder that such a process had moved away, and could not replace any more, gets its name back.
    """
    if os.name != "posix":
        return  # elsewhere there is no harmless way to ask whether a process lives
    name = f".{glob.escape(path.name)}.*-{glob.escape(platform.node())}-*"
    for partial in path.parent.glob(name):
        match = re.search(r"-(\d+)(\.\w+)?$", partial.name)
        try:
            os.kill(int(match[1]) if match else os.getpid(), 0)
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
