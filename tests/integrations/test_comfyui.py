"""The nodes for ComfyUI, run by stand-ins with ComfyUI's recorded signatures: shapes, exactness, sizes, files."""

import ast
import inspect
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from comfyui_interface import PACK, Comfy, InterruptProcessingError, VideoFromComponents, VideoFromFile, save_frames
from patterns import drifting_pattern
from tiny import make_latents, make_tiny

from diffusers_leanvae import __version__, pad_sample
from diffusers_leanvae.latents import normalize_latents
from diffusers_leanvae.loading import load_autoencoder
from diffusers_leanvae.video_io import probe_video, read_video
from diffusers_leanvae.video_io.pixels import sample_to_unit, unit_to_pixels


RECORD = json.loads(Path(__file__).with_name("comfyui_signatures.json").read_text(encoding="utf-8"))["files"]
SIGNATURES = {name: text for file in RECORD.values() for name, text in file.get("signatures", {}).items()}
# IV-VAE's halo is as wide as the frames here, so that a tile costs as much as all: fewer layers than elsewhere.
FAMILIES: dict[str, dict[str, Any]] = {
    "leanvae": {},
    "wfvae": {},
    "ivvae": {"num_layers": 1, "channel_multipliers": (1, 1, 1, 2)},
}
GROUP_NORM = {
    "norm_type": "group_norm",
    "base_channels": 32,
    "encoder_flow_channels": 32,
    "decoder_flow_channels": 32,
}


@pytest.fixture
def comfy(tmp_path: Path) -> Iterator[Comfy]:
    with Comfy(tmp_path / "ComfyUI").installed() as comfy:
        yield comfy


@pytest.fixture(params=FAMILIES)
def vae(request: pytest.FixtureRequest, comfy: Comfy) -> Any:
    """A tiny model of each family as a `VAE`; in float64, so that rounding hides no error."""
    return comfy.pack.nodes.LeanVAE(make_tiny(request.param, torch.float64, **FAMILIES[request.param]))


def make_frames(num_frames: int = 6, height: int = 37, width: int = 51) -> torch.Tensor:
    """Frames of a size that no model takes as it is, `(num_frames, height, width, 3)` in `[0, 1]`."""
    return torch.rand(num_frames, height, width, 3, generator=torch.Generator().manual_seed(3))


def as_sample(frames: torch.Tensor) -> torch.Tensor:
    return frames.double().movedim(-1, 0)[None] * 2 - 1


def check_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # ComfyUI keeps latents and frames in float32, which rounds by up to 6e-8 of the size: 4.6e-8 were seen.
    torch.testing.assert_close(actual, expected, rtol=0, atol=2.4e-7 * expected.abs().max().item())


# ---- the record of ComfyUI ------------------------------------------------------------------------------------------


def find(comfy: Comfy, name: str) -> Any:
    module = max((key for key in comfy.modules if name.startswith(f"{key}.")), key=len)
    found: Any = comfy.modules[module]
    for part in name.removeprefix(f"{module}.").split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", SIGNATURES)
def test_stand_ins_have_the_recorded_signatures(comfy: Comfy, name: str):
    assert str(inspect.signature(find(comfy, name))) == SIGNATURES[name]


def test_nodes_call_only_what_is_recorded():
    used = set()
    for path in PACK.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        used |= {name for name in names if name.startswith(("comfy.", "folder_paths.", "InputImpl."))}
    called = {name.replace("comfy_api.latest.", "") for name in SIGNATURES} | {"comfy.utils", "comfy.model_patcher"}
    assert len(used) > 10 and used - called == {"comfy.model_management"}


def test_the_vae_takes_what_comfyui_calls_it_with(vae: Any):
    for name, text in RECORD["comfy/sd.py"]["vae"].items():
        ours = inspect.signature(getattr(vae, name)).parameters
        # With a name in place of every default, whose values may be ours.
        recorded = [part.split("=")[0].strip() for part in text.strip("()").split(",") if part]
        assert [parameter for parameter in ours if parameter != "_"] == recorded, name
    for name in RECORD["comfy/sd.py"]["vae_attributes"]:
        assert hasattr(vae, name), name


