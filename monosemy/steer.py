"""Steer a model by its latents: add to one while the model runs.

Adding `strength` to latent i changes every row x at the SAE's site by strength * scale(x) * W_dec[i], where scale(x)
undoes the SAE's normalisation of the row. Only this change is added: what the SAE fails to reconstruct stays as it is,
and the latent need not have been among the k that TopK chose (reference system A's `h_bias`). Attention sinks are left
alone: the SAE knows nothing of them, and the model falls apart without them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from monosemy.llm.sites import Edit, Site, Taps
from monosemy.runtime import InputError
from monosemy.sae.autoencoder import SAE


class Addition(NamedTuple):
    """What to add to one latent, in units of its activation."""

    latent: int
    strength: float

    @classmethod
    def parse(cls, text: str) -> Addition:
        """From `896=+20`. Raises `InputError` for anything else."""
        match = re.fullmatch(r"\s*(\d+)\s*=\s*(\S+)\s*", text)
        try:
            latent, strength = (int(match[1]), float(match[2])) if match else (0, math.nan)
        except ValueError:
            strength = math.nan
        if not math.isfinite(strength):
            raise InputError(
                f"{text!r} is no steering: expected LATENT=STRENGTH with a finite number, for example 896=+20"
            )
        return cls(latent, strength)

    def __str__(self) -> str:
        return f"{self.latent}={self.strength:+g}"


def addition_edit(sae: SAE, additions: Sequence[Addition]) -> Edit:
    """The edit of the SAE's site that makes all of `additions`. Raises `InputError` for a latent it does not have."""
    change = torch.zeros(sae.config.d_model)
    for latent, strength in additions:
        change += strength * sae.W_dec[sae.check_latent(latent)]
    return vector_edit(sae, change[None])


def vector_edit(sae: SAE, changes: Float[Tensor, "batch d_model"]) -> Edit:
    """Add one vector of the SAE's normalised space to each text of a batch (or one to all)."""

    def edit(hidden: Float[Tensor, "batch position d_model"], _: Tensor) -> Float[Tensor, "batch position d_model"]:
        rows = hidden.flatten(0, 1)
        _, _, scale = sae.normalize(rows)
        if sae.config.target_site is None:  # what the SAE knows of sinks is the norm of its input
            scale = torch.where(sae.is_sink(rows)[:, None], 0.0, scale)
        scale = scale.view(*hidden.shape[:2], 1)
        return (hidden.float() + scale * changes[:, None]).to(hidden.dtype)

    return edit


def steering(sae: SAE, additions: Sequence[Addition]) -> Taps:
    """`Taps` for `generate`: the model runs with `additions` made at the site that the SAE reconstructs."""
    return Taps(edits={Site.parse(sae.config.output_site): addition_edit(sae, additions)})
