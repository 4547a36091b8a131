"""Make `tests/fixtures/leanvae_tiny.safetensors`: the reference's numbers, small enough for the repository.

    python scripts/make_reference_fixture.py ../shared/golden/leanvae_iter4_16ch.safetensors

The source holds random weights and outputs of the public LeanVAE implementation (arXiv 2503.14325) in float32. Its
weights are too large to keep whole, so they are rounded to float16, and the outputs for the rounded weights come from
the port in float64 - after the port has reproduced every output of the source with the weights as they are.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_leanvae.conversion.leanvae import config_from_original, from_original
from diffusers_leanvae.models.autoencoder_kl_leanvae import AutoencoderKLLeanVAE


OUTPUT = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "leanvae_tiny.safetensors"
NUM_FRAMES, HEIGHT, WIDTH = 5, 16, 16  # cut out of the source's video


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="golden file of the reference")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()

    with safe_open(arguments.source, "pt") as file:
        args = json.loads(file.metadata()["config"])
        golden = {key: file.get_tensor(key) for key in file.keys()}
    weights = {k.removeprefix("state_dict."): v for k, v in golden.items() if k.startswith("state_dict.")}
    # The reference's pixels are in [-0.5, 0.5]; with a factor of 1 the port takes and gives them as they are.
    config = config_from_original(args, weights) | {"pixel_factor": 1.0}
    model = AutoencoderKLLeanVAE(**config).eval()

    model.load_state_dict(from_original(weights))
    posterior = model.encode(golden["video"]).latent_dist
    assert_close(posterior.mean, golden["latent_mean"])
    assert_close(posterior.logvar, golden["latent_logvar"].clamp(-30, 20))
    assert_close(model.decode(golden["latent_in"]).sample, golden["decoded"])
    assert_close(model(golden["video"]).sample, golden["reconstruction"])
    assert_close(model(golden["image"]).sample, golden["image.reconstruction"])

    rounded = {key: tensor.half() for key, tensor in weights.items()}
    model.double().load_state_dict(from_original({key: tensor.double() for key, tensor in rounded.items()}))
    video = golden["video"][:1, :, :NUM_FRAMES, :HEIGHT, :WIDTH].half()
    posterior = model.encode(video.double()).latent_dist
    image_mean = model.encode(video[:, :, 0].double()).latent_dist.mean
    outputs = {
        "latent_mean": posterior.mean,
        "latent_logvar": posterior.logvar,
        "decoded": model.decode(posterior.mean.float().double()).sample,
        "image.latent_mean": image_mean,
        "image.decoded": model.decode(image_mean.float().double()).sample,
    }
    # The prefix makes it an original training checkpoint with foreign entries, which `from_single_file` reads.
    tensors = {f"autoencoder.{key}": tensor for key, tensor in rounded.items()}
    tensors |= {"video": video} | {key: tensor.float().contiguous() for key, tensor in outputs.items()}
    metadata = {"format": "pt", "args": json.dumps(args | {"pixel_factor": 1.0}), "source": arguments.source.name}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, arguments.output, metadata=metadata)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
