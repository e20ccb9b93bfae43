"""How do the directions of dictionaries lie: near duplicates within one, agreement and splitting between two?

1. Within each SAE every latent's nearest neighbours by cosine, of decoder directions and of encoder ones.
2. Between two SAEs at one site, for each latent of one the nearest in the other, both ways: how far they agree.
3. Where one is wider, each of its latents is given the most similar narrow latent as parent, if their cosine reaches
   the threshold. A narrow latent with several children has split; a wide one without a parent is new.
4. The same figures once more, for random directions of the same shapes: what chance alone gives.

No model and no text is needed. Latents that were dead when training ended are left out where the SAE's folder says
which (`activity.parquet`); where it does not, all latents count. Definitions, sources and traps: `neighbours` and
docs/geometry.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow
import torch
from jaxtyping import Float32, Int
from torch import Tensor

from monosemy.artifact import Draft, Manifest, read_manifest, to_json, unrecorded, write_table, write_text
from monosemy.runtime import InputError, Progress, require
from monosemy.sae.activity import TABLE, dead_latents
from monosemy.sae.autoencoder import SAE, open_sae
from monosemy.sae.geometry_figures import (
    GEOMETRY,
    NEAR_DUPLICATE,
    Descent,
    Geometry,
    Pair,
    Within,
    families_line,
    load_geometry,
    pair_summary,
    within_summary,
)
from monosemy.sae.neighbours import (
    Family,
    Neighbours,
    agreement,
    largest_families,
    max_cosines,
    nearest_across,
    nearest_within,
    parents,
    random_directions,
    splitting,
    unit,
)
from monosemy.sae.settings import dead_after

NEIGHBOURS, SPLITTING, PLOT = "neighbours.parquet", "splitting.parquet", "geometry.png"

N_FAMILIES = 10
"""Families that are named, the largest first."""


@dataclass(frozen=True)
class GeometryConfig:
    """Compare the directions of one SAE with each other, and with those of others: duplicates, agreement, splitting."""

    saes: tuple[Path, ...] = unrecorded()
    """SAEs, made by `monosemy train`: one, or several at one site."""
    out: Path = unrecorded()
    """Folder for the results."""
    n_neighbours: int = 5
    """Nearest neighbours of every latent to keep, or all where there are fewer."""
    threshold: float = 0.7
    """Cosine from which on two latents of different SAEs count as the same, or as parent and child."""
    seed: int = 0
    """Seed of the random directions that show what chance gives."""
    plot: bool = True
    """Draw geometry.png, which needs matplotlib (extra `report`)."""

    def __post_init__(self) -> None:
        if not self.saes:
            raise InputError("no SAE was given: name one folder or more, made by `monosemy train`")
        if self.n_neighbours < 1:
            raise InputError(f"n_neighbours is {self.n_neighbours}; expected at least 1")
        if not 0 < self.threshold <= 1:
            raise InputError(f"threshold is {self.threshold}; expected a cosine above 0 and at most 1")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; expected at least 0")


class Dictionary(NamedTuple):
    """An SAE that takes part."""

    number: int
    path: Path
    digest: str
    sae: SAE
    alive: Int[np.ndarray, " alive"]
    """Latents that count."""
    dead: int | None
    """Those left out; None if it is not known which are dead."""

    def directions(self, which: Literal["W_dec", "W_enc"]) -> Float32[Tensor, "alive d_model"]:
        """Unit vectors of the latents that count."""
        return unit(getattr(self.sae.parameters, which)[torch.from_numpy(self.alive)])

    def random(self, seed: int) -> Float32[Tensor, "alive d_model"]:
        """As many random directions, others for every SAE."""
        return random_directions(len(self.alive), self.sae.config.d_model, seed, self.number)


class Measured(NamedTuple):
    """All that is written."""

    geometry: Geometry
    neighbours: pyarrow.Table
    edges: pyarrow.Table


def run(config: GeometryConfig) -> Manifest:
    """Make the geometry artifact `config.out`."""
    if config.plot:
        require("matplotlib", "report")
    dictionaries = [open_dictionary(number, path) for number, path in enumerate(config.saes)]
    for first, second in combinations(dictionaries, 2):
        check_comparable(first, second)
    digests = {f"sae {of.number}": of.digest for of in dictionaries}
    with Draft(config.out, "geometry", config, digests) as draft:
        if draft.complete:
            return read_manifest(config.out, "geometry")
        measured = measure(dictionaries, config)
        write_table(draft.path / NEIGHBOURS, measured.neighbours)
        write_table(draft.path / SPLITTING, measured.edges)
        write_text(draft.path / GEOMETRY, to_json(measured.geometry))
        if config.plot:
            from monosemy.sae.geometry_plot import write_plot

            write_plot(draft.path / PLOT, measured.geometry)
        return draft.commit({"saes": len(dictionaries), "neighbours": len(measured.neighbours)})


def open_dictionary(number: int, path: Path) -> Dictionary:
    """The SAE in folder `path`, and which of its latents count."""
    sae, manifest = open_sae(path), read_manifest(path, "sae")
    for name in ("W_dec", "W_enc"):
        if not getattr(sae.parameters, name).isfinite().all():
            raise InputError(f"{path}: {name} has elements that are not finite numbers: train this SAE again")
    alive, n_dead = np.arange(sae.config.n_latents), None
    if (path / TABLE).exists():
        rule = (manifest.config[name] for name in ("dead_after_tokens", "train_tokens", "batch_size"))
        dead = dead_latents(path, dead_after(*rule))
        alive, n_dead = np.flatnonzero(~dead), int(dead.sum())
    if len(alive) < 2:
        raise InputError(f"{path} has {len(alive)} latents that are not dead; expected at least 2: train it for longer")
    return Dictionary(number, path, manifest.digest, sae, alive, n_dead)


def check_comparable(first: Dictionary, second: Dictionary) -> None:
    """Raise `InputError` unless the directions of two different SAEs lie in one space."""
    if first.digest == second.digest:
        raise InputError(f"{first.path} and {second.path} are the same SAE: name each SAE once")
    places = [(of.sae.config.output_site, of.sae.config.d_model) for of in (first, second)]
    if places[0] != places[1]:
        (site, width), (other_site, other_width) = places
        raise InputError(
            f"{first.path} has directions of width {width} at {site}, {second.path} of width {other_width} at "
            f"{other_site}: expected SAEs at one site of one model"
        )


@torch.inference_mode()
def measure(dictionaries: Sequence[Dictionary], config: GeometryConfig) -> Measured:
    """Every figure and table about `dictionaries` and their pairs."""
    pairs = list(combinations(dictionaries, 2))
    sizes = [len(of.alive) for of in dictionaries]
    total = 3 * sum(n * (n - 1) // 2 for n in sizes) + 2 * sum(n * m for n, m in combinations(sizes, 2))
    neighbours, edges = [], [_edge_table([], [], [], [], [])]
    with Progress("geometry", total, "pair") as progress:
        saes = [_measure_within(of, config, neighbours, progress.advance) for of in dictionaries]
        found = [_measure_pair(*pair, config, neighbours, edges, progress.advance) for pair in pairs]
    geometry = Geometry(config.threshold, saes, found)
    return Measured(geometry, pyarrow.concat_tables(neighbours), pyarrow.concat_tables(edges))


def _measure_within(
    of: Dictionary, config: GeometryConfig, neighbours: list[pyarrow.Table], advance: Callable[[int], None]
) -> Within:
    """The figures of one SAE; its neighbours are added to `neighbours`."""
    decoder = nearest_within(of.directions("W_dec"), config.n_neighbours, advance=advance)
    encoder = nearest_within(of.directions("W_enc"), 1, advance=advance)
    chance = nearest_within(of.random(config.seed), 1, advance=advance)
    neighbours.append(_neighbour_table(of, of, decoder))
    return Within(
        site=of.sae.config.output_site,
        latents=of.sae.config.n_latents,
        dead=of.dead,
        decoder=max_cosines(decoder, NEAR_DUPLICATE),
        encoder=max_cosines(encoder, NEAR_DUPLICATE),
        chance=max_cosines(chance, NEAR_DUPLICATE),
    )


def _measure_pair(
    first: Dictionary,
    second: Dictionary,
    config: GeometryConfig,
    neighbours: list[pyarrow.Table],
    edges: list[pyarrow.Table],
    advance: Callable[[int], None],
) -> Pair:
    """The figures of two SAEs; their neighbours and edges are added to `neighbours` and `edges`."""
    forward, backward = nearest_across(
        first.directions("W_dec"), second.directions("W_dec"), config.n_neighbours, advance=advance
    )
    chance = nearest_across(first.random(config.seed), second.random(config.seed), 1, advance=advance)
    neighbours += [_neighbour_table(first, second, forward), _neighbour_table(second, first, backward)]
    descent = None
    if first.sae.config.n_latents != second.sae.config.n_latents:
        second_is_wide = first.sae.config.n_latents < second.sae.config.n_latents
        narrow, wide = (first, second) if second_is_wide else (second, first)
        to_wide, to_narrow = (forward, backward) if second_is_wide else (backward, forward)
        by_chance = parents(chance[1] if second_is_wide else chance[0], config.threshold)
        parent = parents(to_narrow, config.threshold)
        edges.append(_forest(narrow, wide, parent, to_wide, to_narrow))
        descent = Descent(
            narrow=narrow.number,
            wide=wide.number,
            found=splitting(parent, len(narrow.alive)),
            chance=splitting(by_chance, len(narrow.alive)),
            families=_named(narrow, largest_families(parent, to_narrow.cosines[:, 0], len(narrow.alive), N_FAMILIES)),
        )
    return Pair(
        first=first.number,
        second=second.number,
        found=agreement(forward, backward, config.threshold),
        chance=agreement(*chance, config.threshold),
        descent=descent,
    )


def _named(narrow: Dictionary, families: list[Family]) -> list[Family]:
    """The same with the latents' own numbers, dead ones counted."""
    return [Family(int(narrow.alive[family.narrow_latent]), family.size, family.mean_cosine) for family in families]


