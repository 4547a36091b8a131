"""Names of inputs: files, folders, patterns, pipes, and addresses of servers on 127.0.0.1."""

import hashlib
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
from huggingface_hub import constants
from local_hub import LocalHub
from PIL import Image
from processes import Piped

from diffusers_leanvae.video_io import VideoError, VideoReader, inputs, list_videos, read_video
from diffusers_leanvae.video_io.inputs import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    find_sequence,
    is_media,
    is_remote,
    list_frames,
    local_file,
)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def listed(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in list_videos(folder)]


# --- Extensions ------------------------------------------------------------------------------------------------------


def test_tables_are_in_order():
    for table in (VIDEO_EXTENSIONS, IMAGE_EXTENSIONS):
        assert list(table) == sorted(set(table)) and all(name == name.lower() for name in table)
    assert set(VIDEO_EXTENSIONS) & set(IMAGE_EXTENSIONS) == set()


@pytest.mark.parametrize(
    "name", ["a.mp4", "a.MTS", "b/a.M2ts", "a.3gp", "a.ogv", "a.vob", "a.mxf", "a.y4m", "a.JPG", "a.avif"]
)
def test_media(name: str):
    assert is_media(name) and is_media(Path("/x", name))


@pytest.mark.parametrize(
    "name", ["a.txt", "a", "mp4", ".mp4", "._a.mp4", ".a.mp4", "b/._a.MOV", "a.mp4.part", "a.json"]
)
def test_no_media(name: str):
    assert not is_media(name)


# Of every kind of container that can be written here, one of its extensions.
WRITABLE = {
    ".264": ("h264", "libx264"),
    ".265": ("hevc", "libx265"),
    ".3g2": ("3g2", "libx264"),
    ".3gp": ("3gp", "libx264"),
    ".asf": ("asf", "mpeg4"),
    ".av1": ("obu", "libsvtav1"),
    ".avi": ("avi", "mpeg4"),
    ".f4v": ("f4v", "libx264"),
    ".flv": ("flv", "flv"),
    ".ivf": ("ivf", "libvpx-vp9"),
    ".m1v": ("mpeg1video", "mpeg1video"),
    ".m2ts": ("mpegts", "libx264"),
    ".m2v": ("mpeg2video", "mpeg2video"),
    ".m4v": ("m4v", "mpeg4"),
    ".mjpeg": ("mjpeg", "mjpeg"),
    ".mkv": ("matroska", "ffv1"),
    ".mov": ("mov", "prores_ks"),
    ".mp4": ("mp4", "libx264"),
    ".mpg": ("mpeg", "mpeg2video"),
    ".mts": ("mpegts", "libx264"),
    ".mxf": ("mxf", "mpeg2video"),
    ".nut": ("nut", "ffv1"),
    ".ogv": ("ogg", "libvpx"),
    ".rm": ("rm", "rv10"),
    ".swf": ("swf", "flv"),
    ".vob": ("vob", "mpeg2video"),
    ".webm": ("webm", "libvpx-vp9"),
    ".wmv": ("asf", "wmv2"),
    ".wtv": ("wtv", "mpeg2video"),
    ".y4m": ("yuv4mpegpipe", "wrapped_avframe"),
}


