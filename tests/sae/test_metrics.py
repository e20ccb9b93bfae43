"""Sums and figures against closed forms, and against the same computed at once."""

import math

import pytest
import torch
from known_saes import identity_sae

from monosemy import kernels
from monosemy.runtime import InputError
from monosemy.sae.autoencoder import SAE, SAEConfig
from monosemy.sae.metrics import (
    BehaviourSums,
    PositionSums,
    ReconstructionSums,
    RowSums,
    interval,
    loss_recovered,
    resampled,
)


def rows_of(n: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def test_fvu_is_exact_over_batches_and_about_the_mean():
    """A large mean: variance about zero would be far off, and a mean over batches of different means too."""
    rows, error = rows_of(1000, 8) + 500, 0.3 * rows_of(1000, 8, seed=1)
    rows[:300] += 40
    sums, group = RowSums(3, 8), torch.arange(1000) % 3
    for part in torch.arange(1000).split([1, 500, 499]):
        sums.add(rows[part], rows[part] + error[part], torch.ones(len(part)).long(), group[part])
    x, e = rows.double(), ((rows + error).double() - rows.double())
    exact = e.square().sum() / (x - x.mean(dim=0)).square().sum()
    found = sums.figures(torch.ones(1, 3).double())
    assert found["fvu"].item() == pytest.approx(exact.item(), rel=1e-9)
    assert found["explained_variance"].item() == pytest.approx(1 - exact.item(), rel=1e-9)
    assert found["mse"].item() == pytest.approx(e.square().mean().item(), rel=1e-9)
    for one in range(3):  # a single group
        x_, e_ = x[group == one], e[group == one]
        alone = e_.square().sum() / (x_ - x_.mean(dim=0)).square().sum()
        assert sums.figures(torch.eye(3).double())["fvu"][one].item() == pytest.approx(alone.item(), rel=1e-9)


def test_an_sae_of_one_latent():
    """Only the latent along +axis 0 exists (k = 1): it explains the positive part of one axis of isotropic noise."""
    config = SAEConfig(4, 3, 1, "L0.resid_post", "tiny", normalize="none")
    axes = torch.eye(4)[:3]
    encoder = axes.clone()
    encoder[1:] = 0  # latents 1 and 2 never fire
    sae = SAE(config, kernels.Parameters(encoder, torch.zeros(3), axes, torch.zeros(4)))
    x, sums = rows_of(20_000, 4), ReconstructionSums(sae)
    for part in x.split(7000):
        sums.add(part, sae.encode(part))
    result = sums.result()
    assert result.fvu == pytest.approx(1 - 1 / 8, abs=0.01)
    assert result.explained_variance == pytest.approx(1 / 8, abs=0.01)
    assert result.mse == pytest.approx(7 / 8, abs=0.02)
    assert result.relative_bias == pytest.approx(1)  # what is there is of the right size
    assert result.cosine == pytest.approx((x[:, 0].relu() / x.norm(dim=1)).mean().item(), rel=1e-5)
    assert result.norm_ratio == pytest.approx(result.cosine)
    assert result.l0 == pytest.approx(0.5, abs=0.02)
    assert result.l0_quantiles == (0, 0, round(result.l0), 1, 1)
    assert result.dead == pytest.approx(2 / 3)
    assert result.dense_10_percent == pytest.approx(1 / 3)
    assert result.frequencies == (0, 0, 0, 0, 0, 0, 1)
    assert result.rows == 20_000
    assert result.intervals == {}  # one group says nothing about others


def test_activations_that_are_too_small():
    sae = identity_sae(8, normalize="none")
    half = SAE(sae.config, sae.parameters._replace(W_dec=0.5 * sae.W_dec))
    x, sums = rows_of(5000, 8), ReconstructionSums(half)
    sums.add(x, half.encode(x))
    result = sums.result()
    assert (result.norm_ratio, result.relative_bias) == (pytest.approx(0.5), pytest.approx(0.5))
    assert result.cosine == pytest.approx(1)
    assert result.fvu == pytest.approx(0.25, rel=0.01)
    assert result.l0 == 8


def test_quantiles_of_l0_and_histogram_of_frequencies():
    """Row i of 100 has i % 10 active latents; latent j fires on 1 row in 10^j."""
    sae = identity_sae(8, normalize="none")
    x, sums = torch.zeros(100, 8), ReconstructionSums(sae)
    for row in range(100):
        x[row, : row % 10] = 1  # 8 at most
    sums.add(x, sae.encode(x))
    active = torch.arange(100).remainder(10).clamp(max=8).double()
    expected = torch.quantile(active, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).double(), interpolation="lower")
    assert list(sums.result().l0_quantiles) == expected.tolist()

    rare, sums = torch.zeros(1000, 8), ReconstructionSums(sae)
    for latent, times in enumerate((1000, 100, 10, 1)):
        rare[:times, latent] = 1
    sums.add(rare, sae.encode(rare))
    assert sums.result().frequencies == (0, 0, 0, 1, 1, 1, 1)
    assert sums.result().dead == pytest.approx(12 / 16)


