"""The SAE's own algebra, its training loop, and its metrics against closed forms."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from monosemy import kernels, options
from monosemy.activations.capture import length_batches
from monosemy.artifact import read_manifest
from monosemy.corpus import open_tokens
from monosemy.llm.llama import Llama
from monosemy.runtime import InputError
from monosemy.sae import evaluate, train
from monosemy.sae.autoencoder import SAE, SAEConfig, load_sae, normalize_rows
from monosemy.sae.evaluate import LossSums, ReconstructionSums, VarianceSums, loss_recovered
from monosemy.sae.tracking import read_history


def identity_sae(d_model: int, site: str = "L1.resid_post", **options) -> SAE:
    """Latents + and - along every axis, all of which may fire: it reconstructs everything."""
    axes = torch.cat([torch.eye(d_model), -torch.eye(d_model)])
    config = SAEConfig(d_model, 2 * d_model, 2 * d_model, site, "tiny", **options)
    parameters = kernels.Parameters(axes.clone(), torch.zeros(2 * d_model), axes, torch.zeros(d_model))
    return SAE(config, parameters)


@pytest.fixture
def config(tiny_run: Path, tmp_path: Path) -> train.TrainConfig:
    return options.build(train.TrainConfig, dict(
        activations=tiny_run / "activations", out=tmp_path / "sae", n_latents=64, k=4, train_tokens=10_000,
        batch_size=256, dead_after_tokens=2000, k_aux=8, checkpoint_every=7,
    ))  # fmt: skip


@pytest.mark.parametrize("normalize", ["token", "none"])
def test_identity_sae_reconstructs(normalize):
    x = torch.randn(20, 16) * 50 + 3
    torch.testing.assert_close(identity_sae(16, normalize=normalize)(x), x, atol=1e-3, rtol=1e-4)


def test_normalized_rows_have_mean_0_and_deviation_1():
    x = torch.randn(10, 64) * 30 + 5
    rows, center, scale = normalize_rows(x, "token")
    torch.testing.assert_close(rows.mean(dim=1), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.std(dim=1, unbiased=False), torch.ones(10), atol=1e-4, rtol=0)
    torch.testing.assert_close(rows * scale + center, x)
    assert torch.equal(normalize_rows(torch.ones(1, 8), "token")[0], torch.zeros(1, 8))  # no division by 0


def test_direction_is_what_one_more_unit_of_a_latent_adds():
    sae = identity_sae(16)
    x = torch.randn(6, 16) * 10
    code = sae.encode(x)
    values = code.values.clone()
    slot = (code.indices == 3) & (values > 0)
    values[slot] += 1
    change = sae.decode(code._replace(values=values)) - sae.decode(code)
    expected = sae.direction(3, x) * slot.any(dim=1, keepdim=True)
    torch.testing.assert_close(change, expected, atol=1e-4, rtol=1e-4)


def test_saved_sae_loads_unchanged(tiny_run: Path):
    sae = load_sae(tiny_run / "sae")
    assert (sae.config.n_latents, sae.config.k, sae.config.d_model, sae.config.site) == (64, 4, 32, "L1.resid_post")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


def test_training_lowers_the_error(tiny_run: Path):
    fvu = [line["fvu"] for line in read_history(tiny_run / "sae")]
    assert fvu[-1] < 0.5 * fvu[0]


@pytest.mark.parametrize("stop_at", [3, 7, 20, 38])
def test_interrupted_training_ends_in_the_same_bytes(config: train.TrainConfig, tmp_path: Path, monkeypatch, stop_at):
    whole = train.run(config)
    step_kernel, steps = kernels.train_step, []

    def stopping(*arguments):
        steps.append(arguments[6])
        if len(steps) == stop_at:
            raise KeyboardInterrupt
        return step_kernel(*arguments)

    again = options.replaced(config, out=tmp_path / "again")
    monkeypatch.setattr(kernels, "train_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        train.run(again)
    resumed = train.run(again)
    assert len(steps) <= 39 + 7 + 1  # went on from the last checkpoint
    assert resumed.digest == whole.digest


def test_a_nan_loss_names_the_step_and_keeps_the_checkpoint(config: train.TrainConfig, monkeypatch):
    step_kernel = kernels.train_step

    def broken(*arguments):
        result = step_kernel(*arguments)
        return result._replace(loss=float("nan")) if arguments[6] == 9 else result

    monkeypatch.setattr(kernels, "train_step", broken)
    with pytest.raises(InputError, match="the loss became nan at step 9: try a learning rate below"):
        train.run(config)
    assert not config.out.exists()
    monkeypatch.undo()
    assert train.run(config).rows["latents"] == 64


def test_learning_rate_rises_stays_and_falls(config: train.TrainConfig):
    schedule = options.replaced(config, train_tokens=256 * 100, warmup=0.1, decay=0.3, learning_rate=1.0)
    rates = [schedule.learning_rate(step) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10:70] == [1.0] * 60
    assert 0 < rates[-1] < 0.04
    assert all(a >= b for a, b in itertools.pairwise(rates[70:]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 65}, "k is 65, but there are only 64 latents"),
        ({"n_latents": 0}, "n_latents is 0; expected at least 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; expected a positive number"),
        ({"warmup": 1.5}, r"warmup is 1.5; expected a share of the steps, 0 to 1"),
        ({"train_tokens": 100}, "less than one batch of 256"),
        ({"k_aux": -1}, "expected 0 or more"),
    ],
)
def test_bad_training_options(config: train.TrainConfig, changes: dict, message: str):
    with pytest.raises(InputError, match=message):
        options.replaced(config, **changes)


def test_other_settings_for_the_same_folder_are_refused(config: train.TrainConfig):
    train.run(config)
    with pytest.raises(InputError, match=r"made with other settings \(config k: 4 then, 5 now\): give another --out"):
        train.run(options.replaced(config, k=5))


def test_bad_saes(tmp_path: Path, tiny_run: Path):
    with pytest.raises(InputError, match="holds a 'tokens' artifact; expected a 'sae' artifact"):
        load_sae(tiny_run / "tokens")
    with pytest.raises(InputError, match=r"rows have width 7; this SAE was trained on width 16"):
        identity_sae(16).encode(torch.zeros(1, 7))
    with pytest.raises(InputError, match=r"latent 32 does not exist: this SAE has latents 0 to 31"):
        identity_sae(16).check_latent(32)
    with pytest.raises(InputError, match=r"W_enc has shape \(32, 16\); expected \(30, 16\)"):
        SAE(SAEConfig(16, 30, 4, "L0.resid_post", "tiny"), identity_sae(16).parameters)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------


def test_fvu_is_exact_over_batches_and_about_the_mean():
    rows = torch.randn(1000, 8) + 500  # a large mean: variance about zero would be far off
    error = 0.3 * torch.randn(1000, 8)
    sums = VarianceSums(8)
    for a, b in zip(rows.split([1, 500, 499]), error.split([1, 500, 499]), strict=True):
        sums.add(a, b)
    exact = error.double().square().sum() / (rows.double() - rows.double().mean(dim=0)).square().sum()
    assert sums.fvu == pytest.approx(exact.item(), rel=1e-6)


def test_reconstruction_metrics_of_known_sae():
    """Only the latent along +axis 0 exists (k = 1): it explains the positive part of one axis of isotropic noise."""
    config = SAEConfig(4, 3, 1, "L0.resid_post", "tiny", normalize="none")
    axes = torch.eye(4)[:3]
    encoder = axes.clone()
    encoder[1:] = 0  # latents 1 and 2 never fire
    sae = SAE(config, kernels.Parameters(encoder, torch.zeros(3), axes, torch.zeros(4)))
    x = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0))
    sums = ReconstructionSums(sae)
    for part in x.split(7000):
        sums.add(part, sae.encode(part))
    result = sums.result()
    assert result.fvu == pytest.approx(1 - 1 / 8, abs=0.01)
    assert result.explained_variance == pytest.approx(1 / 8, abs=0.01)
    assert result.l0 == pytest.approx(0.5, abs=0.02)
    assert result.dead == pytest.approx(2 / 3)
    assert result.dense_10_percent == pytest.approx(1 / 3)
    assert result.rows == 20_000


def test_loss_recovered():
    assert loss_recovered(original=2.0, reconstructed=2.0, ablated=6.0) == 1
    assert loss_recovered(original=2.0, reconstructed=6.0, ablated=6.0) == 0
    assert loss_recovered(original=2.0, reconstructed=3.0, ablated=6.0) == 0.75
    assert loss_recovered(2.0, 2.0, 2.0) != loss_recovered(2.0, 2.0, 2.0)  # NaN: nothing to recover


def test_cross_entropies(tiny_run: Path, tiny_llama: Llama):
    """A perfect SAE changes nothing; zeros do; and the original is the model's own loss."""
    tokens = open_tokens(tiny_run / "tokens")
    sums = LossSums(identity_sae(32), tiny_llama)
    total, n = 0.0, 0
    with torch.inference_mode():
        for batch in length_batches(tokens, range(40), 300):
            sums.add(batch)
            for ids in batch.ids.split(batch.lengths.tolist(), dim=1):
                logits = tiny_llama(ids)
                total += torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
                n += ids.shape[1] - 1
    result = sums.result(sparing_sinks=False)
    assert result.tokens == n
    assert result.original == pytest.approx(total / n, rel=1e-5)
    assert result.reconstructed == pytest.approx(result.original, rel=1e-4)
    assert result.loss_recovered == pytest.approx(1, abs=1e-3)
    assert abs(result.zero_ablated - result.original) > 0.1


def test_evaluate_stage(tiny_run: Path, tiny_llama_folder: Path, tmp_path: Path, capsys):
    config = evaluate.EvaluateConfig(
        sae=tiny_run / "sae", tokens=tiny_run / "tokens", out=tmp_path / "metrics", model=str(tiny_llama_folder),
        dtype="float32", loss_tokens=300,
    )  # fmt: skip
    evaluate.run_and_print(config)
    metrics = evaluate.load_metrics(config.out)
    held_out = open_tokens(config.tokens)
    assert metrics.with_sinks.rows == int(held_out.lengths[held_out.validation].sum())
    assert 0 < metrics.without_sinks.fvu < 1
    assert metrics.without_sinks.l0 <= 4
    assert "loss recovered" in capsys.readouterr().out
    assert json.loads((config.out / "metrics.json").read_text())["with_sinks"]["rows"] == metrics.with_sinks.rows
    assert read_manifest(config.out, "metrics").parents["sae"] == read_manifest(config.sae, "sae").digest


def test_evaluate_refuses_another_models_sae(tiny_run: Path, smollm2: Llama):
    with pytest.raises(InputError, match=r"trained on width 32 .* but .* has width 576"):
        evaluate.check_fits(load_sae(tiny_run / "sae"), smollm2)
