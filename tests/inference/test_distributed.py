"""Tiles spread over two processes give what one process gives, and each process computes only its share."""

import re
import traceback
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from tiny import make_latents, make_tiny, make_video

from diffusers_leanvae.inference.distributed import _is_near, _sketch, decode_distributed, encode_distributed
from diffusers_leanvae.models.video_autoencoder import VideoAutoencoder


WORLD = 2
FAMILIES: dict[str, dict[str, Any]] = {
    "leanvae": {},
    "wfvae": {"num_encoder_layers": 1, "num_decoder_layers": 1},
    "ivvae": {"num_layers": 1, "channel_multipliers": (1, 1, 1, 2)},
}


class Case(NamedTuple):
    shape: tuple[int, ...]
    tile: tuple[int, int, int]  # height, width, frames per chunk
    num_parts: tuple[int, ...]  # tiles of chunks that each process computes, in one direction
    slicing: bool = False


CASES = {
    "video, five tiles": Case((2, 3, 9, 24, 80), (24, 16, 5), (6, 4)),
    "video, nine uneven tiles": Case((1, 3, 13, 40, 56), (16, 24, 9), (10, 8)),
    "image, three tiles": Case((1, 3, 40, 16), (16, 16, 5), (2, 1)),
    "one tile for two processes": Case((1, 3, 5, 16, 24), (64, 64, 5), (1, 0)),
    "batch in slices": Case((3, 3, 5, 16, 24), (64, 64, 5), (2, 1), slicing=True),
    "batch in slices of two tiles": Case((3, 3, 5, 16, 24), (16, 16, 5), (3, 3), slicing=True),
}
FIRST = "video, five tiles"


def other_values(x: torch.Tensor, vae: VideoAutoencoder) -> torch.Tensor:
    return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(9))


def other_slicing(x: torch.Tensor, vae: VideoAutoencoder) -> torch.Tensor:
    vae.use_slicing = True
    return x


def without_tiling(x: torch.Tensor, vae: VideoAutoencoder) -> torch.Tensor:
    vae.use_tiling = False
    return x


def other_dtype(x: torch.Tensor, vae: VideoAutoencoder) -> torch.Tensor:
    vae.float()
    return x.float()


SAME = r"must be the same in every process, got"
# What the process of rank 1 does otherwise, and what both then say; of `decode_distributed` with `z` for `x`.
DIFFERENCES: dict[str, tuple[Any, str]] = {
    "values": (other_values, rf"^`x` {SAME} other values in processes 0 and 1: broadcast "),
    "order": (lambda x, vae: x.flip(0), rf"^`x` {SAME} other values in processes 0 and 1: broadcast "),
    "mirrored": (lambda x, vae: x.flip(4), rf"^`x` {SAME} other values in processes 0 and 1: broadcast "),
    "size": (lambda x, vae: x[:, :, :1], rf"^`x` {SAME} \(2, \d, \d, 2?4, \d+\) and \(2, \d, 1, 2?4, \d+\) in proc"),
    "slicing": (other_slicing, rf"^`use_slicing` {SAME} False and True in processes 0 and 1\.$"),
    "dtype": (other_dtype, rf"^`x` {SAME} torch.float64 and torch.float32 in processes 0 and 1\.$"),
    "error": (lambda x, vae: x[:, :2], r"^`x` must have shape .*, in process 1 of the group\.$"),
    "no tensor": (
        lambda x, vae: None,
        r"^`x` must be a `torch.Tensor`, got a `NoneType`, in process 1 of the group\.$",
    ),
    "no tiling": (without_tiling, r"^`vae` must have tiling enabled, .*, in process 1 of the group\.$"),
}


def make(family: str, dtype: torch.dtype = torch.float64) -> VideoAutoencoder:
    return make_tiny(family, dtype, **FAMILIES[family])


def make_input(name: str) -> torch.Tensor:
    return make_video(*CASES[name].shape, dtype=torch.float64)


