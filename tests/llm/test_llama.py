"""Our forward against `transformers`, with and without cache and padding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from monosemy.llm.llama import Llama, LlamaConfig, random_llama
from monosemy.runtime import InputError

pytest_plugins = ["llm_references"]

IDS = torch.randint(0, 49152, (3, 40), generator=torch.Generator().manual_seed(1))


def test_logits_of_smollm2_equal_transformers(smollm2: Llama, transformers_smollm2: Any, speeches: list[str]):
    ids = torch.tensor([smollm2.tokenizer.encode(speeches[-1])[:512]])
    with torch.inference_mode():
        ours, theirs = smollm2(ids), transformers_smollm2(ids).logits
    assert ours.dtype == torch.float32
    assert ours.shape == (1, 512, 49152)
    assert (ours - theirs).abs().max() < 1e-3


def test_logits_of_an_odd_shape_equal_transformers(load_llama: Callable[..., Llama], odd_folder: Path):
    from transformers import AutoModelForCausalLM

    ours, theirs = load_llama(odd_folder), AutoModelForCausalLM.from_pretrained(odd_folder)
    assert ours.config.head_dim == 10
    assert ours.config.rope_divisors is not None
    with torch.inference_mode():
        expected = theirs(IDS).logits
        torch.testing.assert_close(ours(IDS), expected, atol=1e-4, rtol=1e-4)
        assert expected.std() > 0.5


def test_bfloat16_is_as_close_to_float32_as_transformers_is(load_llama: Callable[..., Llama], odd_folder: Path):
    from transformers import AutoModelForCausalLM

    ours = load_llama(odd_folder, torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(odd_folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        exact = load_llama(odd_folder)(IDS)
        our_error, their_error = (ours(IDS) - exact).norm(), (theirs(IDS).logits.float() - exact).norm()
    assert ours.dtype == torch.bfloat16
    assert our_error < 1.2 * their_error < 0.1 * exact.norm()


def test_cache_gives_what_one_pass_gives(tiny_llama: Llama):
    cache = tiny_llama.make_cache(batch=3, capacity=40)
    parts = [tiny_llama(part, cache=cache) for part in IDS.split((20, 1, 1, 18), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), tiny_llama(IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_left_padding_changes_nothing(tiny_llama: Llama, cached: bool):
    lengths = (40, 17, 1)
    ids, mask = IDS.clone(), torch.zeros(3, 40, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, 40 - length :] = True
    if cached:
        cache = tiny_llama.make_cache(batch=3, capacity=40)
        parts = [tiny_llama(ids[:, a:b], mask=mask[:, a:b], cache=cache) for a, b in ((0, 25), (25, 39), (39, 40))]
        logits = torch.cat(parts, dim=1)
    else:
        logits = tiny_llama(ids, mask=mask)
    for row, length in enumerate(lengths):
        alone = tiny_llama(ids[row : row + 1, 40 - length :])
        torch.testing.assert_close(logits[row : row + 1, 40 - length :], alone, atol=1e-5, rtol=1e-5)


def test_right_padding_needs_no_mask(tiny_llama: Llama):
    torch.testing.assert_close(tiny_llama(IDS)[:, :15], tiny_llama(IDS[:, :15]), atol=1e-5, rtol=1e-5)


def windowed(window: int | None) -> Llama:
    return random_llama(shape(n_layers=2, vocabulary=64, sliding_window=window, attention_bias=True, mlp_bias=True))


@pytest.mark.parametrize("window", [None, 1, 4, 11])
@pytest.mark.parametrize("lengths", [(5, 12, 1, 7), (6, 6, 6), (25,)])
def test_packed_texts_give_what_each_gives_alone(window: int | None, lengths: tuple[int, ...]):
    model, ids = windowed(window), torch.randint(0, 64, (1, sum(lengths)))
    packed = model(ids, lengths=torch.tensor(lengths))
    alone = torch.cat([model(text) for text in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 4, 39])
def test_cache_and_padding_under_a_sliding_window(window: int):
    model, ids = windowed(window), torch.randint(0, 64, (2, 40))
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :9] = False
    cache = model.make_cache(batch=2, capacity=40)
    parts = [model(ids[:, a:b], mask=mask[:, a:b], cache=cache) for a, b in ((0, 25), (25, 39), (39, 40))]
    cached = torch.cat(parts, dim=1)
    torch.testing.assert_close(cached[:1], model(ids[:1]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cached[1:, 9:], model(ids[1:, 9:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(5, 5), (12, 0), (-1, 13), ()])
def test_lengths_that_are_not_the_rows(lengths: tuple[int, ...]):
    with pytest.raises(InputError, match=r"the lengths of packed texts sum to \d+ and the input has shape \(1, 12\)"):
        windowed(None)(torch.zeros(1, 12, dtype=torch.long), lengths=torch.tensor(lengths, dtype=torch.long))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[1, 64]]), "the ids run from 1 to 64; tokens are 0 to 63"),
        (torch.tensor([[-1]]), "the ids run from -1 to -1"),
        (torch.zeros(1, 0, dtype=torch.long), r"the ids have shape \(1, 0\); expected \(text, position\)"),
    ],
)
def test_ids_that_are_none(ids: torch.Tensor, message: str):
    with pytest.raises(InputError, match=message):
        windowed(None)(ids)


def test_packed_rows_take_no_mask():
    with pytest.raises(InputError, match="a packed row takes neither mask nor cache"):
        windowed(None)(torch.ones(1, 3, dtype=torch.long), lengths=torch.tensor([3]), mask=torch.ones(1, 3).bool())


def test_layers_run_in_parts(tiny_llama: Llama):
    hidden = tiny_llama.run_layers(tiny_llama.embed(IDS), end=1)
    logits = tiny_llama.unembed(tiny_llama.run_layers(hidden, start=1))
    assert torch.equal(logits, tiny_llama(IDS))


def test_gradients_reach_an_input_and_the_weights(load_llama: Callable[..., Llama], tiny_llama_folder: Path):
    model = load_llama(tiny_llama_folder)
    with torch.inference_mode():
        model(IDS)  # what it keeps for later must not be inference tensors
    hidden = model.embed(IDS).requires_grad_()
    model.requires_grad_(True)
    model.unembed(model.run_layers(hidden)).logsumexp(-1).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


def test_positions_beyond_the_first_table(tiny_llama: Llama):
    ids = IDS.reshape(1, -1).repeat(1, 3)  # 360 positions; the table starts with 256
    cache = tiny_llama.make_cache(batch=1, capacity=360)
    parts = [tiny_llama(part, cache=cache) for part in ids.split(90, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), tiny_llama(ids), atol=1e-5, rtol=1e-5)


def test_named_weights_are_the_model_itself(load_llama: Callable[..., Llama], tiny_llama_folder: Path):
    model = load_llama(tiny_llama_folder)
    before = model(IDS)
    model.named_weights()["model.layers.1.self_attn.v_proj.weight"].zero_()
    assert not torch.equal(model(IDS), before)


def test_full_cache(tiny_llama: Llama):
    with pytest.raises(InputError, match="40 tokens do not fit in a cache of 39"):
        tiny_llama(IDS, cache=tiny_llama.make_cache(batch=3, capacity=39))


def shape(**changes: Any) -> LlamaConfig:
    settings = {"d_model": 8, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "head_dim": 4, "d_mlp": 8}
    rest = {"vocabulary": 16, "context_length": 8, "rope_theta": 1e4, "norm_epsilon": 1e-5, "tied_embeddings": True}
    return LlamaConfig(**{**settings, **rest, **changes})


def test_random_llama():
    logits = random_llama(shape(), seed=3)(torch.tensor([[1, 2, 3]]))
    assert torch.equal(logits, random_llama(shape(), seed=3)(torch.tensor([[1, 2, 3]])))
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 0}, "n_layers is 0; expected at least 1"),
        ({"n_kv_heads": 3}, "4 query heads cannot share 3 key-value heads"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"rope_divisors": (1.0,)}, "1 rotary divisors; expected head_dim / 2 = 2"),
    ],
)
def test_impossible_shapes(changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        shape(**changes)
