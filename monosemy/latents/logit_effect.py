"""Which tokens a latent makes more and less likely, from the weights alone.

The effect of a latent on the logits is its decoder direction through the final norm and the unembedding ("logit lens"
on a direction): W_dec @ norm @ unembedding^T, up to the norm's positive scale. Effects are given relative to the other
latents: less the mean effect on that token, over the standard deviation of the effects on it. Without that, the tokens
that every direction moves, rare ones with unembeddings far from all others, come first.
"""

from __future__ import annotations

from copy import deepcopy
from typing import NamedTuple, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor, nn

from monosemy.runtime import Progress

CHUNK = 256
"""Latents per product: chunk x vocabulary logits are held at once."""

EPSILON = 1e-6
"""Least standard deviation of a token's effects: a token that no latent moves has effects of 0."""


class LogitEffects(NamedTuple):
    """Per latent, the tokens whose logits it moves most, strongest first."""

    promoted: Int32[np.ndarray, "latent rank"]
    promoted_by: Float32[np.ndarray, "latent rank"]
    suppressed: Int32[np.ndarray, "latent rank"]
    suppressed_by: Float32[np.ndarray, "latent rank"]


@torch.inference_mode()
def logit_effects(
    directions: Float[Tensor, "latent d_model"],
    norm: nn.Module,
    unembedding: Float[Tensor, "token d_model"],
    n_tokens: int,
) -> LogitEffects:
    """The `n_tokens` most promoted and most suppressed tokens of each decoder direction."""
    n_tokens = min(n_tokens, len(unembedding))
    directions = (directions - directions.mean(dim=0)) @ norm_matrix(norm, directions.shape[1])
    covariance = directions.T @ directions / len(directions)
    deviation = ((unembedding @ covariance) * unembedding).sum(dim=1).clamp(min=0).sqrt()
    unembedding = unembedding / deviation.clamp(min=EPSILON)[:, None]
    tokens = [np.empty((len(directions), n_tokens), np.int32) for _ in range(2)]
    values = [np.empty((len(directions), n_tokens), np.float32) for _ in range(2)]
    with Progress("logit effects", len(directions), "latent") as progress:
        for start in range(0, len(directions), CHUNK):
            logits = (directions[start : start + CHUNK] @ unembedding.T).numpy()
            for sign in range(2):
                rows = slice(start, start + len(logits))
                _largest(logits, np.float32(1 - 2 * sign), tokens[sign][rows], values[sign][rows])
            progress.advance(len(logits))
    return LogitEffects(tokens[0], values[0], tokens[1], values[1])


def norm_matrix(norm: nn.Module, width: int) -> Float[Tensor, "d_model d_model"]:
    """The final norm as a matrix, up to a positive scale: what it makes of unit vectors, less its bias.

    That is its weight on the diagonal, whatever the weight is kept as; a LayerNorm also takes the mean off.
    """
    norm = deepcopy(norm).float().cpu()
    units = torch.eye(width)[None] * width**0.5  # of root mean square 1
    return (norm(units) - norm(torch.zeros_like(units)))[0] / width**0.5


@numba.njit(nogil=True, cache=True)
@no_type_check
def _largest(logits, sign, tokens, values):
    """Per row, the tokens whose logit times `sign` is largest, in that order; of equal ones the lowest tokens."""
    n = tokens.shape[1]
    for row in range(logits.shape[0]):
        values[row] = -np.inf
        for token in range(logits.shape[1]):
            value = sign * logits[row, token]
            if value > values[row, n - 1]:
                place = n - 1
                while place > 0 and value > values[row, place - 1]:
                    values[row, place], tokens[row, place] = values[row, place - 1], tokens[row, place - 1]
                    place -= 1
                values[row, place], tokens[row, place] = value, token
        for rank in range(n):
            values[row, rank] *= sign
