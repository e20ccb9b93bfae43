"""Activation rows on disk: numbered shards, each file readable alone with safetensors.

1. A shard holds the tokens of a fixed list of sentences, planned before the first forward pass, so a run that was
   interrupted goes on with the first shard that is missing.
2. `SITE/NNNNN.safetensors` holds the rows at one site: float32, bfloat16, or int8 with a bfloat16 scale per row. With
   Zstandard it is `SITE/NNNNN.safetensors.zst`, and then read as a whole rather than mapped.
3. `rows/NNNNN.safetensors` says what each row is, which rows are sinks, and their moments; it is written last and
   marks the shard as whole.
4. Every file carries the mark of its capture, site and number: one that was mixed in from elsewhere is refused.

**Sinks.** Without a BOS token the first token of a sentence becomes an attention sink, with a norm tens of times the
median; left in, these few rows are most of the variance. A row whose norm is more than `SINK_FACTOR` times the median
of the first shard is flagged. The first shard is a random sample of sentences, so one pass suffices.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from monosemy.activations.remote import RemoteFolder, remote_url
from monosemy.artifact import Manifest, atomic, read_manifest, to_json, write_tensors
from monosemy.llm.sites import Site
from monosemy.runtime import InputError

StoredAs = Literal["bfloat16", "float32", "int8"]
Compression = Literal["none", "zstd"]

SINK_FACTOR = 10.0
"""A row is a sink when its norm exceeds the median norm by this factor. SmolLM2: sinks have 20 to 65 times the median,
no other row more than 3 times."""

CHUNK_ROWS = 1024
"""Rows whose moments are computed together in float64: a few megabytes."""

OPEN_SHARDS = 8
"""Shards that an `Activations` keeps open."""


# ---------------------------------------------------------------------------------------------------------------------
# Rows as they are stored
# ---------------------------------------------------------------------------------------------------------------------


class StoredRows(NamedTuple):
    """Rows at one site, as they are stored."""

    rows: Shaped[Tensor, "row d_model"]
    """float32, bfloat16, or int8 in units of the row's scale."""
    scale: Float[Tensor, " row"] | None
    """bfloat16, of int8 rows only: it has float32's range, so no row is too large or too small for it."""

    def decoded(self, places: Int[Tensor, " place"] | None = None) -> Float[Tensor, "place d_model"]:
        """The rows at `places`, or all of them, in float32."""
        rows, scale = self if places is None else self.take(places)
        return rows.float() if scale is None else rows.float().mul_(scale.float()[:, None])

    def take(self, places: Int[Tensor, " place"]) -> StoredRows:
        """A copy of the rows at `places`."""
        return self.map(lambda part: part.index_select(0, places))

    def put(self, places: Int[Tensor, " place"], other: StoredRows) -> None:
        """Write the rows of `other` to `places`."""
        self.rows.index_copy_(0, places, other.rows)
        if self.scale is not None and other.scale is not None:
            self.scale.index_copy_(0, places, other.scale)

    def map(self, function: Callable[[Tensor], Tensor]) -> StoredRows:
        """`function` of the rows and of their scales."""
        return StoredRows(function(self.rows), None if self.scale is None else function(self.scale))

    @property
    def n_bytes(self) -> int:
        return sum(part.nbytes for part in self if part is not None)

    @property
    def is_finite(self) -> bool:
        """Whether no NaN and no infinity was encoded."""
        return bool((self.rows if self.scale is None else self.scale).isfinite().all())


def encode(rows: Float[Tensor, "row d_model"], stored_as: StoredAs) -> StoredRows:
    """`rows` as they are stored. int8 is rounded to the nearest multiple of the scale that is stored, so a decoded
    element is off by half a scale at most, which is 0.4% of the row's largest."""
    if stored_as != "int8":
        return StoredRows(rows.to(getattr(torch, stored_as)), None)
    rows = rows.float()
    smallest = torch.finfo(torch.bfloat16).tiny  # of a row of zeros
    scale = (rows.abs().amax(dim=1) / 127).clamp(min=smallest).bfloat16()
    return StoredRows((rows / scale.float()[:, None]).round_().to(torch.int8), scale)


def empty_rows(n_rows: int, d_model: int, stored_as: StoredAs, device: torch.device) -> StoredRows:
    """Room for `n_rows` rows."""
    scale = torch.empty(n_rows, dtype=torch.bfloat16, device=device) if stored_as == "int8" else None
    return StoredRows(torch.empty(n_rows, d_model, dtype=getattr(torch, stored_as), device=device), scale)


