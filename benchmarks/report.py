"""The full report: the bundled models, a linear autoencoder, peers with random weights, and codecs, by one command.

    python benchmarks/report.py --train path/to/train --held-out path/to/val --output outputs/report

The linear autoencoder is that of the principal components of patches of the training clips, with the 16 channels of
`compact-16ch`. Peers have random weights and small configs: they show that nothing is made for our models alone. All
figures are those of `leanvae eval --compare`, by `val-17x256` or the protocol that is named.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from diffusers_leanvae import AutoencoderKLLeanVAE, bundled
from diffusers_leanvae.cli.comparison import compare_subjects
from diffusers_leanvae.evaluation.diffusability import load_clips
from diffusers_leanvae.evaluation.measures import MetricOptions
from diffusers_leanvae.evaluation.protocols import get_protocol, with_sizes
from diffusers_leanvae.trainer.principal_components import initialize_from_principal_components
from diffusers_leanvae.video_io.pixels import pixels_to_sample


# Four ways of compressing: causal video (Wan), wavelets (Cosmos), patches (LTX), and images one by one (Tiny).
PEERS: dict[str, dict[str, Any]] = {
    "AutoencoderKLWan": {
        "base_dim": 8,
        "z_dim": 16,
        "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 1,
    },
    "AutoencoderKLCosmos": {
        "encoder_block_out_channels": [16, 16, 16, 16],
        "decode_block_out_channels": [16, 16, 16, 16],
        "num_layers": 1,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": [16, 16, 16, 16],
        "decoder_block_out_channels": [16, 16, 16, 16],
        "num_encoder_blocks": [1, 1, 1, 1],
        "num_decoder_blocks": [1, 1, 1, 1],
    },
}


def make_linear(folder: Path, clips: str, num_clips: int) -> None:
    """Save the linear autoencoder of the training clips."""
    torch.manual_seed(0)
    config = AutoencoderKLLeanVAE.load_config(bundled.model_path("compact-16ch"))
    vae: Any = AutoencoderKLLeanVAE.from_config(config)

    def videos() -> Iterator[torch.Tensor]:
        for clip in load_clips(clips, num_clips).split(8):
            yield pixels_to_sample(clip)

    initialize_from_principal_components(vae, videos())
    vae.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="folder of videos for the principal components")
    parser.add_argument("--held-out", required=True, help="folder of videos to measure on")
    parser.add_argument("--output", type=Path, default=Path("outputs/report"))
    parser.add_argument("--protocol", default="val-17x256")
    parser.add_argument("--size", type=int, help="side of the clips, in place of that of the protocol")
    parser.add_argument("--num-train-clips", type=int, default=64)
    parser.add_argument("--codecs", nargs="*", default=["x264", "av1"])
    arguments = parser.parse_args()
    protocol = with_sizes(get_protocol(arguments.protocol), None, arguments.size)
    with TemporaryDirectory() as folder:
        linear = Path(folder, "linear-16ch")
        make_linear(linear, arguments.train, arguments.num_train_clips)
        subjects = {name: name for name in bundled.MODELS} | {str(linear): linear.name}
        for name, config in PEERS.items():
            path = Path(folder, f"{name}.json")
            path.write_text(json.dumps(config))
            subjects[f"{name}:{path}"] = f"{name}, small"
        compare_subjects(
            subjects,
            arguments.codecs,
            arguments.held_out,
            protocol,
            MetricOptions(),
            arguments.output,
            num_examples=3,
            device="auto",
            dtype="float32",
            as_json=False,
        )


if __name__ == "__main__":
    main()
