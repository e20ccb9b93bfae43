"""The SAE's own algebra, and its metrics against closed forms."""

import json
from pathlib import Path

import pytest
import torch

from monosemy import kernels
from monosemy.activations.capture import length_batches
from monosemy.artifact import read_manifest
from monosemy.corpus import open_tokens
from monosemy.llm.llama import Llama
from monosemy.runtime import InputError
from monosemy.sae import evaluate
from monosemy.sae.autoencoder import SAE, SAEConfig, normalize_rows, open_sae
from monosemy.sae.evaluate import LossSums, ReconstructionSums, VarianceSums, loss_recovered


def identity_sae(d_model: int, site: str = "L1.resid_post", **options) -> SAE:
    """Latents + and - along every axis, all of which may fire: it reconstructs everything."""
    axes = torch.cat([torch.eye(d_model), -torch.eye(d_model)])
    config = SAEConfig(d_model, 2 * d_model, 2 * d_model, site, "tiny", **options)
    parameters = kernels.Parameters(axes.clone(), torch.zeros(2 * d_model), axes, torch.zeros(d_model))
    return SAE(config, parameters)


@pytest.mark.parametrize("normalize", ["token", "none"])
def test_identity_sae_reconstructs(normalize):
    x = torch.randn(20, 16) * 50 + 3
    torch.testing.assert_close(identity_sae(16, normalize=normalize)(x), x, atol=1e-3, rtol=1e-4)


def test_normalized_rows_have_mean_0_and_deviation_1():
    x = torch.randn(10, 64) * 30 + 5
    rows, center, scale = normalize_rows(x, "token")
    torch.testing.assert_close(rows.mean(dim=1), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.std(dim=1), torch.ones(10), atol=1e-4, rtol=0)
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


def test_a_bias_of_all_latents_is_that_much_more_of_each():
    random = torch.Generator().manual_seed(0)
    sae, x, h_bias = identity_sae(16), torch.randn(6, 16, generator=random), torch.randn(32, generator=random)
    code = sae.encode(x)
    values = torch.zeros(6, 32).scatter_add_(1, code.indices.long(), code.values)
    every = code._replace(values=values + h_bias, indices=torch.arange(32, dtype=torch.int32).expand(6, -1))
    torch.testing.assert_close(sae.decode(code, h_bias=h_bias), sae.decode(every), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(sae.decode(code, h_bias=h_bias), sae.decode(code))


def test_saved_sae_loads_unchanged(tiny_run: Path):
    sae = open_sae(tiny_run / "sae")
    assert (sae.config.n_latents, sae.config.k, sae.config.d_model, sae.config.site) == (64, 4, 32, "L1.resid_post")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


def test_bad_saes(tmp_path: Path, tiny_run: Path):
    with pytest.raises(InputError, match="holds a 'tokens' artifact; expected a 'sae' artifact"):
        open_sae(tiny_run / "tokens")
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
        evaluate.check_fits(open_sae(tiny_run / "sae"), smollm2)