def write_clip(path: Path, container: str = "matroska", codec: str = "ffv1") -> Path:
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=25)
        stream.width, stream.height = 128, 96
        stream.pix_fmt = {"prores_ks": "yuv422p10le", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        for number in range(5):
            picture = np.full((96, 128, 3), 40 * number, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        output.mux(stream.encode())
    return path


@pytest.mark.parametrize("extension", WRITABLE)
def test_ffmpeg_reads_what_is_listed(tmp_path: Path, extension: str):
    path = write_clip(tmp_path / f"clip{extension.upper()}", *WRITABLE[extension])
    assert list_videos(tmp_path) == [path]
    assert len(read_video(path)[0]) == 5


# --- Folders ---------------------------------------------------------------------------------------------------------


class TestListVideos:
    def test_order_case_and_hidden_files(self, tmp_path: Path):
        touch(
            tmp_path, "b/x.MTS", "b.mp4", "a.png", "._b.mp4", ".hidden/c.mp4", "b/._x.MTS", "notes.txt", "b/c/y.webm"
        )
        assert listed(tmp_path) == ["a.png", "b/c/y.webm", "b/x.MTS", "b.mp4"]
        with pytest.raises(VideoError, match="`folder` must be an existing folder, got '.*missing'"):
            list_videos(tmp_path / "missing")

    def test_links_to_folders_are_followed_once(self, tmp_path: Path):
        touch(tmp_path / "root", "z/a.mp4", "z/deep/b.mp4")
        touch(tmp_path / "elsewhere", "c.mp4")
        root = tmp_path / "root"
        (root / "a_link").symlink_to(root / "z")  # sorts first, but the folder has a name of its own here
        (root / "circle").symlink_to(root)
        (root / "z" / "deep" / "up").symlink_to(root / "z")
        (root / "outside").symlink_to(tmp_path / "elsewhere")
        (root / "outside_again").symlink_to(tmp_path / "elsewhere")
        (root / "z" / "broken").symlink_to(root / "missing")
        (root / "z" / "broken.mp4").symlink_to(root / "missing.mp4")
        assert listed(root) == ["outside/c.mp4", "z/a.mp4", "z/deep/b.mp4"]

    def test_links_to_files_are_files(self, tmp_path: Path):
        touch(tmp_path, "blobs/1234", "clips/seen.mp4")  # as the cache of the Hub has them
        (tmp_path / "clips" / "linked.mp4").symlink_to(tmp_path / "blobs" / "1234")
        assert listed(tmp_path / "clips") == ["linked.mp4", "seen.mp4"]

    def test_the_folder_itself_may_be_a_link_or_hidden(self, tmp_path: Path):
        touch(tmp_path / ".cache", "a.mp4")
        (tmp_path / "link").symlink_to(tmp_path / ".cache")
        assert listed(tmp_path / "link") == listed(tmp_path / ".cache") == ["a.mp4"]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
    def test_closed_folders_are_named(self, tmp_path: Path):
        touch(tmp_path, "a.mp4", "closed/b.mp4")
        (tmp_path / "closed").chmod(0)
        try:
            with pytest.warns(UserWarning, match="'.*closed' is left out: Permission denied"):
                assert listed(tmp_path) == ["a.mp4"]
        finally:
            (tmp_path / "closed").chmod(0o700)

    def test_what_is_no_file_is_left_out(self, tmp_path: Path):
        (tmp_path / "folder.mp4").mkdir()
        os.mkfifo(tmp_path / "pipe.mp4")
        touch(tmp_path, "folder.mp4/a.mp4")
        assert listed(tmp_path) == ["folder.mp4/a.mp4"]


class TestSequences:
    def test_numbers_in_order(self, tmp_path: Path):
        touch(
            tmp_path,
            *(f"f_{number:04d}.png" for number in range(9_998, 10_002)),
            "f_12.png",
            "g_0001.png",
            "f_0001.jpg",
        )
        names = [path.name for path in find_sequence(tmp_path / "f_%04d.png") or []]
        assert names == ["f_9998.png", "f_9999.png", "f_10000.png", "f_10001.png"]

    @pytest.mark.parametrize(
        ("pattern", "names"),
        [
            ("%d.png", ["9.png", "10.png", "11.png"]),
            ("%3d.png", ["009.png", "010.png"]),  # as FFmpeg has it
            ("a%%b_%02d.png", ["a%b_00.png", "a%b_01.png"]),
            ("%02d%%.png", ["05%.png", "06%.png"]),
            ("a[1]+(%d).png", ["a[1]+(1).png", "a[1]+(2).png"]),
            ("%d", ["7", "8"]),
        ],
    )
    def test_patterns(self, tmp_path: Path, pattern: str, names: list[str]):
        touch(tmp_path, *names, "01.png" if pattern == "%d.png" else "other.png")
        assert find_sequence(tmp_path / pattern) == [tmp_path / name for name in names]

    def test_relative_names(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        touch(tmp_path, "1.png", "2.png")
        monkeypatch.chdir(tmp_path)
        assert find_sequence("%d.png") == [Path("1.png"), Path("2.png")]

    def test_what_is_no_pattern(self, tmp_path: Path):
        touch(tmp_path, "f_%04d.png", "f_0001.png")
        assert find_sequence(tmp_path / "f_%04d.png") is None  # a file of this name
        for name in ("a.png", "100%.mp4", "%%d.png", "%d_%d.png", "%s.png", "-", "http://host/%04d.png"):
            assert find_sequence(name) is None, name
        assert find_sequence(tmp_path / "%d" / "a.png") is None  # patterns are in the last part

    def test_gaps_and_nothing(self, tmp_path: Path):
        touch(tmp_path, "3.png", "4.png", "6.png", "9.png")
        with pytest.raises(
            VideoError, match=r"%d\.png': number 5 is missing between 3 and 9, expected a sequence without"
        ):
            find_sequence(tmp_path / "%d.png")
        with pytest.raises(VideoError, match=r"x_%d\.png': no file has a name of this pattern\.$"):
            find_sequence(tmp_path / "x_%d.png")
        with pytest.raises(VideoError, match=r"Cannot read '.*missing.*': No such file or directory\.$"):
            find_sequence(tmp_path / "missing" / "x_%d.png")

    def test_frames_of_a_folder(self, tmp_path: Path):
        touch(tmp_path, "f_10.png", "f_2.png", "f_1.JPG", "._f_3.png", "clip.mp4", "notes.txt", "sub/f_4.png", "7.png")
        assert [path.name for path in list_frames(tmp_path)] == ["7.png", "f_1.JPG", "f_2.png", "f_10.png"]
        with pytest.raises(VideoError, match="`folder` must be an existing folder"):
            list_frames(tmp_path / "missing")


# --- Files and pipes -------------------------------------------------------------------------------------------------


def measure_standard_input() -> None:
    with local_file("-") as path:
        print(len(path.read_bytes()), path.suffix == "")


class TestLocalFile:
    def test_a_path_is_itself(self, tmp_path: Path):
        for name in (tmp_path / "a.mp4", str(tmp_path / "a.mp4"), "relative/é %d.mp4", "c:d.mp4", "file:a.mp4"):
            with local_file(name) as path:
                assert path == Path(name)

    def test_errors_of_the_block_pass_through(self, tmp_path: Path):
        with pytest.raises(OSError, match="mine"), local_file(tmp_path / "a.mp4"):
            raise OSError("mine")

    @pytest.mark.parametrize("name", ["pipe", "pipe.mkv"])
    def test_fifo(self, tmp_path: Path, name: str):
        content = write_clip(tmp_path / "clip.mkv").read_bytes()
        os.mkfifo(tmp_path / name)
        writer = threading.Thread(target=(tmp_path / name).write_bytes, args=(content,))
        writer.start()
        with local_file(tmp_path / name) as path:
            assert path.suffix == Path(name).suffix and path.read_bytes() == content
        writer.join()
        assert not path.exists()

    def test_standard_input(self, tmp_path: Path):
        clip = write_clip(tmp_path / "clip.mkv")
        _, out, err = Piped(measure_standard_input, stdin=clip).communicate()
        assert out.split() == [b"%d" % clip.stat().st_size, b"True"], err
        _, _, err = Piped(measure_standard_input, stdin=os.devnull).communicate()
        assert b"VideoError: Cannot read '-': nothing came through the pipe." in err

    def test_a_terminal_is_no_input(self, monkeypatch: pytest.MonkeyPatch):
        master, terminal = os.openpty()
        try:
            with open(terminal, closefd=False) as file:
                monkeypatch.setattr(sys, "stdin", file)
                with pytest.raises(VideoError, match=r"'-': standard input is a terminal"), local_file("-"):
                    pass
        finally:
            os.close(master)
            os.close(terminal)

    def test_no_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
        with (
            pytest.raises(VideoError, match="there is no room for a temporary file"),
            local_file("http://127.0.0.1:9/a.mp4"),
        ):
            pass


# --- Addresses -------------------------------------------------------------------------------------------------------


CONTENT = bytes(range(256)) * 4000


REDIRECTIONS = {
    "/moved.mp4": "/clip.mp4",
    "/to_file.mp4": "file:///etc/passwd",
    "/to_ftp.mp4": "ftp://127.0.0.1/a.mp4",
    "/circle.mp4": "/circle.mp4",
}
ANSWERS = {
    "/short.mp4": ({"Content_Length": str(len(CONTENT))}, CONTENT[:1000]),
    "/chunked.mp4": ({"Transfer_Encoding": "chunked"}, b"5\r\nabcde\r\n3\r\nfgh\r\n0\r\n\r\n"),
    "/broken_chunks.mp4": ({"Transfer_Encoding": "chunked"}, b"5\r\nabcde\r\nff\r\nfgh"),
    "/page": ({"Content_Type": "text/html; charset=utf-8", "Content_Length": "6"}, b"<html>"),
    "/packed.mp4": ({"Content_Encoding": "gzip", "Content_Length": "6"}, b"packed"),
    "/empty.mp4": ({"Content_Length": "0"}, b""),
}


class Handler(BaseHTTPRequestHandler):
    server: "Server"

    def log_message(self, *_: object) -> None:
        pass

    def begin(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        path = self.path.split("?")[0]
        if path == "/clip.png":
            self.begin(200, Content_Length="14")
            self.wfile.write(b"\x89PNG\r\n\x1a\nbroken")
        elif path.startswith("/clip") or "%20" in path:
            self.begin(200, Content_Length=str(len(CONTENT)), Content_Type="video/mp4")
            self.wfile.write(CONTENT)
        elif path in REDIRECTIONS:
            self.begin(302, Location=REDIRECTIONS[path], Content_Length="0")
        elif path in ANSWERS:
            self.protocol_version = "HTTP/1.1"
            headers, body = ANSWERS[path]
            self.begin(200, **headers, Connection="close")
            self.wfile.write(body)
        elif path == "/silent.mp4":
            self.server.released.wait(20)
        elif path == "/drip.mp4":
            self.begin(200)
            try:
                while not self.server.released.wait(0.05):
                    self.wfile.write(b".")
            except OSError:
                pass
        else:
            self.begin(404 if path == "/missing.mp4" else 503, Content_Length="0")


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


class TestWeb:
    def test_is_remote(self):
        for name in ("http://h/a.mp4", "HTTPS://h/a.mp4", "hf://u/r/a.mp4", Path("https://h/a.mp4")):
            assert is_remote(name), name
        for name in ("a.mp4", "-", "http.mp4", "/http://", "file:///a", "ftp://h/a", "c:/a.mp4", "hf:a", "http:"):
            assert not is_remote(name), name

    @pytest.mark.parametrize(
        ("place", "suffix"),
        [
            ("/clip.mp4", ".mp4"),
            ("/clip.MKV?token=a/b.c#t=1", ".MKV"),
            ("/clip", ""),
            ("/moved.mp4", ".mp4"),
            ("/a b/é.mp4", ".mp4"),
        ],
    )
    def test_download(self, server: Server, place: str, suffix: str):
        with local_file(server.url + place) as path:
            assert path.suffix == suffix and path.read_bytes() == CONTENT
        assert not path.exists() and not path.parent.exists()
        assert server.seen[0][1]["User-Agent"].startswith("diffusers-leanvae/")
        assert server.seen[0][0].isascii() and " " not in server.seen[0][0]

    def test_a_path_object_is_an_address_too(self, server: Server):
        with local_file(Path(server.url + "/clip.mp4")) as path:
            assert path.read_bytes() == CONTENT

    def test_chunks(self, server: Server):
        with local_file(server.url + "/chunked.mp4") as path:
            assert path.read_bytes() == b"abcdefgh"

    def test_password(self, server: Server):
        address = server.url.replace("//", "//user:p%40ss@")
        with local_file(f"{address}/clip.mp4"):
            assert server.seen[0][1]["Authorization"] == "Basic dXNlcjpwQHNz"
        with pytest.raises(VideoError) as caught, local_file(f"{address}/missing.mp4"):
            pass
        assert "p%40ss" not in str(caught.value)

    @pytest.mark.parametrize(
        ("place", "reason"),
        [
            ("missing.mp4", r"the server answered 404 \(Not Found\)"),
            ("other.mp4", r"the server answered 503 \(Service Unavailable\)"),
            ("short.mp4", "the connection broke after 1000 of 1024000 bytes"),
            ("broken_chunks.mp4", "the connection broke after .* bytes"),
            ("page", "the address leads to a web page, expected a video or image file"),
            ("packed.mp4", "the server sent it in the encoding 'gzip', which is not asked for"),
            ("empty.mp4", "the file is empty"),
            ("to_file.mp4", "the server answered 302 .*"),
            ("to_ftp.mp4", "the server cannot be reached .*"),
            ("circle.mp4", "the server answered 302 .*"),
        ],
    )
    def test_failures(self, server: Server, place: str, reason: str):
        address = f"{server.url}/{place}"
        with pytest.raises(VideoError, match=rf"^Cannot read '{address}': {reason}\.$"), local_file(address):
            pass

    @pytest.mark.parametrize(
        ("place", "reason"), [("silent", "did not answer within 1 seconds"), ("drip", "sent .* bytes in 1 seconds")]
    )
    def test_time_limit(self, server: Server, monkeypatch: pytest.MonkeyPatch, place: str, reason: str):
        monkeypatch.setattr(inputs, "TIMEOUT", 1.0)
        began = time.monotonic()
        with pytest.raises(VideoError, match=f"the server {reason}"), local_file(f"{server.url}/{place}.mp4"):
            pass
        assert time.monotonic() - began < 15

    def test_nobody_there(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        unused = Server()
        unused.server_close()
        with (
            pytest.raises(VideoError, match=r"the server cannot be reached \(Connection refused\)\.$"),
            local_file(unused.url),
        ):
            pass
        for address in ("http://127.0.0.1:port/a.mp4", "http://[::1/a.mp4", "http://a\x00b/a.mp4"):
            with pytest.raises(VideoError, match="^Cannot read 'http"), local_file(address):
                pass

    def test_messages_name_the_address(self, server: Server):
        for place in ("/clip.png", "/clip.mp4"):  # a damaged picture, and nothing at all
            with pytest.raises(VideoError, match=f"^Cannot read '{server.url}{place}'"):
                read_video(server.url + place)

    def test_no_video_makes_ffmpeg_open_the_network(self, tmp_path: Path, server: Server):
        playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{server.url}/clip.ts\n#EXT-X-ENDLIST\n"
        for name in ("list.m3u8", "list.mp4", "list.ts", "list.png"):
            (tmp_path / name).write_text(playlist)
            with pytest.raises(VideoError):
                VideoReader(tmp_path / name)
        (tmp_path / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile {server.url}/clip.mp4\n")
        with pytest.raises(VideoError):
            VideoReader(tmp_path / "list.ffconcat")
        assert server.seen == []


class TestHub:
    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
        with LocalHub() as hub:
            hub.connect(monkeypatch)
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
            hub.repositories["someone/tiny"] = {"clips/a.mp4": CONTENT}
            hub.repositories["datasets/someone/films"] = {"b.webm": CONTENT[:99]}
            yield hub

    @pytest.mark.parametrize(
        ("address", "size"),
        [
            ("hf://someone/tiny/clips/a.mp4", len(CONTENT)),
            ("hf://models/someone/tiny@main/clips/a.mp4", len(CONTENT)),
            ("HF://datasets/someone/films/b.webm", 99),
            (Path("hf://datasets/someone/films@main/b.webm"), 99),
        ],
    )
    def test_files(self, hub: LocalHub, tmp_path: Path, address: str | Path, size: int):
        with local_file(address) as path:
            assert path.is_relative_to(tmp_path / "cache") and path.name == Path(address).name
            assert path.read_bytes() == CONTENT[:size]
        assert path.exists() and hub.unknown == []

    def test_the_cache_is_enough(self, hub: LocalHub, monkeypatch: pytest.MonkeyPatch):
        with local_file("hf://someone/tiny/clips/a.mp4"):
            pass
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with local_file("hf://someone/tiny/clips/a.mp4") as path:
            assert hashlib.sha1(path.read_bytes()).digest() == hashlib.sha1(CONTENT).digest()
        with pytest.raises(VideoError, match="the Hub cannot be reached, and the file is not in its cache"):
            with local_file("hf://someone/tiny/other.mp4"):
                pass

    @pytest.mark.parametrize(
        ("address", "reason"),
        [
            ("hf://someone/missing/a.mp4", "there is no model 'someone/missing' on the Hub, or it is private .*"),
            ("hf://datasets/someone/tiny/a.mp4", "there is no dataset 'someone/tiny' on the Hub, or it is private .*"),
            ("hf://someone/tiny/b.mp4", r"the model 'someone/tiny' has no file 'b\.mp4'"),
            ("hf://someone/tiny", "it must name a file as in .*"),
            ("hf://buckets/someone/tiny/a.mp4", "it must name a file as in .*"),
            ("hf://tiny", "Repository id must be .*"),
            ("hf://some one/ti ny/a.mp4", "Repo id must use .*"),
        ],
    )
    def test_failures(self, hub: LocalHub, address: str, reason: str):
        with pytest.raises(VideoError, match=rf"^Cannot read '{address}': {reason}\.$"), local_file(address):
            pass


def test_a_picture_sequence_has_frames(tmp_path: Path):
    for number in range(3):
        Image.new("RGB", (8, 6), (80 * number,) * 3).save(tmp_path / f"f_{number:03d}.png")
    paths = find_sequence(tmp_path / "f_%03d.png")
    assert paths == list_frames(tmp_path) == [tmp_path / f"f_{number:03d}.png" for number in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list_videos(tmp_path) == paths
