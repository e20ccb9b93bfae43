"""The compiled kernels against the reference: every output, every gradient by way of Adam's state, every parameter."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monosemy import kernels
from monosemy.kernels import Moments, Parameters, StepSettings, cpu, reference, step
from monosemy.kernels.types import Entries, TopK
from monosemy.runtime import InputError


def make_parameters(n_latents: int, width: int, seed: int, width_out: int | None = None, skip=False) -> Parameters:
    random = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(n_latents, width_out or width, generator=random), dim=1)
    is_transcoder = width_out is not None
    return Parameters(
        W_enc=torch.randn(n_latents, width, generator=random) * 0.5 / width**0.5,
        b_enc=0.05 * torch.randn(n_latents, generator=random),
        W_dec=directions,
        b_pre=0.1 * torch.randn(width, generator=random),
        b_dec=0.1 * torch.randn(width_out or width, generator=random) if is_transcoder else None,
        W_skip=0.1 * torch.randn(width_out or width, width, generator=random) if skip else None,
    )


def no_moments(parameters: Parameters) -> Moments:
    return Moments(parameters.zeros_like(), parameters.zeros_like())


def dense(code: TopK, n_latents: int) -> torch.Tensor:
    return torch.zeros(len(code.values), n_latents).scatter_add_(1, code.indices.long(), code.values)


# ---------------------------------------------------------------------------------------------------------------------
# Encode
# ---------------------------------------------------------------------------------------------------------------------

sizes = st.tuples(
    st.integers(1, 70),  # rows
    st.integers(1, 50),  # width
    st.integers(1, 90),  # latents
    st.floats(0, 1),  # k as a share of the latents
    st.integers(0, 1000),  # seed
)


@given(sizes, st.booleans())
@settings(max_examples=60, deadline=None)
def test_encode_topk_equals_reference(size, with_norms):
    rows, width, n_latents, share, seed = size
    k = max(1, round(share * n_latents))
    parameters = make_parameters(n_latents, width, seed)
    random = torch.Generator().manual_seed(seed + 1)
    norms = 0.5 + torch.rand(n_latents, generator=random) if with_norms else None
    arguments = (torch.randn(rows, width, generator=random), parameters.W_enc, parameters.b_enc, k, norms)
    ours, theirs = cpu.encode_topk(*arguments), reference.encode_topk(*arguments)
    torch.testing.assert_close(dense(ours, n_latents), dense(theirs, n_latents), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_latents", [511, 512, 513, 1023, 1024, 1025, 2047, 4097])
def test_selection_around_the_sizes_of_blocks(n_latents: int):
    random = torch.Generator().manual_seed(n_latents)
    x, W_enc = torch.randn(20, 24, generator=random), torch.randn(n_latents, 24, generator=random)
    code = cpu.encode_topk(x, W_enc, torch.zeros(n_latents), 40)
    largest = (x @ W_enc.T).topk(40).values.relu()
    torch.testing.assert_close(code.values.sort(descending=True).values, largest, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("precision", ["int8", "bfloat16", "float32"])
def test_no_precision_of_the_product_misses_the_largest(precision):
    """It only chooses candidates: their values, and the choice among them, are float32."""
    parameters = make_parameters(3000, 64, 0)
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(1))
    arguments = (x, parameters.W_enc, parameters.b_enc, 16)
    exact = reference.encode_topk(*arguments)
    found = cpu.encode_topk(*arguments, None, cpu.Workspace(precision))
    both = (dense(exact, 3000) > 0) & (dense(found, 3000) > 0)
    assert both.sum() >= 0.999 * (exact.values > 0).sum()
    torch.testing.assert_close(dense(found, 3000)[both], dense(exact, 3000)[both], atol=1e-5, rtol=1e-5)


def test_all_negative_rows_have_an_empty_code():
    parameters = make_parameters(40, 16, 0)
    for workspace in (None, cpu.Workspace("int8")):
        code = cpu.encode_topk(torch.randn(5, 16), parameters.W_enc, parameters.b_enc - 100, 4, None, workspace)
        assert (code.values == 0).all()
        assert (code.indices == 0).all()
        reconstruction = cpu.decode(code, parameters.W_dec, parameters.b_pre)
        torch.testing.assert_close(reconstruction, parameters.b_pre.expand(5, -1))


@pytest.mark.parametrize("precision", ["int8", "bfloat16", "float32"])
def test_ties_go_to_the_lowest_latents(precision):
    code = cpu.encode_topk(torch.ones(3, 8), torch.ones(50, 8), torch.zeros(50), 6, None, cpu.Workspace(precision))
    assert code.indices.tolist() == [list(range(6))] * 3


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


# ---------------------------------------------------------------------------------------------------------------------
# A step
# ---------------------------------------------------------------------------------------------------------------------

STEPS = {
    "topk": {},
    "few dead": {"n_dead": 7},
    "more dead than k_aux": {"n_dead": 28},
    "many dead": {"n_dead": 60},
    "k = 1, odd width": {"rows": 33, "width": 17, "n_latents": 51, "k": 1, "n_dead": 10, "k_aux": 3},
    "k = all": {"rows": 20, "width": 16, "n_latents": 30, "k": 30, "n_dead": 5, "k_aux": 2},
    "all dead": {"rows": 40, "width": 24, "n_latents": 64, "k": 4, "n_dead": 64, "k_aux": 8},
    "no auxiliary loss": {"n_dead": 10, "k_aux": 0},
    "two equal rows": {"rows": 2, "n_dead": 3},
    "batch_topk": {"n_dead": 7, "activation": "batch_topk"},
    "free": {"n_dead": 60, "decoder": "free"},
    "free, weight decay": {"n_dead": 25, "k_aux": 10, "decoder": "free", "weight_decay": 0.1},
    "prefixes": {"n_dead": 60, "prefixes": (20, 77, 200)},
    "prefixes, batch_topk": {"n_dead": 6, "prefixes": (20, 77, 200), "activation": "batch_topk"},
    "prefixes, batch_topk, free": {"prefixes": (1, 200), "activation": "batch_topk", "decoder": "free"},
    "transcoder": {"n_dead": 6, "width_out": 32},
    "transcoder, as wide": {"n_dead": 6, "width_out": 48},
    "transcoder, skip, prefixes, many dead": {"n_dead": 60, "width_out": 32, "skip": True, "prefixes": (10, 200)},
}


class Case:
    """The same start, batches and dead latents for both ways of doing a step."""

    def __init__(
        self, rows=64, width=48, n_latents=200, k=5, n_dead=0, k_aux=20, width_out=None, skip=False, dead_from=0, **kind
    ):
        self.dead_from = dead_from
        self.settings = StepSettings(k=k, k_aux=k_aux, **kind)
        self.rows, self.width, self.width_out, self.n_latents, self.n_dead = rows, width, width_out, n_latents, n_dead
        self.skip = skip

    def parameters(self) -> Parameters:
        return make_parameters(self.n_latents, self.width, 0, self.width_out, self.skip)

    def batches(self, n: int):
        """(step, x, dead, target)"""
        random = torch.Generator().manual_seed(3)
        for number in range(1, n + 1):
            x = torch.randn(self.rows, self.width, generator=random)
            x[1] = x[0]  # duplicate rows
            dead = torch.zeros(self.n_latents, dtype=torch.bool)
            places = torch.randperm(self.n_latents - self.dead_from, generator=random)[: self.n_dead]
            dead[self.dead_from + places] = True
            target = None if self.width_out is None else torch.randn(self.rows, self.width_out, generator=random)
            yield number, x, dead, target


def assert_same_state(ours: Parameters, our_moments: Moments, theirs: Parameters, their_moments: Moments) -> None:
    for mine, other in zip((*our_moments, ours), (*their_moments, theirs), strict=True):
        assert mine.named().keys() == other.named().keys()
    for which in range(2):
        for name, expected in their_moments[which].named().items():
            scale = expected.abs().max().clamp(min=1e-30)
            found = getattr(our_moments[which], name)
            torch.testing.assert_close(found / scale, expected / scale, atol=1e-4, rtol=0)
    for name, expected in theirs.named().items():
        # Where a gradient is nothing but rounding, Adam's step has an arbitrary sign: hence half a step of slack.
        torch.testing.assert_close(getattr(ours, name), expected, atol=5e-4, rtol=0)
        assert (getattr(ours, name) - expected).abs().mean() < 1e-6


@pytest.mark.parametrize("kind", STEPS)
def test_step_equals_reference(kind: str, monkeypatch):
    monkeypatch.setattr(step, "FEW_DEAD", 30)
    case = Case(**STEPS[kind])
    ours, theirs = case.parameters(), case.parameters()
    our_moments, their_moments = no_moments(ours), no_moments(theirs)
    workspace = cpu.Workspace("float32")
    for number, x, dead, target in case.batches(5):
        a = kernels.train_step(
            ours, our_moments, x, dead, case.settings, 1e-3, number, workspace, target
        )  # fmt: skip
        b = reference.train_step(theirs, their_moments, x, dead, case.settings, 1e-3, number, target)
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.fvu == pytest.approx(b.fvu, rel=1e-4, nan_ok=True)  # equal rows have no variance
        assert a.aux_loss == pytest.approx(b.aux_loss, rel=1e-4, abs=1e-9)
        assert a.l0 == pytest.approx(b.l0)
        assert torch.equal(a.counts, b.counts)
        assert_same_state(ours, our_moments, theirs, their_moments)


variants = st.fixed_dictionaries(
    {
        "rows": st.integers(2, 40), "width": st.integers(1, 40), "n_latents": st.integers(2, 80),
        "k": st.integers(1, 80),
        "n_dead": st.integers(0, 80), "k_aux": st.integers(0, 30), "skip": st.booleans(),
        "width_out": st.none() | st.integers(1, 40), "activation": st.sampled_from(["topk", "batch_topk"]),
        "decoder": st.sampled_from(["unit", "free"]), "split": st.integers(0, 79),
    }
)  # fmt: skip


@given(variants)
@settings(max_examples=40, deadline=None)
def test_any_step_equals_reference(kind):
    split = kind.pop("split")
    kind["k"] = min(kind["k"], kind["n_latents"])
    kind["n_dead"] = min(kind["n_dead"], kind["n_latents"])
    kind["skip"] = kind["skip"] and kind["width_out"] is not None
    if 0 < split < kind["n_latents"]:
        kind["prefixes"] = (split, kind["n_latents"])
    case = Case(**kind)
    ours, theirs = case.parameters(), case.parameters()
    our_moments, their_moments = no_moments(ours), no_moments(theirs)
    [(number, x, dead, target)] = case.batches(1)
    x[1] = -x[0]
    arguments = (x, dead, case.settings, 1e-3, number)
    a = kernels.train_step(ours, our_moments, *arguments, cpu.Workspace("float32"), target)
    b = reference.train_step(theirs, their_moments, *arguments, target)
    assert torch.equal(a.counts, b.counts)
    assert a.loss == pytest.approx(b.loss, rel=1e-4)
    for which in range(2):
        for name, expected in their_moments[which].named().items():
            scale = expected.abs().max().clamp(min=1e-12)
            torch.testing.assert_close(getattr(our_moments[which], name) / scale, expected / scale, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", [{"activation": "relu", "l1": 0.3}, {"activation": "relu", "decoder": "free"}, {}])
def test_gradients_accumulated_over_parts_are_those_of_the_batch(kind: dict, monkeypatch):
    """The dense reference never holds more than a part of the activations."""
    case = Case(n_dead=9, **kind)
    results = []
    for elements in (1 << 24, 200 * 10):
        monkeypatch.setattr(reference, "ROWS_TIMES_LATENTS", elements)
        parameters = case.parameters()
        moments = no_moments(parameters)
        reports = [
            kernels.train_step(parameters, moments, x, dead, case.settings, 1e-3, number, None, target)
            if kind
            else reference.train_step(parameters, moments, x, dead, case.settings, 1e-3, number, target)
            for number, x, dead, target in case.batches(3)
        ]
        results.append((parameters, moments, reports))
    (a, a_moments, a_reports), (b, b_moments, b_reports) = results
    assert_same_state(a, a_moments, b, b_moments)
    for one, other in zip(a_reports, b_reports, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.fvu == pytest.approx(other.fvu, rel=1e-5)
        assert torch.equal(one.counts, other.counts)


def test_l1_makes_codes_sparser():
    def trained_l0(l1: float) -> float:
        case = Case(activation="relu", l1=l1)
        parameters = case.parameters()
        moments = no_moments(parameters)
        for number, x, dead, _ in case.batches(60):
            result = kernels.train_step(parameters, moments, x, dead, case.settings, 1e-2, number, None)
        return result.l0

    assert trained_l0(2.0) < 0.6 * trained_l0(0.0)


@pytest.mark.parametrize("precision", ["int8", "bfloat16", "float32"])
def test_the_copy_that_selects_follows_the_weights(precision):
    case = Case()
    parameters, workspace = case.parameters(), cpu.Workspace(precision)
    moments = no_moments(parameters)
    for number, x, dead, _ in case.batches(2):
        kernels.train_step(parameters, moments, x, dead, case.settings, 1e-2, number, workspace)
    fresh = cpu.Workspace(precision)
    fresh.refresh(parameters.W_enc)
    assert workspace.W_enc is not None
    assert fresh.W_enc is not None
    assert torch.equal(workspace.W_enc, fresh.W_enc)
    assert (workspace.scales == fresh.scales).all()
    if precision == "bfloat16":
        assert torch.equal(fresh.W_enc, parameters.W_enc.bfloat16())
    if precision == "int8":
        restored = fresh.W_enc * torch.from_numpy(fresh.scales)[:, None]
        step_size = parameters.W_enc.abs().max(dim=1, keepdim=True).values / 127
        assert ((restored - parameters.W_enc).abs() <= 0.501 * step_size).all()


@pytest.mark.parametrize("decoder", ["unit", "free"])
def test_decoder_rows_keep_unit_norm_unless_free(decoder):
    case = Case(decoder=decoder)
    parameters, workspace = case.parameters(), cpu.Workspace()
    moments = no_moments(parameters)
    for number, x, dead, _ in case.batches(20):
        kernels.train_step(parameters, moments, x, dead, case.settings, 1e-2, number, workspace)
    away = (parameters.W_dec.norm(dim=1) - 1).abs().max()
    assert away < 1e-5 if decoder == "unit" else away > 1e-2


@pytest.mark.parametrize("compiled", [False, True], ids=["reference", "cpu"])
@pytest.mark.parametrize("few", [100, 0], ids=["dense", "sparse"])
def test_auxiliary_loss_reaches_encoder_and_decoder_of_dead_latents(compiled, few, monkeypatch):
    """And of nobody else: the residual is held constant. (A peer's encoder gradient is 0 here.)"""
    monkeypatch.setattr(step, "FEW_DEAD", few)
    parameters = make_parameters(80, 24, 0)
    parameters.b_enc[:10] = -0.5  # too low to be chosen, yet positive on some rows
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(1))
    dead = torch.zeros(80, dtype=torch.bool)
    dead[:10] = True
    code = reference.encode_topk(x - parameters.b_pre, parameters.W_enc, parameters.b_enc, 3)
    silent = sorted(set(range(10)) - set(code.indices[code.values > 0].tolist()))
    assert silent
    moments = no_moments(parameters)
    arguments = (parameters, moments, x, dead, StepSettings(3, 4), 1e-3, 1)
    if compiled:
        kernels.train_step(*arguments, cpu.Workspace())
    else:
        reference.train_step(*arguments)
    for gradient in (moments.first.W_enc, moments.first.W_dec):
        assert (gradient[silent].abs().max(dim=1).values > 0).all()
    assert (moments.first.b_enc[silent] != 0).all()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "target"])
