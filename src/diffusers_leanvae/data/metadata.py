"""Metadata of videos as people keep them: one `metadata.jsonl`, `.csv` or `.parquet`, or captions in text files."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..checks import reason_of


METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as `datasets` looks for them
CAPTION_KEYS = ("caption", "text", "txt", "captions")  # columns that may hold captions
LABEL_KEYS = ("class_label", "label", "cls")  # columns that may hold the class
_LARGEST_LABEL = 2**63 - 1  # what a tensor holds


def find_metadata(folder: Path) -> Path | None:
    """Return the metadata file of a folder, if there is one.

    Raises:
        ValueError: If there are several, of which none can be preferred.
    """
    name = choose_metadata("folder", folder, [name for name in METADATA_NAMES if (folder / name).is_file()])
    return None if name is None else folder / name


def choose_metadata(argument: str, folder: Any, files: Iterable[str]) -> str | None:
    """Return the name of the metadata file among those of a folder, if there is one.

    Args:
        argument: The argument that names the folder, for the message.
        folder: The folder, for the message.
        files: The names of its files.

    Raises:
        ValueError: If there are several, of which none can be preferred.
    """
    found = sorted(set(METADATA_NAMES).intersection(files))
    if len(found) > 1:
        raise ValueError(f"`{argument}` must hold one metadata file, got {' and '.join(found)} in {str(folder)!r}.")
    return found[0] if found else None


def read_metadata(path: Path, origin: Any = None) -> list[dict[str, Any]]:
    """Read the rows of a metadata file: `file_name` and other columns.

    A CSV file is UTF-8 and has a header. An empty cell is `None`; a column of numbers holds numbers, as `datasets`
    reads it, but for captions and names.

    Args:
        path: `metadata.jsonl`, `metadata.csv` or `metadata.parquet`.
        origin: Where a copy came from, for messages.

    Raises:
        ValueError: If it cannot be read, or a row has no `file_name`, or one that is no name; the message names the
            row.
        ImportError: If it is a Parquet file and pyarrow is not installed.
    """
    rows, shown_path = [], str(origin or path)
    read = {".csv": _csv_rows, ".jsonl": _json_rows, ".parquet": _parquet_rows}[path.suffix]
    for place, row in read(path, shown_path):
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            wanted, shown = "in every row", repr(row)
            if isinstance(row, dict) and "file_name" in row:
                wanted, shown = "in every row, a text that is not empty", repr(name)
            elif isinstance(row, dict):
                shown = f"the columns {', '.join(map(str, row))}"
            raise ValueError(
                f"`{path.name}` must give a `file_name` {wanted}, got {shown} in {place} of {shown_path!r}."
            )
        rows.append(row)
    return rows


def read_captions(video: Path) -> tuple[str, ...]:
    """Return the lines of `clip.txt` beside `clip.mp4`, each a caption; none where there is no such file.

    Raises:
        ValueError: If it is not UTF-8.
    """
    try:
        text = video.with_suffix(".txt").read_bytes()
    except (OSError, ValueError):
        return ()
    return split_captions(decode_text(text, video.with_suffix(".txt")))


def decode_text(content: bytes, origin: Any = None) -> str:
    """Decode the text of a person's file: UTF-8, with or without a byte order mark, without space around it.

    Args:
        content: The file.
        origin: Where it lies, for the message.

    Raises:
        ValueError: If it is something else.
    """
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        place = "" if origin is None else f" in {str(origin)!r}"
        raise ValueError(f"Captions and other texts beside videos must be UTF-8, got {error}{place}.") from error


def find_captions(row: dict[str, Any], column: str | None = None) -> tuple[str, ...]:
    """Return the captions in a row of metadata.

    A text is one caption, and a list of texts, also as JSON in a text, several. `txt`, which a text file of a shard
    becomes, has one in every line.

    Args:
        row: A row.
        column: The column that holds them; `None` for the first of `CAPTION_KEYS` that is not empty.

    Raises:
        ValueError: If it holds something else.
    """
    found = (_captions(key, row.get(key)) for key in (CAPTION_KEYS if column is None else (column,)))
    return next(filter(None, found), ())


def list_captions(rows: Sequence[dict[str, Any]], column: str | None = None) -> list[tuple[str, ...]]:
    """Return the captions of all rows of a source, as [`find_captions`] those of one.

    Raises:
        ValueError: If no row has that column.
    """
    if column is not None and not any(column in row for row in rows):
        names = ", ".join(dict.fromkeys(name for row in rows for name in row if name != "file_name"))
        raise ValueError(
            f"`caption_column` must be a column of the metadata ({names or 'there is none'}), got {column!r}."
        )
    return [find_captions(row, column) for row in rows]


def _captions(column: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        if column == "txt":
            return split_captions(value)
        if not value.lstrip().startswith("["):
            return (value.strip(),) if value.strip() else ()
        try:
            listed = json.loads(value)
        except ValueError:
            listed = [value]
        value = listed if all(isinstance(text, str) for text in listed) else [value]
    texts = []
    for text in value if isinstance(value, list | tuple) else (value,):
        if isinstance(text, dict | list | tuple | bool):
            raise ValueError(f"`{column}` must hold a caption or a list of captions, got {text!r}.")
        # An absent text may come as NaN: so pandas writes it.
        if text is not None and not (isinstance(text, float) and math.isnan(text)):
            texts.append(str(text).strip())
    return tuple(filter(None, texts))


def split_captions(text: str) -> tuple[str, ...]:
    """Split a text into its lines, each of them a caption."""
    # Not `splitlines`, which also breaks at separators that a caption may hold.
    return tuple(line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip())


def number_labels(rows: Sequence[dict[str, Any]]) -> tuple[list[int | None], tuple[str, ...] | None]:
    """Number the class labels of rows of metadata, taken from the first of `LABEL_KEYS` in each; names if known.

    Numbers, also written as text, stay as they are; names are numbered in their order. A number may come as `3.0`, and
    a missing one as NaN: so pandas writes a column of integers with gaps.

    Raises:
        ValueError: If some labels are numbers and some are names, or a number is negative or too large for a tensor.
    """
    found = [next((row[key] for key in LABEL_KEYS if row.get(key) is not None), None) for row in rows]
    found = [None if isinstance(label, float) and math.isnan(label) else label for label in found]
    found = [int(label) if isinstance(label, float) and label.is_integer() else label for label in found]
    # Python refuses to make a number of more than 4,300 digits.
    labels = [int(str(label)) if re.fullmatch(r"\s*\d{1,4000}\s*", str(label)) else label for label in found]
    names = sorted({label for label in labels if isinstance(label, str)})
    numbers = [label for label in labels if label is not None and not isinstance(label, str)]
    wrong = [label for label in numbers if not isinstance(label, int) or not 0 <= label <= _LARGEST_LABEL]
    if wrong or (names and numbers):
        shown = wrong[:1] or [names[0], numbers[0]]
        raise ValueError(f"Labels must be all numbers from 0 to {_LARGEST_LABEL} or all names, got {shown}.")
    if not names:
        return [None if label is None else int(label) for label in labels], None
    return [None if label is None else names.index(str(label)) for label in labels], tuple(names)


# --- Formats ---------------------------------------------------------------------------------------------------------


def _json_rows(path: Path, shown: str) -> Iterator[tuple[str, Any]]:
    # Not `splitlines`, which also breaks at separators that JSON allows inside a caption.
    for number, line in enumerate(_read_text(path, shown).split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"Every line of `{path.name}` must be a JSON object with `file_name`, got {error!r} in line "
                    f"{number} of {shown!r}."
                ) from error


def _csv_rows(path: Path, shown: str) -> Iterator[tuple[str, Any]]:
    # A caption may be longer than the 128 KiB that the module takes a field for damaged at.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        rows = list(csv.DictReader(io.StringIO(_read_text(path, shown)), strict=True))
    except csv.Error as error:
        raise ValueError(f"`{path.name}` must be a CSV file with a header, got {error} in {shown!r}.") from error
    finally:
        csv.field_size_limit(limit)
    if any(None in row for row in rows):  # where `DictReader` puts what the header has no column for
        number = next(number for number, row in enumerate(rows, start=1) if None in row)
        raise ValueError(f"`{path.name}` must have a column for every cell, got more in row {number} of {shown!r}.")
    columns = {name: [row[name] or None for row in rows] for name in (rows[0] if rows else ())}
    typed = {name: cells if name in ("file_name", *CAPTION_KEYS) else _typed(cells) for name, cells in columns.items()}
    for number in range(len(rows)):
        yield f"row {number + 1}", {name: cells[number] for name, cells in typed.items()}


def _typed(cells: list[str | None]) -> list[Any]:
    """Turn a column of text into numbers where each of its cells is one, written as numbers are."""
    for kind, pattern in ((int, r"0|-?[1-9]\d{0,17}"), (float, r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")):
        if all(cell is None or re.fullmatch(pattern, cell) for cell in cells):
            return [None if cell is None else kind(cell) for cell in cells]
    return list(cells)


def _parquet_rows(path: Path, shown: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f'Reading `{path.name}` needs pyarrow: pip install "diffusers-leanvae[datasets]".'
        ) from error
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = reason_of(error)
        raise ValueError(f"`{path.name}` must be a Parquet file, got {shown!r}: {reason}.") from error
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _read_text(path: Path, shown: str) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:  # with BOM, as spreadsheets write it; newlines become "\n"
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"`{path.name}` must be UTF-8, got {error} in {shown!r}.") from error
