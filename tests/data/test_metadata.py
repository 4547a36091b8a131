"""Labels and captions come from whatever file people keep them in, and none gets lost without a word."""

import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusers_leanvae.data import open_training_data
from diffusers_leanvae.data.clip_lists import ClipSelection, open_clip_list
from diffusers_leanvae.data.latent_samples import LatentData
from diffusers_leanvae.data.metadata import find_captions, number_labels, read_captions, read_metadata
from diffusers_leanvae.data.named import open_named_dataset
from diffusers_leanvae.data.sources import open_source


# What a spreadsheet holds: gaps, separators, quotes and line breaks inside of cells, numbers, a name that is one.
ROWS: list[dict[str, Any]] = [
    {"file_name": "b.mp4", "label": 1, "caption": 'one, "two"\nthree', "speed": 0.5, "take": "007"},
    {"file_name": "a.mp4", "label": 0, "caption": "12", "speed": None, "take": "x"},
]


def write_jsonl(path: Path, rows: list[dict[str, Any]], mark: str = "") -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text(mark + "\n".join(lines), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]], mark: str = "") -> None:
    def cell(value: Any) -> str:
        return "" if value is None else '"' + str(value).replace('"', '""') + '"'

    lines = [",".join(rows[0]), *(",".join(map(cell, row.values())) for row in rows)]
    path.write_bytes((mark + "\r\n".join(lines) + "\r\n").encode())  # as spreadsheets end lines


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow comes with the optional datasets")
    pyarrow = sys.modules["pyarrow"]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[..., None]] = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}


