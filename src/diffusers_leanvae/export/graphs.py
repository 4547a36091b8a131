"""The graphs that a video autoencoder is exported as: functions of tensors alone, with names for all of them.

A graph takes a whole clip, or a chunk of a stream together with what the layers remembered of the chunks before. What
they remember comes in as inputs `past.<layer>` and goes out as outputs `present.<layer>`: whoever runs a stream hands
the outputs of a chunk to the next one by their names.
"""

import copy
import functools
from typing import Literal, NamedTuple

import torch
from torch import nn

from ..checks import check_choice
from ..models.leanvae_blocks import NUM_TAIL_STEPS, CausalDepthwiseConv3d, no_tail
from ..models.temporal_cache import WHOLE, Chunk, TemporalCache
from ..models.video_autoencoder import VideoAutoencoder


Part = Literal["encoder", "decoder"]
# Of a graph: a whole clip, or the first chunk of a stream, one in the middle, or the last one.
Role = Literal["whole", "first", "next", "last"]
METADATA = "leanvae"  # the name of the description inside a file
PARTS: tuple[Part, ...] = ("encoder", "decoder")
LOGVAR_RANGE = (-30.0, 20.0)  # that of `DiagonalGaussianDistribution`


class Size(NamedTuple):
    """A size that a graph leaves open: so many times one of the clip's."""

    name: str  # batch, groups, latent_height or latent_width
    factor: int = 1
    more: int = 0

    def __str__(self) -> str:
        return (f"{self.factor}*" if self.factor != 1 else "") + self.name + (f"+{self.more}" if self.more else "")


Shape = tuple[int | Size, ...]


def number_of(size: int | Size, clip: dict[str, int]) -> int:
    """The number that a size is for a clip of these sizes."""
    return size if isinstance(size, int) else size.factor * clip[size.name] + size.more


class Port(NamedTuple):
    """An input or output of a graph.

    Attributes:
        name: Its name in the file.
        shape: Its sizes; those left open as [`Size`].
        labels: The same for people, such as `"height"` or `"4*latent_height"`.
    """

    name: str
    shape: Shape
    labels: tuple[int | str, ...]


class Graph(NamedTuple):
    """One graph to export.

    Attributes:
        name: Of the file, such as `"decoder_next"`.
        part: Encoder or decoder.
        role: What it takes.
        module: The function, of the inputs in their order; returns the outputs as a tuple.
        inputs: The video or the latents, then what the layers remember.
        outputs: Mean and log-variance, or the video, then what the layers remember.
    """

    name: str
    part: Part
    role: Role
    module: "GraphModule"
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def check_exportable(vae: VideoAutoencoder, parts: tuple[Part, ...]) -> None:
    """Refuse what is no model with its weights in memory, and what are no parts of one; see [`graphs_of`]."""
    if not isinstance(vae, VideoAutoencoder):
        raise ValueError(f"`vae` must be a model such as an `AutoencoderKLLeanVAE`, got {vae!r}.")
    if not parts:
        raise ValueError(f"`parts` must be 'encoder', 'decoder' or both, got {parts!r}.")
    for part in parts:
        check_choice("parts", part, PARTS)
    if vae.has_moving_weights():
        raise ValueError("`vae` must be exported before layers are offloaded or cast when called, got some that are.")
    if any(weight.device.type == "meta" for weight in vae.parameters()):
        raise ValueError("`vae` must have its weights in memory, got some on the meta device.")


def graphs_of(vae: VideoAutoencoder, parts: tuple[Part, ...] = PARTS, is_streaming: bool = False) -> list[Graph]:
    """Make the graphs of a model.

    Args:
        vae: The model. Its weights are shared with the graphs, and it stays as it is.
        parts: Encoder, decoder or both.
        is_streaming: Whether to add the graphs of a stream: of its first chunk, of later ones, and of the last one
            where the decoder is late (`num_delayed_frames`).

    Raises:
        ValueError: If the model cannot be computed in chunks, its weights are not all in memory, or an argument is not
            legal.
    """
    check_exportable(vae, parts)
    if is_streaming and not vae.can_stream:
        raise ValueError("`streaming` needs `norm_type` 'layer_norm', got a model whose norms see the whole video.")
    vae, graphs = _exportable(vae), []
    for part in parts:
        graphs.append(_make_graph(vae, part, "whole", {}))
        if is_streaming:
            states = _states_of(vae, part)
            graphs += [_make_graph(vae, part, "first", states), _make_graph(vae, part, "next", states)]
            if part == "decoder" and vae.num_delayed_frames:
                graphs.append(_make_graph(vae, part, "last", states))
    return graphs