def test_no_rows():
    with pytest.raises(InputError, match="no row is left to evaluate: every row is an attention sink"):
        ReconstructionSums(identity_sae(4)).result()
    with pytest.raises(InputError, match="no sentence has two tokens, so nothing is predicted"):
        BehaviourSums().result()


def test_rows_without_variance_have_no_fvu():
    sums = RowSums(1, 4)
    sums.add(torch.ones(10, 4), torch.zeros(10, 4), torch.ones(10).long(), torch.zeros(10).long())
    assert math.isnan(sums.figures(torch.ones(1, 1).double())["fvu"].item())


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Rows of a group share an error of random size: the true FVU lies in 95% of the intervals."""
    held, n_trials, n_groups = 0, 300, 60
    random = torch.Generator().manual_seed(0)
    for trial in range(n_trials):
        sums, group = RowSums(n_groups, 4), torch.arange(n_groups).repeat_interleave(20)
        x = torch.randn(len(group), 4, generator=random)
        size = (0.2 + 0.4 * torch.rand(n_groups, generator=random))[group]
        error = size[:, None] * torch.randn(len(group), 4, generator=random)
        sums.add(x, x + error, torch.ones(len(group)).long(), group)
        low, high = interval(sums.figures(resampled(n_groups, trial))["fvu"])
        held += low < 0.4**2 + 0.4**2 / 12 < high
    assert 0.90 < held / n_trials < 0.985


def test_intervals_are_those_of_documents_not_of_rows():
    """All rows of a document have the same error: more rows of it tell nothing, and the interval stays."""
    widths = []
    for copies in (1, 50):
        sums = RowSums(40, 4)
        group = torch.arange(40).repeat_interleave(copies)
        x = rows_of(40, 4)[group]
        sums.add(x, x + rows_of(40, 4, seed=1)[group], torch.ones(len(group)).long(), group)
        low, high = interval(sums.figures(resampled(40, 0))["fvu"])
        widths.append(high - low)
    assert widths[0] == pytest.approx(widths[1])


def test_loss_recovered():
    assert loss_recovered(original=2.0, reconstructed=2.0, ablated=6.0) == 1
    assert loss_recovered(original=2.0, reconstructed=6.0, ablated=6.0) == 0
    assert loss_recovered(original=2.0, reconstructed=3.0, ablated=6.0) == 0.75
    assert math.isnan(loss_recovered(2.0, 2.0, 2.0))  # nothing to recover


def test_behaviour_of_known_losses():
    """Sums over predictions, not means of batches or documents."""
    sums, group = BehaviourSums(2), torch.tensor([0, 0, 0, 1])
    losses = {
        "original": torch.tensor([1.0, 2.0, 3.0, 2.0]), "reconstructed": torch.tensor([1.0, 2.0, 3.0, 6.0]),
        "zero": torch.full((4,), 6.0), "mean": torch.full((4,), 4.0),
    }  # fmt: skip
    divergences = {"reconstructed": torch.tensor([0.0, 0.0, 0.0, 2.0]), "zero": torch.ones(4)}
    for part in (slice(0, 1), slice(1, 4)):
        sums.add(
            {name: of[part] for name, of in losses.items()}, {name: of[part] for name, of in divergences.items()},
            group[part],
        )  # fmt: skip
    result = sums.result()
    assert (result.tokens, result.original, result.reconstructed) == (4, 2.0, 3.0)
    assert (result.zero_ablated, result.mean_ablated, result.delta_loss) == (6.0, 4.0, 1.0)
    assert result.loss_recovered == loss_recovered(2.0, 3.0, 6.0) == 0.75
    assert result.loss_recovered_mean == loss_recovered(2.0, 3.0, 4.0) == 0.5
    assert (result.kl, result.kl_zero_ablated) == (0.5, 1.0)
    assert result.intervals["delta_loss"] == (0.0, 4.0)  # of two documents, one is perfect


def test_figures_by_position():
    sae = identity_sae(8, normalize="none")
    one = SAE(sae.config, sae.parameters._replace(W_dec=sae.W_dec * torch.linspace(0, 1, 16)[:, None]))
    x, position = rows_of(2000, 8), torch.arange(2000) % 11
    sums = PositionSums(one)
    for part in torch.arange(2000).split(700):
        sums.add(x[part], one.encode(x[part]), x[part], position[part])
    found = sums.result()
    assert [(of.first, of.last) for of in found] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15)]
    assert sum(of.rows for of in found) == 2000
    y = one(x)
    for of in found:
        here = (position >= of.first) & (position <= of.last)
        fvu = (y - x)[here].square().sum() / (x[here] - x[here].mean(dim=0)).square().sum()
        assert of.fvu == pytest.approx(fvu.item(), rel=1e-4)
        assert of.rows == int(here.sum())
