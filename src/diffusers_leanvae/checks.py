"""Small checks and tables that every part of the package needs; imports nothing heavy."""

import difflib
import hashlib
import math
import os
import tempfile
import textwrap
from collections.abc import Iterable
from numbers import Integral, Rational, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch


# The dtypes that users may name, with the short name of each.
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# Files of weights in an original layout; the command line and recipes tell them from folders by these.
CHECKPOINT_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


def one_line(error: Any) -> str:
    """Put the text of an error or warning on one line of at most 400 characters; without any, the error's kind."""
    return textwrap.shorten(str(error) or type(error).__name__, 400, placeholder=" ...")


def reason_of(error: Any) -> str:
    """Put the text of an error on one line, for the end of a sentence."""
    return one_line(str(error).strip().rstrip(". ") or type(error).__name__)


def sha256(path: str | os.PathLike[str]) -> str:
    """Compute the checksum of a file, which says to which weights a number belongs."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_integer(value: Any) -> bool:
    """Tell whether a value is an integer, also one of NumPy; `True` and `False` are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number, also one of NumPy; `True` and `False` are none."""
    # A fraction can be larger than what `isfinite` takes.
    return (
        isinstance(value, Real)
        and not isinstance(value, bool)
        and (isinstance(value, Rational) or math.isfinite(value))
    )


def check_integer(name: str, value: Any) -> None:
    """Refuse what is no integer; `name` is that of the argument.

    Raises:
        ValueError: "`name` must be an integer, got 1.5."
    """
    if not is_integer(value):
        raise ValueError(f"`{name}` must be an integer, got {value!r}.")


def check_positive(name: str, value: Any) -> None:
    """Refuse what is no positive integer; `name` is that of the argument.

    Raises:
        ValueError: "`name` must be a positive integer, got 0."
    """
    if not is_integer(value) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")


def check_place(name: str, path: Path, folder: Path) -> None:
    """Refuse a folder that could not be made or written to, before any work is done.

    Args:
        name: Where `path` was given, for the message.
        path: What came.
        folder: What is to be written to: `path`, or the folder that it is in.

    Raises:
        ValueError: If it, or the nearest one above it that exists, is a file or cannot be written to.
    """
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    reason = None if place.is_dir() else "is a file"
    if reason is None:
        try:  # permissions do not tell all: root has them in /proc, too
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            reason = f"cannot be written to ({error.strerror})"
    if reason is not None:
        raise ValueError(f"{name} must lead to a folder to write to, got {str(path)!r}: {str(place)!r} {reason}.")


def check_choice(name: str, value: Any, legal: Iterable[Any], context: str = "") -> None:
    """Refuse a value that is not one of the legal ones.

    Args:
        name: The argument, for the message.
        value: What came.
        legal: All that may come; of a mapping, its keys.
        context: When the choice is this, such as `"for this model"`; goes into the message.

    Raises:
        ValueError: "`name` must be one of 'a', 'b', got 'c'."
    """
    legal = tuple(legal)
    if value not in legal:
        context = f" {context}" if context else ""
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, legal))}{context}, got {value!r}.")


def suggestion(value: Any, names: Iterable[str]) -> str:
    """Name the one of `names` that was perhaps meant, for the end of a sentence; empty if none is near."""
    near = difflib.get_close_matches(str(value), list(names), n=1, cutoff=0.75)
    return f"; perhaps {near[0]!r} is meant" if near else ""


def parse_dtype(name: str, value: str, legal: Iterable[str] = DTYPES) -> "torch.dtype":
    """Turn the name of a dtype into the dtype.

    Args:
        name: The argument, for the message.
        value: A key of `DTYPES`, or its short name, such as `"bf16"`.
        legal: The keys of `DTYPES` that may come, where not all may.

    Raises:
        ValueError: If `value` is not one of them.
    """
    import torch  # here, since the command line asks for the names alone when it prints its help

    long_names = {short: long for long, short in DTYPES.items()}
    long_name = long_names.get(value, value)
    legal = tuple(legal)
    if long_name not in legal:
        names = ", ".join(f"{long!r} ({DTYPES[long]})" for long in legal)
        raise ValueError(f"`{name}` must be one of {names}, got {value!r}.")
    return getattr(torch, long_name)


def parse_video_size(name: str, text: str) -> tuple[int, int, int]:
    """Split a size such as `"17x256x256"` into frames, height and width.

    Args:
        name: The argument, for the message.
        text: What came.

    Raises:
        ValueError: If it is no such size.
    """
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"`{name}` must be FRAMESxHEIGHTxWIDTH such as 17x256x256, got {text!r}.")
    num_frames, height, width = map(int, parts)
    return num_frames, height, width