def _make_graph(vae: VideoAutoencoder, part: Part, role: Role, states: dict[str, Shape]) -> Graph:
    is_first = role in ("whole", "first")
    ratio_t, ratio_s = vae.temporal_compression_ratio, vae.spatial_compression_ratio
    batch, height, width = Size("batch"), Size("latent_height"), Size("latent_width")
    latents: Shape = (batch, vae.latent_channels, Size("groups", more=int(is_first)), height, width)
    size = (Size("latent_height", ratio_s), Size("latent_width", ratio_s))
    frames: Shape = (batch, vae.in_channels, Size("groups", ratio_t, int(is_first)), *size)
    latents_labels = ("batch", vae.latent_channels, "latent_frames", "latent_height", "latent_width")
    frames_labels = ("batch", vae.in_channels, "frames", "height", "width")
    kept = {name: shape for name, shape in states.items() if 0 not in shape}
    past = [Port(f"past.{name}", shape, _labels(shape)) for name, shape in kept.items()]
    present = [Port(f"present.{name}", shape, _labels(shape)) for name, shape in kept.items()]
    video = Port("video", frames, frames_labels)
    if part == "encoder":
        inputs, outputs = [video], [Port(name, latents, latents_labels) for name in ("mean", "logvar")]
    else:
        inputs, outputs = [Port("latents", latents, latents_labels)], [video]
    return Graph(
        part if role == "whole" else f"{part}_{role}",
        part,
        role,
        GraphModule(vae, part, role, states),
        (*inputs, *(past if role in ("next", "last") else [])),
        (*outputs, *(present if role in ("first", "next") else [])),
    )


def _labels(shape: Shape) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size) for size in shape)


def _states_of(vae: VideoAutoencoder, part: Part) -> dict[str, Shape]:
    """What the layers remember between chunks: found by streams that differ from another in one size each."""
    clip = {"batch": 1, "groups": 1, "latent_height": 1, "latent_width": 1}
    shapes = _remembered(vae, part, clip)
    larger = {name: _remembered(vae, part, clip | {name: clip[name] + 1}) for name in clip}

    def size_of(state: str, dim: int) -> int | Size:
        size = shapes[state][dim]
        factors = {name: other[state][dim] - size for name, other in larger.items()}
        name = max(factors, key=lambda name: factors[name])
        return Size(name, factors[name], size - factors[name] * clip[name]) if factors[name] else size

    return {state: tuple(size_of(state, dim) for dim in range(len(shape))) for state, shape in shapes.items()}


def _remembered(vae: VideoAutoencoder, part: Part, clip: dict[str, int]) -> dict[str, torch.Size]:
    """Shapes of what the layers remember of a stream."""
    cache, shapes = TemporalCache(), []
    for role in ("first", "next"):
        shape = _make_graph(vae, part, role, {}).inputs[0].shape
        x = torch.zeros([number_of(size, clip) for size in shape], dtype=vae.dtype, device=vae.device)
        chunk = Chunk(role == "first", False, cache, has_gradients=False)
        with torch.no_grad():
            _compute(vae, part, x, chunk)
        chunk.close()
        shapes.append({name: tail.shape for name, tail in cache.tails.items()})
    assert shapes[0] == shapes[1]  # the first chunk leaves behind what later ones take and leave
    return shapes[0]


# ---- modules --------------------------------------------------------------------------------------------------------