def _neighbour_table(of: Dictionary, others: Dictionary, neighbours: Neighbours) -> pyarrow.Table:
    """A row per latent and rank."""
    n_latents, n = neighbours.latents.shape
    columns = {
        "sae": np.full(n_latents * n, of.number, np.int32),
        "latent": np.repeat(of.alive, n).astype(np.int32),
        "rank": np.tile(np.arange(n, dtype=np.int32), n_latents),
        "other_sae": np.full(n_latents * n, others.number, np.int32),
        "other": others.alive[neighbours.latents.ravel()].astype(np.int32),
        "cosine": neighbours.cosines.ravel(),
    }
    return pyarrow.table(columns)


def _forest(
    narrow: Dictionary,
    wide: Dictionary,
    parent: Int[np.ndarray, " wide_latent"],
    to_wide: Neighbours,
    to_narrow: Neighbours,
) -> pyarrow.Table:
    """A row per edge, per new latent and per lost one."""
    lost = np.setdiff1d(np.arange(len(narrow.alive)), parent)
    narrow_latents = [int(narrow.alive[i]) if i >= 0 else None for i in parent.tolist()] + narrow.alive[lost].tolist()
    wide_latents = wide.alive.tolist() + [None] * len(lost)
    cosines = to_narrow.cosines[:, 0].tolist() + to_wide.cosines[lost, 0].tolist()
    n = len(cosines)
    return _edge_table([narrow.number] * n, [wide.number] * n, narrow_latents, wide_latents, cosines)


