"""Prediction of the memory that any video autoencoder needs: its network is run once on tensors without data.

What is alive at its peak, and what it remembers, grows with the area of the frames, as every layer's tensors do. So
one run on a small frame says it for all sizes. Counted besides tensors is what kernels of a processor take for
themselves: the copies in blocks that oneDNN makes for a convolution, and copies in another order.
"""

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .memory_planning import Cost, MemoryModel
from .temporal_cache import Chunk, TemporalCache


# Height and width of the frame that is traced, in latents: large enough that the row which downsampling pads is small.
_EDGE = 16
_FLOAT_BYTES = 4
_CONVOLUTIONS = {torch.ops.aten.convolution.default}
if torch.backends.mkldnn.is_available():
    _CONVOLUTIONS |= {torch.ops.mkldnn._convolution_pointwise.default}


# Peaks of what grows with the area of the frames, by what comes on top of them whatever the area: a copy of a weight.
_Peaks = dict[float, float]


class _Alive(TorchDispatchMode):
    """Counts bytes of tensors that are made while it is active, and their peak.

    Attributes:
        num_bytes: What is alive now.

    Args:
        on_cpu: Whether what kernels of a processor take for themselves counts.
    """

    def __init__(self, on_cpu: bool) -> None:
        super().__init__()
        self.on_cpu = on_cpu
        self.num_bytes = 0
        self._peaks: _Peaks = {}
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):  # what was there before: weights and inputs
            self._seen.setdefault(storage, True)
        output = func(*args, **(kwargs or {}))
        for storage in _storages(output):
            if storage not in self._seen:
                self._seen[storage] = True
                self.num_bytes += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        scratch, fixed = _scratch(func, args, output) if self.on_cpu else (0, 0)
        self._peaks[fixed] = max(self._peaks.get(fixed, 0), self.num_bytes + scratch)
        return output

    def _free(self, num_bytes: int) -> None:
        self.num_bytes -= num_bytes

    def take_peaks(self) -> _Peaks:
        """Return the peaks since the last call, in bytes."""
        peaks = self._peaks
        self._peaks = {0: self.num_bytes}
        return peaks


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _scratch(func: Any, args: tuple[Any, ...], output: Any) -> tuple[int, int]:
    """Bytes that a kernel takes beside its result: those that grow with the area of the frames, and the others."""
    if func is torch.ops.aten.native_layer_norm.default:
        return 0 if args[0].is_contiguous() else args[0].nbytes, 0
    if func not in _CONVOLUTIONS:
        return 0, 0
    x, weight = args[:2]
    is_channels_last = torch.channels_last_3d in {suggest_memory_format(tensor) for tensor in (x, weight)}
    is_pointwise = weight[0, 0].numel() == 1
    layout = torch.channels_last_3d if is_channels_last and not is_pointwise else torch.contiguous_format
    copy = 0 if x.is_contiguous(memory_format=layout) else x.nbytes
    if is_pointwise:
        return copy, 0
    if is_channels_last:
        return copy, weight.nbytes
    # oneDNN: input and result once more, in blocks of 16 channels; the input's are freed before the result is ordered.
    blocks, results = (_padded(tensor, tensor.shape[1]) for tensor in (x, output))
    return copy + max(blocks + results - output.nbytes, results), weight.nbytes


def _padded(tensor: torch.Tensor, num_channels: int) -> int:
    return tensor.nbytes // num_channels * (-(-num_channels // 16) * 16)


class _Part(NamedTuple):
    """Elements that a part of the network takes.

    Attributes:
        peaks: Its peaks, result included, where nothing is remembered, over a latent position each.
        stream_peaks: Likewise in a stream, its state included.
        result: Its result, over a latent position.
        state: What it remembers, over a latent position.
    """

    peaks: _Peaks
    stream_peaks: _Peaks
    result: float
    state: float

    def peak(self, area: int) -> float:
        """Its peak for a number of latent positions."""
        return _highest(self.peaks, area)

    def more(self, area: int) -> float:
        """What a chunk of a stream takes at its peak beyond [`peak`] and the state."""
        return max(_highest(self.stream_peaks, area) - self.peak(area) - self.state * area, 0.0)


def _highest(peaks: _Peaks, area: int) -> float:
    return max(each * area + fixed for fixed, each in peaks.items())


