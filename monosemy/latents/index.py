"""Room 4: one pass over the text tells, for every latent, how often it fires, where most, and what it promotes.

1. Read activations, from disk or from the model, in batches of whole sentences, and encode them.
2. `tally` counts, and keeps the best sentences of each latent under three aggregations.
3. `logit_effect` reads the promoted and suppressed tokens off the weights.
4. Write tables that can be read without the model: the sentences' tokens and the vocabulary are in them.

Rows that are attention sinks count as not firing: the SAE was not trained on them. Densities are shares of the other
rows. The pass takes less than a minute on the default text, so an interrupted run starts over in the same folder.

On disk: `latents.parquet` (statistics), `examples.parquet` (sorted by latent, aggregation and rank; activations are
sparse: `positions` in the sentence and the activations there), `sentences.safetensors` (the tokens of all sentences
that are examples, and of a random sample of the text, `background`), `logits.parquet`, `vocabulary.parquet`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from monosemy.activations.capture import check_tokenizer, length_batches, read_sites
from monosemy.activations.store import Activations, open_activations
from monosemy.artifact import Draft, Manifest, read_manifest, unrecorded, write_table, write_tensors
from monosemy.corpus import TokenFile, open_tokens
from monosemy.latents.logit_effect import LogitEffects, logit_effects
from monosemy.latents.record import EXAMPLES_PER_GROUP, Index, LatentRecord, open_index
from monosemy.latents.tally import AGGREGATIONS, Batch, Tally
from monosemy.llm.checkpoint import load_model
from monosemy.llm.model import LanguageModel, resolved
from monosemy.llm.sites import Site
from monosemy.llm.tokenizer import Tokenizer
from monosemy.runtime import DtypeName, InputError, Progress, random_stream
from monosemy.sae.autoencoder import SAE, open_sae
from monosemy.sae.evaluate import check_fits

__all__ = ["Index", "IndexConfig", "LatentRecord", "open_index", "run"]


@dataclass(frozen=True)
class IndexConfig:
    """Find the best sentences and the statistics of every latent."""

    sae: Path = unrecorded()
    """SAE, made by `monosemy train`."""
    tokens: Path = unrecorded()
    """Token file to look through."""
    out: Path = unrecorded()
    """Folder for the index."""
    activations: Path | None = unrecorded(None)
    """Stored activations of that token file; without them the model is run."""
    model: str = unrecorded("smollm2")
    """The model the SAE was trained on."""
    dtype: DtypeName = "auto"
    """Arithmetic of the model, if it is run; `auto` is bfloat16 where the processor multiplies it, or else float32."""
    n_examples: int = 50
    """Sentences to keep per latent and aggregation."""
    n_tokens: int = 20
    """Promoted and suppressed tokens to keep per latent."""
    background: int = 20_000
    """Random sentences to keep for comparison, at most."""
    batch_tokens: int = unrecorded(2048)
    """Tokens per forward pass."""
    seed: int = 0
    """Seed of the random sentences."""

    def __post_init__(self) -> None:
        for name in ("n_examples", "n_tokens", "background", "batch_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")


def run(config: IndexConfig) -> Manifest:
    """Make the index artifact `config.out`."""
    sae = open_sae(config.sae)
    tokens = open_tokens(config.tokens)
    model = load_model(config.model, config.dtype)
    config = resolved(config, model)
    check_tokenizer(tokens, model, config.tokens)
    check_fits(sae, model)
    stored = None if config.activations is None else _open_stored(config.activations, tokens, model, sae)
    parents = {
        "sae": read_manifest(config.sae, "sae").digest,
        "tokens": tokens.manifest.digest,
        "model": model.fingerprint,
    }
    if stored is not None:
        parents["activations"] = stored.manifest.digest
    with Draft(config.out, "index", config, parents) as draft:
        if draft.complete:
            return read_manifest(config.out, "index")
        tally = gather(sae, tokens, model, stored, config)
        effects = logit_effects(
            sae.W_dec,
            model.norm,
            model.unembedding.weight[: model.tokenizer.size].float().cpu(),
            config.n_tokens,
        )
        return _write(draft, tally, effects, tokens, model.tokenizer, sae, config)


def _open_stored(path: Path, tokens: TokenFile, model: LanguageModel, sae: SAE) -> Activations:
    """The stored activations, if they are of this text, this model and the SAE's site; `InputError` otherwise."""
    stored = open_activations(path)
    for role, wanted in (("tokens", tokens.manifest.digest), ("model", model.fingerprint)):
        if stored.manifest.parents[role] != wanted:
            raise InputError(
                f"{path} was captured from other {role} (digest {stored.manifest.parents[role][:12]}, "
                f"given {wanted[:12]}): give the {role} it was made from, or leave out --activations to run the model"
            )
    stored.check_site(Site.parse(sae.config.site))
    return stored


