"""Names of inputs: files and their extensions, folders, numbered pictures, pipes, and addresses on the network."""

from __future__ import annotations

import base64
import http.client
import os
import re
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from .._version import __version__
from ..hub_errors import hub_reason
from .containers import PathLike, VideoError, check_path


# Names under which FFmpeg finds a moving picture. Left out is what may as well be something else (`.dat`, `.ogg`,
# `.avs`) or has no header (`.yuv`).
VIDEO_EXTENSIONS = tuple(
    """
    .264 .265 .266 .3g2 .3gp .3gp2 .3gpp .amv .apv .asf .av1 .avc .avi .cavs .dif .divx .dnxhd .drc .dv .dvr-ms .f4v
    .flc .fli .flv .gxf .h261 .h263 .h264 .h265 .h266 .hevc .insv .ismv .ivf .lrv .m1v .m2p .m2t .m2ts .m2v .m4v
    .mj2 .mjpeg .mjpg .mk3d .mkv .mod .mov .mp4 .mp4v .mpe .mpeg .mpg .mpv .mts .mxf .nut .nuv .obu .ogm .ogv .ogx
    .qt .rm .rmvb .swf .tod .tp .trp .ts .vc1 .vob .vro .vvc .webm .wm .wmv .wtv .xvid .y4m
    """.split()
)
# Pictures that come out as they were meant. Icons (`.ico`: one picture in many sizes) and light that has no white
# (`.exr`, `.hdr`, `.pfm`) are not searched for.
IMAGE_EXTENSIONS = tuple(
    """
    .apng .avif .avifs .bmp .dib .gif .heic .heif .hif .icb .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx .mpo
    .pbm .pcx .pgm .png .pnm .ppm .qoi .sgi .tga .tif .tiff .vda .vst .webp
    """.split()
)

TIMEOUT = 30.0  # seconds without a byte, after which a server counts as gone
_BLOCK = 1 << 18
_ADDRESS = re.compile(r"(https?|hf):/{1,2}(?=[^/])", re.IGNORECASE)  # `Path` makes one slash of two
_NUMBER = re.compile(r"%(0?[1-9])?d")  # of one digit: `%20d` is a space in a name from the network, before a "d"


# --- Files and folders -----------------------------------------------------------------------------------------------


def is_media(path: PathLike) -> bool:
    """Tell by its name whether a file is a video or image; hidden files, such as `._clip.mp4` of macOS, are not."""
    path = Path(path)
    return not path.name.startswith(".") and path.suffix.lower() in (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS)


def list_videos(folder: PathLike) -> list[Path]:
    """List all video and image files below `folder`, as `list_files` does.

    Raises:
        VideoError: If `folder` is not a folder.
    """
    return list_files(folder, is_media)


def list_files(folder: PathLike, is_wanted: Callable[[Path], bool]) -> list[Path]:
    """List the files below `folder` whose name is wanted, sorted by path.

    Hidden files and folders are left out. Links to folders are followed, but no folder is listed twice: not by its own
    name and by that of a link, and not in a circle. Folders that must not be read are named in a warning.

    Raises:
        VideoError: If `folder` is not a folder.
    """
    check_path("folder", folder)
    root = Path(folder)
    if not root.is_dir():
        raise VideoError(f"`folder` must be an existing folder, got {str(folder)!r}.")
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    waiting, links = [root], []
    while waiting or links:
        # Links come last, so that a folder is listed under its own name where it has one below `folder`.
        place = waiting.pop() if waiting else links.pop(0)
        try:
            status = place.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            if place == root:
                raise VideoError(f"Cannot list {str(folder)!r}: {error.strerror}.") from error
            warnings.warn(f"{str(place)!r} is left out: {error.strerror}.", stacklevel=2)
            continue
        for entry in entries:
            path = place / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif entry.is_symlink() and path.is_dir():
                links.append(path)
            elif is_wanted(path) and path.is_file():
                found.append(path)
    return sorted(found)


def find_sequence(source: PathLike) -> list[Path] | None:
    """Find the files of an image sequence, in numerical order from the lowest number that there is.

    Args:
        source: A path whose last part holds one printf pattern, `f_%04d.png` or `%d.png`, for numbers of at least as
            many digits; `%%` stands for a percent sign.

    Returns:
        The files, or `None` where `source` is no pattern. A file of exactly this name counts as a file.

    Raises:
        VideoError: If there is no such file, or a number is missing between the lowest and the highest.
    """
    folder, name = Path(source).parent, Path(source).name
    if is_remote(source) or not is_pattern(name) or Path(source).exists():
        return None
    try:
        numbered = numbered_files(folder, name)
    except OSError as error:
        raise VideoError(f"Cannot read {str(source)!r}: {error.strerror}.") from error
    if not numbered:
        raise VideoError(f"Cannot read {str(source)!r}: no file has a name of this pattern.")
    first, last = min(numbered), max(numbered)
    if len(numbered) <= last - first:
        missing = next(number for number in range(first, last) if number not in numbered)
        raise VideoError(
            f"Cannot read {str(source)!r}: number {missing} is missing between {first} and {last}, expected a "
            "sequence without gaps."
        )
    return [numbered[number] for number in range(first, last + 1)]


