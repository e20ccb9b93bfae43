"""Every kind of dictionary is trained for real, and the saved SAE is what was trained."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from monosemy import kernels, options
from monosemy.activations import capture
from monosemy.activations.capture import CaptureConfig
from monosemy.activations.store import open_activations
from monosemy.activations.stream import Stream
from monosemy.llm.llama import Llama
from monosemy.llm.sites import Site, Taps
from monosemy.runtime import InputError
from monosemy.sae import evaluate, train
from monosemy.sae.autoencoder import SAE, SAEConfig, folded, open_sae
from monosemy.sae.settings import TrainConfig
from monosemy.sae.tracking import read_history
from monosemy.sae.training_state import Latents, geometric_median, initial_state
from monosemy.steer import Addition, steering

SITE = Site.parse("L1.resid_post")


@pytest.fixture
def config(training_config: TrainConfig) -> TrainConfig:
    return options.replaced(training_config, log_every=1, learning_rate=1e-2)


@pytest.fixture(scope="module")
def rows(tiny_run: Path) -> torch.Tensor:
    """All training rows, as stored."""
    found = Stream(open_activations(tiny_run / "activations"), SITE, 1, 0).first_rows(1 << 15)[0]
    assert len(found) > 3000
    return found


def trained(config: TrainConfig, **changes) -> SAE:
    config = options.replaced(config, **changes)
    train.run(config)
    return open_sae(config.out)


def fraction_unexplained(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).square().sum() / (wanted - wanted.mean(dim=0)).square().sum()).item()


def l0(sae: SAE, rows: torch.Tensor) -> torch.Tensor:
    return (sae.encode(rows).values > 0).sum(dim=1).double()


def dense(sae: SAE, rows: torch.Tensor) -> torch.Tensor:
    code = sae.encode(rows)
    return torch.zeros(len(rows), sae.config.n_latents).scatter_add_(1, code.indices.long(), code.values)


VARIANTS: dict[str, dict[str, Any]] = {
    "batch_topk": {"activation": "batch_topk"},
    "free decoder, annealed": {"decoder": "free", "start_k": 20, "anneal": 0.5},
    "prefixes": {"prefixes": (8, 24)},
    "prefixes, batch_topk, free": {"prefixes": (8, 24), "activation": "batch_topk", "decoder": "free"},
    "relu": {"activation": "relu", "l1": 0.3},
    "jumprelu": {"jumprelu": True},
    "dataset": {"normalize": "dataset"},
    "dataset, batch_topk": {"normalize": "dataset", "activation": "batch_topk"},
    "as stored": {"normalize": "none"},
    "geometric median": {"initial_bias": "geometric_median"},
    "average": {"ema": 0.8},
    "weight decay, cosine": {"weight_decay": 0.01, "schedule": "cosine"},
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_every_variant_learns(config: TrainConfig, rows: torch.Tensor, kind: str):
    changes = VARIANTS[kind]
    sae = trained(config, **changes)
    history = read_history(config.out)
    assert history[-1]["fvu"] < 0.4 * history[0]["fvu"]
    assert fraction_unexplained(sae(rows), rows) < 0.3  # after folding and thresholds, on rows as they are stored
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    assert sae.config.normalize == ("none" if changes.get("normalize") in ("none", "dataset") else "token")
    if changes.get("activation") == "batch_topk" or "jumprelu" in changes:
        assert sae.config.activation == "jumprelu"
        assert l0(sae, rows).mean() == pytest.approx(4, rel=0.02)
        assert l0(sae, rows).max() > 4
    elif changes.get("activation") == "relu":
        assert sae.config.activation == "relu"
        assert l0(sae, rows).mean() == pytest.approx(history[-1]["l0"], rel=0.2)
    else:
        assert sae.config.activation == "topk"
        assert l0(sae, rows).max() <= 4
    if "start_k" in changes:
        ks = [line["k"] for line in history]
        assert ks == sorted(ks, reverse=True)
        assert (ks[0], ks[-1]) == (20, 4)
        assert len(set(ks)) > 10


def test_the_first_latents_of_a_matryoshka_reconstruct_by_themselves(config: TrainConfig, rows, tmp_path: Path):
    found = {}
    for prefixes in ((8, 24), ()):
        sae = trained(config, out=tmp_path / str(len(prefixes)), prefixes=prefixes)
        code = sae.encode(rows)
        first = code._replace(values=torch.where(code.indices < 8, code.values, 0.0))
        found[prefixes] = 1 - fraction_unexplained(sae.decode(first), rows)
    assert found[(8, 24)] > 1.5 * found[()] > 0


def test_a_larger_l1_makes_codes_sparser(config: TrainConfig, rows: torch.Tensor, tmp_path: Path):
    def mean_l0(l1: float) -> float:
        changes = {"activation": "relu", "l1": l1, "train_tokens": 5120}
        return l0(trained(config, out=tmp_path / str(l1), **changes), rows).mean().item()

    found = [mean_l0(l1) for l1 in (0.1, 2.0)]
    assert found[1] < 0.5 * found[0]


# ---------------------------------------------------------------------------------------------------------------------
# JumpReLU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, 40])
def test_the_threshold_keeps_k_on_average(rows: torch.Tensor, k: int):
    random = torch.Generator().manual_seed(0)
    W_enc = torch.randn(64, 32, generator=random)
    parameters = kernels.Parameters(W_enc, 0.1 * torch.randn(64, generator=random), W_enc, torch.zeros(32))
    # Some rows are much stronger than others: they hold more than the 4 k candidates that are looked at first.
    x = torch.randn(400, 32, generator=random) * (1 + 9 * (torch.arange(400) % 10 == 0))[:, None]
    sae = SAE(SAEConfig(32, 64, k, str(SITE), "tiny", normalize="none"), parameters).to_jumprelu(x)
    pre = x @ W_enc.T + parameters.b_enc
    assert l0(sae, x).mean() == pytest.approx(min(k, (pre > 0).double().sum(dim=1).mean().item()), rel=0.02)
    assert sae.threshold is not None
    assert torch.equal(dense(sae, x) > 0, pre > sae.threshold)


def test_the_threshold_of_a_training(config: TrainConfig, rows: torch.Tensor):
    """It is all that differs from the SAE with k latents per row."""
    topk = trained(config)
    jump = trained(config, out=config.out.with_name("jump"), jumprelu=True)
    for name, tensor in topk.parameters.named().items():
        assert torch.equal(getattr(jump.parameters, name), tensor)
    assert l0(jump, rows).mean() == pytest.approx(4, rel=0.02)
    by_hand = topk.to_jumprelu(rows)
    assert by_hand.config == jump.config
    assert jump.threshold is not None
    assert bool((jump.threshold > 0).all())
    assert by_hand.threshold is not None
    assert torch.equal(jump.threshold, by_hand.threshold)


def test_latents_of_a_jumprelu_do_not_compete(config: TrainConfig, rows: torch.Tensor):
    """What a latent does is the same without the others; among the k largest, it is not."""
    topk = trained(config)
    jump = topk.to_jumprelu(rows)

    def first_ten(sae: SAE) -> SAE:
        of = sae.parameters
        fewer = of._replace(W_enc=of.W_enc[:10], b_enc=of.b_enc[:10], W_dec=of.W_dec[:10])
        return SAE(replace(sae.config, n_latents=10), fewer, None if sae.threshold is None else sae.threshold[:10])

    torch.testing.assert_close(dense(jump, rows)[:, :10], dense(first_ten(jump), rows), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(dense(topk, rows)[:, :10], dense(first_ten(topk), rows), atol=1e-3)


def test_codes_of_any_width_encode_and_decode_in_parts(config: TrainConfig, rows: torch.Tensor, monkeypatch):
    """Rows are encoded in parts, whose fullest rows differ."""
    from monosemy.sae import autoencoder

    jump = trained(config, jumprelu=True)
    whole = dense(jump, rows)
    monkeypatch.setattr(autoencoder, "DENSE_ELEMENTS", 64 * 7)
    torch.testing.assert_close(dense(jump, rows), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(jump(rows[:20]), jump(rows)[:20], atol=1e-4, rtol=1e-4)


def test_no_rows_have_no_code(tiny_run: Path, rows: torch.Tensor):
    sae = open_sae(tiny_run / "sae")
    assert sae.encode(rows[:0]).values.shape == (0, 4)
    assert len(sae.to_jumprelu(rows).encode(rows[:0]).values) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Scales and norms
# ---------------------------------------------------------------------------------------------------------------------


def test_norms_and_scales_are_folded_into_the_weights():
    random = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (20, 6), "b_enc": (20,), "W_dec": (20, 5), "b_pre": (6,), "b_dec": (5,), "W_skip": (5, 6)}
    plain = kernels.Parameters(**{name: torch.randn(*shape, generator=random) for name, shape in shapes.items()})
    x = torch.randn(9, 6, generator=random)

    def run(of: kernels.Parameters, x: torch.Tensor) -> torch.Tensor:
        assert of.W_skip is not None
        active = ((x - of.b_pre) @ of.W_enc.T + of.b_enc).relu()
        return active @ of.W_dec + of.output_bias + (x - of.b_pre) @ of.W_skip.T

    ready = folded(plain, 3.0, 0.5)
    torch.testing.assert_close(run(ready, x), run(plain, 3.0 * x) / 0.5, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ready.W_dec.norm(dim=1), torch.ones(20))


def test_normalising_by_data_set_is_training_on_rows_scaled_by_hand(config: TrainConfig, rows, monkeypatch):
    dataset = trained(config, normalize="dataset")
    scale = 32**0.5 / rows.norm(dim=1).mean().item()
    assert not 0.9 < scale < 1.1
    monkeypatch.setattr(train, "normalize_rows", lambda x, how: (x.float() * scale,))
    by_hand = trained(config, out=config.out.with_name("by-hand"), normalize="none")
    assert (dataset.config.normalize, dataset.config) == ("none", by_hand.config)
    for name, factor in (("W_enc", 1.0), ("W_dec", 1.0), ("b_enc", 1 / scale), ("b_pre", 1 / scale)):
        mine, theirs = (getattr(sae.parameters, name) for sae in (dataset, by_hand))
        torch.testing.assert_close(mine, theirs * factor, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(dataset(rows), by_hand(rows * scale) / scale, atol=1e-3, rtol=1e-3)


def test_the_average_is_what_is_saved(config: TrainConfig, monkeypatch):
    train_step, average, steps = kernels.train_step, {}, itertools.count(1)

    def record(parameters, *rest):
        if not average:
            average.update(parameters.map(torch.clone).named())
        result, step = train_step(parameters, *rest), next(steps)
        kept = min(0.9, (1 + step) / (10 + step))
        for name, tensor in parameters.named().items():
            average[name] = kept * average[name] + (1 - kept) * tensor
        return result

    monkeypatch.setattr(kernels, "train_step", record)
    saved = trained(config, ema=0.9).parameters
    for name, tensor in folded(kernels.Parameters(**average)).named().items():
        torch.testing.assert_close(getattr(saved, name), tensor, atol=1e-4, rtol=1e-4)


def test_weight_decay_keeps_weights_small(config: TrainConfig, tmp_path: Path):
    norms = [
        trained(config, out=tmp_path / str(decay), weight_decay=decay).parameters.W_enc.norm().item()
        for decay in (0.0, 3.0)
    ]
    assert norms[1] < 0.9 * norms[0]


# ---------------------------------------------------------------------------------------------------------------------
# Where it starts
# ---------------------------------------------------------------------------------------------------------------------


def test_geometric_median_of_closed_cases():
    square = torch.tensor([[0.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 2.0]])
    torch.testing.assert_close(geometric_median(square), torch.ones(2), atol=1e-4, rtol=0)
    line = torch.tensor([[0.0], [1.0], [10.0]])  # of three points on a line, the middle one
    torch.testing.assert_close(geometric_median(line, most=1000), torch.ones(1), atol=0.02, rtol=0)
    angles = torch.tensor([0.0, 2.0, 4.0]) * math.pi / 3
    triangle = torch.stack([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(geometric_median(triangle + 5), torch.full((2,), 5.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(geometric_median(torch.full((4, 3), 2.0)), torch.full((3,), 2.0))  # no division by 0


def test_an_outlier_moves_the_geometric_median_less_than_the_mean():
    cloud = torch.randn(99, 8, generator=torch.Generator().manual_seed(0))
    far = torch.cat([cloud, torch.full((1, 8), 1e4)])
    assert (far.mean(dim=0) - cloud.mean(dim=0)).norm() > 100
    assert (geometric_median(far) - geometric_median(cloud)).norm() < 0.2


@pytest.mark.parametrize("initial_bias", ["mean", "geometric_median"])
def test_biases_start_at_the_centre_of_the_rows(config: TrainConfig, initial_bias: str):
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 32, generator=random).exp(), torch.randn(200, 20, generator=random).exp()
    centre = {"mean": lambda rows: rows.mean(dim=0), "geometric_median": geometric_median}[initial_bias]
    changes = {"initial_bias": initial_bias, "normalize": "none"}
    start = initial_state(options.replaced(config, **changes), [x], Latents(0, 64), torch.device("cpu")).parameters
    assert torch.equal(start.b_pre, centre(x))
    assert start.b_dec is None
    torch.testing.assert_close(start.W_enc, 0.25 * start.W_dec)
    changes |= {"target_site": "L1.mlp_out", "skip": True, "encoder_scale": 0.5}
    start = initial_state(options.replaced(config, **changes), [x, y], Latents(0, 64), torch.device("cpu")).parameters
    assert start.b_dec is not None
    assert start.W_skip is not None
    assert torch.equal(start.b_pre, centre(x))
    assert torch.equal(start.b_dec, centre(y))
    assert (start.W_enc.shape, start.W_dec.shape, start.W_skip.shape) == ((64, 32), (64, 20), (20, 32))
    torch.testing.assert_close(start.W_enc.norm(dim=1), torch.full((64,), 0.5))
    torch.testing.assert_close(start.W_dec.norm(dim=1), torch.ones(64))


# ---------------------------------------------------------------------------------------------------------------------
# Transcoders
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tiny_run: Path, tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations of what an MLP reads and what it writes."""
    out = tmp_path_factory.mktemp("pairs") / "activations"
    capture.run(
        CaptureConfig(
            tokens=tiny_run / "tokens", out=out, model=str(tiny_llama_folder), dtype="float32", stored_as="float32",
            sites=("L1.mlp_in", "L1.mlp_out"), shard_tokens=1000, batch_tokens=256,
        )
    )  # fmt: skip
    return out


