"""As much of ComfyUI as the nodes in `integrations/comfyui` meet, in our own words; no tests.

The signatures are those of `comfyui_signatures.json`, which says where they were read, and `test_comfyui.py` compares
them.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from diffusers_leanvae.video_io import VideoReader, write_video
from diffusers_leanvae.video_io.pixels import pixels_to_unit, unit_to_pixels


PACK = Path(__file__).resolve().parents[2] / "integrations" / "comfyui"
CPU = torch.device("cpu")


class Comfy:
    """One ComfyUI with folders of its own.

    Attributes:
        root: Folder with `models/vae`, `input` and `output`.
        loads: `memory_required` of each request to load a model.
        shown: How far each progress bar came, and how far it can.
        is_interrupted: Whether the user has asked to stop.
        pack: The nodes, imported as ComfyUI does it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("models/vae", "input", "output"):
            (root / name).mkdir(parents=True)
        self.loads: list[float] = []
        self.shown: list[list[int]] = []
        self.is_interrupted = False
        self.modules = self._modules()
        self.pack: Any = None

    @contextmanager
    def installed(self) -> Iterator["Comfy"]:
        """Make the modules importable, and import the nodes as ComfyUI imports a folder of `custom_nodes`."""
        name = "custom_nodes_leanvae"
        before = {key: sys.modules.pop(key, None) for key in (*self.modules, name, f"{name}.nodes", f"{name}.vae")}
        sys.modules.update(self.modules)
        for key, module in self.modules.items():
            parent, _, child = key.rpartition(".")
            if parent:
                setattr(self.modules[parent], child, module)
        try:
            spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py")
            assert spec is not None and spec.loader is not None
            self.pack = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(self.pack)
            yield self
        finally:
            for key, module in before.items():
                sys.modules.pop(key, None)
                if module is not None:
                    sys.modules[key] = module

    def _modules(self) -> dict[str, ModuleType]:
        comfy = self

        class ModelPatcher:
            def __init__(
                self, model, load_device, offload_device, size=0, weight_inplace_update=False, fast_disk=False
            ):
                self.model, self.load_device = model, load_device
                self.model.device = offload_device  # of a model of diffusers this would fail

            def is_dynamic(self):
                return False

        class ProgressBar:
            def __init__(self, total, node_id=None):
                self.state = [0, total]
                comfy.shown.append(self.state)

            def update(self, value):
                self.state[0] += value

        def load_models_gpu(
            models,
            memory_required=0,
            force_patch_weights=False,
            minimum_memory_required=None,
            force_full_load=False,
        ):
            comfy.loads.append(memory_required)
            for patcher in models:
                patcher.model.to(patcher.load_device)
                patcher.model.device = patcher.load_device

        def throw_exception_if_processing_interrupted():
            if comfy.is_interrupted:
                raise InterruptProcessingError

        def get_filename_list(folder_name):
            assert folder_name == "vae"
            files = (comfy.root / "models/vae").rglob("*")
            return sorted(
                str(path.relative_to(comfy.root / "models/vae"))
                for path in files
                if path.suffix in (".ckpt", ".safetensors")
            )

        def get_full_path(folder_name, filename):
            path = comfy.root / "models" / folder_name / filename
            return str(path) if path.is_file() else None

        def get_save_image_path(filename_prefix, output_dir, image_width=0, image_height=0):
            prefix = Path(filename_prefix)
            folder = Path(output_dir) / prefix.parent
            folder.mkdir(parents=True, exist_ok=True)
            counter = len([*folder.glob(f"{prefix.name}_*")]) + 1
            return str(folder), prefix.name, counter, str(prefix.parent), filename_prefix

        return {
            "comfy": ModuleType("comfy"),
            "comfy.model_management": _module(
                "comfy.model_management",
                intermediate_device=lambda: CPU,
                load_models_gpu=load_models_gpu,
                soft_empty_cache=lambda force=False: None,
                throw_exception_if_processing_interrupted=throw_exception_if_processing_interrupted,
                vae_device=lambda: CPU,
                vae_dtype=_vae_dtype,
                vae_offload_device=lambda: CPU,
            ),
            "comfy.model_patcher": _module("comfy.model_patcher", ModelPatcher=ModelPatcher),
            "comfy.utils": _module("comfy.utils", ProgressBar=ProgressBar),
            "comfy_api": ModuleType("comfy_api"),
            "comfy_api.latest": _module("comfy_api.latest", InputImpl=SimpleNamespace(VideoFromFile=VideoFromFile)),
            "folder_paths": _module(
                "folder_paths",
                get_filename_list=get_filename_list,
                get_full_path=get_full_path,
                get_output_directory=lambda: str(comfy.root / "output"),
                get_save_image_path=get_save_image_path,
            ),
        }

    def nodes(self) -> dict[str, Any]:
        """All nodes by name: those of the pack, and as many of ComfyUI's as the workflows have."""
        return STOCK_NODES | {"LoadVideo": self._load_video()} | self.pack.NODE_CLASS_MAPPINGS

    def _load_video(self) -> type:
        folder = self.root / "input"

        class LoadVideo:
            FUNCTION, RETURN_TYPES = "load", ("VIDEO",)

            @classmethod
            def INPUT_TYPES(cls):
                return {"required": {"file": (sorted(path.name for path in folder.iterdir()),)}}

            def load(self, file):
                return (VideoFromFile(str(folder / file)),)

        return LoadVideo

    def run(self, workflow: dict[str, Any]) -> dict[str, tuple]:
        """Execute a workflow of ComfyUI's API: check every input against its node, then call the nodes in order.

        Returns:
            What each node gave, by its number.
        """
        classes, outputs = self.nodes(), {}

        def execute(number: str) -> tuple:
            if number in outputs:
                return outputs[number]
            node = workflow[number]
            node_class = classes[node["class_type"]]
            declared = node_class.INPUT_TYPES()
            inputs = declared["required"] | declared.get("optional", {})
            assert set(node["inputs"]) <= set(inputs), "an input that the node does not have"
            assert set(declared["required"]) <= set(node["inputs"]), "a required input is missing"
            values = {}
            for name, value in node["inputs"].items():
                if isinstance(value, list):
                    source, index = value
                    output_types = classes[workflow[source]["class_type"]].RETURN_TYPES
                    assert output_types[index] == inputs[name][0], f"{name} is linked to {output_types[index]}"
                    values[name] = execute(source)[index]
                else:
                    _check_widget(name, value, *inputs[name])
                    values[name] = value
            result = getattr(node_class(), node_class.FUNCTION)(**values)
            outputs[number] = result["result"] if isinstance(result, dict) else result
            assert len(outputs[number]) == len(node_class.RETURN_TYPES)
            return outputs[number]

        with torch.inference_mode():  # as ComfyUI does
            for number in workflow:
                execute(number)
        return outputs


