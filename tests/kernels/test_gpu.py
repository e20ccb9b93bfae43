"""The GPU's kernels against the reference. Where there is no GPU, Triton's interpreter runs them, on small sizes."""

import importlib.util
import os
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_kernels import Case, assert_same_state, dense, make_parameters, no_moments

from monosemy.kernels import Moments, Parameters, StepResult, reference, step
from monosemy.kernels.types import TopK

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
INTERPRETED = {} if HAS_GPU else {"TRITON_INTERPRET": "1"}
"""What Triton must find in the environment when it is imported, when kernels are defined, and when they run."""
with patch.dict(os.environ, INTERPRETED):
    gpu: Any = importlib.import_module("monosemy.kernels.gpu")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Where there is no GPU, interpret, and let small products have more than one tile."""
    for name, value in INTERPRETED.items():
        monkeypatch.setenv(name, value)
        monkeypatch.setattr(gpu, "TILES", {precision: gpu.Tile(16, 32, 16, 1, 1) for precision in gpu.TILES})


def on_device(parameters: Parameters) -> Parameters:
    return parameters.map(lambda tensor: tensor.to(DEVICE))


def inputs(rows: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def spread(code: TopK, n_latents: int) -> torch.Tensor:
    return dense(TopK(code.values.cpu(), code.indices.cpu()), n_latents)


def assert_same_code(ours: TopK, theirs: TopK, n_latents: int) -> None:
    torch.testing.assert_close(spread(ours, n_latents), spread(theirs, n_latents), atol=1e-5, rtol=1e-5)
    used = ours.values > 0
    assert (ours.values[~used] == 0).all()
    assert (ours.indices[~used] == 0).all()
    both = used[:, 1:] & used[:, :-1]
    assert (ours.indices.diff(dim=1)[both] > 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Encode and decode
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "width", "n_latents", "k", "with_norms"),
    [(1, 1, 1, 1, False), (20, 17, 300, 1, True), (18, 33, 130, 9, False), (5, 16, 31, 31, True)],
)
def test_encode_topk_equals_reference(rows: int, width: int, n_latents: int, k: int, with_norms: bool):
    parameters = on_device(make_parameters(n_latents, width, 0))
    norms = 0.5 + torch.rand(n_latents, generator=torch.Generator().manual_seed(2)).to(DEVICE) if with_norms else None
    arguments = (inputs(rows, width), parameters.W_enc, parameters.b_enc, k, norms)
    assert_same_code(gpu.encode_topk(*arguments), reference.encode_topk(*arguments), n_latents)


def test_a_batch_may_be_encoded_in_parts(monkeypatch):
    parameters = on_device(make_parameters(70, 16, 0))
    arguments = (inputs(9, 16), parameters.W_enc, parameters.b_enc, 2)
    whole = gpu.encode_topk(*arguments)
    monkeypatch.setattr(gpu, "BUFFER", 70 * 5)
    for part, same in zip(gpu.encode_topk(*arguments), whole, strict=True):
        assert torch.equal(part, same)


def test_a_copy_that_is_not_exact_only_chooses_candidates():
    parameters = on_device(make_parameters(90, 24, 0))
    arguments = (inputs(12, 24), parameters.W_enc, parameters.b_enc, 4)
    workspace = gpu.Workspace("float32")
    workspace.refresh(parameters.W_enc.bfloat16().float())
    assert_same_code(gpu.encode_topk(*arguments, None, workspace), reference.encode_topk(*arguments), 90)
    workspace.refresh(-parameters.W_enc)
    opposite = spread(gpu.encode_topk(*arguments, None, workspace), 90)
    assert (opposite * spread(reference.encode_topk(*arguments), 90) == 0).all()


@pytest.mark.parametrize("n_latents", [50, 400], ids=["all are candidates", "more than there is room for"])
def test_ties_go_to_the_lowest_latents(n_latents: int):
    assert gpu.sampling(1 + gpu.MARGIN, 400)[1] < 400
    ones = torch.ones(n_latents, 8, device=DEVICE)
    code = gpu.encode_topk(ones[:3], ones, ones.new_zeros(n_latents), 2)
    assert code.indices.tolist() == [[0, 1]] * 3


def test_only_rows_with_too_many_candidates_are_done_again(monkeypatch):
    """A row that the latents outside the sample like."""
    again, densely = [], gpu._encode_densely
    monkeypatch.setattr(gpu, "_encode_densely", lambda rows, *rest: again.append(len(rows)) or densely(rows, *rest))
    W_enc = torch.randn(400, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x = inputs(20, 16)
    W_enc[:, 0], x[:, 0] = 0.0, 0.0
    W_enc[torch.arange(400) % gpu.STRIDE > 0, 0] = 1.0
    x[[3, 11], 0] = 30.0
    arguments = (x, W_enc, torch.zeros(400, device=DEVICE), 1)
    assert_same_code(gpu.encode_topk(*arguments), reference.encode_topk(*arguments), 400)
    assert again == [2]


@pytest.mark.parametrize("k", [0, 40], ids=["none are wanted", "more are wanted than a program holds"])
def test_what_does_not_fit_a_program_is_encoded_densely(monkeypatch, k: int):
    monkeypatch.setattr(gpu, "LONGEST", 64)
    parameters = on_device(make_parameters(100, 16, 0))
    arguments = (inputs(9, 16), parameters.W_enc, parameters.b_enc, k)
    assert_same_code(gpu.encode_topk(*arguments), reference.encode_topk(*arguments), 100)


def test_all_negative_rows_have_an_empty_code():
    parameters = on_device(make_parameters(40, 16, 0))
    code = gpu.encode_topk(inputs(5, 16), parameters.W_enc, parameters.b_enc - 100, 4)
    assert (code.values == 0).all()
    assert (code.indices == 0).all()
    reconstruction = gpu.decode(code, parameters.W_dec, parameters.b_pre)
    torch.testing.assert_close(reconstruction, parameters.b_pre.expand(5, -1))


@pytest.mark.parametrize(("rows", "width", "k"), [(1, 1, 1), (7, 150, 20)])
def test_decode_equals_reference(rows: int, width: int, k: int):
    parameters = on_device(make_parameters(30, width, 0))
    random = torch.Generator().manual_seed(1)
    code = TopK(torch.rand(rows, k, generator=random), torch.randint(30, (rows, k), generator=random).int())
    code = TopK(*(field.to(DEVICE) for field in code))
    ours, theirs = (which.decode(code, parameters.W_dec, parameters.b_pre) for which in (gpu, reference))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# A step
# ---------------------------------------------------------------------------------------------------------------------

STEPS = {
    "topk": {},
    "few dead": {"n_dead": 8},
    "many dead": {"n_dead": 14},
    "k = 1, odd width": {"rows": 17, "width": 17, "n_latents": 33, "k": 1, "n_dead": 5, "k_aux": 2},
    "k = all, more rows than are asked for at once": {"rows": 40, "width": 16, "n_latents": 9, "k": 9, "n_dead": 2},
    "all dead": {"n_dead": 22},
    "more columns than a program has": {"rows": 6, "width": 530, "n_latents": 12, "k": 3, "n_dead": 3},
    "batch_topk": {"n_dead": 14, "activation": "batch_topk"},
    "free": {"n_dead": 14, "decoder": "free"},
    "free, weight decay": {"n_dead": 8, "decoder": "free", "weight_decay": 0.1},
    "prefixes": {"n_dead": 14, "prefixes": (5, 17, 22)},
    "prefixes, batch_topk, free": {"prefixes": (1, 22), "activation": "batch_topk", "decoder": "free"},
    "transcoder": {"n_dead": 6, "width_out": 13},
    "transcoder, skip, prefixes, many dead": {"n_dead": 14, "width_out": 33, "skip": True, "prefixes": (10, 22)},
}


def small_case(rows=9, width=24, n_latents=22, k=3, k_aux=6, **kind) -> Case:
    return Case(rows, width, n_latents, k, k_aux=k_aux, **kind)


def trained(case: Case, n_steps: int, workspace) -> tuple[list[StepResult], Parameters, Moments]:
    """What steps report and where they lead, on the device; the reference's where `workspace` is None."""
    parameters = on_device(case.parameters())
    moments, reports = no_moments(parameters), []
    for number, x, dead, target in case.batches(n_steps):
        state = (parameters, moments, x.to(DEVICE), dead.to(DEVICE), case.settings, 1e-3, number)
        target = None if target is None else target.to(DEVICE)
        if workspace is None:
            reports.append(reference.train_step(*state, target))
        else:
            reports.append(step.train_step(gpu, *state, workspace, target))
    return reports, parameters, moments


