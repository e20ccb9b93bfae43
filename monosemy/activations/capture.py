"""Room 2: run the model over the token file and keep what passes the named sites.

1. Shuffle the sentences by the seed and cut them into shards of about `shard_tokens` tokens.
2. Per shard: sort its sentences by length, run batches of about `batch_tokens` tokens up to the last site, and put
   each token's activation at its own row, as it will be stored.
3. The first shard decides from which norm on a row is a sink.
4. Another thread flags the sinks, computes moments and writes, while the model goes on with the next shard. From a GPU,
   a shard is copied on a stream of its own, into pinned memory.
5. Merge the shards' moments. A shard that is already on disk is not computed again.

Under `torchrun`, rank r of n takes shards r, r + n, r + 2 n, ...; a shard does not depend on who computes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from monosemy.activations import store
from monosemy.activations.remote import RemoteFolder, remote_url
from monosemy.activations.store import Compression, RowTable, ShardFolder, SiteStatistics, StoredAs, StoredRows
from monosemy.activations.writer import Writer
from monosemy.artifact import Draft, Manifest, unrecorded
from monosemy.corpus import TokenFile, open_tokens
from monosemy.llm.checkpoint import load_model
from monosemy.llm.layout import ranges
from monosemy.llm.model import LanguageModel, check_sites, resolved
from monosemy.llm.sites import Site, Taps
from monosemy.runtime import DtypeName, InputError, Progress, Ranks, joined_ranks, random_stream, say

KIND = "activations"

DeviceName = Literal["auto", "cpu", "cuda"]

LOOK_AHEAD = 32
"""Shards per rank that progress looks for: no rank is further ahead of the slowest."""


@dataclass(frozen=True)
class CaptureConfig:
    """Run a model over a token file and store the activations at the named sites."""

    tokens: Path = unrecorded()
    """Token file, made by `monosemy tokenize`."""
    out: Path = unrecorded()
    """Folder for the activations, or a URL such as s3://bucket/activations (extra `remote`)."""
    model: str = unrecorded("smollm2")
    """Model: `smollm2`, a folder, a .gguf file, or a Hub id: org/name, org/name@revision, org/name:file.gguf."""
    sites: tuple[str, ...] = ("L24.resid_post",)
    """Sites to store, for example L24.resid_post."""
    dtype: DtypeName = "auto"
    """Arithmetic of the model; `auto` is bfloat16 where the processor multiplies it, or else float32."""
    device: DeviceName = unrecorded("auto")
    """Where the model runs; `auto`: on the GPU of this rank, if there is one."""
    stored_as: StoredAs = "bfloat16"
    """How activations are stored: 2 or 4 bytes per element, or 1 and a scale per row."""
    compress: Compression = "none"
    """`zstd`: compress shards. They are then read as a whole, not mapped."""
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
    """Make the activations artifact `config.out`, or go on with it. Under `torchrun` all ranks share the work."""
    with joined_ranks() as ranks:
        tokens = open_tokens(config.tokens)
        model = load_model(config.model, config.dtype, rank_device(config.device))
        config = resolved(config, model)
        say(f"capture: {model.name} computes in {config.dtype} on {model.device.type}")
        maker = ShardMaker(model, tokens, config)
        url = remote_url(config.out)
        if url is None:
            return _make(config.out, config, maker, ranks, None)
        remote = RemoteFolder(url)
        if ranks.gather(remote.is_complete)[0]:
            Draft(config.out, "activations", config, maker.parents).check_same_command(remote.read_manifest(KIND))
        else:
            _make(remote.draft, config, maker, ranks, remote)
        return remote.read_manifest(KIND)


def rank_device(name: DeviceName) -> torch.device:
    """The device called `name`; each of `torchrun`'s ranks on a machine has a GPU of its own."""
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and there == 0):
        return torch.device("cpu")
    if number >= there:
        raise InputError(f"rank {number} of this machine needs a GPU, and it has {there}: start fewer, or --device cpu")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def check_tokenizer(tokens: TokenFile, model: LanguageModel, path: Path) -> None:
    """Raise `InputError` unless the token file was made with this model's tokenizer."""
    if tokens.manifest.parents["tokenizer"] != model.tokenizer.fingerprint:
        raise InputError(f"{path} was tokenized for another model than {model.name}: run `monosemy tokenize` with it")