def _check_widget(name: str, value: Any, kind: Any, options: dict[str, Any] | None = None) -> None:
    options = options or {}
    if isinstance(kind, list):
        assert value in kind, f"{name} must be in {kind}, got {value!r}"
        return
    assert isinstance(value, {"INT": int, "FLOAT": float, "STRING": str}[kind]), f"{name} must be {kind}"
    if kind != "STRING":
        assert options["min"] <= value <= options["max"]


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module


def _vae_dtype(device=None, allowed_dtypes=[]):  # noqa: B006 (the signature is ComfyUI's)
    return torch.float32  # as on a CPU


class InterruptProcessingError(BaseException):
    """What ComfyUI raises when the user stops a workflow; no `Exception` there either."""


class VideoFromFile:
    """A video file; `start_time` and `duration` in seconds are a trim."""

    def __init__(self, file, *, start_time=0, duration=0, crop=None):
        self.file, self.trim = file, (float(start_time), float(duration))

    def get_stream_source(self):
        return self.file

    def has_pending_frame_edits(self):
        return False

    def get_active_trim_window(self):
        return self.trim

    def get_components(self):
        with VideoReader(self.file) as video:
            start, duration = (round(seconds * video.info.fps) for seconds in self.trim)
            frames = video.read(start, start + duration if duration else None)
            return SimpleNamespace(images=pixels_to_unit(frames), audio=None, frame_rate=video.info.fps)


