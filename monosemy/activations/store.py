"""Activation rows on disk: numbered shards, one file per site and shard, each readable alone with safetensors.

A shard holds the tokens of a fixed list of sentences, planned before the first forward pass, so a run that was
interrupted goes on with the first shard that is missing. `rows/NNNNN.safetensors` says what each row is; it is
written last and marks the shard as whole. `SITE/NNNNN.safetensors` holds the activations at one site.

**Sinks.** Without a BOS token the first token of a sentence becomes an attention sink, with a norm tens of times the
median; left in, these few rows are most of the variance. A row whose norm is more than `SINK_FACTOR` times the median
of the first shard is flagged. The first shard is a random sample of sentences, so one pass suffices.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from monosemy.artifact import Manifest, read_manifest, read_tensors, write_tensors
from monosemy.llm.sites import Site
from monosemy.runtime import InputError

SINK_FACTOR = 10.0
"""A row is a sink when its norm exceeds the median norm by this factor. SmolLM2: sinks have 20 to 65 times the median,
no other row more than 3 times."""


class Moments(NamedTuple):
    """Number and mean of rows, accumulated stably (Chan, Golub and LeVeque 1983)."""

    count: int
    mean: Float[Tensor, " d_model"]
    """float64."""

    def merge(self, other: Moments) -> Moments:
        count = self.count + other.count
        if count == 0:
            return self
        return Moments(count, self.mean + (other.mean - self.mean) * (other.count / count))


class RowTable(NamedTuple):
    """What the rows of one shard are, the same at every site."""

    sentence: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    """Place of the token in its sentence, from 0."""
    token: Int[Tensor, " row"]
    validation: Bool[Tensor, " row"]


class SiteShard(NamedTuple):
    """The activations of one shard at one site."""

    rows: Float[Tensor, "row d_model"]
    norm: Float[Tensor, " row"]
    sink: Bool[Tensor, " row"]
    mean: Float[Tensor, " d_model"]
    """Mean of the training rows that are not sinks, float64."""
    count: Int[Tensor, " 1"]
    """Number of them."""


def shard_name(folder: str, number: int) -> str:
    return f"{folder}/{number:05d}.safetensors"


def site_shard(rows: Float[Tensor, "row d_model"], validation: Bool[Tensor, " row"], sink_norm: float) -> SiteShard:
    """`rows` with their norms, sink flags and training mean."""
    norm = rows.float().norm(dim=1)
    sink = norm > sink_norm
    chosen = rows[~sink & ~validation].double()
    mean = chosen.mean(dim=0) if len(chosen) else torch.zeros(rows.shape[1], dtype=torch.float64)
    return SiteShard(rows, norm, sink, mean, torch.tensor([len(chosen)]))


def sink_norm_of(rows: Float[Tensor, "row d_model"]) -> float:
    """The norm from which on a row counts as a sink, judged by the rows of the first shard."""
    return SINK_FACTOR * rows.float().norm(dim=1).median().item()


def write_site_shard(path: Path, shard: SiteShard) -> None:
    write_tensors(path, shard._asdict())


def write_row_table(path: Path, table: RowTable) -> None:
    write_tensors(path, table._asdict())


class SiteSummary(NamedTuple):
    """What the manifest says about one site of an activations artifact."""

    sink_norm: float
    n_sinks: int
    mean: list[float]


class Activations:
    """An activations artifact, opened for reading. Shards are memory-mapped and read when asked for."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.sites = [Site.parse(name) for name in manifest.config["sites"]]
        self.n_rows = manifest.rows["tokens"]
        self.n_shards = manifest.rows["shards"]
        self.d_model: int = manifest.facts["d_model"]
        self.model_name: str = manifest.facts["model"]

    def table(self, shard: int) -> RowTable:
        return RowTable(**read_tensors(self.path / shard_name("rows", shard)))

    def shard(self, site: Site, shard: int) -> SiteShard:
        return SiteShard(**read_tensors(self.path / shard_name(str(self.check_site(site)), shard)))

    def mean(self, site: Site) -> Float[Tensor, " d_model"]:
        """The mean of the training rows that are not sinks, float32."""
        return torch.tensor(self.manifest.facts["sites"][str(self.check_site(site))]["mean"])

    def sink_norm(self, site: Site) -> float:
        return self.manifest.facts["sites"][str(self.check_site(site))]["sink_norm"]

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


def open_activations(path: Path, verify: bool = False) -> Activations:
    """Open the activations artifact in folder `path`. Raises `InputError` if it is none or is damaged."""
    return Activations(path, read_manifest(path, "activations", verify))
