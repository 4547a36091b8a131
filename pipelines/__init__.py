"""Latent video pipelines, one file each; mapped into the package as `diffusers_leanvae.pipelines`."""
