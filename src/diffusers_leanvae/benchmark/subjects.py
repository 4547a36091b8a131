"""One autoencoder in one variant on one device, ready to be measured."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..checks import check_choice
from ..clock import MIB, end_of_peak, seconds, start_of_peak
from ..evaluation.autoencoders import decode, encode, find_class, legal_sample
from ..models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE
from .names import LEANVAE, PEERS, VARIANTS
from .tiny_autoencoder import TinyVideoAutoencoder
from .work import Layout, MatrixFloor, Size, count_work


def build_model(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Build an autoencoder with random weights: a name of `LEANVAE` or of `PEERS`.

    Raises:
        ValueError: If there is none of that name, or this version of diffusers does not have its class.
    """
    check_choice("name", name, (*LEANVAE, *PEERS))
    torch.manual_seed(0)
    if name in PEERS:
        class_name, config = PEERS[name]
        model_class = TinyVideoAutoencoder if class_name == "TinyVideoAutoencoder" else find_class(class_name)
        if model_class is None:
            raise ValueError(f"`name` must be of a class of this version of diffusers, got {name!r}.")
        return nn.Module.to(model_class(**config).eval(), device, dtype)  # diffusers' own `to` warns of nothing
    vae = AutoencoderKLLeanVAE(**LEANVAE[name])
    with torch.no_grad():  # the training initialisation gives tokens of almost zero, and zeros can be faster
        for key, parameter in vae.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
            elif key.endswith("bias"):
                parameter.normal_(std=0.1)
    return nn.Module.to(vae.eval(), device, dtype)


def variants_of(vae: Any) -> tuple[str, ...]:
    """List the variants that an autoencoder has: only a LeanVAE can be fused."""
    can_be_fused = isinstance(vae, AutoencoderKLLeanVAE)
    return tuple(name for name, settings in VARIANTS.items() if can_be_fused or settings is None)


class Subject:
    """One autoencoder, ready to be measured.

    Args:
        vae: A video autoencoder of diffusers, with its dtype and on its device.
        variant: A key of `VARIANTS`: `"eager"`, or `"compiled"` (`torch.compile` of the eager network for each size);
            for LeanVAE also `"fused"`, `"fused-torch"` (without Triton and C++) and `"graphs"` (fused, replayed as a
            CUDA graph).

    Attributes:
        has_floor: Whether the matrix products alone say anything: they are nearly all the work of a LeanVAE, but not
            of networks made of convolutions.

    Raises:
        ValueError: If the autoencoder does not have the variant.
    """

    def __init__(self, vae: Any, variant: str = "eager"):
        check_choice("variant", variant, VARIANTS)
        check_choice("variant", variant, variants_of(vae), f"for an {type(vae).__name__}")
        if (settings := VARIANTS[variant]) is not None:
            vae.fuse(**settings)
        self.vae, self.variant = vae, variant
        self.has_floor = isinstance(vae, AutoencoderKLLeanVAE)
        self.dtype, self.device = vae.dtype, vae.device
        self.num_parameters = sum(parameter.numel() for parameter in vae.parameters())
        self._functions: dict[tuple[str, Size], Callable[[torch.Tensor], torch.Tensor]] = {}
        self._inputs: dict[tuple[str, Size], torch.Tensor] = {}
        self._floors: dict[tuple[str, Size], MatrixFloor] = {}
        self.layouts: dict[tuple[int, ...], Layout] = {}
        self._warm: set[Any] = set()

    def make_input(self, direction: str, size: Size) -> torch.Tensor:
        """Make uniform noise in `[-1, 1]` to encode, or normal noise to decode."""
        generator = torch.Generator(self.device).manual_seed(0)
        settings: dict[str, Any] = {"generator": generator, "device": self.device}
        if direction == "encode":
            x = legal_sample(self.vae, torch.rand(1, 3, *size, **settings) * 2 - 1)
        else:
            x = torch.randn(count_work(self.vae, size)["decode"].input_shape, **settings)
        return x.to(self.dtype)

    def measure(self, direction: str, size: Size, is_first: bool) -> dict[str, Any]:
        """Call once. The first call measures memory and counts work, later ones also time the floor if there is one.

        Args:
            direction: `"encode"` or `"decode"`.
            size: Frames, height and width of the video.
            is_first: Whether memory and work are wanted; the time then includes the allocation of large tensors.
        """
        key = (direction, size)
        if key not in self._inputs:
            self._inputs = {key: self.make_input(direction, size)}
        x = self._inputs[key]
        function = self._function(direction, size, x)
        result: dict[str, Any] = {}
        with torch.no_grad():
            self._warm_up(direction, size, x, function)
            if is_first:
                work = count_work(self.vae, size)[direction]
                self._floors.clear()
                before = start_of_peak(self.device)
                output = None

                def run() -> None:
                    nonlocal output
                    output = function(x)

                result["seconds"] = seconds(run, self.device)
                # A graph takes its memory when it is recorded, not when it runs.
                peak = None if self.variant == "graphs" else end_of_peak(before, self.device)
                assert output is not None
                if tuple(output.shape) != work.output_shape or not bool(output.isfinite().all()):
                    raise RuntimeError(f"result of shape {tuple(output.shape)} is not finite or of the wrong shape")
                result |= {
                    "peak_mib": None if peak is None else round(peak / MIB, 1),
                    "output_mib": round(output.numel() * output.element_size() / MIB, 1),
                    "giga_multiply_adds": float(f"{work.multiply_adds / 1e9:.6g}"),
                    "num_parameters": self.num_parameters,
                    "latent": list(work.output_shape if direction == "encode" else work.input_shape)[2:],
                }
            else:
                result["seconds"] = seconds(lambda: function(x), self.device)
                if self.has_floor:
                    floor = self._floor(direction, size)
                    result["floor_seconds"] = seconds(floor, self.device)
        return result

    def _floor(self, direction: str, size: Size) -> MatrixFloor:
        if (direction, size) not in self._floors:
            products = count_work(self.vae, size)[direction].products
            self._floors = {key: floor for key, floor in self._floors.items() if key[1] == size}
            self._floors[direction, size] = MatrixFloor(products, self.dtype, self.device, self.layouts)
            self._floors[direction, size]()
        return self._floors[direction, size]

    def _function(self, direction: str, size: Size, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        key = (direction, size)
        if key in self._functions:
            return self._functions[key]
        plain = encode if direction == "encode" else decode

        def function(x: torch.Tensor) -> torch.Tensor:
            return plain(self.vae, x)

        if self.variant == "compiled":
            torch._dynamo.config.recompile_limit = 64  # one version for each size
            function = torch.compile(function, dynamic=False)
        elif self.variant == "graphs":
            from ..kernels.cuda_graphs import GraphedFunction

            self._functions.clear()  # a graph holds the memory of its peak
            function = GraphedFunction(function, x)  # type: ignore[assignment]
        self._functions[key] = function
        return function

    def _warm_up(self, direction: str, size: Size, x: torch.Tensor, function: Callable) -> None:
        """Bring kernels, their threads and their scratch memory into place before anything is counted."""
        if self.variant in ("compiled", "graphs"):
            if (direction, size) not in self._warm:
                function(x)
                function(x)  # what the first call changed may have it compiled once more
                self._warm.add((direction, size))
        elif not self._warm:
            small = (17, 64, 64)
            for name, plain in (("encode", encode), ("decode", decode)):
                plain(self.vae, self.make_input(name, small))
                self._warm.add((name, small))
