"""CUDA graphs: a fixed sequence of kernels replayed without the cost of launching each from Python."""

from collections.abc import Callable

import torch


class GraphedFunction:
    """A function of tensors recorded once as a CUDA graph, replayed at each call.

    For inputs of one shape where launching takes longer than computing: small videos, single frames of a stream.
    The graph holds the memory that the function takes at its peak. It reads the very parameters that it was recorded
    with: after they were moved, cast or replaced (not: overwritten in place) it must be recorded again. Whatever
    else the function does on the CPU, such as advancing a `TemporalCache`, happens while recording and never again.

    Args:
        function: Takes tensors, returns a tensor or a tuple of tensors; must not wait for the GPU, as `.item()` and
            copies to the CPU do. No gradients are recorded.
        examples: Inputs of the shapes, dtypes and device that later calls will have.
        num_warmup: Calls before recording, in which kernels are compiled and tuned.
    """

    def __init__(self, function: Callable, *examples: torch.Tensor, num_warmup: int = 3):
        if not examples or not all(isinstance(example, torch.Tensor) and example.is_cuda for example in examples):
            kinds = [
                example.device.type if isinstance(example, torch.Tensor) else type(example).__name__
                for example in examples
            ]
            raise ValueError(f"`examples` must be tensors on a CUDA device, at least one, got {kinds}.")
        if num_warmup < 1:
            raise ValueError(f"`num_warmup` must be 1 or more, got {num_warmup}.")
        self._inputs = tuple(example.detach().clone() for example in examples)
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.device(self._inputs[0].device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(num_warmup):
                    function(*self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph):
                outputs = function(*self._inputs)
        self._is_tuple = isinstance(outputs, tuple)
        self._outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not all(isinstance(output, torch.Tensor) for output in self._outputs):
            kinds = ", ".join(type(output).__name__ for output in self._outputs)
            raise ValueError(f"`function` must return a tensor or a tuple of tensors, got {kinds}.")

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Replay with new inputs of the recorded shapes; the outputs are the caller's own."""
        got, expected = ([(tuple(x.shape), x.dtype, x.device) for x in xs] for xs in (inputs, self._inputs))
        if got != expected:  # a copy would broadcast, cast and move silently
            raise ValueError(f"`inputs` must be as recorded, {expected}, got {got}.")
        with torch.no_grad(), torch.cuda.device(self._inputs[0].device):
            for static, x in zip(self._inputs, inputs, strict=True):
                static.copy_(x)
            self._graph.replay()
            outputs = tuple(output.clone() for output in self._outputs)
        return outputs if self._is_tuple else outputs[0]
