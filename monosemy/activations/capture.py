"""Room 2: run the model over the token file and keep what passes the named sites.

1. Shuffle the sentences by the seed and cut them into shards of about `shard_tokens` tokens.
2. Per shard: sort its sentences by length, run batches of about `batch_tokens` tokens up to the last site, and put
   each token's activation at its own row.
3. Write the shard; the first one decides from which norm on a row is a sink.
4. Merge the shards' means. A shard that is already on disk is not computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from monosemy.activations import store
from monosemy.artifact import Draft, Manifest, unrecorded
from monosemy.corpus import TokenFile, open_tokens
from monosemy.llm.checkpoint import load_model
from monosemy.llm.llama import Llama
from monosemy.llm.sites import Site, Taps, check_site
from monosemy.runtime import DtypeName, InputError, Progress, random_stream


@dataclass(frozen=True)
class CaptureConfig:
    """Run a model over a token file and store the activations at the named sites."""

    tokens: Path = unrecorded()
    """Token file, made by `monosemy tokenize`."""
    out: Path = unrecorded()
    """Folder for the activations."""
    model: str = unrecorded("smollm2")
    """Model: `smollm2`, a .gguf file, or a Hugging Face folder."""
    sites: tuple[str, ...] = ("L24.resid_post",)
    """Sites to store, for example L24.resid_post."""
    dtype: DtypeName = "auto"
    """Arithmetic of the model."""
    stored_as: Literal["bfloat16", "float32"] = "bfloat16"
    """How activations are stored: 2 or 4 bytes per element."""
    batch_tokens: int = 1024
    """Tokens per forward pass."""
    shard_tokens: int = 32_768
    """Tokens per shard: what an interruption costs at most."""
    seed: int = 0
    """Seed of the order of sentences."""

    def __post_init__(self) -> None:
        if not self.sites:
            raise InputError("no site was given: name at least one, for example --sites L24.resid_post")
        parsed = [Site.parse(name) for name in self.sites]
        if len(set(parsed)) < len(parsed):
            raise InputError(f"--sites names a site twice: {' '.join(self.sites)}")
        for name in ("batch_tokens", "shard_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        object.__setattr__(self, "sites", tuple(map(str, parsed)))


def run(config: CaptureConfig) -> Manifest:
    """Make the activations artifact `config.out`, or go on with it."""
    tokens = open_tokens(config.tokens)
    model = load_model(config.model, config.dtype)
    check_tokenizer(tokens, model, config.tokens)
    sites = [Site.parse(name) for name in config.sites]
    for site in sites:
        check_site(site, model.config.n_layers, model.name)
    parents = {"tokens": tokens.manifest.digest, "model": model.fingerprint}
    with Draft(config.out, "activations", config, parents) as draft:
        if draft.complete:
            return store.open_activations(config.out).manifest
        shards = plan_shards(tokens, config.shard_tokens, config.seed)
        sink_norms: dict[Site, float] = {}
        with Progress("capture", tokens.n_tokens, "token") as progress:
            for number, sentences in enumerate(shards):
                n_rows = int(tokens.lengths[sentences].sum())
                if not draft.file(store.shard_name("rows", number)).exists():
                    _write_shard(draft, number, sentences, tokens, model, sites, sink_norms, config)
                    progress.advance(n_rows)
                else:
                    progress.skip(n_rows)
        return _commit(draft, sites, len(shards), tokens.n_tokens, model)


def check_tokenizer(tokens: TokenFile, model: Llama, path: Path) -> None:
    """Raise `InputError` unless the token file was made with this model's tokenizer."""
    if tokens.manifest.parents["tokenizer"] != model.tokenizer.fingerprint:
        raise InputError(f"{path} was tokenized for another model than {model.name}: run `monosemy tokenize` with it")


