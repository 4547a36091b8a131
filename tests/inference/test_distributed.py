"""Tiles spread over two processes give what one process gives, and each process computes only its share."""

import traceback
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks

from diffusers_leanvae import AutoencoderKLLeanVAE
from diffusers_leanvae.inference.distributed import decode_distributed, encode_distributed


WORLD = 2


class Case(NamedTuple):
    shape: tuple[int, ...]
    tile: tuple[int, int, int]  # height, width, frames per chunk
    num_tiles: tuple[int, ...]  # that each process computes, in one direction
    slicing: bool = False


CASES = {
    "video, five tiles": Case((2, 3, 9, 24, 80), (24, 16, 5), (3, 2)),
    "video, nine uneven tiles": Case((1, 3, 13, 40, 56), (16, 24, 9), (5, 4)),
    "image, three tiles": Case((1, 3, 40, 16), (16, 16, 5), (2, 1)),
    "one tile for two processes": Case((1, 3, 5, 16, 24), (64, 64, 5), (1, 0)),
    "batch in slices": Case((3, 3, 5, 16, 24), (64, 64, 5), (2, 1), slicing=True),
}


def work(rank: int, folder: str) -> None:
    """Work of each process: all cases, results and counts into a file of its own."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    vae = AutoencoderKLLeanVAE.from_pretrained(f"{folder}/model", torch_dtype=torch.float64).eval()
    inputs = torch.load(f"{folder}/inputs.pt")
    num_tiles = {"encode": 0, "decode": 0}
    for direction in num_tiles:
        compute = getattr(vae, f"{direction}_tile")

        def counted(*args: Any, compute: Any = compute, direction: str = direction):
            num_tiles[direction] += 1
            return compute(*args)

        setattr(vae, f"{direction}_tile", counted)

    def run(x: torch.Tensor, group: Any = None) -> dict[str, Any]:
        num_tiles.update(encode=0, decode=0)
        posterior = encode_distributed(vae, x, group).latent_dist
        z = posterior.mode().squeeze(2) if x.ndim == 4 else posterior.mode()
        sample = decode_distributed(vae, z, group).sample
        return {"moments": posterior.parameters, "sample": sample, "num_tiles": dict(num_tiles)}

    results: dict[str, Any] = {}
    for name, case in CASES.items():
        vae.use_slicing = case.slicing
        vae.enable_tiling(*case.tile)
        results[name] = run(inputs[name])
    vae.use_slicing = False
    alone = dist.new_group([1])  # its rank 0 is the process of rank 1
    name = "video, five tiles"
    vae.enable_tiling(*CASES[name].tile)
    try:
        results["group of one"] = run(inputs[name], alone)
    except ValueError:
        results["group of one"] = traceback.format_exc()
    vae.float()
    with torch.autocast("cpu", torch.bfloat16):
        results["autocast"] = run(inputs[name].float())
    torch.save(results, f"{folder}/results-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def vae(make_model) -> AutoencoderKLLeanVAE:
    return make_model(torch.float64)


@pytest.fixture(scope="module")
def inputs(make_video) -> dict[str, torch.Tensor]:
    return {name: make_video(*case.shape, dtype=torch.float64) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def results(vae, inputs, tmp_path_factory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("distributed")
    vae.save_pretrained(folder / "model")
    torch.save(inputs, folder / "inputs.pt")
    run_ranks(work, str(folder), num_processes=WORLD, output=folder)
    return [torch.load(folder / f"results-{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_two_processes_equal_one(vae, inputs, results, name):
    posterior = vae.encode(inputs[name]).latent_dist
    sample = vae(inputs[name]).sample
    assert posterior.parameters.std() > 0.1 and sample.std() > 0.1
    for rank, result in enumerate(results):
        torch.testing.assert_close(result[name]["moments"], posterior.parameters, rtol=0, atol=1e-10)
        torch.testing.assert_close(result[name]["sample"], sample, rtol=0, atol=1e-10)
        share = CASES[name].num_tiles[rank]
        assert result[name]["num_tiles"] == {"encode": share, "decode": share}
    for key in ("moments", "sample"):  # bit for bit the same everywhere
        torch.testing.assert_close(results[0][name][key], results[1][name][key], rtol=0, atol=0)


@torch.no_grad()
def test_a_smaller_group(vae, inputs, results):
    outsider, member = (result["group of one"] for result in results)
    assert "`group` must contain the process that calls, got one without: rank 0" in outsider
    expected = vae(inputs["video, five tiles"]).sample
    torch.testing.assert_close(member["sample"], expected, rtol=0, atol=1e-10)
    assert member["num_tiles"] == {"encode": 5, "decode": 5}


@torch.no_grad()
def test_autocast_chooses_the_dtype(make_model, inputs, results):
    x, vae = inputs["video, five tiles"].float(), make_model()
    with torch.autocast("cpu", torch.bfloat16):
        moments = vae.encode(x).latent_dist.parameters
    assert moments.dtype == torch.bfloat16
    for result in results:
        torch.testing.assert_close(result["autocast"]["moments"], moments, rtol=0, atol=0.1)
        assert result["autocast"]["sample"].dtype == torch.bfloat16


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
