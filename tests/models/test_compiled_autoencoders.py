"""The three families under `torch.compile`: the same results, and no compilation for each size."""

from typing import Any

import pytest
import tiny
import torch
from tiny_autoencoders import make, make_latents, make_video


# Layers are traced one by one: where each block has one layer, less is traced, but the same code.
@torch.no_grad()
def test_tiles_by_memory_are_planned_outside_of_what_is_compiled():
    torch.compiler.reset()
    vae = make("wf_one_layer", torch.float32)
    z = make_latents(vae, 2, 2, 2)
    expected = vae.decode(z).sample
    vae.enable_tiling("auto")
    torch.testing.assert_close(torch.compile(vae.decode, backend="eager")(z).sample, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "case, backend",
    [
        *((case, "aot_eager") for case in ("lean", "wf_one_layer", "iv_one_layer")),
        *(pytest.param(case, "inductor", marks=pytest.mark.slow) for case in ("lean", "wf", "iv")),
    ],
)
def test_compile(case: str, backend: str):
    torch.compiler.reset()
    vae = make(case, torch.float32)
    video = make_video(vae, 1, 16, 16)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        expected = vae.encode(video).latent_dist.mean, vae.decode(make_latents(vae, 2, 2, 2)).sample
        encode = torch.compile(lambda x: vae.encode(x).latent_dist.mean, backend=backend, fullgraph=True)
        decode = torch.compile(lambda z: vae.decode(z).sample, backend=backend, fullgraph=True)
        for _ in range(2):
            actual = encode(video), decode(make_latents(vae, 2, 2, 2))
            # Compiled, small convolutions are computed by a kernel of PyTorch's own: measured 1.3e-5.
            torch.testing.assert_close(actual, expected, rtol=0, atol=4e-5)


@pytest.mark.parametrize(
    "case, config, parts",
    [
        ("lean", tiny.SMALLEST, ("decode",)),
        *(
            pytest.param(case, {}, ("encode", "decode"), marks=pytest.mark.slow)
            for case in ("lean", "wf_one_layer", "iv_one_layer")
        ),
    ],
)
@torch.no_grad()
def test_one_compilation_serves_every_size(case: str, config: dict[str, Any], parts: tuple[str, ...]):
    torch.compiler.reset()
    vae, graphs = make(case, torch.float32, **config), []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    for part in parts:
        method = getattr(vae, part)
        compiled = torch.compile(method, backend=count, fullgraph=True, dynamic=True)
        # In the first sizes no two numbers are equal, which a compiler would take for a rule.
        for batch_size, num_groups, height, width in ((2, 4, 6, 7), (3, 2, 4, 4), (2, 3, 7, 2)):
            if part == "encode":
                x = make_video(vae, num_groups, 8 * height, 8 * width, batch_size)
                actual, expected = (function(x).latent_dist.mean for function in (compiled, method))
            else:
                x = tiny.make_latents(batch_size, vae.latent_channels, num_groups + 1, height, width)
                actual, expected = (function(x).sample for function in (compiled, method))
            # IV-VAE computes a clip in steps where it is not compiled: the same up to rounding. Measured 1e-5, of
            # IV-VAE 4.6e-5 on a processor of another make.
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4 if case.startswith("iv") else 4e-5)
    assert len(graphs) == len(parts)
