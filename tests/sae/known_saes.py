"""SAEs whose figures are known."""

import torch

from monosemy import kernels
from monosemy.sae.autoencoder import SAE, SAEConfig


def identity_sae(d_model: int, site: str = "L1.resid_post", **options) -> SAE:
    """Latents + and - along every axis, all of which may fire: it reconstructs everything."""
    axes = torch.cat([torch.eye(d_model), -torch.eye(d_model)])
    config = SAEConfig(d_model, 2 * d_model, 2 * d_model, site, "tiny", **options)
    parameters = kernels.Parameters(axes.clone(), torch.zeros(2 * d_model), axes, torch.zeros(d_model))
    return SAE(config, parameters)