def gather(
    open_shard: Callable[[int], StoredRows], shard: Int[np.ndarray, " row"], row: Int[np.ndarray, " row"]
) -> Float[Tensor, "row d_model"]:
    """Rows `row` of shards `shard`, float32, in the order given; each shard is visited once."""
    order = np.argsort(shard, kind="stable")
    numbers, starts = np.unique(shard[order], return_index=True)
    places = torch.from_numpy(row[order].astype(np.int64)).tensor_split(torch.from_numpy(starts[1:]))
    parts = [open_shard(int(number)).take(part) for number, part in zip(numbers, places, strict=True)]
    back = torch.from_numpy(np.argsort(order))
    scales = [part.scale for part in parts if part.scale is not None]
    together = StoredRows(torch.cat([part.rows for part in parts]), torch.cat(scales) if scales else None)
    return together.decoded(back)


# ---------------------------------------------------------------------------------------------------------------------
# What is known of them
# ---------------------------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Number, mean and variance of rows, accumulated stably (Chan, Golub and LeVeque 1983)."""

    count: int
    mean: Float[Tensor, " d_model"]
    """float64."""
    deviations: float
    """Sum of the squared distances from the mean."""

    @classmethod
    def of(cls, rows: Float[Tensor, "row d_model"]) -> Moments:
        if len(rows) == 0:
            return cls(0, torch.zeros(rows.shape[1], dtype=torch.float64), 0.0)
        rows = rows.double()
        mean = rows.mean(dim=0)
        return cls(len(rows), mean, (rows - mean).square_().sum(dim=0).sum().item())

    @property
    def variance(self) -> float:
        """Mean squared distance from the mean, summed over the dimensions."""
        return self.deviations / max(self.count, 1)

    def merge(self, other: Moments) -> Moments:
        count = self.count + other.count
        if count == 0:
            return self
        difference, share = other.mean - self.mean, other.count / count
        between = difference.square().sum().item() * self.count * share
        return Moments(count, self.mean + difference * share, self.deviations + other.deviations + between)


class RowTable(NamedTuple):
    """What the rows of one shard are, the same at every site."""

    sentence: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    """Place of the token in its sentence, from 0."""
    token: Int[Tensor, " row"]
    validation: Bool[Tensor, " row"]


class SiteStatistics(NamedTuple):
    """What is known of one shard's rows at one site."""

    sink: Bool[Tensor, " row"]
    sink_norm: float
    """The norm above which a row is a sink."""
    training: Moments
    """Of the training rows that are not sinks."""
    every: Moments
    """Of all rows."""


def statistics(stored: StoredRows, validation: Bool[Tensor, " row"], sink_norm: float) -> SiteStatistics:
    """Sink flags and moments of `stored`, computed from the rows as a reader will see them."""
    nothing = Moments.of(torch.zeros(0, stored.rows.shape[1]))
    sinks, training, rest = [], nothing, nothing
    for places in torch.arange(len(stored.rows)).split(CHUNK_ROWS):
        rows = stored.decoded(places)
        sink = rows.norm(dim=1) > sink_norm
        kept = ~sink & ~validation[places]
        training, rest = training.merge(Moments.of(rows[kept])), rest.merge(Moments.of(rows[~kept]))
        sinks.append(sink)
    return SiteStatistics(torch.cat(sinks), sink_norm, training, training.merge(rest))


def sink_norm_of(stored: StoredRows) -> float:
    """The norm from which on a row counts as a sink, judged by the rows of the first shard."""
    places = torch.arange(len(stored.rows)).split(CHUNK_ROWS)
    return SINK_FACTOR * torch.cat([stored.decoded(part).norm(dim=1) for part in places]).median().item()


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