@lru_cache(maxsize=128)
def _trace(
    model_class: type, config: str, decoding: bool, num_latent_frames: int, on_cpu: bool
) -> tuple[_Part, _Part]:
    """The local and the whole part of a chunk."""
    # Inference mode would show composite operations instead of what they are made of, and autocast other dtypes.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        # Made in the mode, so that weights are tensors without data and nothing that a layer makes of them is new.
        with FakeTensorMode():
            vae = model_class.from_config(json.loads(config)).eval().requires_grad_(False)  # type: ignore[attr-defined]
            ratio = 1 if decoding else vae.spatial_compression_ratio
            later = max(num_latent_frames - 1, 1)
            sizes = [num_latent_frames, later]
            if not decoding:
                sizes = [vae.num_sample_frames(num_latent_frames), later * vae.temporal_compression_ratio]
            channels = vae.latent_channels if decoding else vae.in_channels
            inputs = [torch.empty(1, channels, size, _EDGE * ratio, _EDGE * ratio) for size in sizes]
            names = ("whole", "local") if decoding else ("local", "whole")
            parts: dict[str, _Part] = {}
            for name in names:
                call = getattr(vae, f"_{'decode' if decoding else 'encode'}_{name}")
                parts[name], inputs = _trace_part(call, inputs, on_cpu)
    return parts["local"], parts["whole"]


def _trace_part(
    call: Callable[[torch.Tensor, Chunk], torch.Tensor], inputs: list[torch.Tensor], on_cpu: bool
) -> tuple[_Part, list[torch.Tensor]]:
    def per_position(num_bytes: float) -> float:
        return num_bytes / _FLOAT_BYTES / _EDGE**2

    with _Alive(on_cpu) as alive:
        result = call(inputs[0], Chunk())
        peaks, num_result = alive.take_peaks(), result.nbytes
        del result
    outputs, cache, stream_peaks = [], TemporalCache(), _Peaks()
    with _Alive(on_cpu) as alive:
        for index, x in enumerate(inputs):
            chunk = Chunk(index == 0, False, cache)
            outputs.append(call(x, chunk))
            chunk.close()
            for fixed, num_bytes in alive.take_peaks().items():
                stream_peaks[fixed] = max(stream_peaks.get(fixed, 0), num_bytes)
            alive.num_bytes = cache.nbytes()  # results are gone by the next chunk
            alive.take_peaks()
    first, later = (
        {fixed / _FLOAT_BYTES: per_position(num_bytes) for fixed, num_bytes in found.items()}
        for found in (peaks, stream_peaks)
    )
    return _Part(first, later, per_position(num_result), per_position(cache.nbytes())), outputs


@dataclass(frozen=True)
class TracedMemory(MemoryModel):
    """The memory of a model as its traced network says.

    Attributes:
        model_class: The class of the model.
        config: Its config as JSON.
        on_cpu: Whether kernels are those of a processor.
    """

    model_class: type
    config: str
    on_cpu: bool

    def cost(
        self,
        decoding: bool,
        shape: tuple[int, int, int, int],
        tile: tuple[int, int],
        num_frames_per_chunk: int,
        item_bytes: int,
    ) -> Cost:
        num_frames = shape[1]
        frame, area, computed = self._positions(decoding, shape, tile)
        num_latent_frames = self._num_latent(min(num_frames_per_chunk, num_frames))
        local, whole = _trace(self.model_class, self.config, decoding, num_latent_frames, self.on_cpu)
        # The frame that tiles are put together to. One tile is the frame itself.
        canvas = local.result * frame if computed > area else 0.0
        if decoding:
            peaks = whole.peak(frame), whole.result * frame + canvas + local.peak(area)
            per_position = self.frame_elements * num_frames
        else:
            peaks = canvas + local.peak(area), local.result * frame + whole.peak(frame)
            per_position = 2 * self.latent_channels * self._num_latent(num_frames)
        more = max(local.more(area), whole.more(frame))
        return Cost(
            working=round(max(peaks)),
            result=per_position * frame,
            tile_state=round(local.state * area + whole.state * frame + more),
            state=round(local.state * computed + whole.state * frame + more),
            overhead=computed / frame,
        )