def assert_trains_as_reference(case: Case, n_steps: int) -> None:
    reports, ours, our_moments = trained(case, n_steps, gpu.Workspace("float32"))
    expected, theirs, their_moments = trained(case, n_steps, None)
    assert_same_state(ours, our_moments, theirs, their_moments)
    for a, b in zip(reports, expected, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.fvu == pytest.approx(b.fvu, rel=1e-4)
        assert a.aux_loss == pytest.approx(b.aux_loss, rel=1e-4, abs=1e-9)
        assert a.l0 == pytest.approx(b.l0)
        assert torch.equal(a.counts, b.counts)


@pytest.mark.parametrize("kind", STEPS)
def test_step_equals_reference(kind: str, monkeypatch):
    monkeypatch.setattr(step, "FEW_DEAD", 10)
    assert_trains_as_reference(small_case(**STEPS[kind]), 2 if kind in ("few dead", "free, weight decay") else 1)


def test_a_step_without_an_active_latent_equals_the_reference(monkeypatch):
    parameters = Case.parameters
    monkeypatch.setattr(Case, "parameters", lambda case: (p := parameters(case))._replace(b_enc=p.b_enc - 100))
    assert_trains_as_reference(small_case(rows=4), 1)


@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=(pytest.mark.gpu, needs_gpu))])
def test_the_copy_that_selects_follows_the_weights(precision):
    """(The interpreter does not round to bfloat16, and multiplies bfloat16 as if they were integers.)"""
    workspace = gpu.Workspace(precision)
    _, parameters, _ = trained(small_case(rows=6, width=17, n_latents=20), 1, workspace)
    assert torch.equal(workspace.W_enc, gpu.padded(parameters.W_enc, getattr(torch, precision)))
    assert workspace.W_enc.shape == (20, 32)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", [{}, {"prefixes": (500, 20_000)}, {"decoder": "free"}, {"activation": "batch_topk"}])
