"""Directions whose geometry is known in closed form, and the command on real tiny SAEs."""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

from monosemy import options
from monosemy.__main__ import main
from monosemy.artifact import Draft, read_manifest
from monosemy.kernels import Parameters
from monosemy.runtime import InputError
from monosemy.sae import geometry, train
from monosemy.sae.activity import collect, dead_latents, write_interval
from monosemy.sae.autoencoder import SAE, SAEConfig, open_sae
from monosemy.sae.geometry import GeometryConfig, open_dictionary
from monosemy.sae.geometry_figures import Geometry, load_geometry
from monosemy.sae.neighbours import (
    Family,
    Neighbours,
    agreement,
    largest_families,
    max_cosines,
    mutual_nearest,
    nearest_across,
    nearest_within,
    parents,
    random_directions,
    splitting,
    unit,
)

# ---------------------------------------------------------------------------------------------------------------------
# Nearest neighbours and figures
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 7, 13, 40, 41, 64])
def test_blocks_of_any_size_give_what_all_cosines_at_once_give(block: int):
    first, second = random_directions(40, 16, 1), random_directions(23, 16, 2)
    cosines = first @ second.T
    told = []
    forward, backward = nearest_across(first, second, 5, block, told.append)
    assert sum(told) == 40 * 23
    for found, dense in ((forward, cosines), (backward, cosines.T)):
        expected = dense.topk(5, dim=1)
        assert (found.latents == expected.indices.numpy()).all()
        np.testing.assert_allclose(found.cosines, expected.values, atol=1e-6)
    told.clear()
    found = nearest_within(first, 5, block, told.append)
    assert sum(told) == 40 * 39 / 2
    expected = (first @ first.T).fill_diagonal_(-2).topk(5, dim=1)
    assert (found.latents == expected.indices.numpy()).all()
    np.testing.assert_allclose(found.cosines, expected.values, atol=1e-6)


@pytest.mark.parametrize("block", [1, 3, 4, 100])
def test_of_equal_cosines_the_lowest_latents_come_first(block: int):
    eight = torch.eye(4).repeat(2, 1)
    assert nearest_within(eight, 3, block).latents[1].tolist() == [5, 0, 2]
    assert nearest_within(eight, 3, block).latents[6].tolist() == [2, 0, 1]
    forward, backward = nearest_across(eight, eight, 3, block)
    assert forward.latents[5].tolist() == backward.latents[5].tolist() == [1, 5, 0]


def test_there_are_no_more_neighbours_than_others():
    three, two = torch.eye(5)[:3], torch.eye(5)[:2]
    assert nearest_within(three, 5).latents.tolist() == [[1, 2], [0, 2], [0, 1]]
    forward, backward = nearest_across(three, two, 5)
    assert forward.latents.shape == (3, 2)
    assert backward.latents.shape == (2, 3)


def test_the_nearest_may_point_the_other_way():
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert nearest_within(opposite, 1).cosines.tolist() == [[-1.0], [-1.0]]
    assert max_cosines(nearest_within(opposite, 1), 0.9).histogram == [2] + [0] * 99


def test_orthogonal_directions_have_no_neighbour_near():
    found = max_cosines(nearest_within(torch.eye(8), 3), 0.9)
    assert (found.latents, found.mean, found.median, found.share_above) == (8, 0, 0, 0)
    assert found.histogram == [0] * 50 + [8] + [0] * 49


def test_duplicated_latents_are_found():
    directions = torch.cat([torch.eye(8), 3 * torch.eye(8)[:2]])
    neighbours = nearest_within(unit(directions), 1)
    assert neighbours.latents[[0, 1, 8, 9], 0].tolist() == [8, 9, 0, 1]
    found = max_cosines(neighbours, 0.9)
    assert found.share_above == found.mean == pytest.approx(0.4)
    assert found.histogram[-1] == 4


def test_a_direction_of_zeros_is_near_to_none():
    directions = unit(torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]))
    assert nearest_within(directions, 1).cosines.tolist() == [[0.0], [1.0], [1.0]]


def test_known_angles_are_measured():
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 40.0, 90.0]))
    found = nearest_within(torch.stack([angles.cos(), angles.sin()], dim=1), 2)
    assert found.latents.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    between = np.cos(np.deg2rad([[10, 40], [10, 30], [30, 40], [50, 80]]))
    np.testing.assert_allclose(found.cosines, between, atol=1e-6)
    figures = max_cosines(found, math.cos(math.radians(20)))
    assert figures.share_above == 0.5
    assert figures.mean == pytest.approx(between[:, 0].mean())
    assert figures.median == pytest.approx(np.median(between[:, 0]))