class VideoFromComponents:
    """Frames as a video."""

    def __init__(self, components):
        self.components = components

    def get_stream_source(self):
        raise AssertionError("ComfyUI would encode all frames here")

    def has_pending_frame_edits(self):
        return False

    def get_active_trim_window(self):
        return 0.0, 0.0

    def get_components(self):
        return self.components


class VAEEncode:
    FUNCTION, RETURN_TYPES = "run", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"pixels": ("IMAGE",), "vae": ("VAE",)}}

    def run(self, pixels, vae):
        return ({"samples": vae.encode(pixels)},)


class VAEEncodeTiled:
    FUNCTION, RETURN_TYPES = "run", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"pixels": ("IMAGE",), "vae": ("VAE",), **TILES}}

    def run(self, pixels, vae, tile_size, overlap, temporal_size, temporal_overlap):
        samples = vae.encode_tiled(
            pixels,
            tile_x=tile_size,
            tile_y=tile_size,
            overlap=overlap,
            tile_t=temporal_size,
            overlap_t=temporal_overlap,
        )
        return ({"samples": samples},)


class VAEDecode:
    FUNCTION, RETURN_TYPES = "run", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",), "vae": ("VAE",)}}

    def run(self, samples, vae):
        return (_joined(vae.decode(samples["samples"], term_pbar_desc="VaeDecode")),)


class VAEDecodeTiled:
    FUNCTION, RETURN_TYPES = "run", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",), "vae": ("VAE",), **TILES}}

    def run(self, samples, vae, tile_size, overlap, temporal_size, temporal_overlap):
        ratio_t, ratio_s = vae.temporal_compression_decode(), vae.spacial_compression_decode()
        images = vae.decode_tiled(
            samples["samples"],
            tile_x=tile_size // ratio_s,
            tile_y=tile_size // ratio_s,
            overlap=overlap // ratio_s,
            tile_t=temporal_size // ratio_t,
            overlap_t=temporal_overlap // ratio_t,
        )
        return (_joined(images),)


class GetVideoComponents:
    FUNCTION, RETURN_TYPES = "run", ("IMAGE", "AUDIO", "FLOAT")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"video": ("VIDEO",)}}

    def run(self, video):
        components = video.get_components()
        return components.images, components.audio, float(components.frame_rate)


class CreateVideo:
    FUNCTION, RETURN_TYPES = "run", ("VIDEO",)

    @classmethod
    def INPUT_TYPES(cls):
        fps = ("FLOAT", {"min": 1.0, "max": 120.0})
        return {"required": {"images": ("IMAGE",), "fps": fps}, "optional": {"audio": ("AUDIO",)}}

    def run(self, images, fps, audio=None):
        return (VideoFromComponents(SimpleNamespace(images=images, audio=audio, frame_rate=Fraction(fps))),)


def _joined(images: torch.Tensor) -> torch.Tensor:
    return images.reshape(-1, *images.shape[-3:]) if images.ndim == 5 else images


def _size(default: int, smallest: int, step: int) -> tuple[str, dict[str, int]]:
    return "INT", {"default": default, "min": smallest, "max": 4096, "step": step}


TILES = {
    "tile_size": _size(512, 64, 32),
    "overlap": _size(64, 0, 32),
    "temporal_size": _size(64, 8, 4),
    "temporal_overlap": _size(8, 4, 4),
}
STOCK_NODES = {
    node.__name__: node
    for node in (VAEEncode, VAEEncodeTiled, VAEDecode, VAEDecodeTiled, GetVideoComponents, CreateVideo)
}


def save_frames(path: Path, frames: torch.Tensor, codec: str = "ffv1") -> None:
    """Write frames in `[0, 1]`, 8 of them a second."""
    write_video(path, unit_to_pixels(frames), 8, codec=codec)
