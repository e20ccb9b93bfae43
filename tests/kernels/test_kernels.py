"""The compiled kernels against the reference: every output, every gradient by way of Adam's state, every parameter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monosemy.kernels import Moments, Parameters, StepSettings, cpu, reference
from monosemy.kernels.types import TopK


def make_parameters(n_latents: int, width: int, seed: int) -> Parameters:
    random = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(n_latents, width, generator=random), dim=1)
    return Parameters(
        W_enc=directions * 0.5 + 0.01 * torch.randn(n_latents, width, generator=random),
        b_enc=0.05 * torch.randn(n_latents, generator=random),
        W_dec=directions,
        b_pre=0.1 * torch.randn(width, generator=random),
    )


def dense(code: TopK, n_latents: int) -> torch.Tensor:
    return torch.zeros(len(code.values), n_latents).scatter_add_(1, code.indices.long(), code.values)


sizes = st.tuples(
    st.integers(1, 70),  # rows
    st.integers(1, 50),  # width
    st.integers(1, 90),  # latents
    st.floats(0, 1),  # k as a share of the latents
    st.integers(0, 1000),  # seed
)


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_encode_topk_equals_reference(size):
    rows, width, n_latents, share, seed = size
    k = max(1, round(share * n_latents))
    parameters = make_parameters(n_latents, width, seed)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + 1))
    arguments = (x, parameters.W_enc, parameters.b_enc, parameters.b_pre, k)
    ours, theirs = cpu.encode_topk(*arguments), reference.encode_topk(*arguments)
    torch.testing.assert_close(dense(ours, n_latents), dense(theirs, n_latents), atol=1e-5, rtol=1e-5)


@given(sizes)
@settings(max_examples=30, deadline=None)
def test_decode_equals_reference(size):
    rows, width, n_latents, share, seed = size
    k = max(1, round(share * n_latents))
    random = torch.Generator().manual_seed(seed)
    parameters = make_parameters(n_latents, width, seed)
    indices = torch.randint(n_latents, (rows, k), generator=random).int()
    code = TopK(torch.rand(rows, k, generator=random), indices)
    ours = cpu.decode(code, parameters.W_dec, parameters.b_pre)
    torch.testing.assert_close(ours, reference.decode(code, parameters.W_dec, parameters.b_pre), atol=1e-4, rtol=1e-4)


def test_all_negative_rows_have_an_empty_code():
    parameters = make_parameters(40, 16, 0)
    x = torch.randn(5, 16)
    code = cpu.encode_topk(x, parameters.W_enc, parameters.b_enc - 100, parameters.b_pre, 4)
    assert (code.values == 0).all()
    assert (code.indices == 0).all()
    torch.testing.assert_close(cpu.decode(code, parameters.W_dec, parameters.b_pre), parameters.b_pre.expand(5, -1))


def test_ties_go_to_the_lowest_latents():
    W_enc = torch.ones(50, 8)
    code = cpu.encode_topk(torch.ones(3, 8), W_enc, torch.zeros(50), torch.zeros(8), 6)
    assert code.indices.tolist() == [list(range(6))] * 3


def test_bfloat16_selection_keeps_nearly_the_largest():
    """Selecting by a bfloat16 product may swap latents of almost equal activation, never clearly different ones."""
    parameters = make_parameters(3000, 64, 0)
    x = torch.randn(200, 64)
    arguments = (x, parameters.W_enc, parameters.b_enc, parameters.b_pre, 16)
    exact, rounded = reference.encode_topk(*arguments), cpu.encode_topk(*arguments, dtype=torch.bfloat16)
    kth = exact.values.min(dim=1).values
    assert (rounded.values.min(dim=1).values > kth - 0.02 * exact.values.max(dim=1).values).all()
    chosen = reference.encode_topk(x, parameters.W_enc, parameters.b_enc, parameters.b_pre, 3000)
    everything = dense(chosen, 3000)
    torch.testing.assert_close(rounded.values, everything.gather(1, rounded.indices.long()), atol=1e-5, rtol=1e-5)


def exact_selection(monkeypatch) -> None:
    """Let the compiled step select in float32, so that it must agree with the reference to rounding."""
    encode = cpu._encode
    monkeypatch.setattr(cpu, "_encode", lambda x, W_enc, _, *rest: encode(x, W_enc, W_enc, *rest))


@pytest.mark.parametrize(
    ("rows", "width", "n_latents", "k", "n_dead", "k_aux"),
    [
        (64, 48, 200, 5, 0, 20),
        (64, 48, 200, 5, 7, 20),  # fewer dead than k_aux
        (64, 48, 200, 5, 60, 20),  # more
        (33, 17, 51, 1, 10, 3),  # k = 1, width not a multiple of 16
        (20, 16, 30, 30, 5, 2),  # k = all latents
        (40, 24, 64, 4, 64, 8),  # every latent dead
        (40, 24, 64, 4, 10, 0),  # auxiliary loss off
    ],
)
def test_train_step_equals_reference(monkeypatch, rows, width, n_latents, k, n_dead, k_aux):
    exact_selection(monkeypatch)
    settings_ = StepSettings(k=k, k_aux=k_aux)
    ours, theirs = make_parameters(n_latents, width, 0), make_parameters(n_latents, width, 0)
    our_moments = Moments(ours.zeros_like(), ours.zeros_like())
    their_moments = Moments(theirs.zeros_like(), theirs.zeros_like())
    random = torch.Generator().manual_seed(3)
    workspace = cpu.Workspace()
    for step in range(1, 6):
        x = torch.randn(rows, width, generator=random)
        x[1] = x[0]  # duplicate rows
        dead = torch.zeros(n_latents, dtype=torch.bool)
        dead[torch.randperm(n_latents, generator=random)[:n_dead]] = True
        a = cpu.train_step(ours, our_moments, x, dead, settings_, 1e-3, step, workspace)
        b = reference.train_step(theirs, their_moments, x, dead, settings_, 1e-3, step)
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.fvu == pytest.approx(b.fvu, rel=1e-4)
        assert a.aux_loss == pytest.approx(b.aux_loss, rel=1e-4, abs=1e-9)
        assert a.l0 == pytest.approx(b.l0)
        assert torch.equal(a.fired, b.fired)
        for name, tolerance in (("first", 1e-5), ("second", 1e-5)):
            for ours_, theirs_ in zip(getattr(our_moments, name), getattr(their_moments, name), strict=True):
                scale = theirs_.abs().max().clamp(min=1e-30)
                torch.testing.assert_close(ours_ / scale, theirs_ / scale, atol=10 * tolerance, rtol=0)
        for ours_, theirs_ in zip(ours, theirs, strict=True):
            # Where a gradient is nothing but rounding, Adam's step has an arbitrary sign: hence half a step of slack.
            torch.testing.assert_close(ours_, theirs_, atol=5e-4, rtol=0)
            assert (ours_ - theirs_).abs().mean() < 1e-6


def test_bfloat16_copy_is_torchs_rounding():
    parameters = make_parameters(60, 24, 0)
    moments = Moments(parameters.zeros_like(), parameters.zeros_like())
    workspace = cpu.Workspace()
    dead = torch.zeros(60, dtype=torch.bool)
    cpu.train_step(parameters, moments, torch.randn(32, 24), dead, StepSettings(4, 0), 1e-2, 1, workspace)
    assert workspace.W_enc_bfloat16 is not None
    assert torch.equal(workspace.W_enc_bfloat16, parameters.W_enc.bfloat16())


def test_decoder_rows_keep_unit_norm():
    parameters = make_parameters(60, 24, 0)
    moments = Moments(parameters.zeros_like(), parameters.zeros_like())
    dead = torch.zeros(60, dtype=torch.bool)
    for step in range(1, 20):
        cpu.train_step(parameters, moments, torch.randn(32, 24), dead, StepSettings(4, 0), 1e-2, step)
    torch.testing.assert_close(parameters.W_dec.norm(dim=1), torch.ones(60))


@pytest.mark.parametrize("train_step", [reference.train_step, cpu.train_step], ids=["reference", "cpu"])
def test_auxiliary_loss_reaches_encoder_and_decoder_of_dead_latents(train_step):
    """And of nobody else: the residual is held constant. (A peer's encoder gradient is 0 here.)"""
    parameters = make_parameters(80, 24, 0)
    parameters.b_enc[:10] = -0.5  # too low to be chosen, yet positive on some rows
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(1))
    dead = torch.zeros(80, dtype=torch.bool)
    dead[:10] = True
    fired = set(
        reference.encode_topk(x, parameters.W_enc, parameters.b_enc, parameters.b_pre, 3).indices.flatten().tolist()
    )
    silent = [latent for latent in range(10) if latent not in fired]
    assert silent
    moments = Moments(parameters.zeros_like(), parameters.zeros_like())
    train_step(parameters, moments, x, dead, StepSettings(3, 4), 1e-3, 1)
    for gradient in (moments.first.W_enc, moments.first.W_dec):
        assert (gradient[silent].abs().max(dim=1).values > 0).all()
    assert (moments.first.b_enc[silent] != 0).all()


def test_both_paths_train_alike():
    """200 steps of the compiled path, selecting in bfloat16, against the reference: losses within 1%."""
    random = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(100, 32, generator=random), dim=1)
    losses = []
    for train_step in (cpu.train_step, reference.train_step):
        parameters = make_parameters(120, 32, 1)
        moments = Moments(parameters.zeros_like(), parameters.zeros_like())
        data = torch.Generator().manual_seed(5)
        dead = torch.zeros(120, dtype=torch.bool)
        own = []
        for step in range(1, 201):
            strength = torch.rand(128, 100, generator=data) * (torch.rand(128, 100, generator=data) < 0.04)
            result = train_step(parameters, moments, strength @ truth, dead, StepSettings(6, 0), 2e-3, step)
            own.append(result.loss)
        losses.append(sum(own[-20:]) / 20)
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0] < 0.5 * (strength @ truth).square().mean().item()