def test_an_sae_agrees_fully_with_itself_in_another_order():
    first = random_directions(50, 12, 3)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    forward, backward = nearest_across(first, first[order], 1, block=16)
    assert (order[forward.latents[:, 0]] == torch.arange(50)).all()
    found = agreement(forward, backward, 0.999)
    assert (found.mutual, found.mutual_above, found.mutual_share, found.mutual_above_share) == (50, 50, 1, 1)
    for way in (found.forward, found.backward):
        assert way.mean == pytest.approx(1, abs=1e-6)
        assert way.share_above == 1


def test_agreement_counts_mutual_pairs_and_those_above_the_threshold():
    """Latents of the first: the axes. Of the second: near the first axis twice, between second and third once."""

    def towards(axis: int, degrees: float) -> list[float]:
        row = [0.0] * 4
        row[axis], row[3] = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        return row

    second = torch.tensor([towards(0, 20), towards(0, 10), towards(1, 60)])
    forward, backward = nearest_across(torch.eye(4)[:3], second, 1)
    assert mutual_nearest(forward, backward).tolist() == [True, True, False]
    found = agreement(forward, backward, 0.7)
    assert (found.mutual, found.mutual_above) == (2, 1)
    assert (found.mutual_share, found.mutual_above_share) == pytest.approx((2 / 3, 1 / 3))
    assert found.forward.share_above == pytest.approx(1 / 3)
    assert found.backward.share_above == pytest.approx(2 / 3)
    assert found.backward.mean == pytest.approx(sum(math.cos(math.radians(x)) for x in (20, 10, 60)) / 3)


def test_half_of_random_directions_are_mutual_nearest_neighbours():
    """n m / (n + m - 1) of n x m independent numbers are the largest of their row and of their column."""
    narrow, wide = random_directions(500, 64, 1), random_directions(1500, 64, 2)
    assert agreement(*nearest_across(narrow, wide[:500], 1), 0.7).mutual_share == pytest.approx(1 / 2, abs=0.07)
    found = agreement(*nearest_across(narrow, wide, 1), 0.7)
    assert found.mutual_share == pytest.approx(3 / 4, abs=0.07)
    assert found.mutual_above == 0


def test_splitting_of_known_angles():
    """Narrow: 4 axes. Wide: three children of 0 (at 10, 20, 30 degrees), one of 1, two strays at 60 degrees to 2."""
    tilt = [(0, 10), (0, 20), (0, 30), (1, 0), (2, 60), (2, 60)]
    wide = torch.zeros(6, 10)
    for row, (axis, degrees) in enumerate(tilt):
        wide[row, axis] = math.cos(math.radians(degrees))
        wide[row, 4 + row] = math.sin(math.radians(degrees))
    _, to_narrow = nearest_across(torch.eye(10)[:4], wide, 1)
    parent = parents(to_narrow, 0.7)
    assert parent.tolist() == [0, 0, 0, 1, -1, -1]
    found = splitting(parent, 4)
    assert (found.split, found.kept, found.lost, found.new, found.largest) == (1, 1, 2, 2, 3)
    assert (found.split_share, found.lost_share, found.new_share) == pytest.approx((1 / 4, 1 / 2, 1 / 3))
    assert found.sizes == [2, 1, 0, 1]
    [family] = largest_families(parent, to_narrow.cosines[:, 0], 4, 10)
    assert (family.narrow_latent, family.size) == (0, 3)
    assert family.mean_cosine == pytest.approx(sum(math.cos(math.radians(x)) for x in (10, 20, 30)) / 3)
    assert splitting(parents(to_narrow, 0.49), 4).sizes == [1, 1, 1, 1]  # cos 60 degrees = 1/2
    everything_new = splitting(parents(to_narrow, 1.0), 4)
    assert (everything_new.new, everything_new.lost, everything_new.largest) == (5, 3, 1)


def test_a_cosine_of_exactly_the_threshold_counts():
    exact = Neighbours(np.zeros((1, 1), np.int32), np.array([[0.5]], np.float32))
    assert parents(exact, 0.5).tolist() == [0]
    assert max_cosines(exact, 0.5).share_above == 1