def _edge_table(
    narrow_saes: Sequence[int],
    wide_saes: Sequence[int],
    narrow_latents: Sequence[int | None],
    wide_latents: Sequence[int | None],
    cosines: Sequence[float],
) -> pyarrow.Table:
    numbers = {
        "narrow_sae": narrow_saes,
        "wide_sae": wide_saes,
        "narrow_latent": narrow_latents,
        "wide_latent": wide_latents,
    }
    columns = {name: pyarrow.array(values, pyarrow.int32()) for name, values in numbers.items()}
    return pyarrow.table(columns | {"cosine": pyarrow.array(cosines, pyarrow.float32())})


def run_and_print(config: GeometryConfig) -> None:
    """What the command does: make the geometry and show it as tables."""
    from rich.console import Console
    from rich.table import Table

    run(config)
    geometry, console = load_geometry(config.out), Console()
    for number, path in enumerate(config.saes):
        console.print(f"SAE {number}: {path}", highlight=False, markup=False)
    table = Table("SAE", "latents", "dead", "directions", "mean", "median", f">= {NEAR_DUPLICATE}")
    table.title = "largest cosine with another latent of the same SAE"
    for number, within in enumerate(geometry.saes):
        for row in within_summary(number, within):
            table.add_row(*row)
        table.add_section()
    console.print(table)
    for pair in geometry.pairs:
        table = Table("", "measured", "chance", title=f"SAE {pair.first} and SAE {pair.second}", title_justify="left")
        for row in pair_summary(pair, geometry.threshold):
            table.add_row(*row)
        table.caption, table.caption_justify = families_line(pair), "left"
        console.print(table)