# ---- frames and latents ---------------------------------------------------------------------------------------------


def test_any_size_is_padded_as_the_package_does_it_and_cut_back(comfy: Comfy, vae: Any):
    frames, model = make_frames(), vae.autoencoder
    ratios = model.temporal_compression_ratio, model.spatial_compression_ratio
    (latent,) = comfy.pack.nodes.LeanVAEEncode().encode(frames, vae)
    with torch.no_grad():
        expected = model.encode(pad_sample(as_sample(frames), *ratios)[0]).latent_dist.mode()
        whole = sample_to_unit(model.decode(latent["samples"].double()).sample[0]).movedim(0, -1)
    check_same(latent["samples"].double(), expected)
    (images,) = comfy.pack.nodes.LeanVAEDecode().decode(latent, vae)
    assert images.shape == frames.shape and images.dtype == torch.float32
    assert images.std() > 0.05
    check_same(images, whole[:6, :37, :51])


def test_tiles_and_steps_change_nothing(comfy: Comfy, vae: Any):
    frames = make_frames(10)
    encode, decode = comfy.pack.nodes.LeanVAEEncode().encode, comfy.pack.nodes.LeanVAEDecode().decode
    (whole,) = encode(frames, vae, frames_per_step=64)
    (cut,) = encode(frames, vae, tile_size=32, frames_per_step=4)
    check_same(cut["samples"], whole["samples"])
    (images,) = decode(whole, vae, tile_size=32, frames_per_step=4)
    check_same(images, decode(whole, vae, frames_per_step=64)[0])


def test_frames_can_be_images(comfy: Comfy, vae: Any):
    frames = make_frames(5)
    encode, decode = comfy.pack.nodes.LeanVAEEncode().encode, comfy.pack.nodes.LeanVAEDecode().decode
    (latent,) = encode(frames, vae, frames_are="images", frames_per_step=4)
    alone = torch.cat([encode(frame[None], vae)[0]["samples"] for frame in frames])
    assert latent["samples"].shape[:3] == (5, vae.latent_channels, 1)
    check_same(latent["samples"], alone)
    (images,) = decode(latent, vae)
    assert images.shape == frames.shape
    flat = {**latent, "samples": latent["samples"][:, :, 0]}  # as ComfyUI's nodes for images have them
    padded = decode(flat, vae)[0]
    check_same(padded[:, :37, :51], images)


def test_comfyuis_own_nodes_take_the_vae(comfy: Comfy, vae: Any, caplog: pytest.LogCaptureFixture):
    stock, ratio = comfy.nodes(), vae.autoencoder.spatial_compression_ratio
    frames = make_frames(9, 2 * ratio, 3 * ratio)
    (latent,) = stock["VAEEncode"]().run(frames, vae)
    assert latent["samples"].shape == (1, vae.latent_channels, 3, 2, 3)
    (images,) = stock["VAEDecode"]().run(latent, vae)
    assert images.shape == frames.shape
    assert not caplog.records
    tiles = {"tile_size": 32, "overlap": 16, "temporal_size": 4, "temporal_overlap": 4}
    frames = make_frames(9, 32, 40)
    (latent,) = stock["VAEEncode"]().run(frames, vae)
    (cut,) = stock["VAEEncodeTiled"]().run(frames, vae, **tiles)
    # ComfyUI blends tiles of other VAEs, which changes them.
    check_same(cut["samples"], latent["samples"])
    (images,) = stock["VAEDecodeTiled"]().run(latent, vae, **tiles)
    check_same(images, stock["VAEDecode"]().run(latent, vae)[0])


def test_comfyuis_own_nodes_say_that_frames_are_padded(comfy: Comfy, caplog: pytest.LogCaptureFixture):
    vae = comfy.pack.nodes.LeanVAE(make_tiny("leanvae"))
    (latent,) = comfy.nodes()["VAEEncode"]().run(make_frames(), vae)
    assert latent["samples"].shape == (1, 4, 3, 5, 7)
    assert "6 frames of 51x37 become 9 of 56x40" in caplog.text