@pytest.fixture(params=WRITERS)
def listed(request: pytest.FixtureRequest, clips: Path, tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(clips / name, tmp_path)
    shutil.copy(clips / "a.mp4", tmp_path / "unlisted.mp4")
    WRITERS[request.param](tmp_path / f"metadata.{request.param}", ROWS)
    return tmp_path


def test_every_format_says_the_same(listed: Path):
    source = open_source(listed)
    assert [source.metadata(number) for number in range(len(source))] == ROWS
    data = open_training_data(str(listed), batch_size=1, clip_sizes=[[5, 16, 16]])
    assert len(data) == 2 and data.metadata(1) == ROWS[1]
    named = open_named_dataset("videofolder", listed, 5, 16, sample_stride=1)
    expected = [(1, (ROWS[0]["caption"],)), (0, ("12",))]
    assert [(clip.class_label, clip.captions) for clip in map(named.clip, range(2))] == expected
    clips = open_clip_list(ClipSelection(str(listed), (5, 16, 16)))
    assert [(clip.class_label, clip.captions) for clip in clips.read(range(2)) if clip is not None] == expected


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(kind: str, tmp_path: Path):
    WRITERS[kind](tmp_path / f"metadata.{kind}", ROWS, mark="\ufeff")
    assert read_metadata(tmp_path / f"metadata.{kind}") == ROWS


def test_line_separators_inside_a_caption(tmp_path: Path):
    rows = [{"file_name": "a.mp4", "caption": "one\u2028two\x85three"}]
    for kind in ("jsonl", "csv"):
        WRITERS[kind](tmp_path / f"metadata.{kind}", rows)
        assert read_metadata(tmp_path / f"metadata.{kind}") == rows


def test_a_caption_of_any_length(tmp_path: Path):
    rows = [{"file_name": "a.mp4", "caption": "long " * 50_000}]  # more than the `csv` module takes by itself
    write_csv(tmp_path / "metadata.csv", rows)
    assert read_metadata(tmp_path / "metadata.csv") == rows


def test_two_metadata_files_are_refused(clips: Path, tmp_path: Path):
    shutil.copy(clips / "a.mp4", tmp_path)
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "a.mp4"}])
    write_csv(tmp_path / "metadata.csv", [{"file_name": "a.mp4"}])
    for open_folder in (open_source, lambda folder: open_named_dataset("videofolder", folder, 5, 16)):
        with pytest.raises(ValueError, match=r"must hold one metadata file, got metadata.csv and metadata.jsonl in"):
            open_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "metadata.csv",
            b"path,caption\na.mp4,hello\n",
            r"`file_name` in every row, got the columns path, caption in row 1",
        ),
        ("metadata.csv", b"file_name,caption\na.mp4,x\n,y\n", r"`file_name` in every row, .* in row 2"),
        (
            "metadata.csv",
            b"file_name,caption\na.mp4,x\n,y\n",
            r"`file_name` in every row, a text that is not empty, got None in row 2",
        ),
        (
            "metadata.jsonl",
            b'{"file_name": "", "label": 1}\n',
            r"`file_name` in every row, a text that is not empty, got '' in line 1 of",
        ),
        (
            "metadata.jsonl",
            b'{"file_name": "a.mp4"}\n{"file_name": 7}\n',
            r"`file_name` in every row, a text that is not empty, got 7 in line 2 of",
        ),
        ("metadata.csv", b"file_name,caption\na.mp4,x,y\n", r"a column for every cell, got more in row 1"),
        ("metadata.csv", b'file_name,caption\na.mp4,"x\n', r"must be a CSV file with a header, got "),
        ("metadata.csv", "file_name\nä.mp4\n".encode("latin-1"), r"`metadata.csv` must be UTF-8, got "),
        ("metadata.jsonl", b'{"file_name": "a.mp4"}\n{"file', r"must be a JSON object .* in line 2 of"),
        ("metadata.jsonl", b'["a.mp4"]\n', r"`file_name` in every row, got \['a.mp4'\] in line 1"),
        ("metadata.parquet", b"PAR1 or something else", r"`metadata.parquet` must be a Parquet file, got "),
    ],
)
def test_what_is_wrong_is_named(name: str, content: bytes, message: str, tmp_path: Path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pyarrow comes with the optional datasets")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_metadata(tmp_path / name)
    assert "\n" not in str(error.value)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "metadata.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r'needs pyarrow: pip install "diffusers-leanvae\[datasets\]"'):
        open_source(tmp_path)


def test_labels_as_pandas_writes_a_column_with_gaps():
    rows = [{"label": 1.0}, {"label": float("nan")}, {"label": 0.0}]
    assert number_labels(rows) == ([1, None, 0], None)


# --- Captions beside videos ------------------------------------------------------------------------------------------


def test_a_text_file_beside_a_video_is_its_caption(clips: Path, tmp_path: Path):
    for name in ("a", "b", "c", "dots.v1"):
        shutil.copy(clips / "a.mp4", tmp_path / f"{name}.mp4")
    (tmp_path / "a.txt").write_text("a surfer\n")
    (tmp_path / "b.txt").write_bytes("\ufeffein Sörfer".encode())
    (tmp_path / "c.txt").write_text(" \n")  # as good as none
    (tmp_path / "dots.v1.txt").write_text("first version")
    (tmp_path / "README.txt").write_text("of nothing")
    (tmp_path / "e.txt").write_bytes(b"one\r\n\r\n two \r\n")
    shutil.copy(clips / "a.mp4", tmp_path / "e.mp4")
    captions = [("a surfer",), ("ein Sörfer",), (), ("first version",), ("one", "two")]

    source = open_source(tmp_path)
    rows = [source.metadata(number) for number in range(len(source))]
    assert [find_captions(row) for row in rows] == captions
    assert rows[0]["caption"] == "a surfer" and len(rows[2]) == 1 and rows[4]["captions"] == ["one", "two"]
    named = open_named_dataset("videofolder", tmp_path, 5, 16, sample_stride=1)
    assert [named.metadata(number)["captions"] for number in range(5)] == captions
    assert read_captions(tmp_path / "README.mp4") == ("of nothing",)

    (tmp_path / "b.txt").write_bytes("ein Sörfer".encode("latin-1"))
    message = r"^Captions .* must be UTF-8, got 'utf-8' codec can't decode byte 0xf6 .* in '.*b\.txt'\.$"
    with pytest.raises(ValueError, match=message):
        source.metadata(1)
    with pytest.raises(ValueError, match=message):
        open_named_dataset("videofolder", tmp_path, 5, 16, sample_stride=1)

    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "a.mp4"}, {"file_name": "b.mp4", "caption": "listed"}])
    source = open_source(tmp_path)
    assert [find_captions(source.metadata(number)) for number in range(2)] == [(), ("listed",)]


def test_captions_of_a_row():
    nan = float("nan")
    for row, captions in (
        ({"caption": " ", "text": None, "txt": "there\n"}, ("there",)),
        ({"caption": ""}, ()),
        ({"caption": nan, "captions": ["one ", "", None, nan, "two"]}, ("one", "two")),
        ({"caption": ["one", "two"], "captions": ["three"]}, ("one", "two")),
        ({"captions": '["one", "two"]'}, ("one", "two")),  # as a cell of a CSV file has to write it
        ({"caption": '[laughing] a "dog"'}, ('[laughing] a "dog"',)),
        ({"caption": "[1, 2]"}, ("[1, 2]",)),
        ({"caption": "two\nlines"}, ("two\nlines",)),
        ({"txt": "two\nlines"}, ("two", "lines")),
        ({"text": 12}, ("12",)),
    ):
        assert find_captions(row) == captions, row
    row = {"caption": "short", "long": "much longer", "words": ["a", "b"], "none": None}
    found = [find_captions(row, column) for column in ("long", "words", "none", "absent")]
    assert found == [("much longer",), ("a", "b"), (), ()]
    for bad in ({"a": 1}, [["a"]], True):
        with pytest.raises(ValueError, match="`caption` must hold a caption or a list of captions, got"):
            find_captions({"caption": bad})