class ShardFolder:
    """The files of the shards of one capture."""

    def __init__(self, locate: Callable[[str], Path], identity: Mapping[str, Any]) -> None:
        """`locate` finds the file of a name; `identity` is what the manifest says of kind, config and parents."""
        self.locate = locate
        names = ("kind", "format_version", "config", "parents")
        self.mark = hashlib.sha256(to_json({name: identity[name] for name in names}).encode()).hexdigest()[:16]
        self.suffix = ".zst" if identity["config"].get("compress") == "zstd" else ""

    def name(self, site: Site | None, number: int) -> str:
        """The file of shard `number` at `site`; without a site, that of its row table."""
        return f"rows/{number:05d}.safetensors" if site is None else f"{site}/{number:05d}.safetensors{self.suffix}"

    def has(self, number: int) -> bool:
        """Whether shard `number` is whole."""
        return self.locate(self.name(None, number)).exists()

    def write(self, number: int, table: RowTable, sites: Mapping[Site, tuple[StoredRows, SiteStatistics]]) -> None:
        """Write the rows at `sites`, then the row table."""
        for site, (stored, _) in sites.items():
            tensors = {name: tensor for name, tensor in stored._asdict().items() if tensor is not None}
            self._write(site, number, tensors)
        self.write_table(number, table, {site: known for site, (_, known) in sites.items()})

    def write_table(self, number: int, table: RowTable, sites: Mapping[Site, SiteStatistics]) -> None:
        """Write the row table alone."""
        tensors = table._asdict()
        for site, known in sites.items():
            both = (known.training, known.every)
            tensors[f"{site}.sink"] = known.sink
            tensors[f"{site}.sink_norm"] = torch.tensor([known.sink_norm], dtype=torch.float64)
            tensors[f"{site}.count"] = torch.tensor([moments.count for moments in both])
            tensors[f"{site}.mean"] = torch.stack([moments.mean for moments in both])
            tensors[f"{site}.deviations"] = torch.tensor([moments.deviations for moments in both], dtype=torch.float64)
        self._write(None, number, tensors)

    def stored(self, site: Site, number: int) -> StoredRows:
        """The rows of shard `number` at `site`, memory-mapped unless they are compressed."""
        tensors = self._read(site, number)
        return StoredRows(tensors["rows"], tensors.get("scale"))

    def table(self, number: int) -> RowTable:
        tensors = self._read(None, number)
        return RowTable(*(tensors[name] for name in RowTable._fields))

    def statistics(self, site: Site, number: int) -> SiteStatistics:
        tensors = self._read(None, number)
        count, mean, deviations = (tensors[f"{site}.{name}"] for name in ("count", "mean", "deviations"))
        training, every = (Moments(int(count[i]), mean[i], deviations[i].item()) for i in (0, 1))
        return SiteStatistics(tensors[f"{site}.sink"], tensors[f"{site}.sink_norm"].item(), training, every)

    def _mark_of(self, site: Site | None, number: int) -> str:
        return f"capture {self.mark}, {'rows' if site is None else site}, shard {number}"

    def _write(self, site: Site | None, number: int, tensors: Mapping[str, Tensor]) -> None:
        path, metadata = self.locate(self.name(site, number)), {"monosemy": self._mark_of(site, number)}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".zst":
            write_tensors(path, tensors, metadata)
            return
        import pyarrow
        from safetensors.torch import save

        with atomic(path) as temporary:
            temporary.write_bytes(pyarrow.compress(save(dict(tensors), metadata), "zstd", asbytes=True))

    def _read(self, site: Site | None, number: int) -> dict[str, Tensor]:
        path, wanted = self.locate(self.name(site, number)), self._mark_of(site, number)
        found, tensors = _read_compressed(path) if path.suffix == ".zst" else _read_mapped(path)
        if found != wanted:
            raise InputError(
                f"{path} is marked {found!r}; expected {wanted!r}: a shard of another capture was mixed in. Put the "
                "right one back, or remove the folder and capture again"
            )
        return tensors


