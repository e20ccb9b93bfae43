"""What probes see of a sentence: its latents, pooled over its tokens, and its mean activation.

1. The model reads sentences of similar length together, up to the SAE's site; no later layer is run.
2. Attention sinks are left out: they are alike in all sentences, and larger than everything else.
3. A sentence keeps only the latents that fire in it: what is held does not grow with the number of latents.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from monosemy.activations.capture import length_batches, read_sites
from monosemy.corpus import TokenFile
from monosemy.llm.model import LanguageModel
from monosemy.llm.sites import Site
from monosemy.runtime import Progress
from monosemy.sae.autoencoder import SAE, SparseCode

Pool = Literal["max", "mean"]

BATCH_TOKENS = 1024
"""Tokens per forward pass."""


class Pooled(NamedTuple):
    """One row per sentence."""

    latents: Any
    """(sentence, latent), a scipy.sparse.csr_array of float64: the pooled activations that are not 0."""
    mean: Float[np.ndarray, "sentence d_model"]
    """Mean of the raw activations."""
    tokens: Int[np.ndarray, " sentence"]
    """Tokens that are no sinks; where there are none, everything else is 0."""


class SparseEntries(NamedTuple):
    """The entries of a sparse matrix that are not 0."""

    rows: Int64[Tensor, " entry"]
    columns: Int64[Tensor, " entry"]
    values: Float[Tensor, " entry"]


@torch.inference_mode()
def pool_sentences(
    model: LanguageModel, sae: SAE, tokens: TokenFile, sentences: Int[np.ndarray, " sentence"], pool: Pool
) -> Pooled:
    """Read `sentences` of the token file (their numbers, rising) and pool each; rows are in the order given."""
    from scipy.sparse import csr_array

    site, shape = Site.parse(sae.config.site), (len(sentences), sae.config.n_latents)
    mean, counts = np.zeros((len(sentences), sae.config.d_model), np.float32), np.zeros(len(sentences), np.int64)
    parts: list[SparseEntries] = []
    with Progress("read sentences", int(tokens.lengths[sentences].sum()), "token") as progress:
        for batch in length_batches(tokens, sentences, BATCH_TOKENS):
            places = np.searchsorted(sentences, batch.sentences)
            rows = read_sites(model, batch, [site])[site].cpu()
            owner = torch.arange(len(places)).repeat_interleave(batch.lengths)
            kept = ~sae.is_sink(rows)
            rows, owner = rows[kept], owner[kept]
            entries = pool_code(sae.encode(rows), owner, sae.config.n_latents, pool)
            parts.append(entries._replace(rows=torch.from_numpy(places)[entries.rows]))
            counts[places] = torch.bincount(owner, minlength=len(places)).numpy()
            sums = torch.zeros(len(places), rows.shape[1]).index_add_(0, owner, rows.float())
            mean[places] = sums.numpy() / np.maximum(counts[places], 1)[:, None]
            progress.advance(int(batch.lengths.sum()))
    at, latent, values = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    return Pooled(csr_array((values.astype(np.float64), (at, latent)), shape), mean, counts)


def pool_code(code: SparseCode, owner: Int64[Tensor, " row"], n_latents: int, pool: Pool) -> SparseEntries:
    """The largest or the mean activation of every latent over the rows of each sentence, `owner`: where it is not 0."""
    active = code.values > 0
    keys = (owner[:, None] * n_latents + code.indices)[active]
    keys, group = keys.unique(return_inverse=True)
    how = "amax" if pool == "max" else "sum"
    values = torch.zeros(len(keys)).scatter_reduce(0, group, code.values[active].float(), how, include_self=False)
    sentence, latent = keys // n_latents, keys % n_latents
    if pool == "mean":
        values = values / torch.bincount(owner)[sentence]
    return SparseEntries(sentence, latent, values)