# ---------------------------------------------------------------------------------------------------------------------
# 1. and 2. The pass
# ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def gather(sae: SAE, tokens: TokenFile, model: LanguageModel, stored: Activations | None, config: IndexConfig) -> Tally:
    """Encode every token and tally what fires."""
    site = Site.parse(sae.config.site)
    source = _from_model(tokens, model, site, config) if stored is None else _from_disk(stored, site)
    tally = Tally(sae.config.n_latents, config.n_examples)
    with Progress("index", tokens.n_tokens, "token") as progress:
        for sentences, lengths, rows in source:
            code = sae.encode(rows)
            values, indices = code.values.numpy(), code.indices.int().numpy()
            tally.add(Batch(sentences, lengths, values, indices, sae.is_sink(rows).numpy()))
            progress.advance(len(rows))
    return tally


Rows = tuple[Int64[np.ndarray, " sentence"], Int64[np.ndarray, " sentence"], Float[Tensor, "row d_model"]]
"""Numbers and lengths of whole sentences, and their rows."""


def _from_disk(stored: Activations, site: Site) -> Iterator[Rows]:
    for shard in range(stored.n_shards):
        sentence = stored.table(shard).sentence.numpy()
        begins = np.flatnonzero(np.diff(sentence, prepend=-1))
        rows = stored.shard(site, shard).decoded()
        yield sentence[begins].astype(np.int64), np.diff(begins, append=len(sentence)), rows


def _from_model(tokens: TokenFile, model: LanguageModel, site: Site, config: IndexConfig) -> Iterator[Rows]:
    for batch in length_batches(tokens, np.arange(tokens.n_sentences), config.batch_tokens):
        rows = read_sites(model, batch, [site])[site]
        yield batch.sentences.astype(np.int64), batch.lengths.numpy().astype(np.int64), rows.cpu()


# ---------------------------------------------------------------------------------------------------------------------
# 4. Writing
# ---------------------------------------------------------------------------------------------------------------------


def _write(
    draft: Draft,
    tally: Tally,
    effects: LogitEffects,
    tokens: TokenFile,
    tokenizer: Tokenizer,
    sae: SAE,
    config: IndexConfig,
) -> Manifest:
    kept = tally.best.score > 0
    sample = random_stream(config.seed).permutation(tokens.n_sentences)[: config.background]
    _write_latents(draft, tally, kept)
    _write_examples(draft, tally, kept, tokens)
    _write_sentences(draft, np.unique(tally.best.sentence[kept]), np.sort(sample), tokens)
    _write_logits(draft, effects)
    _write_vocabulary(draft, tokens, tokenizer)
    rows = {
        "latents": tally.n_latents,
        "silent_latents": int((tally.counters.n_fired == 0).sum()),
        "tokens": tally.n_rows,
        "sinks": tally.n_sinks,
        "sentences": tokens.n_sentences,
        "examples": int(kept.sum()),
    }
    return draft.commit(rows, {"site": sae.config.site, "model": sae.config.model})


