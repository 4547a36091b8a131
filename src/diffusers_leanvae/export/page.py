"""A static page that runs a model in the browser, with ONNX Runtime for WebAssembly and WebGPU."""

import base64
import hashlib
import json
import shutil
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

from ..atomic import replace_folder
from ..bundled import clip_path
from ..models.video_autoencoder import VideoAutoencoder
from .files import check_folder, export_model, named_errors


RUNTIME = "onnxruntime-web@1.30.0"
# What the page loads of that package's folder `dist`. The browser refuses files of other hashes.
RUNTIME_FILES = {
    "ort.webgpu.bundle.min.mjs": "sha384-1ntMeyj+z5diX6vBR5h+zlJBPc4iNvhCxE6nlammh8daBYcLBZkzrwDkuJjhwI+f",
    "ort-wasm-simd-threaded.asyncify.wasm": "sha384-EPVDLTxuO663dkZO/pcKJF6vOyyfq/5z9FY1oksN0UWFX2ABH4wDDZQHeNoUleWR",
    "ort.wasm.bundle.min.mjs": "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    "ort-wasm-simd-threaded.wasm": "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
}
CDN = f"https://cdn.jsdelivr.net/npm/{RUNTIME}/dist/"
SETTINGS = "page.json"
EXAMPLE = "example.mp4"
PAGE_FILES = ("index.html", "page.css", "page.js", "clip.js", "worker.js")


def export_page(
    vae: VideoAutoencoder,
    folder: str | Path,
    name: str,
    *,
    runtime: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write a folder that any static host can serve: a page, and the model with weights in float16.

    The page takes a clip or the camera, and shows original and reconstruction, PSNR, bits and latents. Its addresses
    are relative. The folder appears when it is complete.

    Args:
        vae: The model, float32, on cpu.
        folder: The folder to write.
        name: What the page calls the model.
        runtime: The folder `dist` of `onnxruntime-web`, of which a copy is made; without it the page loads these
            files from jsDelivr. Either way the browser checks their hashes.
        overwrite: Whether to replace a former page.
        progress: Called with the number of finished graphs and of all, at first and after each.

    Returns:
        The files of the folder.

    Raises:
        ValueError: If an argument is not legal.
        ImportError: If the packages that write ONNX are not installed.
    """
    folder = Path(folder)
    if vae.in_channels != 3:
        raise ValueError(f"`vae` must take 3 channels for a page, got {vae.in_channels}.")
    check_folder(folder, overwrite, mark=SETTINGS)
    if runtime is not None:
        check_runtime(Path(runtime))
    with named_errors(folder), replace_folder(folder) as partial:
        export_model(vae, partial / "model", weights="float16", progress=progress)
        lay_out_page(partial, name, runtime)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def lay_out_page(folder: Path, name: str, runtime: str | Path | None = None) -> None:
    """Put the files of the page around an export that is in its folder `model`; arguments as of [`export_page`]."""
    with as_file(files("diffusers_leanvae.export") / "page") as page:
        for file in PAGE_FILES:
            shutil.copyfile(page / file, folder / file)
    shutil.copyfile(clip_path(), folder / EXAMPLE)
    if runtime is not None:
        (folder / "runtime").mkdir()
        for file in RUNTIME_FILES:
            shutil.copyfile(Path(runtime) / file, folder / "runtime" / file)
    settings = {
        "model": name,
        "megabytes": round(sum(path.stat().st_size for path in (folder / "model").iterdir()) / 1e6, 1),
        "example": EXAMPLE,
        "runtime": {"address": CDN if runtime is None else "runtime/", "files": RUNTIME_FILES},
    }
    (folder / SETTINGS).write_text(f"{json.dumps(settings, indent=2)}\n", encoding="utf-8")


def check_runtime(folder: Path, name: str = "`runtime`") -> None:
    """Refuse a folder without the files that the page needs; `name` is where it was given, for the message."""
    for file_name, expected in RUNTIME_FILES.items():
        path = folder / file_name
        if not path.is_file():
            found = "which does not have it"
        else:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha384").digest()
            found = "where it is another" if f"sha384-{base64.b64encode(digest).decode()}" != expected else None
        if found is not None:
            raise ValueError(
                f"{name} must be the folder `dist` of {RUNTIME} with its {file_name}, got {str(folder)!r}, {found}."
            )