@pytest.mark.parametrize("few_dead", [20_000, 0], ids=["dense", "sparse"])
def test_a_larger_step_equals_reference(kind: dict, few_dead: int, monkeypatch):
    monkeypatch.setattr(step, "FEW_DEAD", few_dead)
    assert_trains_as_reference(small_case(100, 768, 20_000, 32, 200, n_dead=600, **kind), 2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", [{}, {"prefixes": (500, 20_000), "activation": "batch_topk"}])
def test_two_runs_compute_the_same_bits(precision, kind: dict, monkeypatch):
    monkeypatch.setattr(step, "FEW_DEAD", 0)
    case = small_case(1500, 768, 20_000, 32, 200, n_dead=600, **kind)
    (a_reports, a, a_moments), (b_reports, b, b_moments) = (trained(case, 5, gpu.Workspace(precision)) for _ in "ab")
    assert [report.loss for report in a_reports] == [report.loss for report in b_reports]
    for mine, other in zip((a, *a_moments), (b, *b_moments), strict=True):
        for name, tensor in mine.named().items():
            assert torch.equal(tensor, other.named()[name]), name


@pytest.mark.gpu
@needs_gpu
def test_bfloat16_finds_nearly_the_largest_of_many():
    parameters = on_device(make_parameters(65_536, 3072, 0))
    arguments = (inputs(512, 3072), parameters.W_enc, parameters.b_enc, 64)
    exact, found = reference.encode_topk(*arguments), gpu.encode_topk(*arguments, None, gpu.Workspace())
    exact, found = (spread(code, 65_536) for code in (exact, found))
    both = (exact > 0) & (found > 0)
    assert both.sum() >= 0.999 * (exact > 0).sum()
    torch.testing.assert_close(found[both], exact[both], atol=1e-4, rtol=1e-4)