def plan_shards(tokens: TokenFile, shard_tokens: int, seed: int) -> list[np.ndarray]:
    """Shuffled sentence numbers, cut so that every shard has about `shard_tokens` tokens and whole sentences."""
    order = random_stream(seed).permutation(tokens.n_sentences)
    ends = tokens.lengths.numpy()[order].cumsum()
    cuts = np.flatnonzero(np.diff((ends - 1) // shard_tokens)) + 1
    return np.split(order, cuts)


class PackedBatch(NamedTuple):
    """Sentences of similar length, one after the other in one row."""

    sentences: np.ndarray
    ids: Int[Tensor, "1 token"]
    lengths: Int[Tensor, " sentence"]


def length_batches(
    tokens: TokenFile, sentences: Sequence[int] | np.ndarray, batch_tokens: int
) -> Iterator[PackedBatch]:
    """`sentences` from long to short, in batches of at most `batch_tokens` tokens, but one sentence at least."""
    lengths = tokens.lengths.numpy()
    order = np.asarray(sentences)[np.argsort(-lengths[sentences], kind="stable")]
    start = 0
    ends = lengths[order].cumsum()
    while start < len(order):
        before = ends[start] - lengths[order[start]]
        stop = max(start + 1, int(np.searchsorted(ends, before + batch_tokens, side="right")))
        chosen = order[start:stop]
        ids = torch.cat([tokens.sentence(int(sentence)) for sentence in chosen]).long()[None]
        yield PackedBatch(chosen, ids, torch.from_numpy(lengths[chosen]))
        start = stop


@torch.inference_mode()
def read_sites(model: Llama, batch: PackedBatch, sites: list[Site]) -> dict[Site, Float[Tensor, "token d_model"]]:
    """The activations at `sites` of the batch's tokens, sentence after sentence. Later layers are not run."""
    taps = Taps(reads=set(sites))
    end = max(site.layer for site in sites) + 1
    model.run_layers(model.embed(batch.ids), end=end, taps=taps, lengths=batch.lengths)
    return {site: taps.values[site][0] for site in sites}


def _write_shard(
    draft: Draft,
    number: int,
    sentences: np.ndarray,
    tokens: TokenFile,
    model: Llama,
    sites: list[Site],
    sink_norms: dict[Site, float],
    config: CaptureConfig,
) -> None:
    table = _row_table(tokens, sentences)
    first_row = np.concatenate([[0], tokens.lengths.numpy()[sentences].cumsum()])
    row_of = dict(zip(sentences.tolist(), first_row, strict=False))
    dtype = getattr(torch, config.stored_as)
    rows = {site: torch.empty(len(table.token), model.config.d_model, dtype=dtype) for site in sites}
    for batch in length_batches(tokens, sentences, config.batch_tokens):
        starts = torch.tensor([row_of[sentence] for sentence in batch.sentences.tolist()])
        within = torch.cat([torch.arange(length) for length in batch.lengths.tolist()])
        places = starts.repeat_interleave(batch.lengths) + within
        for site, values in read_sites(model, batch, sites).items():
            rows[site][places] = values.to("cpu", dtype)
    for site in sites:
        if not rows[site].isfinite().all():
            raise InputError(f"{site} holds NaN or infinite activations: try --dtype float32, or check the weights")
        if site not in sink_norms:
            sink_norms[site] = _sink_norm(draft, site, number, rows[site])
        shard = store.site_shard(rows[site], table.validation, sink_norms[site])
        store.write_site_shard(draft.file(store.shard_name(str(site), number)), shard)
    store.write_row_table(draft.file(store.shard_name("rows", number)), table)


def _sink_norm(draft: Draft, site: Site, number: int, rows: Tensor) -> float:
    if number > 0:  # a resumed run: the first shard is on disk
        rows = store.read_tensors(draft.file(store.shard_name(str(site), 0)))["rows"]
    return store.sink_norm_of(rows)


def _row_table(tokens: TokenFile, sentences: np.ndarray) -> store.RowTable:
    lengths = tokens.lengths[sentences]
    return store.RowTable(
        sentence=torch.from_numpy(sentences).repeat_interleave(lengths),
        position=torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths.tolist()]),
        token=torch.cat([tokens.sentence(int(sentence)) for sentence in sentences]).int(),
        validation=tokens.validation[sentences].repeat_interleave(lengths),
    )


def _commit(draft: Draft, sites: list[Site], n_shards: int, n_tokens: int, model: Llama) -> Manifest:
    facts = {}
    for site in sites:
        moments, n_sinks = None, 0
        shards = [
            store.SiteShard(**store.read_tensors(draft.path / store.shard_name(str(site), number)))
            for number in range(n_shards)
        ]
        for shard in shards:
            part = store.Moments(int(shard.count), shard.mean)
            moments = part if moments is None else moments.merge(part)
            n_sinks += int(shard.sink.sum())
        assert moments is not None
        facts[str(site)] = store.SiteSummary(
            store.sink_norm_of(shards[0].rows), n_sinks, moments.mean.tolist()
        )._asdict()
    rows = {"tokens": n_tokens, "shards": n_shards}
    return draft.commit(rows, {"sites": facts, "d_model": model.config.d_model, "model": model.name})