# ---------------------------------------------------------------------------------------------------------------------
# 1. and 2. Shards of rows
# ---------------------------------------------------------------------------------------------------------------------


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
        chosen = torch.from_numpy(order[start:stop])
        ids = tokens.ids[ranges(tokens.starts[chosen], tokens.lengths[chosen])].long()[None]
        yield PackedBatch(order[start:stop], ids, tokens.lengths[chosen])
        start = stop


@torch.inference_mode()
def read_sites(
    model: LanguageModel, batch: PackedBatch, sites: list[Site]
) -> dict[Site, Float[Tensor, "token d_model"]]:
    """The activations at `sites` of the batch's tokens, sentence after sentence. Later layers are not run."""
    taps = Taps(reads=set(sites))
    end = max(site.layer for site in sites) + 1
    model.run_layers(model.embed(batch.ids), end=end, taps=taps, lengths=batch.lengths)
    return {site: taps.values[site][0] for site in sites}


class RawShard(NamedTuple):
    """The rows of one shard, before anything is known of them."""

    table: RowTable
    sites: dict[Site, StoredRows]
    """In this machine's memory, once `arrived` has happened."""
    arrived: torch.cuda.Event | None

    @property
    def n_bytes(self) -> int:
        return sum(stored.n_bytes for stored in self.sites.values())


class ShardMaker:
    """Computes any shard of a token file, on its own: what `capture` stores and what training on the fly reads."""

    def __init__(self, model: LanguageModel, tokens: TokenFile, config: CaptureConfig) -> None:
        check_tokenizer(tokens, model, config.tokens)
        self.model, self.tokens, self.config = model, tokens, config
        self.sites = [Site.parse(name) for name in config.sites]
        check_sites(model, self.sites)
        self.parents = {"tokens": tokens.manifest.digest, "model": model.fingerprint}
        self.plan = plan_shards(tokens, config.shard_tokens, config.seed)
        self.copies = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None

    def n_tokens(self, numbers: Sequence[int]) -> int:
        """Tokens of the shards `numbers`."""
        return sum(int(self.tokens.lengths[torch.from_numpy(self.plan[number])].sum()) for number in numbers)

    def table(self, number: int) -> RowTable:
        """What the rows of shard `number` are."""
        sentences = torch.from_numpy(self.plan[number])
        lengths, starts = self.tokens.lengths[sentences], self.tokens.starts[sentences]
        return RowTable(
            sentence=sentences.repeat_interleave(lengths),
            position=ranges(torch.zeros_like(lengths), lengths).int(),
            token=self.tokens.ids[ranges(starts, lengths)].int(),
            validation=self.tokens.validation[sentences].repeat_interleave(lengths),
        )

    def compute(self, number: int, between: Callable[[], object] = lambda: None) -> RawShard:
        """Run the model over shard `number`; `between` is called after each forward pass."""
        sentences, table = self.plan[number], self.table(number)
        lengths = self.tokens.lengths[torch.from_numpy(sentences)]
        first_row = dict(zip(sentences.tolist(), (lengths.cumsum(0) - lengths).tolist(), strict=True))
        shape = len(table.token), self.model.config.d_model
        stored = {site: store.empty_rows(*shape, self.config.stored_as, self.model.device) for site in self.sites}
        for batch in length_batches(self.tokens, sentences, self.config.batch_tokens):
            starts = torch.tensor([first_row[sentence] for sentence in batch.sentences.tolist()])
            places = ranges(starts, batch.lengths).to(self.model.device)
            for site, values in read_sites(self.model, batch, self.sites).items():
                stored[site].put(places, store.encode(values, self.config.stored_as))
            between()
        return RawShard(table, *self._to_this_machine(stored))

    def finish(self, raw: RawShard, sink_norms: Mapping[Site, float]) -> dict[Site, tuple[StoredRows, SiteStatistics]]:
        """Flag sinks and compute moments; `InputError` for rows that are not finite."""
        _arrive(raw)
        found = {}
        for site, stored in raw.sites.items():
            if not stored.is_finite:
                raise InputError(f"{site} holds NaN or infinite activations: try --dtype float32, or check the weights")
            found[site] = stored, store.statistics(stored, raw.table.validation, sink_norms[site])
        return found

    def sink_norms(self, first: RawShard) -> dict[Site, float]:
        """From which norm on a row is a sink, judged by the first shard."""
        _arrive(first)
        return {site: store.sink_norm_of(stored) for site, stored in first.sites.items()}

    def _to_this_machine(self, sites: dict[Site, StoredRows]) -> tuple[dict[Site, StoredRows], torch.cuda.Event | None]:
        """Start copying rows from a GPU on a stream of its own: the model need not wait for it."""
        if (stream := self.copies) is None:
            return sites, None

        def copy(tensor: Tensor) -> Tensor:
            tensor.record_stream(stream)
            return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

        stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(stream):
            copied, arrived = {site: stored.map(copy) for site, stored in sites.items()}, torch.cuda.Event()
            arrived.record(stream)
        return copied, arrived


