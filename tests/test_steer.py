"""Adding to latents changes exactly what it says, with a cache as without."""

from pathlib import Path

import pytest
import torch

from monosemy.llm.generate import SamplingSettings, generate
from monosemy.llm.llama import Llama
from monosemy.llm.sites import Site, Taps
from monosemy.runtime import InputError
from monosemy.sae.autoencoder import SAE, open_sae
from monosemy.steer import Addition, addition_edit, steering, vector_edit


def ones(hidden: torch.Tensor) -> torch.Tensor:
    return torch.ones(hidden.shape[:2], dtype=torch.bool)


@pytest.fixture
def sae(tiny_run: Path) -> SAE:
    return open_sae(tiny_run / "sae")


def test_parse():
    assert Addition.parse("896=+20") == Addition(896, 20.0)
    assert Addition.parse(" 3=-1.5 ") == Addition(3, -1.5)
    assert Addition.parse("3=1e2") == Addition(3, 100.0)
    assert str(Addition(896, 20.0)) == "896=+20"
    for text in ("896", "=3", "a=3", "896=", "896=x", "896=+2x", "-1=3", "1=nan", "1=inf"):
        with pytest.raises(InputError, match=r"expected LATENT=STRENGTH with a finite number, for example 896=\+20"):
            Addition.parse(text)


def test_adds_the_direction_in_the_rows_own_scale(sae: SAE):
    hidden = torch.randn(2, 3, 32)
    steered = addition_edit(sae, [Addition(5, 2.0), Addition(9, -1.0)])(hidden, ones(hidden))
    rows = hidden.flatten(0, 1)
    expected = rows + 2 * sae.direction(5, rows) - sae.direction(9, rows)
    torch.testing.assert_close(steered.flatten(0, 1), expected)


def test_strength_0_is_the_plain_model_to_the_last_bit(sae: SAE, tiny_llama: Llama):
    ids = torch.tensor([[5, 900, 33, 7]])
    with torch.inference_mode():
        assert torch.equal(tiny_llama(ids, taps=steering(sae, [Addition(5, 0.0)])), tiny_llama(ids))


def test_sinks_are_left_alone(sae: SAE):
    hidden = torch.randn(1, 4, 32)
    hidden[0, 0] *= 1e6
    steered = addition_edit(sae, [Addition(5, 3.0)])(hidden, ones(hidden))
    assert torch.equal(steered[0, 0], hidden[0, 0])
    assert (steered[0, 1:] != hidden[0, 1:]).any()


def test_each_text_of_a_batch_gets_its_own_vector(sae: SAE):
    hidden = torch.randn(2, 3, 32)
    changes = torch.stack([sae.W_dec[1] * 2, torch.zeros(32)])
    steered = vector_edit(sae, changes)(hidden, ones(hidden))
    torch.testing.assert_close(steered[0], addition_edit(sae, [Addition(1, 2.0)])(hidden, ones(hidden))[0])
    assert torch.equal(steered[1], hidden[1])


def test_unknown_latent(sae: SAE):
    with pytest.raises(InputError, match="latent 64 does not exist: this SAE has latents 0 to 63"):
        steering(sae, [Addition(64, 1.0)])


def test_generation_with_cache_equals_generation_without(sae: SAE, tiny_llama: Llama):
    taps = Taps(edits={Site.parse(sae.config.site): addition_edit(sae, [Addition(5, 8.0)])})
    prompt = tiny_llama.tokenizer.encode("The delegates gathered at the")
    cached = [step[0] for step in generate(tiny_llama, [prompt], SamplingSettings(12, temperature=0), taps)]
    ids = list(prompt)
    for _ in range(len(cached)):
        with torch.inference_mode():
            ids.append(int(tiny_llama(torch.tensor([ids]), taps=taps)[0, -1].argmax()))
    assert ids[len(prompt) :] == cached
    plain = [step[0] for step in generate(tiny_llama, [prompt], SamplingSettings(12, temperature=0))]
    assert plain != cached