class GraphModule(nn.Module):
    """The function of a graph: of the video or latents and of what the layers remember, in the order of `states`.

    Args:
        vae: The model.
        part: Which of its functions.
        role: Where the chunk stands in the video.
        states: What the layers remember between chunks. What has no elements is no input or output.
    """

    def __init__(self, vae: VideoAutoencoder, part: Part, role: Role, states: dict[str, Shape]):
        super().__init__()
        self.vae = vae
        self.part: Part = part
        self.role: Role = role
        self.states = states

    def forward(self, x: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cache = None if self.role == "whole" else TemporalCache()
        if cache is not None and self.role != "first":
            cache.tails = self._tails(x, list(past))
        chunk = Chunk(self.role in ("whole", "first"), self.role in ("whole", "last"), cache, has_gradients=False)
        outputs = _compute(self.vae, self.part, x, chunk)
        chunk.close()
        if cache is None or chunk.is_last:
            return outputs
        return (*outputs, *(cache.tails[name] for name, shape in self.states.items() if 0 not in shape))

    def _tails(self, x: torch.Tensor, past: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        scale = self.vae.spatial_compression_ratio if self.part == "encoder" else 1
        clip = {"batch": x.shape[0], "latent_height": x.shape[3] // scale, "latent_width": x.shape[4] // scale}
        return {
            name: x.new_zeros([number_of(size, clip) for size in shape]) if 0 in shape else past.pop(0)
            for name, shape in self.states.items()
        }


def _compute(vae: VideoAutoencoder, part: Part, x: torch.Tensor, chunk: Chunk) -> tuple[torch.Tensor, ...]:
    """One chunk, without tiles: mean and log-variance of a video, or the video of latents."""
    if part == "decoder":
        return (vae._decode_local(x if vae.is_local else vae._decode_whole(x, chunk), chunk),)
    moments = vae._encode_local(x, chunk)
    moments = moments if vae.is_local else vae._encode_whole(moments, chunk)
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar.clamp(*LOGVAR_RANGE)


class ExportableConv3d(CausalDepthwiseConv3d):
    """The depthwise convolution of LeanVAE as three 2D convolutions, one for each step of time, of the same weights.

    Runtimes have fast 2D depthwise kernels and, for most devices, slow 3D ones or none (WebGPU).
    """

    def __init__(self, conv: CausalDepthwiseConv3d):
        nn.Module.__init__(self)
        self.name, self.weight, self.bias = conv.name, conv.weight, conv.bias

    def forward(self, hidden_states: torch.Tensor, chunk: Chunk = WHOLE, residual: bool = False) -> torch.Tensor:
        tail = chunk.recall(self.name, hidden_states, time_dim=1)
        steps = torch.cat((no_tail(hidden_states) if tail is None else tail, hidden_states), dim=1)
        chunk.remember(self.name, steps[:, -NUM_TAIL_STEPS:])
        num_steps = hidden_states.shape[1]
        outputs = [self._convolve_frames(steps[:, i : i + num_steps], i) for i in range(NUM_TAIL_STEPS + 1)]
        output = functools.reduce(torch.add, outputs)
        return hidden_states + output if residual else output

    def _convolve_frames(self, steps: torch.Tensor, index: int) -> torch.Tensor:
        frames = steps.flatten(0, 1).permute(0, 3, 1, 2)  # (B * t, c, h, w)
        bias = self.bias if index == 0 else None
        frames = nn.functional.conv2d(frames, self.weight[:, :, index], bias, padding=1, groups=self.weight.shape[0])
        return frames.permute(0, 2, 3, 1).unflatten(0, steps.shape[:2])


def _exportable(vae: VideoAutoencoder) -> VideoAutoencoder:
    """The model, with the same weights, of layers that exporters take."""
    weights = {id(tensor): tensor for tensor in (*vae.parameters(), *vae.buffers())}
    vae = copy.deepcopy(vae, weights).eval()
    vae.unfuse()
    for module in [*vae.modules()]:
        for name, child in module.named_children():
            if isinstance(child, CausalDepthwiseConv3d):
                setattr(module, name, ExportableConv3d(child))
    return vae