def _arrive(raw: RawShard) -> None:
    if raw.arrived is not None:
        raw.arrived.synchronize()


# ---------------------------------------------------------------------------------------------------------------------
# 3. to 5. The artifact
# ---------------------------------------------------------------------------------------------------------------------


def _make(out: Path, config: CaptureConfig, maker: ShardMaker, ranks: Ranks, remote: RemoteFolder | None) -> Manifest:
    with Draft(out, KIND, config, maker.parents, ranks) as draft:
        if not draft.complete:
            folder = ShardFolder(draft.path.joinpath, draft.identity)
            _write_shards(folder, maker, ranks, remote)
            n_shards = len(maker.plan)
            facts = {"d_model": maker.model.config.d_model, "model": maker.model.name}
            if ranks.number == 0:  # all shards are there
                facts |= store.facts_of(folder, maker.sites, n_shards)
            draft.commit({"tokens": maker.tokens.n_tokens, "shards": n_shards}, facts)
    manifest = store.open_activations(out).manifest
    ranks.wait()
    if remote is not None:
        if ranks.number == 0:
            remote.send_rest(out)
        ranks.wait()
    return manifest


def _write_shards(folder: ShardFolder, maker: ShardMaker, ranks: Ranks, remote: RemoteFolder | None) -> None:
    """Compute this rank's shards that are missing, and write them in the background."""
    missing = [number for number in range(len(maker.plan)) if not folder.has(number)]
    sink_norms = ranks.gather(_known_sink_norms(folder, maker.sites))[0]
    with Progress("capture", maker.tokens.n_tokens, "token") as progress:
        progress.skip(maker.tokens.n_tokens - maker.n_tokens(missing))
        with Writer() as writer:
            for number in [number for number in missing if number % ranks.count == ranks.number]:
                raw = maker.compute(number, writer.check)
                if sink_norms is None:  # rank 0 has just computed the first shard
                    sink_norms = ranks.gather(maker.sink_norms(raw) if number == 0 else None)[0]
                writer.put(raw.n_bytes, _write_shard, folder, number, maker, raw, sink_norms, remote)
                written = [number for number in missing[: LOOK_AHEAD * ranks.count] if folder.has(number)]
                missing = sorted({*missing} - {*written})
                progress.advance(maker.n_tokens(written))
        if sink_norms is None:  # this rank had no shard to compute
            ranks.gather(None)
        ranks.wait()
        progress.advance(maker.n_tokens(missing))


def _known_sink_norms(folder: ShardFolder, sites: list[Site]) -> dict[Site, float] | None:
    return {site: folder.statistics(site, 0).sink_norm for site in sites} if folder.has(0) else None


def _write_shard(
    folder: ShardFolder,
    number: int,
    maker: ShardMaker,
    raw: RawShard,
    sink_norms: Mapping[Site, float],
    remote: RemoteFolder | None,
) -> None:
    folder.write(number, raw.table, maker.finish(raw, sink_norms))
    if remote is not None:
        for site in (*maker.sites, None):
            name = folder.name(site, number)
            remote.send(folder.locate(name), name)
