"""The compiled step of generation against the model in PyTorch."""

import threading
from typing import Any

import pytest
import torch

from monosemy.llm import decode, llama
from monosemy.llm.llama import Llama, LlamaConfig, random_llama
from monosemy.llm.sites import POINTS, Site, Taps

OPTIONS = {"attention_bias": True, "mlp_bias": True, "sliding_window": 5, "tied_embeddings": False}


def model_of(dtype: torch.dtype = torch.float32, **changes: Any) -> Llama:
    shape = {
        "d_model": 40, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "head_dim": 10, "d_mlp": 52, "vocabulary": 77,
        "context_length": 64, "rope_theta": 1e4, "norm_epsilon": 1e-5, "tied_embeddings": True,
    }  # fmt: skip
    return random_llama(LlamaConfig(**(shape | changes))).to(dtype)


def steps(model: Llama, ids: torch.Tensor, mask: torch.Tensor | None = None, taps: Taps | None = None) -> torch.Tensor:
    """Logits of all positions: the first six in one pass, then one at a time."""
    with torch.inference_mode():
        cache, parts = model.make_cache(len(ids), ids.shape[1]), []
        for start, stop in [(0, 6), *((at, at + 1) for at in range(6, ids.shape[1]))]:
            part = None if mask is None else mask[:, start:stop]
            parts.append(model(ids[:, start:stop], mask=part, cache=cache, taps=taps))
        return torch.cat(parts, dim=1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every compiled loop that was entered: a test of them must not pass by PyTorch alone."""
    entered, call = [], decode.call
    monkeypatch.setattr(decode, "call", lambda threads, loop, *rest: (entered.append(loop), call(threads, loop, *rest)))
    return entered


@pytest.mark.parametrize("texts", [1, 3, 4, 9])
@pytest.mark.parametrize("changes", [{}, OPTIONS])
def test_logits_are_those_of_one_pass(texts: int, changes: dict[str, Any], calls: list[object]):
    model, ids = model_of(**changes), torch.randint(0, 77, (texts, 20))
    with torch.inference_mode():
        torch.testing.assert_close(steps(model, ids), model(ids), atol=1e-5, rtol=1e-5)
    assert decode.run_layers_loop in calls
    assert decode.unembed_loop in calls


def test_padding_on_the_left(calls: list[object]):
    model, ids, mask = model_of(), torch.randint(0, 77, (3, 20)), torch.ones(3, 20, dtype=torch.bool)
    mask[1, :4] = False
    mask[2, :9] = False  # even the first single steps are padding
    logits = steps(model, ids, mask)
    assert logits.isfinite().all()
    with torch.inference_mode():
        for row, padding in enumerate((0, 4, 9)):
            torch.testing.assert_close(
                logits[row, padding:], model(ids[row : row + 1, padding:])[0], atol=1e-5, rtol=1e-5
            )
    assert calls


def test_texts_that_end_leave_the_cache(calls: list[object]):
    model, ids = model_of(), torch.randint(0, 77, (4, 20))
    with torch.inference_mode():
        cache = model.make_cache(4, 20)
        model(ids[:, :8], cache=cache)
        cache.select(torch.tensor([0, 2, 3]))
        model(ids[[0, 2, 3], 8:9], cache=cache)
        cache.select(torch.tensor([1]))
        logits = torch.cat([model(ids[2:3, at : at + 1], cache=cache) for at in range(9, 20)], dim=1)
        torch.testing.assert_close(logits, model(ids[2:3])[:, 9:], atol=1e-5, rtol=1e-5)
    assert calls


def test_bfloat16_is_no_further_from_float32_than_pytorch(calls: list[object], monkeypatch: pytest.MonkeyPatch):
    model, ids = model_of(torch.bfloat16), torch.randint(0, 77, (4, 40))
    with torch.inference_mode():
        exact = model_of().to(torch.bfloat16).float()(ids)
    ours = steps(model, ids)
    assert calls
    monkeypatch.setattr(llama, "MOST_DECODED", 0)
    theirs = steps(model, ids)
    assert (ours - exact).norm() < 1.05 * (theirs - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(threads: int, monkeypatch: pytest.MonkeyPatch):
    model, ids = model_of(), torch.randint(0, 77, (3, 12))
    monkeypatch.setattr(decode, "thread_count", lambda: 3)
    expected = steps(model, ids)
    monkeypatch.setattr(decode, "thread_count", lambda: threads)
    assert torch.equal(steps(model, ids), expected)


@pytest.mark.parametrize("point", POINTS)
def test_sites_are_read_and_edited_in_between(point: str, calls: list[object]):
    model, ids, site = model_of(), torch.randint(0, 77, (2, 12)), Site(1, point)
    taps = Taps(reads={site}, edits={site: lambda hidden, mask: hidden + 0.3})
    logits = steps(model, ids, taps=taps)
    last = taps.values[site]
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(ids, taps=taps), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, taps.values[site][:, -1:], atol=1e-5, rtol=1e-5)
    assert calls.count(decode.run_layers_loop) == 2 * 6  # layers 0 and 2 of six single steps


def test_callers_side_by_side_do_not_wait_for_each_other_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decode, "thread_count", lambda: 12)
    model, ids = model_of(), torch.randint(0, 77, (1, 30))
    expected, found = steps(model, ids), []
    callers = [threading.Thread(target=lambda: found.append(steps(model, ids))) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert len(found) == 6
    assert all(torch.equal(logits, expected) for logits in found)


def test_gradients_are_pytorch_s_business(calls: list[object]):
    model, hidden = model_of(), torch.randn(1, 1, 40, requires_grad=True)
    model.unembed(hidden).logsumexp(-1).sum().backward()
    assert not calls
    assert hidden.grad is not None
    assert hidden.grad.any()