def _read_mapped(path: Path) -> tuple[str | None, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("monosemy"), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _read_compressed(path: Path) -> tuple[str | None, dict[str, Tensor]]:
    import pyarrow
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        with pyarrow.input_stream(str(path), compression="zstd") as stream:
            content = stream.read()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return header.get("__metadata__", {}).get("monosemy"), load(content)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read ({error}): put it back, or remove the folder and capture again")


# ---------------------------------------------------------------------------------------------------------------------
# The artifact
# ---------------------------------------------------------------------------------------------------------------------


def facts_of(folder: ShardFolder, sites: list[Site], n_shards: int) -> dict[str, Any]:
    """What the manifest says of `n_shards` shards: rows in each, bytes per row, and per site its sinks and moments."""
    held_out = []  # (rows, held-out rows) of each shard
    for number in range(n_shards):
        flags = folder.table(number).validation
        held_out.append((len(flags), int(flags.sum())))
    n_rows = sum(rows for rows, _ in held_out)

    def bytes_per_row(site: Site | None) -> float:
        files = [folder.locate(folder.name(site, number)) for number in range(n_shards)]
        return round(sum(file.stat().st_size for file in files) / n_rows, 2)

    facts = {}
    for site in sites:
        known = [folder.statistics(site, number) for number in range(n_shards)]
        training, every = known[0].training, known[0].every
        for part in known[1:]:
            training, every = training.merge(part.training), every.merge(part.every)
        facts[str(site)] = {
            "sink_norm": known[0].sink_norm,
            "n_sinks": sum(int(part.sink.sum()) for part in known),
            "bytes_per_row": bytes_per_row(site),
            "training": _summary(training),
            "all": _summary(every),
        }
    return {
        "sites": facts,
        "row_table_bytes_per_row": bytes_per_row(None),
        "shard_rows": [rows for rows, _ in held_out],
        "shard_validation_rows": [validation for _, validation in held_out],
    }


def _summary(moments: Moments) -> dict[str, Any]:
    return {"rows": moments.count, "mean": moments.mean.tolist(), "variance": moments.variance}


class Activations:
    """An activations artifact, opened for reading. Shards are read when asked for; a remote one is fetched then."""

    def __init__(self, path: Path, manifest: Manifest, locate: Callable[[str], Path] | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.sites = [Site.parse(name) for name in manifest.config["sites"]]
        self.n_rows = manifest.rows["tokens"]
        self.n_shards = manifest.rows["shards"]
        self.d_model: int = manifest.facts["d_model"]
        self.model_name: str = manifest.facts["model"]
        self.folder = ShardFolder(locate or path.joinpath, vars(manifest))
        self._stored = lru_cache(OPEN_SHARDS)(self.folder.stored)
        self._starts = np.cumsum([0, *manifest.facts["shard_rows"]])

    def table(self, shard: int) -> RowTable:
        return self.folder.table(shard)

    def shard(self, site: Site, shard: int) -> StoredRows:
        return self._stored(self.check_site(site), shard)

    def sinks(self, site: Site, shard: int) -> Bool[Tensor, " row"]:
        """Which rows of the shard are sinks."""
        return self.folder.statistics(self.check_site(site), shard).sink

    def rows(self, site: Site, rows: Sequence[int] | np.ndarray | Tensor) -> Float[Tensor, "row d_model"]:
        """The rows numbered `rows` over all shards, float32, in the order given."""
        rows = np.asarray(rows)
        if rows.ndim != 1 or (len(rows) and rows.dtype.kind not in "iu"):
            raise InputError(f"rows are asked for by {rows.dtype} of shape {rows.shape}; expected one list of integers")
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.n_rows):
            raise InputError(f"rows {rows.min()} to {rows.max()} of {self.path} were asked for; it has {self.n_rows}")
        if len(rows) == 0:
            return torch.zeros(0, self.d_model)
        shard = np.searchsorted(self._starts, rows, side="right") - 1
        return gather(lambda number: self.shard(site, number), shard, rows - self._starts[shard])

    def split_sizes(self, validation: bool) -> Int[np.ndarray, " shard"]:
        """Rows of each shard that are held out, or those that are not; sinks are counted."""
        held_out = np.array(self.manifest.facts["shard_validation_rows"])
        return held_out if validation else np.array(self.manifest.facts["shard_rows"]) - held_out

    def mean(self, site: Site) -> Float[Tensor, " d_model"]:
        """The mean of the training rows that are not sinks, float32."""
        return torch.tensor(self._facts(site)["training"]["mean"])

    def variance(self, site: Site) -> float:
        """The mean squared distance of the training rows that are not sinks from their mean."""
        return self._facts(site)["training"]["variance"]

    def sink_norm(self, site: Site) -> float:
        return self._facts(site)["sink_norm"]

    def _facts(self, site: Site) -> dict[str, Any]:
        return self.manifest.facts["sites"][str(self.check_site(site))]

    def check_site(self, site: Site) -> Site:
        if site not in self.sites:
            raise InputError(f"{self.path} holds no {site}; it holds {', '.join(map(str, self.sites))}")
        return site

    def only_site(self, name: str | None) -> Site:
        """The site called `name`; without a name, the one site there is."""
        if name is not None:
            return self.check_site(Site.parse(name))
        if len(self.sites) > 1:
            raise InputError(
                f"{self.path} holds several sites ({', '.join(map(str, self.sites))}): choose one by --site"
            )
        return self.sites[0]


def open_activations(path: Path | str, verify: bool = False) -> Activations:
    """Open the activations artifact in folder `path`, or at a URL that fsspec understands.

    `verify` checks every byte. Raises `InputError` if it is none or is damaged.
    """
    if url := remote_url(path):
        remote = RemoteFolder(url)
        return Activations(Path(path), remote.read_manifest("activations", verify), remote.fetch)
    path = Path(path)
    return Activations(path, read_manifest(path, "activations", verify))