def test_latents_changed_to_another_size_are_not_cut(comfy: Comfy):
    vae = comfy.pack.nodes.LeanVAE(make_tiny("leanvae"))
    (latent,) = comfy.pack.nodes.LeanVAEEncode().encode(make_frames(), vae)
    longer = {**latent, "samples": latent["samples"].repeat(1, 1, 2, 1, 1)}
    (images,) = comfy.pack.nodes.LeanVAEDecode().decode(longer, vae)
    assert images.shape == (21, 40, 56, 3)


def test_latents_can_be_normalised(comfy: Comfy):
    model = make_tiny("leanvae", latents_mean=[0.1, 0.2, -0.3, 0.4], latents_std=[0.5, 2.0, 1.5, 3.0])
    raw, normalized = (comfy.pack.nodes.LeanVAE(model, is_normalized) for is_normalized in (False, True))
    encode, decode = comfy.pack.nodes.LeanVAEEncode().encode, comfy.pack.nodes.LeanVAEDecode().decode
    (latent,), (scaled,) = encode(make_frames(), raw), encode(make_frames(), normalized)
    expected = normalize_latents(latent["samples"], model.config)
    assert (expected - latent["samples"]).abs().max() > 0.1
    torch.testing.assert_close(scaled["samples"], expected, rtol=0, atol=0)
    # Normalised and back in float32: 2e-6 were seen.
    torch.testing.assert_close(decode(scaled, normalized)[0], decode(latent, raw)[0], rtol=0, atol=8e-6)


def test_alpha_is_left_out_and_grey_refused(comfy: Comfy):
    vae, frames = comfy.pack.nodes.LeanVAE(make_tiny("leanvae")), make_frames()
    with_alpha = torch.cat((frames, frames[..., :1]), dim=-1)
    torch.testing.assert_close(vae.encode(with_alpha), vae.encode(frames), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"`pixels` must be .*, got float32 of shape \(6, 37, 51, 1\)\.$"):
        vae.encode(frames[..., :1])


