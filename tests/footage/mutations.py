"""Damaged files with fixed seeds: bits flipped, ends cut off, headers of other files, sizes that are not true."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from clips import Footage, make_clip, make_frame
from tiny import make_tiny

from diffusers_leanvae.inference.files import encode_video


LARGE = 100_000  # pixels on a side, of which 100,000 x 100,000 would be 30 GB
SHORT = {"num_frames": 6}

VIDEOS = {
    "h264.mp4": Footage(".mp4", "libx264", "yuv420p", sound="aac", options=(("bf", "2"), ("threads", "1")), **SHORT),
    "ffv1.mkv": Footage(".mkv", "ffv1", "yuv420p10le", sound="flac", options=(("threads", "1"),), **SHORT),
    "vp9.webm": Footage(".webm", "libvpx-vp9", "yuv420p", sound="libopus", **SHORT),
    "mjpeg.avi": Footage(".avi", "mjpeg", "yuvj420p", sound="pcm_s16le", is_full_range=True, **SHORT),
    "mpeg2.ts": Footage(".ts", "mpeg2video", "yuv420p", sound="mp2", **SHORT),
    "gif.gif": Footage(".gif", "gif", "pal8", **SHORT),
}


# Only for what is made of them below.
OTHERS = {
    "ffv1.avi": Footage(".avi", "ffv1", "yuv420p", **SHORT),
    "h264.h264": Footage(".h264", "libx264", "yuv420p", **SHORT),
}


def make_bases(folder: Path) -> dict[str, bytes]:
    """Make one good file of each kind, and return their contents by name."""
    from PIL import Image

    for name, footage in (VIDEOS | OTHERS).items():
        make_clip(folder / name, footage)
    picture = Image.fromarray(make_frame(Footage(".png", "png", "rgb24"), 5).to_ndarray(format="rgb24"))
    picture.save(folder / "png.png")
    picture.save(folder / "jpeg.jpg", quality=95)
    picture.save(folder / "tiff.tif", compression="tiff_lzw")
    picture.save(folder / "webp.webp", lossless=True)
    encode_video(make_tiny("leanvae"), folder / "h264.mp4", folder / "latents.safetensors", model="tiny")
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for key, name in (("0", "h264.mp4"), ("1", "jpeg.jpg"), ("2", "mpeg2.ts")):
            archive.add(folder / name, f"{key}.{name.split('.')[1]}")
            _add(archive, f"{key}.txt", b"a caption")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


# --- By chance -------------------------------------------------------------------------------------------------------


def _flip_bits(data: bytes, rng: np.random.Generator, _: bytes) -> bytes:
    """Flip 1 to 64 bits, half of the time only in the first kilobyte, where headers are."""
    end = min(len(data), 1024) if rng.random() < 0.5 else len(data)
    changed = np.frombuffer(data, np.uint8).copy()
    for position in rng.integers(end, size=int(2 ** rng.uniform(0, 6))):
        changed[position] ^= 1 << int(rng.integers(8))
    return changed.tobytes()


def _cut_off(data: bytes, rng: np.random.Generator, _: bytes) -> bytes:
    return data[: int(rng.integers(1, len(data)))]


def _splice(data: bytes, rng: np.random.Generator, other: bytes) -> bytes:
    """Put the beginning of another file before, or in place of, the own one."""
    length = int(2 ** rng.uniform(2, 10))
    return other[:length] + data[length if rng.random() < 0.7 else 0 :]


def _claim(data: bytes, rng: np.random.Generator, _: bytes) -> bytes:
    """Put the largest numbers in place of four or eight bytes of the first two kilobytes, or of the last."""
    value = [b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\xff" * 4, b"\x00" * 4, b"\xff" * 8][int(rng.integers(5))]
    position = int(rng.integers(4, min(len(data) - 8, 2048)))
    position = len(data) - 8 - position if rng.random() < 0.4 else position
    position = max(position, 0)
    return data[:position] + value + data[position + len(value) :]


def _lose(data: bytes, rng: np.random.Generator, _: bytes) -> bytes:
    """Leave a part out, fill it with zeros or noise, or have it twice."""
    start, stop = sorted(int(place) for place in rng.integers(len(data), size=2))
    middle = data[start:stop]
    instead = [b"", bytes(len(middle)), rng.bytes(len(middle)), 2 * middle][int(rng.integers(4))]
    return data[:start] + instead + data[stop:]


KINDS: dict[str, Callable[[bytes, np.random.Generator, bytes], bytes]] = {
    "flipped": _flip_bits,
    "cut": _cut_off,
    "spliced": _splice,
    "claiming": _claim,
    "holed": _lose,
}


def mutants(bases: dict[str, bytes], name: str, numbers: range) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of damaged versions of a file; a number is the same one always."""
    others = [other for other in bases if other != name]
    for number in numbers:
        kind = list(KINDS)[number % len(KINDS)]
        rng = np.random.default_rng([zlib.crc32(name.encode()), number])
        changed = bases[name]
        while changed == bases[name]:
            changed = KINDS[kind](bases[name], rng, bases[others[int(rng.integers(len(others)))]])
        stem, extension = name.split(".")
        yield f"{stem}-{number}-{kind}.{extension}", changed