def is_pattern(name: str) -> bool:
    """Tell whether a name holds the place of one number, `%d`, `%4d` or `%04d`; `%%` stands for a percent sign."""
    return sum(len(_NUMBER.findall(piece)) for piece in name.split("%%")) == 1


def numbered_name(pattern: str, number: int) -> str:
    """Put a number into a pattern, with zeros in front as FFmpeg does, also for `%4d`."""
    return "%".join(_NUMBER.sub(lambda m: f"{number:0{int(m[1] or 1)}d}", piece) for piece in pattern.split("%%"))


def numbered_files(folder: Path, pattern: str) -> dict[int, Path]:
    """Find the files in a folder whose names are of a pattern, by number.

    Raises:
        OSError: If the folder cannot be listed.
    """
    escaped = (map(re.escape, _NUMBER.sub("\0", piece).split("\0")) for piece in pattern.split("%%"))
    expected = re.compile("%".join("([0-9]+)".join(parts) for parts in escaped))
    found: dict[int, Path] = {}
    for entry in os.scandir(folder):
        match = expected.fullmatch(entry.name)
        if match and numbered_name(pattern, int(match[1])) == entry.name and entry.is_file():
            found[int(match[1])] = folder / entry.name
    return found


def list_frames(folder: PathLike) -> list[Path]:
    """List the images directly in a folder by the numbers in their names: `f_2.png` comes before `f_10.png`.

    Raises:
        VideoError: If `folder` is not a folder.
    """
    check_path("folder", folder)
    root = Path(folder)
    try:
        paths = [
            root / entry.name
            for entry in os.scandir(root)
            if is_media(entry.name) and Path(entry.name).suffix.lower() in IMAGE_EXTENSIONS and entry.is_file()
        ]
    except OSError as error:
        raise VideoError(f"`folder` must be an existing folder, got {str(folder)!r}.") from error
    return sorted(paths, key=lambda path: (_natural(path.name), path.name))


def _natural(name: str) -> list[tuple[int, str]]:
    # Text and digits take turns, text first, so that numbers are only ever compared with numbers.
    return [(int(part), "") if number % 2 else (0, part) for number, part in enumerate(re.split("([0-9]+)", name))]


# --- Pipes and addresses ---------------------------------------------------------------------------------------------


def is_remote(source: PathLike) -> bool:
    """Tell whether an input lies on the network: `http://`, `https://` or `hf://`."""
    return _ADDRESS.match(os.fspath(source)) is not None


@contextmanager
def local_file(source: PathLike) -> Iterator[Path]:
    """Give a path to read any input from, inside the `with` block.

    Args:
        source: A path, which is given back as it is; `"-"` for standard input, or a named pipe, which are copied to a
            temporary file; `http://` and `https://` addresses, which are downloaded to one; and files of the Hub,
            `hf://datasets/user/name@revision/path` or `hf://user/name/path`, which are kept in the cache of
            huggingface_hub. Temporary files are removed at the end of the block.

    Yields:
        A path, with the extension of `source` where it has one.

    Raises:
        VideoError: If the input cannot be had; the message names it and says why.
    """
    name = os.fspath(source)
    if is_remote(name):
        address = _ADDRESS.sub(lambda match: f"{match[1].lower()}://", name)
        if address.startswith("hf://"):
            yield _from_hub(name, address)
            return
        extension = Path(unquote(re.sub("^[a-z]+://[^/?#]*|[?#].*", "", address))).suffix
    elif name == "-" or Path(name).is_fifo():
        address, extension = "", Path(name).suffix
    else:
        yield Path(source)
        return
    try:
        folder = tempfile.TemporaryDirectory(prefix="leanvae-")
    except OSError as error:
        raise _unreadable(name, f"there is no room for a temporary file ({error.strerror})") from error
    with folder:
        is_plain = re.fullmatch(r"\.[A-Za-z0-9-]{1,10}", extension) is not None
        path = Path(folder.name, f"input{extension if is_plain else ''}")
        try:
            with path.open("wb") as file:
                if address:
                    _download(address, file)
                else:
                    _copy_pipe(name, file)
        except _Failure as failure:
            raise _unreadable(name, str(failure)) from failure
        except OSError as error:
            raise _unreadable(name, f"{error.strerror or error}") from error
        yield path


