"""The SAE's own algebra."""

from pathlib import Path

import pytest
import torch
from known_saes import identity_sae

from monosemy.runtime import InputError
from monosemy.sae.autoencoder import SAE, SAEConfig, normalize_rows, open_sae


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