@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_rows_that_are_not_finite_are_refused_and_change_nothing(number: float, where: str, activation):
    parameters = make_parameters(40, 16, 0, 16)
    before, moments = parameters.map(torch.clone), no_moments(parameters)
    rows = {"x": torch.randn(8, 16), "target": torch.randn(8, 16)}
    rows[where][3, 2] = number
    dead = torch.zeros(40, dtype=torch.bool)
    with pytest.raises(InputError, match="1 of 8 rows hold NaN or infinity: capture them again"):
        kernels.train_step(
            parameters, moments, rows["x"], dead, StepSettings(4, 0, activation=activation), 1e-3, 1,
            cpu.Workspace(), rows["target"],
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True) if a is not None and b is not None)


def test_batch_topk_looks_at_more_candidates_where_one_row_has_most(monkeypatch):
    """One row holds nearly all of the batch's largest activations, many more than 4 k."""
    looks, encode = [], cpu.encode_topk
    monkeypatch.setattr(cpu, "encode_topk", lambda *args: looks.append(args[3]) or encode(*args))
    settings_ = StepSettings(2, 0, activation="batch_topk")
    parameters = make_parameters(300, 24, 0)
    x = torch.randn(100, 24, generator=torch.Generator().manual_seed(1))
    x[7] *= 1000
    ours, theirs = parameters.map(torch.clone), parameters
    dead = torch.zeros(300, dtype=torch.bool)
    a = kernels.train_step(ours, no_moments(ours), x, dead, settings_, 1e-3, 1, cpu.Workspace("float32"))
    b = reference.train_step(theirs, no_moments(theirs), x, dead, settings_, 1e-3, 1)
    assert looks == [8, 16, 32, 64, 128, 256]
    assert torch.equal(a.counts, b.counts)


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    states = []
    for threads in (1, 3):
        monkeypatch.setattr(cpu, "cpu_count", lambda threads=threads: threads)
        cpu._pool.cache_clear()
        case = Case(n_dead=20, prefixes=(20, 200))
        parameters, workspace = case.parameters(), cpu.Workspace()
        moments = no_moments(parameters)
        for number, x, dead, _ in case.batches(4):
            kernels.train_step(parameters, moments, x, dead, case.settings, 1e-2, number, workspace)
        states.append([tensor for whole in (parameters, *moments) for tensor in whole if tensor is not None])
    cpu._pool.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_both_paths_train_alike(precision):
    """200 steps of the compiled path, selecting in low precision, against the reference: losses within 1%."""
    random = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(100, 32, generator=random), dim=1)
    losses = []
    for compiled in (True, False):
        parameters, workspace = make_parameters(120, 32, 1), cpu.Workspace(precision)
        moments = no_moments(parameters)
        data = torch.Generator().manual_seed(5)
        dead = torch.zeros(120, dtype=torch.bool)
        own = []
        for number in range(1, 201):
            strength = torch.rand(128, 100, generator=data) * (torch.rand(128, 100, generator=data) < 0.04)
            arguments = (parameters, moments, strength @ truth, dead, StepSettings(6, 0), 2e-3, number)
            result = kernels.train_step(*arguments, workspace) if compiled else reference.train_step(*arguments)
            own.append(result.loss)
        losses.append(sum(own[-20:]) / 20)
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0] < 0.5 * (strength @ truth).square().mean().item()


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "free", "prefixes", "transcoder, as wide"])
def test_fvu_is_that_of_the_step(kind: str):
    case = Case(**(STEPS[kind] | {"n_dead": 0}))
    parameters, workspace = case.parameters(), cpu.Workspace("float32")
    [(number, x, dead, target)] = case.batches(1)
    before = kernels.fvu(parameters, x, case.settings, workspace, target)
    result = kernels.train_step(
        parameters, no_moments(parameters), x, dead, case.settings, 1e-3, number, workspace, target
    )  # fmt: skip
    assert before == pytest.approx(result.fvu, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Shards and replicas, as threads
# ---------------------------------------------------------------------------------------------------------------------


class Grid:
    """What ranks tell each other, for ranks that are threads of one process."""

    def __init__(self, n_replicas: int, n_shards: int) -> None:
        self.n_replicas, self.n_shards = n_replicas, n_shards
        self.barrier = threading.Barrier(n_replicas * n_shards, timeout=20)
        self.said: dict[tuple[int, int], torch.Tensor] = {}

    def everyone(self, replica: int, shard: int, tensor: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
        self.said[replica, shard] = tensor.clone()
        self.barrier.wait()
        heard = dict(self.said)
        self.barrier.wait()
        return heard


class ThreadExchange:
    def __init__(self, grid: Grid, replica: int, shard: int, first_latent: int) -> None:
        self.grid, self.replica, self.shard, self.first_latent = grid, replica, shard, first_latent

    def gather_shards(self, tensor):
        heard = self.grid.everyone(self.replica, self.shard, tensor)
        return [heard[self.replica, shard] for shard in range(self.grid.n_shards)]

    def gather_replicas(self, tensor):
        heard = self.grid.everyone(self.replica, self.shard, tensor)
        return [heard[replica, self.shard] for replica in range(self.grid.n_replicas)]

    def sum_shards(self, tensor):
        return torch.stack(self.gather_shards(tensor)).sum(dim=0)


STEPS["one shard without dead"] = {"n_dead": 60, "dead_from": 50}
SHARDED = [
    "topk",
    "one shard without dead",
    "few dead",
    "more dead than k_aux",
    "many dead",
    "batch_topk",
    "free",
    "prefixes, batch_topk",
]


@pytest.mark.parametrize("kind", [*SHARDED, "transcoder, skip, prefixes, many dead"])
def test_shards_and_replicas_compute_the_step_of_one_process(kind: str, monkeypatch):
    monkeypatch.setattr(step, "FEW_DEAD", 30)
    case, n_replicas, n_shards = Case(**STEPS[kind]), 2, 3
    bounds = [0, 50, 130, 200]
    whole, whole_moments = case.parameters(), no_moments(case.parameters())
    grid = Grid(n_replicas, n_shards)

    def cut(parameters: Parameters, shard: int) -> Parameters:
        rows = slice(bounds[shard], bounds[shard + 1])
        of = {
            name: part[rows].clone() for name, part in parameters.named().items() if name in ("W_enc", "b_enc", "W_dec")
        }
        return parameters.map(torch.clone)._replace(**of)

    states = {(r, s): cut(whole, s) for r in range(n_replicas) for s in range(n_shards)}
    moments = {place: no_moments(parameters) for place, parameters in states.items()}
    workspaces = {place: cpu.Workspace("float32") for place in states}

    def work(place, x, dead, target, number):
        replica, shard = place
        half = slice(replica * 32, replica * 32 + 32)
        return step.train_step(
            cpu, states[place], moments[place], x[half], dead[bounds[shard] : bounds[shard + 1]], case.settings, 1e-3,
            number, workspaces[place], None if target is None else target[half],
            ThreadExchange(grid, replica, shard, bounds[shard]),
        )  # fmt: skip

    with ThreadPoolExecutor(n_replicas * n_shards) as pool:
        for number, x, dead, target in case.batches(3):
            expected = kernels.train_step(
                whole, whole_moments, x, dead, case.settings, 1e-3, number, cpu.Workspace("float32"), target
            )  # fmt: skip
            jobs = {place: pool.submit(work, place, x, dead, target, number) for place in states}
            found = {place: job.result() for place, job in jobs.items()}
            for (_, shard), result in found.items():
                assert result.loss == pytest.approx(expected.loss, rel=1e-5)
                assert result.fvu == pytest.approx(expected.fvu, rel=1e-5)
                assert result.aux_loss == pytest.approx(expected.aux_loss, rel=1e-5)
                assert result.l0 == pytest.approx(expected.l0)
                assert torch.equal(result.counts, expected.counts[bounds[shard] : bounds[shard + 1]])
    for (_, shard), parameters in states.items():
        for name, part in cut(whole, shard).named().items():
            torch.testing.assert_close(getattr(parameters, name), part, atol=5e-4, rtol=0)
            assert (getattr(parameters, name) - part).abs().mean() < 1e-6
    for name in ("b_pre", "b_dec", "W_skip"):  # what all ranks hold stays the same, bit for bit
        copies = [getattr(parameters, name) for parameters in states.values()]
        assert copies[0] is None or all(torch.equal(copies[0], copy) for copy in copies)


def test_a_row_of_zeros_is_chosen_by_the_biases():
    W_enc, b_enc = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), torch.linspace(-1, 1, 40)
    for precision in ("int8", "bfloat16", "float32"):
        code = cpu.encode_topk(torch.zeros(2, 16), W_enc, b_enc, 3, None, cpu.Workspace(precision))
        assert code.indices.tolist() == [[37, 38, 39]] * 2


@pytest.mark.parametrize("few", [100, 0], ids=["dense", "sparse"])
def test_of_equal_dead_latents_k_aux_are_used(few, monkeypatch):
    monkeypatch.setattr(step, "FEW_DEAD", few)
    parameters = make_parameters(30, 16, 0)
    for name in ("W_enc", "W_dec", "b_enc"):
        getattr(parameters, name)[:6] = getattr(parameters, name)[0]
    dead = torch.arange(30) < 6
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    arguments = (x, dead, StepSettings(4, 2), 1e-3, 1)
    ours, theirs = parameters.map(torch.clone), parameters
    a = kernels.train_step(ours, no_moments(ours), *arguments, cpu.Workspace("float32"))
    b = reference.train_step(theirs, no_moments(theirs), *arguments)
    assert a.aux_loss == pytest.approx(b.aux_loss, rel=1e-5)


def test_entries_know_their_rows():
    entries = Entries(torch.tensor([0, 2, 2, 3]), torch.tensor([4, 9, 1]).int(), torch.ones(3))
    assert entries.rows.tolist() == [0, 0, 2]