# --- By design -------------------------------------------------------------------------------------------------------


def bombs(bases: dict[str, bytes]) -> dict[str, bytes]:
    """Files that claim to be far larger than they are, by name."""
    png = bytearray(bases["png.png"])
    png[16:24] = struct.pack(">II", LARGE, LARGE)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    jpeg = bytearray(bases["jpeg.jpg"])
    position = next(at for at in range(len(jpeg) - 9) if jpeg[at : at + 2] == b"\xff\xc0")
    jpeg[position + 5 : position + 9] = struct.pack(">HH", 65500, 65500)
    gif = bytearray(bases["gif.gif"])
    gif[6:10] = b"\xff" * 4
    tiff = _with_tiff_size(bases["tiff.tif"])
    avi = bases["ffv1.avi"].replace(struct.pack("<II", 96, 64), struct.pack("<II", LARGE, LARGE))
    assert avi != bases["ffv1.avi"]
    y4m = f"YUV4MPEG2 W{LARGE} H{LARGE} F25:1 Ip A1:1 C420jpeg\nFRAME\n".encode() + bytes(4096)
    return {
        "bomb.png": bytes(png),
        "bomb.jpg": bytes(jpeg),
        "bomb.gif": bytes(gif),
        "bomb.tif": tiff,
        "bomb.webp": _webp_of(16383),
        "bomb.bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 4096, 0, 54, 40, LARGE, LARGE, 1, 24, *[0] * 6) + bytes(99),
        "bomb.tga": struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 65535, 65535, 24, 32) + bytes(4096),
        "bomb.ppm": f"P6 {LARGE} {LARGE} 255\n".encode() + bytes(4096),
        "bomb.avi": avi,
        "bomb.y4m": y4m,
        "bomb.h264": _h264_of(16000, bases["h264.h264"]),
        "header.safetensors": struct.pack("<Q", 2**40) + bases["latents.safetensors"][8:],
        "shape.safetensors": _with_latents(bases["latents.safetensors"], shape=[1, 4, 2**20, 2**20, 2**20]),
        "frames.safetensors": _with_latents(bases["latents.safetensors"], num_frames=10**15),
        "height.safetensors": _with_latents(bases["latents.safetensors"], height=LARGE, width=LARGE),
        "rate.safetensors": _with_latents(bases["latents.safetensors"], fps="1/0"),
        "types.safetensors": _with_latents(bases["latents.safetensors"], num_frames="six", model=7),
        "size.tar": _with_tar_size(bases["shard.tar"], b"77777777777\0"),
    }  # fmt: skip


def _with_tiff_size(data: bytes) -> bytes:
    changed = bytearray(data)
    (start,) = struct.unpack_from("<I", changed, 4)
    (count,) = struct.unpack_from("<H", changed, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from("<H", changed, entry)[0] in (256, 257):  # width and height
            struct.pack_into("<HII", changed, entry + 2, 4, 1, LARGE)
    assert changed != data
    return bytes(changed)


def _webp_of(edge: int) -> bytes:
    """A lossless WebP of so many pixels on a side, and nothing behind its header."""
    header = b"\x2f" + struct.pack("<I", (edge - 1) | (edge - 1) << 14) + bytes(64)
    chunk = b"VP8L" + struct.pack("<I", len(header)) + header + b"\0" * (len(header) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def _h264_of(edge: int, stream: bytes) -> bytes:
    """An H.264 stream with a parameter set in front, in place of its own, that claims so many pixels on a side."""
    macroblocks = edge // 16 - 1
    # Identifier, frame numbers, order, references, no gaps, size, progressive, no 8x8, no cropping, nothing more, end.
    bits = "".join(map(_exp_golomb, (0, 0, 2, 1))) + "0" + 2 * _exp_golomb(macroblocks) + "10001"
    bits += "0" * (-len(bits) % 8)
    claim = b"\x67\x42\0\x3e" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    others = [unit for unit in stream.split(b"\0\0\1") if unit and unit[0] & 31 != 7]
    return b"".join(b"\0\0\1" + unit for unit in (claim, *others))


def _exp_golomb(value: int) -> str:
    digits = f"{value + 1:b}"
    return "0" * (len(digits) - 1) + digits


def _with_latents(data: bytes, shape: list[int] | None = None, **metadata: object) -> bytes:
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    if shape is not None:
        header["latents"]["shape"] = shape
    header["__metadata__"]["leanvae"] = json.dumps(json.loads(header["__metadata__"]["leanvae"]) | metadata)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _with_tar_size(data: bytes, size: bytes) -> bytes:
    changed = bytearray(data)
    changed[124:136] = size
    changed[148:156] = b" " * 8
    changed[148:156] = f"{sum(changed[:512]):06o}\0 ".encode()
    return bytes(changed)