COLUMNS: list[dict[str, Any]] = [
    {"file_name": "b.mp4", "caption": "short", "prompt": "a first video", "many": '["a first one", "another way"]'},
    {"file_name": "a.mp4", "caption": "brief", "prompt": "a second video", "many": '["a second one"]'},
]
MANY = [("a first one", "another way"), ("a second one",)]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_column_of_captions_may_be_chosen(kind: str, clips: Path, tmp_path: Path):
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(clips / name, tmp_path)
    rows = COLUMNS if kind == "csv" else [row | {"many": json.loads(row["many"])} for row in COLUMNS]
    WRITERS[kind](tmp_path / f"metadata.{kind}", rows)
    for column, captions in (
        (None, [("short",), ("brief",)]),
        ("prompt", [("a first video",), ("a second video",)]),
        ("many", MANY),
    ):
        data = open_training_data(str(tmp_path), batch_size=1, clip_sizes=[[5, 16, 16]], caption_column=column)
        named = open_named_dataset("videofolder", tmp_path, 5, 16, sample_stride=1, caption_column=column)
        listed = open_clip_list(ClipSelection(str(tmp_path), (5, 16, 16), caption_column=column))
        assert [data.captions(video) for video in range(2)] == captions
        assert [named.captions(index) for index in range(2)] == [clip.captions for clip in named] == captions
        assert [clip.captions for clip in listed.read(range(2)) if clip is not None] == captions
    wrong = "`caption_column` must be a column of the metadata \\(caption, prompt, many\\), got 'prompts'"
    for call in (
        lambda: open_training_data(str(tmp_path), batch_size=1, caption_column="prompts"),
        lambda: open_named_dataset("videofolder", tmp_path, 5, 16, caption_column="prompts"),
        lambda: open_clip_list(ClipSelection(str(tmp_path), (5, 16, 16), caption_column="prompts")),
    ):
        with pytest.raises(ValueError, match=wrong):
            call()
    with pytest.raises(ValueError, match="`caption_column` must be None for ffs, which has no captions, got 'many'"):
        open_named_dataset("ffs", tmp_path, 5, 16, caption_column="many")


def test_columns_of_a_hub_dataset(clips: Path, tmp_path: Path):
    pytest.importorskip("datasets", reason="datasets is an optional dependency")
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(clips / name, tmp_path)
    write_jsonl(tmp_path / "metadata.jsonl", [row | {"many": json.loads(row["many"])} for row in COLUMNS])
    for column, captions in ((None, [("short",), ("brief",)]), ("many", MANY)):
        options = {"batch_size": 2, "clip_sizes": [[5, 16, 16]], "shuffle_buffer": 2, "caption_column": column}
        data = open_training_data(f"hub:{tmp_path}", **options)
        samples = LatentData(data, has_latents=False, has_captions=True)
        batch = samples.__getitems__([0, 1])
        assert batch.captions is not None
        for number, caption in enumerate(batch.captions):
            assert caption in data.captions(data[number].video)
        assert {data.captions(data[number].video) for number in range(2)} == set(captions)
        data.close()


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_key_of_json_in_shards_may_be_chosen(is_stream: bool, clips: Path, tmp_path: Path):
    if is_stream:
        pytest.importorskip("datasets", reason="datasets is an optional dependency")
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for row in COLUMNS:
            name = row["file_name"].removesuffix(".mp4")
            archive.add(clips / row["file_name"], row["file_name"])
            parts = {"json": json.dumps(row | {"many": json.loads(row["many"])}), "txt": "one line\nanother"}
            for extension, text in parts.items():
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(text.encode())
                archive.addfile(member, io.BytesIO(text.encode()))
    source = (tmp_path / "0.tar").as_uri() if is_stream else str(tmp_path / "0.tar")
    for column, captions in (
        (None, [("short",), ("brief",)]),
        ("many", MANY),
        ("txt", [("one line", "another")] * 2),
    ):
        data = open_training_data(
            source, batch_size=2, clip_sizes=[[5, 16, 16]], caption_column=column, shuffle_buffer=2
        )
        samples = LatentData(data, has_latents=False, has_captions=True)
        (batch,) = samples.first(2, 2)
        videos = [data[index].video for index in range(2)]
        assert batch.captions == [captions[video][0] for video in videos] and sorted(videos) == [0, 1]
        selection = ClipSelection(source, (5, 16, 16), num_clips=2, caption_column=column)
        assert [clip.captions for clip in open_clip_list(selection).read(range(2)) if clip is not None] == captions
        data.close()
    selection = ClipSelection(source, (5, 16, 16), num_clips=2, caption_column="prompts")
    with pytest.raises(ValueError, match="`caption_column` must be a column of the metadata .*, got 'prompts'"):
        list(open_clip_list(selection).read(range(2)))