def work(rank: int, folder: str) -> None:
    """Work of each process: all cases of all families, results and counts into a file of its own."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    alone = dist.new_group([1])  # its rank 0 is the process of rank 1
    torch.save({family: work_of(family, alone) for family in FAMILIES}, f"{folder}/results-{rank}.pt")
    dist.destroy_process_group()


def work_of(family: str, alone: Any) -> dict[str, Any]:
    vae = make(family)
    num_parts = {"encode": 0, "decode": 0}
    for direction in num_parts:
        compute = getattr(vae, f"_{direction}_local")

        def counted(*args: Any, compute: Any = compute, direction: str = direction) -> torch.Tensor:
            num_parts[direction] += 1
            return compute(*args)

        setattr(vae, f"_{direction}_local", counted)

    def run(x: torch.Tensor, group: Any = None) -> dict[str, Any]:
        num_parts.update(encode=0, decode=0)
        posterior = encode_distributed(vae, x, group).latent_dist
        z = posterior.mode().squeeze(2) if x.ndim == 4 else posterior.mode()
        sample = decode_distributed(vae, z, group).sample
        return {"moments": posterior.parameters, "sample": sample, "num_parts": dict(num_parts)}

    results: dict[str, Any] = {}
    for name, case in CASES.items():
        vae.use_slicing = case.slicing
        vae.enable_tiling(*case.tile)
        results[name] = run(make_input(name))
    vae.use_slicing = False
    vae.enable_tiling(*CASES[FIRST].tile)
    try:
        results["group of one"] = run(make_input(FIRST), alone)
    except ValueError:
        results["group of one"] = traceback.format_exc()
    results["differences"] = {name: messages_of(vae, change) for name, (change, _) in DIFFERENCES.items()}
    vae.float()
    with torch.autocast("cpu", torch.bfloat16):
        results["autocast"] = run(make_input(FIRST).float())
    return results


def messages_of(vae: VideoAutoencoder, change: Any) -> list[str]:
    """What `encode_distributed` and `decode_distributed` say where the process of rank 1 does something else."""
    x = make_input(FIRST)
    z, messages = make_latents(2, 4, 3, 4, 10, dtype=x.dtype), []
    for function, source in ((encode_distributed, x), (decode_distributed, z)):
        with pytest.raises(ValueError) as error:
            function(vae, change(source, vae) if dist.get_rank() else source)
        messages.append(str(error.value))
        vae.double()
        vae.use_slicing, vae.use_tiling = False, True
    return messages


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("distributed")
    run_ranks(work, str(folder), num_processes=WORLD, output=folder)
    return [torch.load(folder / f"results-{rank}.pt") for rank in range(WORLD)]


@cache
def expected(family: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The moments and the sample of one process."""
    vae, x = make(family), make_input(name)
    with torch.no_grad():
        moments, sample = vae.encode(x).latent_dist.parameters, vae(x).sample
    assert moments.std() > 0.1 and sample.std() > 0.1
    return moments, sample


families = pytest.mark.parametrize("family", FAMILIES)


@families
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(family: str, name: str, results):
    moments, sample = expected(family, name)
    for rank, result in enumerate(result[family][name] for result in results):
        torch.testing.assert_close(result["moments"], moments, rtol=0, atol=1e-10)
        torch.testing.assert_close(result["sample"], sample, rtol=0, atol=1e-10)
        share = CASES[name].num_parts[rank]
        assert result["num_parts"] == {"encode": share, "decode": share}
    for key in ("moments", "sample"):  # bit for bit the same everywhere
        first, second = (result[family][name][key] for result in results)
        torch.testing.assert_close(first, second, rtol=0, atol=0)


@families
def test_a_smaller_group(family: str, results):
    outsider, member = (result[family]["group of one"] for result in results)
    assert "`group` must contain the process that calls, got one without: rank 0" in outsider
    torch.testing.assert_close(member["sample"], expected(family, FIRST)[1], rtol=0, atol=1e-10)
    assert member["num_parts"] == {"encode": 10, "decode": 10}


@families
@pytest.mark.parametrize("name", DIFFERENCES)
def test_processes_that_differ_say_so_alike(family: str, name: str, results):
    expected = DIFFERENCES[name][1]
    for result in results:
        encoding, decoding = result[family]["differences"][name]
        assert re.match(expected, encoding), encoding
        assert re.match(expected.replace("`x`", "`z`"), decoding), decoding


def test_inputs_may_differ_by_rounding():
    x = torch.randn(1, 4, 9, 32, 48, generator=torch.Generator().manual_seed(0))
    sketch, nan = _sketch(x), torch.full_like(x, torch.nan)
    assert _is_near(sketch, _sketch(x.bfloat16())) and _is_near(_sketch(nan), _sketch(nan))
    assert _is_near(_sketch(x * 0), _sketch(x * 0))
    last = x.clone()
    last[:, :, -1] = x[:, :, 0]
    for other in (last, x.flip(2), x.flip(3), x.transpose(0, 1).reshape(x.shape) * 0.97, x * 0, nan):
        assert not _is_near(sketch, _sketch(other))


@families
@torch.no_grad()
def test_autocast_chooses_the_dtype(family: str, results):
    x, vae = make_input(FIRST).float(), make(family, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        moments = vae.encode(x).latent_dist.parameters
    assert moments.dtype == torch.bfloat16
    for result in results:
        torch.testing.assert_close(result[family]["autocast"]["moments"], moments, rtol=0, atol=0.1)
        assert result[family]["autocast"]["sample"].dtype == torch.bfloat16


def test_misuse_is_named(make_model, make_video):
    vae = make_model()
    with pytest.raises(ValueError, match="must have tiling enabled.*`vae.enable_tiling"):
        encode_distributed(vae, make_video(1, 3, 16, 16))
    vae.enable_tiling()
    with pytest.raises(ValueError, match="must be a group of running processes, got none"):
        decode_distributed(vae, make_video(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"`num_frames` must be 4 \* n \+ 1"):
        encode_distributed(vae, make_video(1, 3, 4, 16, 16))
    with pytest.raises(ValueError, match="`z` must have shape"):
        decode_distributed(vae, make_video(1, 3, 2, 2))
