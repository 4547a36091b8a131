"""Give the last ISTA iteration of a LeanVAE another start where training has left it without effect.

    python scripts/revive_iterations.py MODEL_FOLDER OUTPUT_FOLDER

It takes the weights of the iteration before it, and the feed-forwards of the encoder's low-frequency layers new ones.
What they add to the tokens begins at zero, so the model computes what it did without them, and learns to use them.
"""

import argparse
from typing import Any

import torch

from diffusers_leanvae import AutoencoderKLLeanVAE


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    vae: Any = AutoencoderKLLeanVAE.from_pretrained(options.model, torch_dtype=torch.float32)
    if len(getattr(vae.bottleneck, "iterations", ())) < 2:
        parser.error(f"MODEL_FOLDER must hold a LeanVAE with two ISTA iterations or more, got {options.model!r}")
    torch.manual_seed(options.seed)
    before, last = vae.bottleneck.iterations[-2:]
    last.load_state_dict(before.state_dict())
    last.backward_transform[-1].ff.down_proj.weight.zero_()
    for layer in vae.encoder.low_layers:
        torch.nn.init.normal_(layer.ff.up_proj.weight, std=0.1)
        layer.ff.down_proj.weight.zero_()
    vae.save_pretrained(options.output)


if __name__ == "__main__":
    main()
