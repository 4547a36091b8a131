"""The page that runs a model in the browser: its folder, and, in Chromium, what it shows."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from chromium import Tab, find_chromium, open_tab
from serving.local_server import serving
from tiny import make_tiny
from typer.testing import CliRunner

from diffusers_leanvae.cli import app
from diffusers_leanvae.evaluation.metrics import frame_psnr
from diffusers_leanvae.export import export_page, page
from diffusers_leanvae.loading import load_autoencoder
from diffusers_leanvae.video_io import read_video, write_video
from diffusers_leanvae.video_io.pixels import pixels_to_sample, sample_to_unit


# ---- The folder -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """A page around files that stand where an export would be: to trace a model takes half a minute."""
    graphs = {part: {"file": f"{part}.onnx"} for part in ("encoder", "decoder")}
    (tmp_path / "site" / "model").mkdir(parents=True)
    (tmp_path / "site" / "model" / "export.json").write_text(json.dumps({"graphs": graphs}), encoding="utf-8")
    for part in graphs:
        (tmp_path / "site" / "model" / f"{part}.onnx").write_bytes(bytes(600_000))
    page.lay_out_page(tmp_path / "site", "small")
    return tmp_path / "site"


def test_all_that_the_page_names_is_in_its_folder(folder):
    names = set(re.findall(r'(?:src|href)="([^"]+)"', (folder / "index.html").read_text(encoding="utf-8")))
    for script in folder.glob("*.js"):
        text = script.read_text(encoding="utf-8")
        names |= set(re.findall(r'(?:from|Worker\(|loadJson\()\s*"([^"]+)"', text))
    assert {"page.css", "page.js", "./clip.js", "worker.js", "page.json", "model/export.json"} <= names
    settings = json.loads((folder / "page.json").read_text(encoding="utf-8"))
    graphs = json.loads((folder / "model" / "export.json").read_text(encoding="utf-8"))["graphs"]
    names |= {settings["example"], *(f"model/{graphs[part]['file']}" for part in ("encoder", "decoder"))}
    assert [name for name in names - {"data:,"} if not (folder / name).is_file()] == []
    assert settings["runtime"] == {"address": page.CDN, "files": page.RUNTIME_FILES}
    assert (settings["model"], settings["megabytes"]) == ("small", 1.2)
    written = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.*") if path.suffix != ".mp4")
    # All addresses on other machines are that of the runtime, and the page may not reach others.
    assert {address.split("/")[2] for address in re.findall(r"https?://[^\s\"';]+", written)} == {"cdn.jsdelivr.net"}


def test_the_elements_that_scripts_look_for_are_there(folder):
    there = set(re.findall(r'id="([^"]+)"', (folder / "index.html").read_text(encoding="utf-8")))
    wanted = set(re.findall(r'find\("([^"]+)"\)', (folder / "page.js").read_text(encoding="utf-8")))
    assert wanted <= there and len(wanted) > 10


def test_every_picture_has_a_name_for_those_who_do_not_see_it(folder):
    pictures = re.findall(r"<canvas [^>]*>", (folder / "index.html").read_text(encoding="utf-8"))
    assert len(pictures) == 3
    assert all('role="img"' in picture and re.search('aria-label="[^"]+"', picture) for picture in pictures)


def test_a_page_is_replaced_on_request_only(folder, tmp_path):
    small_vae = make_tiny("leanvae")
    with pytest.raises(ValueError, match="`folder` must be new or empty without `overwrite`"):
        export_page(small_vae, folder, "small")
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="`folder` must be new, empty or a former export"):
        export_page(small_vae, tmp_path, "small", overwrite=True)
    assert (folder / "index.html").is_file() and (tmp_path / "mine.txt").is_file()


def test_the_runtime_is_checked_and_copied(folder, tmp_path, monkeypatch):
    def hash_of(content: bytes) -> str:
        return f"sha384-{base64.b64encode(hashlib.sha384(content).digest()).decode()}"

    monkeypatch.setattr(page, "RUNTIME_FILES", {"ort.mjs": hash_of(b"right")})
    with pytest.raises(
        ValueError, match=r"^`runtime` must be the folder `dist` of onnxruntime-web@.*does not have it"
    ):
        page.check_runtime(tmp_path)
    (tmp_path / "ort.mjs").write_bytes(b"wrong")
    with pytest.raises(ValueError, match="where it is another"):
        page.check_runtime(tmp_path)
    (tmp_path / "ort.mjs").write_bytes(b"right")
    page.check_runtime(tmp_path)
    (folder / "page.json").unlink()
    page.lay_out_page(folder, "small", tmp_path)
    assert (folder / "runtime" / "ort.mjs").read_bytes() == b"right"
    assert json.loads((folder / "page.json").read_text(encoding="utf-8"))["runtime"]["address"] == "runtime/"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["page", "compact-16ch", "OUT", "--runtime", "nowhere"], "`--runtime` must be the folder `dist`"),
        (["page", "compact-16ch", "docs"], "OUT must be new, empty or a former export"),
        (["serve", "--page", "docs"], "`--page` must be a folder that `leanvae page` has written, got 'docs'"),
    ],
)
def test_commands_refuse_in_one_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    Path("docs/a.md").touch()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1
    assert not Path("OUT").exists()


# ---- In Chromium ----------------------------------------------------------------------------------------------------

NUM_FRAMES, HEIGHT, WIDTH = 9, 64, 96


@pytest.fixture(scope="module")
def vae():
    return load_autoencoder("compact-16ch", torch.float32).eval()


@pytest.fixture(scope="module")
def site(vae, tmp_path_factory) -> Path:
    """A page of compact-16ch, with the runtime beside it."""
    for program in ("npm", "tar"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed, ONNX Runtime for browsers cannot be had")
    if find_chromium() is None:
        pytest.skip("Chromium is not installed")
    root = tmp_path_factory.mktemp("site")
    packed = subprocess.run(["npm", "pack", "--silent", page.RUNTIME], cwd=root, capture_output=True, text=True)
    if packed.returncode:
        pytest.skip(f"npm does not give {page.RUNTIME}: {packed.stderr}")
    subprocess.run(["tar", "xzf", packed.stdout.strip()], cwd=root, check=True)
    export_page(vae, root / "site", "compact-16ch", runtime=root / "package" / "dist")
    return root / "site"


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "waves.mp4"
    t, y, x = torch.meshgrid(*(torch.arange(float(size)) for size in (11, HEIGHT, WIDTH)), indexing="ij")
    waves = torch.stack([(x / 9 + t / 3).sin(), (y / 11 + t / 4).cos(), (x / 17 + y / 13 - t / 5).sin()], -1)
    write_video(path, (128 + 100 * waves).to(torch.uint8), fps=8)
    return path


def choose(tab: Tab, frames: int = NUM_FRAMES, device: str = "auto") -> None:
    for name, value in {"frames": frames, "device": device}.items():
        tab.evaluate(f"document.getElementById('{name}').value = '{value}'")


def text_of(tab: Tab, name: str) -> str:
    return tab.evaluate(f"document.getElementById('{name}').textContent")


def finish(tab: Tab) -> str:
    """Wait for the end of a computation; its error, or an empty text."""
    tab.wait_for("!document.getElementById('file').disabled")
    return "" if tab.evaluate("document.getElementById('error').hidden") else text_of(tab, "error")


def figures(tab: Tab) -> list[float]:
    values = tab.evaluate("[...document.querySelectorAll('#figures dd')].map((value) => value.textContent)")
    return [float(value.split()[0]) for value in values]


def frame_of(tab: Tab, index: int) -> tuple[torch.Tensor, float]:
    """The original frame (height, width, 3) at a place of the page, and the PSNR that the page shows there."""
    tab.evaluate(f"(document.getElementById('time').value = {index}, 0)")
    tab.evaluate("document.getElementById('time').dispatchEvent(new Event('input'))")
    pixels = tab.evaluate("""(() => {
        const canvas = document.getElementById("original");
        return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
    })()""")
    return torch.tensor(pixels, dtype=torch.uint8).view(HEIGHT, WIDTH, 4)[..., :3], figures(tab)[1]


@torch.no_grad()
def psnr_in_python(vae, pixels: torch.Tensor) -> torch.Tensor:
    sample = pixels_to_sample(pixels).permute(3, 0, 1, 2)[None]
    decoded = vae.decode(vae.encode(sample).latent_dist.mode()).sample
    return frame_psnr(sample_to_unit(decoded)[0].transpose(0, 1), sample_to_unit(sample)[0].transpose(0, 1))


@pytest.mark.slow
def test_the_page_measures_what_python_measures(vae, site, clip, tmp_path):
    with serving(vae, page=site) as url, open_tab(tmp_path) as tab:
        tab.open(url)
        tab.wait_for("document.getElementById('status').textContent.startsWith('Ready')")
        choose(tab)
        tab.choose_file("#file", clip)
        tab.wait_for("document.getElementById('file').disabled", 10)
        assert finish(tab) == ""
        assert text_of(tab, "status") == f"{NUM_FRAMES} frames of {WIDTH}x{HEIGHT} on WebAssembly."
        mean, _, bits, ratio, *_ = figures(tab)
        frames, shown = zip(*(frame_of(tab, i) for i in range(NUM_FRAMES)), strict=True)
        errors = [message for message in tab.messages if message.startswith("error")]
    expected = psnr_in_python(vae, torch.stack(frames))
    read = read_video(clip, num_frames=NUM_FRAMES)[0]
    apart = (read.int() - torch.stack(frames).int()).abs().float().mean((1, 2, 3))
    assert errors == []
    # Measured: 0.0049, of two digits that are shown, although the page has the weights in float16.
    torch.testing.assert_close(torch.tensor(shown), expected, rtol=0, atol=0.02)
    assert mean == pytest.approx(expected.mean().item(), rel=0, abs=0.02)
    # Browsers convert colors in their own way: 1.4 of 255 here, where the next frame would be 16 away; PSNR 0.19 dB.
    assert apart.max() < 6
    assert mean == pytest.approx(psnr_in_python(vae, read).mean().item(), rel=0, abs=0.8)
    assert bits == round(16 * 3 * 8 * 12 * 8 / (NUM_FRAMES * HEIGHT * WIDTH), 3) and ratio == 36.0


@pytest.mark.slow
def test_camera_and_errors(vae, site, tmp_path):
    (tmp_path / "words.mp4").write_text("no video")
    with serving(vae, page=site) as url, open_tab(tmp_path / "profile") as tab:
        tab.open(url)
        tab.wait_for("document.getElementById('status').textContent.startsWith('Ready')")
        choose(tab, frames=5)
        tab.choose_file("#file", tmp_path / "words.mp4")
        tab.wait_for("document.getElementById('file').disabled || !document.getElementById('error').hidden", 10)
        assert finish(tab) == "This browser cannot read that file as a video."
        choose(tab, device="webgpu")
        tab.evaluate("document.getElementById('example').click()")
        assert finish(tab) == "This browser has no WebGPU here: choose WebAssembly."
        choose(tab, frames=65)
        tab.evaluate("document.getElementById('side').value = '512'")
        tab.evaluate("document.getElementById('camera').click()")
        assert finish(tab).startswith(
            "A clip may have 4.9 million pixels in all frames on this device, got 12.8 million"
        )
        choose(tab, frames=5)
        tab.evaluate("document.getElementById('side').value = '128'")
        tab.evaluate("document.getElementById('camera').click()")
        assert finish(tab) == ""
        assert text_of(tab, "status") == "5 frames of 128x96 on WebAssembly."


@pytest.mark.slow
def test_a_result_goes_with_its_clip(vae, site, clip, tmp_path):
    """The next result takes its place, and so does an error; what played before plays no longer."""
    (tmp_path / "words.mp4").write_text("no video")
    count = """
        window.timers = new Set();
        const { setInterval: set, clearInterval: clear } = window;
        window.setInterval = (...values) => { const id = set(...values); timers.add(id); return id; };
        window.clearInterval = (id) => { timers.delete(id); clear(id); };
    """
    with serving(vae, page=site) as url, open_tab(tmp_path / "profile") as tab:
        tab.open(url)
        tab.wait_for("document.getElementById('status').textContent.startsWith('Ready')")
        tab.evaluate(f"(() => {{ {count} }})()")
        choose(tab, frames=5)
        for _ in range(2):
            tab.choose_file("#file", clip)
            tab.wait_for("document.getElementById('file').disabled", 10)
            assert finish(tab) == ""
            assert tab.evaluate("[timers.size, document.getElementById('result').hidden]") == [1, False]
        tab.choose_file("#file", tmp_path / "words.mp4")
        tab.wait_for("document.getElementById('file').disabled || !document.getElementById('error').hidden", 10)
        assert finish(tab) == "This browser cannot read that file as a video."
        assert tab.evaluate("[timers.size, document.getElementById('result').hidden]") == [0, True]


@pytest.mark.slow
def test_a_static_host_and_webgpu(site, clip, tmp_path):
    """Below another address than the root, and on a GPU that the processor stands in for."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    vulkan = ("--enable-unsafe-webgpu", "--enable-features=Vulkan", "--use-vulkan=swiftshader")
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site.parent)) as server,
        open_tab(tmp_path, *vulkan, "--use-webgpu-adapter=swiftshader") as tab,
    ):
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            tab.open(f"http://127.0.0.1:{server.server_port}/{site.name}/")
            tab.wait_for("document.getElementById('status').textContent.startsWith('Ready')")
            shown = {}
            choose(tab, frames=5)
            tab.evaluate("document.getElementById('example').click()")
            assert finish(tab) == ""
            assert text_of(tab, "status") == "5 frames of 256x144 on WebAssembly."
            for device, name in {"auto": "WebAssembly", "webgpu": "WebGPU"}.items():
                choose(tab, frames=5, device=device)
                tab.choose_file("#file", clip)
                tab.wait_for("document.getElementById('file').disabled", 10)
                assert finish(tab) == ""
                assert text_of(tab, "status") == f"5 frames of {WIDTH}x{HEIGHT} on {name}."
                shown[device] = figures(tab)[0]
        finally:
            server.shutdown()
            thread.join()
    assert shown["auto"] == pytest.approx(shown["webgpu"], rel=0, abs=0.02)  # two digits are shown