def test_the_largest_families_come_first_and_the_lowest_latent_of_equal_ones():
    parent = np.array([3, 3, 1, 1, 2, 5, 5, 5, -1])
    families = largest_families(parent, np.ones(9, np.float32), 6, 2)
    assert [(family.narrow_latent, family.size) for family in families] == [(5, 3), (1, 2)]
    assert [family.size for family in largest_families(parent, np.ones(9, np.float32), 6, 10)] == [3, 2, 2]


def test_random_directions_depend_on_their_key_alone():
    assert torch.equal(random_directions(9, 5, 0, 1), random_directions(9, 5, 0, 1))
    assert not torch.equal(random_directions(9, 5, 0, 1), random_directions(9, 5, 0, 2))
    many = random_directions(4000, 32, 0)
    assert many.norm(dim=1).sub(1).abs().max() < 1e-5
    assert many.mean(dim=0).abs().max() < 0.02
    # The largest of 3999 cosines with deviation 1/sqrt(32) is about sqrt(2 ln 3999 / 32) = 0.72, less a little.
    assert 0.55 < max_cosines(nearest_within(many, 1), 0.9).mean < 0.72


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeds(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained SAEs: `a` and `b` of one width and two seeds, `wide` of another width."""
    folder = tmp_path_factory.mktemp("seeds")
    made = {}
    for name, n_latents, seed in (("a", 32, 0), ("b", 32, 1), ("wide", 96, 0)):
        sizes = {"n_latents": n_latents, "k": 4, "train_tokens": 20_000, "batch_size": 256, "seed": seed}
        places = {"activations": tiny_run / "activations", "out": folder / name}
        train.run(options.build(train.TrainConfig, sizes | places))
        made[name] = folder / name
    return made


@dataclass(frozen=True)
class Trained:
    """What an SAE's manifest must say about its training."""

    dead_after_tokens: int = 10
    train_tokens: int = 100
    batch_size: int = 10


def made_sae(
    out: Path, W_dec: torch.Tensor, W_enc: torch.Tensor | None = None, site: str = "L1.resid_post", last_fired=None
) -> Path:
    """An SAE artifact with these weights; `last_fired`: after how many of 100 rows each latent last did."""
    n_latents, d_model = W_dec.shape
    parameters = Parameters(
        W_dec.clone() if W_enc is None else W_enc, torch.zeros(n_latents), W_dec, torch.zeros(d_model)
    )
    with Draft(out, "sae", Trained(), {}) as draft:
        SAE(SAEConfig(d_model, n_latents, 1, site, "none"), parameters).save(draft.path)
        if last_fired is not None:
            write_interval(draft.path, 0, 50, 0, torch.zeros(n_latents).long(), torch.zeros(n_latents).long())
            write_interval(draft.path, 1, 100, 0, torch.zeros(n_latents).long(), torch.tensor(last_fired))
            collect(draft.path, 2)
        draft.commit({"latents": n_latents})
    return out


def made(out: Path, *saes: Path, **settings) -> Geometry:
    geometry.run(GeometryConfig(saes=saes, out=out, **settings))
    return load_geometry(out)


def rows(path: Path) -> list[dict]:
    return parquet.read_table(path).to_pylist()


def test_the_command_on_trained_saes(seeds: dict[str, Path], tmp_path: Path, capsys):
    out = tmp_path / "geometry"
    arguments = ["geometry", "--saes", *map(str, seeds.values()), "--out", str(out), "--threshold", "0.6"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for text in ("decoder", "encoder", "chance", "mutual nearest", "that split", "that are lost", "that are new"):
        assert text in shown
    assert main(["verify", str(out)]) == 0
    assert sorted(path.name for path in out.glob("geometry.*")) == ["geometry.json", "geometry.png"]
    assert (out / "geometry.png").read_bytes().startswith(b"\x89PNG")
    found = load_geometry(out)
    assert found.threshold == 0.6
    assert [within.latents for within in found.saes] == [32, 32, 96]
    assert [(pair.first, pair.second, pair.descent is not None) for pair in found.pairs] == [
        (0, 1, False),
        (0, 2, True),
        (1, 2, True),
    ]
    manifest = read_manifest(out, "geometry")
    assert manifest.parents == {f"sae {i}": read_manifest(path, "sae").digest for i, path in enumerate(seeds.values())}
    assert manifest.config == {"n_neighbours": 5, "threshold": 0.6, "seed": 0, "plot": True}
    # Every figure, from all cosines at once.
    a, wide = (open_sae(seeds[name]).W_dec for name in ("a", "wide"))
    alive = [open_dictionary(i, seeds[name]).alive for i, name in enumerate(("a", "wide"))]
    cosines = (a[alive[0]] @ wide[alive[1]].T).numpy()
    pair = found.pairs[1]
    assert pair.found.forward.mean == pytest.approx(cosines.max(axis=1).mean())
    assert pair.found.backward.share_above == pytest.approx((cosines.max(axis=0) >= 0.6).mean())
    parent = np.where(cosines.max(axis=0) >= 0.6, cosines.argmax(axis=0), -1)
    assert pair.descent is not None
    assert pair.descent.found == splitting(parent, len(a[alive[0]]))
    within = (a[alive[0]] @ a[alive[0]].T).fill_diagonal_(-1)
    assert found.saes[0].decoder.mean == pytest.approx(within.amax(dim=1).mean().item())


def test_the_same_command_gives_the_same_bytes(seeds: dict[str, Path], tmp_path: Path, capsys):
    saes = (seeds["a"], seeds["wide"])
    first = geometry.run(GeometryConfig(saes=saes, out=tmp_path / "first"))
    second = geometry.run(GeometryConfig(saes=saes, out=tmp_path / "second"))
    assert first == second
    assert geometry.run(GeometryConfig(saes=saes, out=tmp_path / "first")) == first
    assert "complete already" in capsys.readouterr().err
    with pytest.raises(InputError, match="was made with other settings .*config seed: 0 then, 1 now"):
        geometry.run(GeometryConfig(saes=saes, out=tmp_path / "first", seed=1))


def test_one_sae_has_neighbours_within_it_only(tmp_path: Path):
    sae = made_sae(tmp_path / "sae", torch.cat([torch.eye(4), torch.eye(4)[:1]]), W_enc=torch.eye(5, 4))
    found = made(tmp_path / "out", sae, n_neighbours=2)
    [within] = found.saes
    assert found.pairs == []
    assert (within.latents, within.dead) == (5, None)
    assert (within.decoder.share_above, within.encoder.share_above) == (0.4, 0)
    assert within.chance.latents == 5
    table = rows(tmp_path / "out" / "neighbours.parquet")
    assert len(table) == 10
    duplicate = {"sae": 0, "latent": 0, "rank": 0, "other_sae": 0, "other": 4, "cosine": 1.0}
    assert table[0] == duplicate
    assert table[8] == duplicate | {"latent": 4, "other": 0}
    assert rows(tmp_path / "out" / "splitting.parquet") == []


def test_splitting_is_written_as_a_graph_whichever_sae_comes_first(tmp_path: Path):
    """Latent 0 has two children, 1 has one, 2 none that is near enough; the last wide latent is new."""
    children = torch.tensor([[1.0, 0.1, 0, 0], [1.0, -0.1, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 1.1]])
    narrow, wide = made_sae(tmp_path / "narrow", torch.eye(4)[:3]), made_sae(tmp_path / "wide", unit(children))
    found = [made(tmp_path / "1", narrow, wide, threshold=0.8), made(tmp_path / "2", wide, narrow, threshold=0.8)]
    for out, geometry_found, number in (("1", found[0], 0), ("2", found[1], 1)):
        descent = geometry_found.pairs[0].descent
        assert descent is not None
        assert (descent.narrow, descent.wide) == (number, 1 - number)
        assert descent.found.sizes == [1, 1, 1]
        [family] = descent.families
        assert (family.narrow_latent, family.size) == (0, 2)
        assert family.mean_cosine == pytest.approx(1 / math.hypot(1, 0.1))
        assert descent.chance.new + sum(i * n for i, n in enumerate(descent.chance.sizes)) == 4
        table = rows(tmp_path / out / "splitting.parquet")
        assert [(row["narrow_latent"], row["wide_latent"]) for row in table] == [
            (0, 0),
            (0, 1),
            (1, 2),
            (None, 3),
            (2, None),
        ]
        assert {(row["narrow_sae"], row["wide_sae"]) for row in table} == {(number, 1 - number)}
        assert table[3]["cosine"] == table[4]["cosine"] == pytest.approx(1 / math.hypot(1, 1.1))
    assert found[0].pairs[0].found.forward == found[1].pairs[0].found.backward


def test_latents_known_to_be_dead_are_left_out(tmp_path: Path):
    """Latents 1 and 3 last fired more than 10 rows before the end; without them nothing is duplicated."""
    directions = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    sae = made_sae(tmp_path / "sae", directions, last_fired=[100, 89, 90, 0, 95])
    other = made_sae(tmp_path / "other", torch.eye(3)[[2, 1]])
    assert dead_latents(sae, 10).tolist() == [False, True, False, True, False]
    found = made(tmp_path / "out", sae, other)
    assert (found.saes[0].latents, found.saes[0].dead, found.saes[1].dead) == (5, 2, None)
    assert found.saes[0].decoder.latents == found.saes[0].encoder.latents == found.saes[0].chance.latents == 3
    assert found.saes[0].decoder.share_above == 0
    table = rows(tmp_path / "out" / "neighbours.parquet")
    assert {row["latent"] for row in table if row["sae"] == 0} == {0, 2, 4}
    nearest = {row["latent"]: row["other"] for row in table if (row["sae"], row["other_sae"], row["rank"]) == (1, 0, 0)}
    assert nearest == {0: 4, 1: 2}
    edges = [(row["narrow_latent"], row["wide_latent"]) for row in rows(tmp_path / "out" / "splitting.parquet")]
    assert edges == [(None, 0), (1, 2), (0, 4)]


def test_families_are_named_by_latents_of_the_whole_sae(tmp_path: Path):
    narrow = made_sae(tmp_path / "narrow", torch.eye(3), last_fired=[0, 100, 100])
    wide = made_sae(tmp_path / "wide", torch.eye(3)[[2, 2, 1, 0]])
    descent = made(tmp_path / "out", narrow, wide).pairs[0].descent
    assert descent is not None
    assert descent.families == [Family(2, 2, 1.0)]


def test_without_a_plot(tmp_path: Path, monkeypatch):
    sae = made_sae(tmp_path / "sae", torch.eye(3))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(InputError, match=r"needs the package 'matplotlib'.*pip install 'monosemy\[report\]'"):
        made(tmp_path / "out", sae)
    assert not list(tmp_path.glob("out*"))
    made(tmp_path / "out", sae, plot=False)
    assert not (tmp_path / "out" / "geometry.png").exists()


def test_saes_that_cannot_be_compared_are_refused(tmp_path: Path):
    one = made_sae(tmp_path / "one", torch.eye(3))
    for name, directions, site, message in (
        (
            "width",
            torch.eye(4),
            "L1.resid_post",
            "one has directions of width 3 at L1.resid_post, .*width of width 4 at",
        ),
        ("site", torch.eye(3), "L0.mlp_out", "one has directions of width 3 at L1.resid_post, .*width 3 at L0.mlp_out"),
        ("copy", torch.eye(3), "L1.resid_post", "one and .*copy are the same SAE: name each SAE once"),
    ):
        other = made_sae(tmp_path / name, directions, site=site)
        with pytest.raises(InputError, match=message):
            made(tmp_path / "out", one, other)
    with pytest.raises(InputError, match="are the same SAE"):
        made(tmp_path / "out", one, one)
    with pytest.raises(InputError, match="one has 1 latents that are not dead; expected at least 2"):
        made(tmp_path / "out", made_sae(tmp_path / "dead" / "one", torch.eye(3), last_fired=[100, 0, 0]))
    with pytest.raises(InputError, match="single has 1 latents that are not dead"):
        made(tmp_path / "out", made_sae(tmp_path / "single", torch.eye(3)[:1]))
    broken = torch.eye(3)
    broken[1, 1] = math.nan
    with pytest.raises(InputError, match="W_enc has elements that are not finite numbers"):
        made(tmp_path / "out", made_sae(tmp_path / "broken", torch.eye(3), W_enc=broken))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"saes": ()}, "no SAE was given"),
        ({"n_neighbours": 0}, "n_neighbours is 0; expected at least 1"),
        ({"threshold": 0.0}, "threshold is 0.0; expected a cosine above 0 and at most 1"),
        ({"threshold": 1.01}, "threshold is 1.01; expected"),
        ({"threshold": math.nan}, "threshold is nan; expected"),
        ({"seed": -1}, "seed is -1; expected at least 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(settings: dict, message: str):
    with pytest.raises(InputError, match=message):
        GeometryConfig(**{"saes": (Path("a"),), "out": Path("out")} | settings)


def test_what_is_no_sae_is_refused(tiny_run: Path, tmp_path: Path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert main(["geometry", "--saes", str(tiny_run / "tokens"), *out]) == 2
    assert "holds a 'tokens' artifact; expected a 'sae' artifact" in capsys.readouterr().err
    assert main(["geometry", "--saes", str(tiny_run / "sae"), str(tmp_path / "nosuch"), *out]) == 2
    assert "nosuch is not a folder; expected a 'sae' artifact" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