@pytest.mark.parametrize("kind", ["video", "images", "tiles"])
@pytest.mark.parametrize(
    "pixels, found",
    [
        (torch.zeros(0, 16, 16, 3), r"float32 of shape \(0, 16, 16, 3\)"),
        (torch.zeros(5, 0, 16, 3), r"float32 of shape \(5, 0, 16, 3\)"),
        (torch.zeros(5, 16, 16), r"float32 of shape \(5, 16, 16\)"),  # a mask
        (torch.zeros(16, 16, 3), r"float32 of shape \(16, 16, 3\)"),  # an image that is not in a batch
        (torch.zeros(5, 16, 16, 3, dtype=torch.uint8), r"uint8 of shape \(5, 16, 16, 3\)"),
        (None, "a NoneType"),
    ],
)
def test_what_are_no_frames_is_refused(comfy: Comfy, pixels: Any, found: str, kind: str):
    nodes = comfy.pack.nodes
    vae = nodes.LeanVAE(make_tiny("leanvae"))
    sentence = (
        rf"^`pixels` must be floating-point frames of shape \(num_frames, height, width, 3\), .*, got {found}\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        vae.encode(pixels) if kind == "tiles" else nodes.LeanVAEEncode().encode(pixels, vae, kind)


@pytest.mark.parametrize("shape", [(0, 4, 2, 3, 3), (1, 4, 0, 3, 3), (1, 4, 2, 0, 3), (4, 3, 3)])
def test_empty_latents_are_refused(comfy: Comfy, shape: tuple[int, ...]):
    nodes = comfy.pack.nodes
    vae, samples = nodes.LeanVAE(make_tiny("leanvae")), {"samples": torch.zeros(shape)}
    to_file = {"fps": 8.0, "filename_prefix": "clip", "container": "mkv"}
    for decode in (nodes.LeanVAEDecode().decode, partial(nodes.LeanVAEDecodeVideo().decode, **to_file)):
        with pytest.raises(
            ValueError, match=rf"^`samples` must have shape .* got float32 of shape {re.escape(str(shape))}"
        ):
            decode(samples, vae)


def test_values_that_no_widget_has_are_refused(comfy: Comfy):
    nodes = comfy.pack.nodes
    vae, frames = nodes.LeanVAE(make_tiny("leanvae")), make_frames()
    encode, decode = nodes.LeanVAEEncode().encode, nodes.LeanVAEDecode().decode
    (latent,) = encode(frames, vae)
    for number in (0, -4, 4.5):
        for run in (partial(encode, frames), partial(decode, latent)):
            with pytest.raises(ValueError, match=f"^`frames_per_step` must be a positive integer, got {number}"):
                run(vae, frames_per_step=number)
    with pytest.raises(ValueError, match=r"^`tile_size` must be a positive integer, or 0 for whole frames, got -16\."):
        encode(frames, vae, tile_size=-16)
    with pytest.raises(ValueError, match="^`frames_are` must be one of 'video', 'images', got 'frames'"):
        encode(frames, vae, "frames")
    with pytest.raises(ValueError, match="^`latents` must be one of 'raw', 'normalized', got 'scaled'"):
        nodes.LeanVAELoader().load("compact-4ch", latents="scaled")
    with pytest.raises(ValueError, match="^`container` must be one of 'mp4', 'mkv', 'webm', got 'gif'"):
        nodes.LeanVAEDecodeVideo().decode(latent, vae, 8.0, "clip", "gif")
    with pytest.raises(ValueError, match="^`video` must be a VIDEO, such as Load Video gives, got a NoneType"):
        nodes.LeanVAEEncodeVideo().encode(None, vae)


def test_latents_of_another_model_and_other_vaes_are_refused(comfy: Comfy):
    vae = comfy.pack.nodes.LeanVAE(make_tiny("leanvae"))
    with pytest.raises(ValueError, match=r"`samples` must have shape \(batch_size, 4, .* of shape \(1, 16, 2, 3, 3\)"):
        vae.decode(make_latents(1, 16, 2, 3, 3))
    with pytest.raises(ValueError, match="`vae` must come from Load LeanVAE, got a object"):
        comfy.pack.nodes.LeanVAEDecode().decode({"samples": make_latents(1, 4, 2, 3, 3)}, object())


def test_a_model_that_needs_the_whole_video_gets_it(comfy: Comfy):
    model = make_tiny("wfvae", torch.float64, **GROUP_NORM)
    vae, frames = comfy.pack.nodes.LeanVAE(model), make_frames(6, 16, 16)
    with torch.no_grad():
        expected = model.encode(pad_sample(as_sample(frames))[0]).latent_dist.mode()
    latents = vae.encode_frames(frames, num_frames_per_step=4)
    check_same(latents.double(), expected)
    assert vae.decode(latents).shape == (1, 9, 16, 16, 3)
    with pytest.raises(ValueError, match="`tile_size` must be 0 for this model, .* got 16"):
        vae.encode_frames(frames, (16, 16))


# ---- memory, progress, interruption ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["leanvae", "wfvae"])
def test_comfyui_is_asked_for_the_memory_of_a_step(comfy: Comfy, family: str):
    vae, sizes = comfy.pack.nodes.LeanVAE(make_tiny(family)), []
    cases = (9, 32, None), (9, 64, None), (41, 32, None), (61, 32, None), (9, 64, (16, 16))
    for num_frames, height, tile in cases:
        comfy.loads.clear()
        vae.encode_frames(make_frames(num_frames, height, 32), tile)
        sizes.append(comfy.loads[-1])
    small, large, long, longer, tiled = sizes
    assert 0 < small < long == longer < large and small < tiled != large


@pytest.mark.parametrize("node", ["encode", "decode"])
def test_frames_too_large_for_the_device_are_computed_in_tiles(
    comfy: Comfy, vae: Any, node: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    argument = make_frames(9) if node == "encode" else make_latents(1, 4, 3, 4, 5)
    expected = getattr(vae, node)(argument)
    real, num_failed = getattr(vae.autoencoder, node), 0

    def fail_on_whole_frames(*args: Any, cache: Any, **kwargs: Any) -> Any:
        nonlocal num_failed
        if cache.layout is None:
            num_failed += 1
            raise torch.OutOfMemoryError
        return real(*args, cache=cache, **kwargs)

    monkeypatch.setattr(vae.autoencoder, node, fail_on_whole_frames)
    monkeypatch.setattr(comfy.pack.vae, "FALLBACK_TILE", 32)
    caplog.clear()
    check_same(getattr(vae, node)(argument), expected)
    assert num_failed == 1 and "do not fit" in caplog.text


def test_no_more_frames_than_a_step_pass_at_once(comfy: Comfy, monkeypatch: pytest.MonkeyPatch):
    vae, counts = comfy.pack.nodes.LeanVAE(make_tiny("leanvae")), {"encode": [], "decode": []}
    for name, seen in counts.items():
        real = getattr(vae.autoencoder, name)

        def count(x: torch.Tensor, *args: Any, real: Any = real, seen: list[int] = seen, **kwargs: Any) -> Any:
            seen.append(x.shape[0] * x.shape[2])
            return real(x, *args, **kwargs)

        monkeypatch.setattr(vae.autoencoder, name, count)
    encode, decode = comfy.pack.nodes.LeanVAEEncode().encode, comfy.pack.nodes.LeanVAEDecode().decode
    (latent,) = encode(make_frames(21, 16, 16), vae, frames_per_step=8)
    decode(latent, vae, frames_per_step=8)
    assert counts == {"encode": [9, 8, 4], "decode": [3, 2, 1]}
    (latent,) = encode(make_frames(5, 16, 16), vae, frames_are="images", frames_per_step=4)
    decode(latent, vae, frames_per_step=4)
    assert counts == {"encode": [9, 8, 4, 4, 1], "decode": [3, 2, 1, 4, 1]}


def test_files_pass_step_by_step(comfy: Comfy, monkeypatch: pytest.MonkeyPatch):
    nodes, path = comfy.pack.nodes, comfy.root / "input/clip.mkv"
    vae = nodes.LeanVAE(make_tiny("leanvae"))
    save_frames(path, make_frames(21, 16, 16))
    held = [0]  # frames that are read and not encoded, then such as are decoded and not written

    def count(owner: Any, name: str, change: Callable[[Any, Any], int]) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            held.append(held[-1] + change(args[0], result))
            return result

        monkeypatch.setattr(owner, name, call)

    count(nodes, "pixels_to_unit", lambda pixels, _: len(pixels))
    count(vae.autoencoder, "encode", lambda sample, _: -sample.shape[2])
    count(vae.autoencoder, "decode", lambda _, decoded: decoded[0].shape[2])
    count(nodes, "unit_to_pixels", lambda frames, _: -len(frames))
    latent, fps = nodes.LeanVAEEncodeVideo().encode(VideoFromFile(str(path)), vae, frames_per_step=4)
    assert held == [0, 4, 8, 3, 7, 3, 7, 3, 7, 3, 4, 0]
    held[:] = [0]
    nodes.LeanVAEDecodeVideo().decode(latent, vae, fps, "clip", "mkv", frames_per_step=4)
    assert held == [0, 5, 0, 4, 0, 4, 0, 4, 0, 4, 0]


def test_progress_is_shown_and_the_user_can_interrupt(comfy: Comfy):
    vae = comfy.pack.nodes.LeanVAE(make_tiny("leanvae"))
    latents = vae.encode_frames(make_frames(14), num_frames_per_step=4)
    vae.decode_latents(latents, num_frames_per_step=4)
    assert comfy.shown == [[14, 14], [5, 5]]
    comfy.is_interrupted = True
    with pytest.raises(InterruptProcessingError):
        vae.decode(latents)
    latent = {"samples": latents}
    with pytest.raises(InterruptProcessingError):
        comfy.pack.nodes.LeanVAEDecodeVideo().decode(latent, vae, 8.0, "video/LeanVAE", "mkv")
    assert not [*(comfy.root / "output/video").iterdir()]


# ---- loading --------------------------------------------------------------------------------------------------------


def test_loader_lists_and_loads_bundled_models_folders_and_files(comfy: Comfy):
    folder, loader = comfy.root / "models/vae", comfy.pack.NODE_CLASS_MAPPINGS["LeanVAELoader"]
    models = {family: make_tiny(family) for family in FAMILIES}
    for family, model in models.items():
        model.save_pretrained(folder / "mine" / family)
    lean = models["leanvae"]
    lean.conversion.write_original_checkpoint(folder / "original.ckpt", dict(lean.config), lean.state_dict())
    (folder / "gone.ckpt").symlink_to(folder / "nowhere.ckpt")
    names = loader.INPUT_TYPES()["required"]["model"][0]
    assert names == ["compact-16ch", "compact-4ch", "mine/ivvae", "mine/leanvae", "mine/wfvae", "original.ckpt"]
    for name, family in zip(names[2:], ("ivvae", "leanvae", "wfvae", "leanvae"), strict=True):
        (vae,) = loader().load(name)
        assert type(vae.autoencoder) is type(models[family]) and vae.vae_dtype is torch.float32
        expected = models[family].state_dict()
        assert vae.get_sd().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in vae.get_sd().items())
    (vae,) = loader().load("compact-4ch", dtype="bfloat16", latents="normalized")
    assert (vae.vae_dtype, vae.latent_channels, vae.is_normalized) == (torch.bfloat16, 4, True)
    (vae,) = loader().load("compact-4ch", source=str(folder / "mine/wfvae"))
    assert type(vae.autoencoder) is type(models["wfvae"])


def test_loader_refuses_other_files_and_names(comfy: Comfy):
    loader = comfy.pack.NODE_CLASS_MAPPINGS["LeanVAELoader"]()
    (comfy.root / "models/vae/sdxl.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match="must be an original checkpoint of LeanVAE"):
        loader.load("sdxl.safetensors")
    with pytest.raises(ValueError, match="`model` must be one of 'compact-16ch', .*, got '../secret.ckpt'"):
        loader.load("../secret.ckpt")


# ---- workflows and files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(PACK.glob("workflows/*.json")), ids=lambda path: path.stem)
@torch.no_grad()
def test_workflow_runs(comfy: Comfy, path: Path):
    save_frames(comfy.root / "input/flower.mp4", drifting_pattern(22, height=44, width=60, seed=1) / 255, "libx264")
    frames, _ = read_video(comfy.root / "input/flower.mp4")
    model = load_autoencoder("compact-16ch")
    latents = model.encode(pad_sample(as_sample(frames / 255).float())[0], return_dict=False)[0].mode()
    expected = sample_to_unit(model.decode(latents, return_dict=False)[0][0]).movedim(0, -1)
    workflow = json.loads(path.read_text(encoding="utf-8"))
    if path.stem == "stock_nodes":
        del workflow["7"]  # SaveVideo, of which there is no stand-in
        (video,) = comfy.run(workflow)["6"]
        # Steps and tiles in float32: 4e-7 were seen.
        torch.testing.assert_close(video.get_components().images, expected, rtol=0, atol=2e-6)
        return
    (video,) = comfy.run(workflow)["4"]
    file = Path(video.get_stream_source())
    assert file == comfy.root / "output/video/LeanVAE_00001_.mp4"
    written, info = read_video(file)
    assert info.fps == 8 and written.shape == frames.shape
    assert (written / 255 - expected[:22, :44, :60]).abs().mean() < 0.02  # what x264 loses


def test_a_video_file_gives_the_latents_of_its_frames(comfy: Comfy, vae: Any):
    path, nodes = comfy.root / "input/clip.mkv", comfy.pack.nodes
    frames = make_frames(14)
    save_frames(path, frames)
    frames = unit_to_pixels(frames) / 255
    (expected,) = nodes.LeanVAEEncode().encode(frames, vae)
    latent, fps = nodes.LeanVAEEncodeVideo().encode(VideoFromFile(str(path)), vae, frames_per_step=4)
    assert fps == 8 and latent[nodes.SIZE] == (14, 37, 51)
    check_same(latent["samples"], expected["samples"])
    trimmed, fps = nodes.LeanVAEEncodeVideo().encode(VideoFromFile(str(path), start_time=0.5, duration=1), vae)
    (expected,) = nodes.LeanVAEEncode().encode(frames[4:12], vae)
    assert fps == 8 and trimmed[nodes.SIZE] == (8, 37, 51)
    check_same(trimmed["samples"], expected["samples"])


def test_a_file_holds_the_decoded_frames(comfy: Comfy, vae: Any):
    nodes = comfy.pack.nodes
    (latent,) = nodes.LeanVAEEncode().encode(make_frames(), vae)
    (images,) = nodes.LeanVAEDecode().decode(latent, vae)
    result = nodes.LeanVAEDecodeVideo().decode(latent, vae, 12.5, "mine/clip", "mkv", tile_size=32, frames_per_step=4)
    shown = {"filename": "clip_00001_.mkv", "subfolder": "mine", "type": "output"}
    assert result["ui"] == {"images": [shown], "animated": (True,)}
    file = comfy.root / "output/mine/clip_00001_.mkv"
    assert probe_video(file).fps == 12.5
    frames, _ = read_video(file)
    assert frames.shape == images.shape
    assert (frames / 255 - images).abs().mean() < 0.05  # x264 of noise
    with pytest.raises(ValueError, match="`samples` must be of one video, got a batch of 2"):
        nodes.LeanVAEDecodeVideo().decode({"samples": torch.cat((latent["samples"],) * 2)}, vae, 8.0, "a", "mkv")
    with pytest.raises(ValueError, match="`sound` must be a video from a file"):
        nodes.LeanVAEDecodeVideo().decode(latent, vae, 8.0, "a", "mkv", sound=VideoFromComponents(None))


def test_a_file_keeps_the_sound_of_another(comfy: Comfy, tmp_path: Path):
    nodes, source = comfy.pack.nodes, tmp_path / "sound.mkv"
    ramp = np.arange(2 * 8000, dtype=np.int16)[None]  # two seconds; each sample is its own place
    with av.open(source, "w") as container:
        picture = container.add_stream("ffv1", rate=8, width=16, height=16)
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        for _ in range(16):
            container.mux(picture.encode(av.VideoFrame(16, 16, "yuv420p")))
        frame = av.AudioFrame.from_ndarray(ramp, format="s16", layout="mono")
        frame.rate, frame.pts = 8000, 0
        container.mux([*picture.encode(), *sound.encode(frame), *sound.encode()])
    vae = nodes.LeanVAE(make_tiny("leanvae"))
    (latent,) = nodes.LeanVAEEncode().encode(make_frames(8, 32, 32), vae)
    trimmed = VideoFromFile(str(source), start_time=0.5)
    (video,) = nodes.LeanVAEDecodeVideo().decode(latent, vae, 8.0, "loud", "mkv", sound=trimmed)["result"]
    with av.open(video.get_stream_source()) as container:
        heard = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    # Cut to packets, which have 1152 samples at most here.
    assert abs(int(heard[0]) - 4000) < 1200 and abs(len(heard) - 8000) < 2400


def test_the_page_of_the_nodes_says_what_they_are(comfy: Comfy):
    page = (PACK.parents[1] / "docs/comfyui.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*?LeanVAE.*?) \|", page, re.MULTILINE)
    assert rows == [*comfy.pack.NODE_DISPLAY_NAME_MAPPINGS.values()]
    assert f"in tiles of {comfy.pack.vae.FALLBACK_TILE} pixels" in page


def test_pack_has_what_comfyui_and_its_registry_read(comfy: Comfy):
    assert comfy.pack.NODE_CLASS_MAPPINGS.keys() == comfy.pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in comfy.pack.NODE_CLASS_MAPPINGS.values():
        declared = node.INPUT_TYPES()
        parameters = inspect.signature(getattr(node, node.FUNCTION)).parameters
        assert [*declared["required"], *declared.get("optional", {})] == [
            name for name in parameters if name != "self"
        ]
        assert all(parameters[name].default is not inspect.Parameter.empty for name in declared.get("optional", {}))
    pack = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
    assert pack["project"].keys() >= {"name", "version", "description", "license"} and pack["tool"]["comfy"]
    assert pack["project"]["version"] == __version__