def _write_latents(draft: Draft, tally: Tally, kept: np.ndarray) -> None:
    import pyarrow

    counters = tally.counters
    fired = np.maximum(counters.n_fired, 1)
    n_examples = kept.sum(axis=(1, 2))
    columns = {
        "latent": np.arange(tally.n_latents, dtype=np.int32),
        "density": counters.n_fired / max(tally.n_rows - tally.n_sinks, 1),
        "n_fired": counters.n_fired,
        "n_sentences": counters.n_sentences,
        "mean": (counters.total / fired).astype(np.float32),
        "max": counters.largest,
        "first_share": (counters.n_first / fired).astype(np.float32),
        "last_share": (counters.n_last / fired).astype(np.float32),
        "histogram": pyarrow.FixedSizeListArray.from_arrays(counters.histogram.ravel(), counters.histogram.shape[1]),
        "examples_start": n_examples.cumsum() - n_examples,
        "n_examples": n_examples,
    }
    write_table(draft.file("latents.parquet"), pyarrow.table(columns))


def _write_examples(draft: Draft, tally: Tally, kept: np.ndarray, tokens: TokenFile) -> None:
    import pyarrow

    positions, activations = tally.compact()
    latent, aggregation, rank = kept.nonzero()
    lengths = tally.best.length[kept].astype(np.int64)
    ends = lengths.cumsum()
    gather = np.repeat(tally.best.start[kept] - (ends - lengths), lengths) + np.arange(lengths.sum())
    offsets = np.concatenate([[0], ends]).astype(np.int32)
    sentence = tally.best.sentence[kept]
    columns = {
        "latent": latent.astype(np.int32),
        "aggregation": pyarrow.DictionaryArray.from_arrays(aggregation.astype(np.int8), list(AGGREGATIONS)),
        "rank": rank.astype(np.int32),
        "sentence": sentence,
        "document": tokens.document.numpy()[sentence],
        "score": tally.best.score[kept],
        "positions": pyarrow.ListArray.from_arrays(offsets, positions[gather]),
        "activations": pyarrow.ListArray.from_arrays(offsets, activations[gather]),
    }
    write_table(draft.file("examples.parquet"), pyarrow.table(columns), row_group_size=EXAMPLES_PER_GROUP)


def _write_sentences(draft: Draft, examples: np.ndarray, background: np.ndarray, tokens: TokenFile) -> None:
    numbers = np.union1d(examples, background)
    starts = tokens.starts.numpy()
    lengths = starts[numbers + 1] - starts[numbers]
    ends = lengths.cumsum()
    gather = np.repeat(starts[numbers] - (ends - lengths), lengths) + np.arange(lengths.sum())
    tensors = {
        "number": numbers,
        "starts": np.concatenate([[0], ends]).astype(np.int64),
        "ids": tokens.ids.numpy()[gather],
        "document": tokens.document.numpy()[numbers],
        "background": np.isin(numbers, background),
    }
    write_tensors(draft.file("sentences.safetensors"), {name: torch.from_numpy(a) for name, a in tensors.items()})


def _write_logits(draft: Draft, effects: LogitEffects) -> None:
    import pyarrow

    def lists(matrix: np.ndarray) -> pyarrow.Array:
        return pyarrow.FixedSizeListArray.from_arrays(matrix.ravel(), matrix.shape[1])

    columns = {name: lists(matrix) for name, matrix in effects._asdict().items()}
    columns = {"latent": np.arange(len(effects.promoted), dtype=np.int32)} | columns
    write_table(draft.file("logits.parquet"), pyarrow.table(columns))


def _write_vocabulary(draft: Draft, tokens: TokenFile, tokenizer: Tokenizer) -> None:
    import pyarrow

    columns = {
        "token": np.arange(tokenizer.size, dtype=np.int32),
        "bytes": pyarrow.array([tokenizer.bytes_of(token) for token in range(tokenizer.size)], pyarrow.binary()),
        "count": np.bincount(tokens.ids.numpy(), minlength=tokenizer.size),
    }
    write_table(draft.file("vocabulary.parquet"), pyarrow.table(columns))