def held_out_pairs(pairs: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What the MLP reads and writes on all held-out tokens, sinks too."""
    activations = open_activations(pairs)
    found = []
    for name in ("L1.mlp_in", "L1.mlp_out"):
        parts = [
            activations.shard(Site.parse(name), number).decoded()[activations.table(number).validation]
            for number in range(activations.n_shards)
        ]
        found.append(torch.cat(parts))
    return found[0], found[1]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("normalize", ["dataset", "none"])
def test_a_transcoder_predicts_another_site(
    config: TrainConfig, pairs: Path, tiny_run: Path, tiny_llama_folder: Path, tmp_path: Path, skip, normalize
):
    sites = {"activations": pairs, "site": "L1.mlp_in", "target_site": "L1.mlp_out"}
    sae = trained(config, normalize=normalize, skip=skip, **sites)
    history = read_history(config.out)
    assert history[-1]["fvu"] < 0.5 * history[0]["fvu"]
    x, wanted = held_out_pairs(pairs)
    by_hand = fraction_unexplained(sae(x), wanted)
    assert by_hand < 0.5
    assert fraction_unexplained(x, wanted) > 0.9  # it has something to predict
    assert (sae.config.site, sae.config.output_site) == ("L1.mlp_in", "L1.mlp_out")
    assert sae.config.k == 4
    assert (sae.parameters.W_skip is not None) == skip
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    if skip:
        without = SAE(sae.config, sae.parameters._replace(W_skip=None))
        assert fraction_unexplained(without(x), wanted) > 1.1 * by_hand
        with pytest.raises(InputError, match=r"decode\(code, x\) needs the rows x"):
            sae.decode(sae.encode(x))
    settings = evaluate.EvaluateConfig(
        sae=config.out, tokens=tiny_run / "tokens", out=tmp_path / "metrics", model=str(tiny_llama_folder),
        dtype="float32", loss_tokens=300,
    )  # fmt: skip
    evaluate.run(settings)
    metrics = evaluate.load_metrics(settings.out)
    assert metrics.with_sinks.rows == len(x)
    assert metrics.with_sinks.fvu == pytest.approx(by_hand, rel=1e-3)
    assert metrics.with_sinks.l0 == pytest.approx(l0(sae, x).mean().item(), rel=1e-3)
    behaviour = metrics.behaviour_with_sinks
    assert abs(behaviour.reconstructed - behaviour.original) < abs(behaviour.zero_ablated - behaviour.original)


def test_a_perfect_transcoder_changes_nothing_and_steering_edits_its_target(tiny_llama: Llama):
    axes = torch.cat([torch.eye(32), -torch.eye(32)])
    settings = SAEConfig(32, 64, 64, "L1.mlp_in", "tiny", normalize="none", target_site="L1.mlp_out")
    zero = torch.zeros(32)
    sae = SAE(settings, kernels.Parameters(axes.clone(), torch.zeros(64), axes, zero, zero))
    x, ids = torch.randn(5, 32), torch.arange(20)[None] + 100
    torch.testing.assert_close(sae(x), x)
    taps = steering(sae, [Addition(3, 2.5), Addition(40, 1.0)])
    [site] = taps.edits
    assert site == Site.parse("L1.mlp_out")
    change = 2.5 * axes[3] + axes[40]
    hidden = torch.randn(2, 7, 32) * 100
    torch.testing.assert_close(taps.edits[site](hidden, ids), hidden + change)
    plain, steered = Taps(reads={SITE}), Taps(reads={SITE}, edits=taps.edits)
    with torch.inference_mode():
        tiny_llama(ids, taps=plain)
        tiny_llama(ids, taps=steered)
    torch.testing.assert_close(steered.values[SITE], plain.values[SITE] + change, atol=1e-4, rtol=1e-4)