class _Failure(Exception):
    """The message is the end of a sentence that begins with the name of the input."""


def _unreadable(source: str, reason: str) -> VideoError:
    shown = re.sub(r"(?<=://)[^/@]*@", "", source)  # a password in the address is for the server only
    reason = re.sub(r"\s+", " ", reason).rstrip(". ")
    return VideoError(f"Cannot read {shown!r}: {reason}.")


def _copy_pipe(name: str, target: IO[bytes]) -> None:
    if name != "-":
        with open(name, "rb", buffering=0) as pipe:
            while block := pipe.read(_BLOCK):
                target.write(block)
    elif sys.stdin is None or sys.stdin.isatty():
        raise _Failure("standard input is a terminal, expected a file or pipe")
    else:
        while block := sys.stdin.buffer.read(_BLOCK):
            target.write(block)
    if target.tell() == 0:
        raise _Failure("nothing came through the pipe")


def _download(address: str, target: IO[bytes]) -> None:
    """Copy what a web server has at an address, all of it or an error."""
    # Only HTTP, also after a redirection: never FTP or local files, which the default opener knows too.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    try:
        with opener.open(_request(address), timeout=TIMEOUT) as response:
            headers = response.headers
            if headers.get_content_type() == "text/html" and "Content-Type" in headers:
                raise _Failure("the address leads to a web page, expected a video or image file")
            if headers.get("Content-Encoding", "identity").lower() != "identity":
                raise _Failure(
                    f"the server sent it in the encoding {headers['Content-Encoding']!r}, which is not asked for"
                )
            deadline = time.monotonic() + TIMEOUT
            while block := response.read1(_BLOCK):
                target.write(block)
                # Whoever sends single bytes keeps the connection alive, and would never end.
                if time.monotonic() > deadline and target.tell() < 1024 * TIMEOUT:
                    raise _Failure(f"the server sent {target.tell()} bytes in {TIMEOUT:.0f} seconds")
            promised = headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        error.close()
        raise _Failure(f"the server answered {error.code} ({error.reason or 'no reason given'})") from error
    except TimeoutError as error:
        raise _Failure(f"the server did not answer within {TIMEOUT:.0f} seconds") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise _Failure(f"the server did not answer within {TIMEOUT:.0f} seconds") from error
        reason = getattr(error.reason, "strerror", None) or error.reason
        raise _Failure(f"the server cannot be reached ({reason})") from error
    except http.client.IncompleteRead as error:
        raise _Failure(f"the connection broke after {target.tell()} bytes") from error
    except (http.client.HTTPException, ConnectionError, ValueError) as error:
        raise _Failure(f"the download failed ({error or type(error).__name__})") from error
    if promised is not None and promised.isdecimal() and target.tell() != int(promised):
        raise _Failure(f"the connection broke after {target.tell()} of {promised} bytes")
    if target.tell() == 0:
        raise _Failure("the file is empty")


def _request(address: str) -> urllib.request.Request:
    parts = urlsplit(address)
    user, has_user, host = parts.netloc.rpartition("@")
    legal = "%/:=&?~+!$,;'()*[]@"  # what is quoted already stays as it is
    address = urlunsplit((parts.scheme, host, quote(parts.path or "/", legal), quote(parts.query, legal), ""))
    request = urllib.request.Request(
        address, headers={"User-Agent": f"diffusers-leanvae/{__version__}", "Accept": "*/*"}
    )
    if has_user:
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _from_hub(name: str, address: str) -> Path:
    """Find a file of the Hub in the cache, after downloading it where it is not there yet."""
    from huggingface_hub import hf_hub_download, parse_hf_uri
    from huggingface_hub.errors import HfUriError

    try:
        uri = parse_hf_uri(address)
    except HfUriError as error:
        raise _unreadable(name, error.msg) from error
    if uri.is_bucket or not uri.path_in_repo:
        raise _unreadable(
            name, "it must name a file as in 'hf://datasets/user/name/clip.mp4' or 'hf://user/name/clip.mp4'"
        )
    try:
        found = hf_hub_download(uri.id, uri.path_in_repo, repo_type=uri.type, revision=uri.revision)
    except Exception as error:  # huggingface_hub lets errors of its HTTP client, of checks and of the disk through
        reason = hub_reason(error, f"{uri.type} {uri.id!r}", uri.revision, uri.path_in_repo)
        raise _unreadable(name, reason or f"the download failed ({error or type(error).__name__})") from error
    return Path(found)
