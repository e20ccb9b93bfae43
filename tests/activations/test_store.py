"""The store gives back what was put in, to the precision asked for, and notices what does not belong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from monosemy.__main__ import main
from monosemy.activations import capture, store
from monosemy.activations.capture import CaptureConfig
from monosemy.artifact import read_manifest
from monosemy.llm.sites import Site
from monosemy.runtime import InputError

SITE = Site.parse("L1.resid_post")


@pytest.fixture
def config(capture_config: CaptureConfig) -> CaptureConfig:
    return capture_config


@pytest.fixture(scope="session")
def reference(tiny_run: Path) -> torch.Tensor:
    """All rows of `tiny_run`, float32."""
    activations = store.open_activations(tiny_run / "activations")
    return torch.cat([activations.shard(SITE, number).rows for number in range(activations.n_shards)])


# ---------------------------------------------------------------------------------------------------------------------
# Encodings
# ---------------------------------------------------------------------------------------------------------------------


def test_int8_is_off_by_half_a_scale_at_most():
    random = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.arange(-30, 31, 2)[:, None]  # from far below float16's range to far above
    rows = torch.randn(len(sizes), 576, generator=random) * sizes
    stored = store.encode(rows, "int8")
    assert stored.scale is not None
    error = (stored.decoded() - rows).abs().amax(dim=1)
    assert (error <= 0.5001 * stored.scale.float()).all()
    assert (stored.scale.float() <= rows.abs().amax(dim=1) / 127 * 1.004).all()
    assert stored.n_bytes == len(rows) * 578


def test_int8_keeps_zeros_and_a_sink_of_the_real_model():
    rows = torch.zeros(2, 576)
    rows[1, 3] = -29_700
    decoded = store.encode(rows, "int8").decoded()
    assert torch.equal(decoded[0], rows[0])
    torch.testing.assert_close(decoded[1], rows[1], rtol=0.004, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stored_as", ["float32", "bfloat16", "int8"])
def test_what_is_not_finite_is_seen(stored_as, value: float):
    rows = torch.ones(3, 8)
    assert store.encode(rows, stored_as).is_finite
    rows[1, 2] = value
    assert not store.encode(rows, stored_as).is_finite


@pytest.mark.parametrize("compress", ["none", "zstd"])
@pytest.mark.parametrize(("stored_as", "tolerance"), [("float32", 0.0), ("bfloat16", 2.0**-8), ("int8", 0.004)])
def test_any_row_in_any_encoding(config: CaptureConfig, reference: torch.Tensor, stored_as, tolerance, compress):
    manifest = capture.run(replace(config, stored_as=stored_as, compress=compress))
    activations = store.open_activations(config.out, verify=True)
    asked = np.random.default_rng(0).integers(0, len(reference), 500)
    rows = activations.rows(SITE, asked)
    largest = reference[asked].abs().amax(dim=1, keepdim=True)
    assert rows.dtype == torch.float32
    assert ((rows - reference[asked]).abs() <= tolerance * largest).all()
    payload = {"float32": 128, "bfloat16": 64, "int8": 34}[stored_as]
    files = sum(record["bytes"] for name, record in manifest.files.items() if name.startswith("L1"))
    assert manifest.facts["sites"][str(SITE)]["bytes_per_row"] == pytest.approx(files / len(reference), abs=0.01)
    assert files / len(reference) < payload + 1


def test_a_shard_is_readable_alone(config: CaptureConfig, reference: torch.Tensor):
    capture.run(replace(config, stored_as="int8"))
    alone = load_file(config.out / "L1.resid_post" / "00000.safetensors")
    decoded = alone["rows"].float() * alone["scale"].float()[:, None]
    assert (decoded - reference[: len(decoded)]).abs().max() < 0.02 * reference.abs().max()
    table = load_file(config.out / "rows" / "00000.safetensors")
    assert {"token", "sentence", "position", "validation", "L1.resid_post.sink"} <= table.keys()


def test_rows_beyond_the_last(tiny_run: Path):
    activations = store.open_activations(tiny_run / "activations")
    assert activations.rows(SITE, np.array([], dtype=np.int64)).shape == (0, 32)
    with pytest.raises(InputError, match=rf"rows 3 to {activations.n_rows} of .* were asked for; it has"):
        activations.rows(SITE, np.array([3, activations.n_rows]))


def test_rows_asked_for_by_a_list(tiny_run: Path):
    activations = store.open_activations(str(tiny_run / "activations"))
    assert torch.equal(activations.rows(SITE, [5, 1]), activations.rows(SITE, np.array([5, 1])))
    assert torch.equal(activations.rows(SITE, torch.tensor([5, 1])), activations.rows(SITE, [5, 1]))
    with pytest.raises(InputError, match=r"asked for by float64 of shape \(1,\); expected one list of integers"):
        activations.rows(SITE, np.array([1.5]))


# ---------------------------------------------------------------------------------------------------------------------
# Counts, means, variances
# ---------------------------------------------------------------------------------------------------------------------


def test_mean_and_variance_of_the_manifest(config: CaptureConfig):
    manifest = capture.run(config)
    activations = store.open_activations(config.out)
    rows = torch.cat([activations.shard(SITE, n).rows for n in range(activations.n_shards)]).double()
    validation = torch.cat([activations.table(n).validation for n in range(activations.n_shards)])
    sink = rows.float().norm(dim=1) > activations.sink_norm(SITE)
    assert torch.equal(sink, torch.cat([activations.sinks(SITE, n) for n in range(activations.n_shards)]))
    facts = manifest.facts["sites"][str(SITE)]
    for name, chosen in (("training", rows[~sink & ~validation]), ("all", rows)):
        assert facts[name]["rows"] == len(chosen)
        torch.testing.assert_close(torch.tensor(facts[name]["mean"]).double(), chosen.mean(dim=0), atol=1e-6, rtol=0)
        assert facts[name]["variance"] == pytest.approx(chosen.var(dim=0, correction=0).sum().item(), rel=1e-9)
    assert facts["n_sinks"] == int(sink.sum())
    torch.testing.assert_close(activations.mean(SITE), rows[~sink & ~validation].mean(dim=0).float())
    assert activations.variance(SITE) == facts["training"]["variance"]
    assert sum(manifest.facts["shard_rows"]) == activations.n_rows == len(rows)
    for held_out in (False, True):
        expected = [
            int((activations.table(n).validation == held_out).sum()) for n in range(activations.n_shards)
        ]  # fmt: skip
        assert activations.split_sizes(held_out).tolist() == expected


def test_a_row_of_huge_norm_is_a_sink():
    rows = torch.randn(50, 8)
    rows[7] *= 100
    stored = store.encode(rows, "float32")
    known = store.statistics(stored, torch.zeros(50, dtype=torch.bool), store.sink_norm_of(stored))
    assert known.sink.nonzero().flatten().tolist() == [7]
    assert (known.training.count, known.every.count) == (49, 50)
    torch.testing.assert_close(known.training.mean, rows[~known.sink].double().mean(dim=0))


def test_merged_moments_equal_those_of_all_rows():
    rows = torch.randn(100, 5, dtype=torch.float64) + 1000
    merged = store.Moments.of(rows[:0])
    for part in rows.split([1, 0, 60, 39]):
        merged = merged.merge(store.Moments.of(part))
    assert merged.count == 100
    torch.testing.assert_close(merged.mean, rows.mean(dim=0), atol=1e-10, rtol=0)
    assert merged.variance == pytest.approx(rows.var(dim=0, correction=0).sum().item(), rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run / "activations", tmp_path / "copy"))


def test_verify_finds_any_flipped_bit(copy: Path, capsys):
    random = np.random.default_rng(0)
    assert main(["verify", str(copy)]) == 0
    for file in sorted(path for path in copy.rglob("*") if path.is_file()):
        whole = file.read_bytes()
        for place in (0, len(whole) - 1, *random.integers(0, len(whole), 3)):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << random.integers(8)
            file.write_bytes(flipped)
            capsys.readouterr()
            assert main(["verify", str(copy)]) == 2, f"byte {place} of {file}"
            assert file.name in capsys.readouterr().err
        file.write_bytes(whole)
    assert main(["verify", str(copy)]) == 0


@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_a_shard_from_another_capture_is_refused(config: CaptureConfig, tmp_path: Path, compress):
    """The files have the same names and sizes: only their marks tell."""
    one = replace(config, compress=compress)
    other = replace(one, seed=1, out=tmp_path / "other")
    capture.run(one)
    capture.run(other)
    name = "00001.safetensors" + (".zst" if compress == "zstd" else "")
    file = config.out / "L1.resid_post" / name
    own = file.read_bytes()
    _replace(config.out, file, (other.out / "L1.resid_post" / name).read_bytes())
    with pytest.raises(InputError, match=r"is marked 'capture .*'; expected .*a shard of another capture was mixed in"):
        store.open_activations(config.out).shard(SITE, 1)
    _replace(config.out, file, own.replace(b"shard 1", b"shard 2") if compress == "none" else own[:-9])
    with pytest.raises(InputError, match=r"shard of another capture was mixed in|cannot be read"):
        store.open_activations(config.out).shard(SITE, 1)
    assert store.open_activations(config.out).shard(SITE, 0) is not None


def _replace(folder: Path, file: Path, content: bytes) -> None:
    """Put `content` there, and its size into the manifest: opening does not complain."""
    file.write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][str(file.relative_to(folder))]["bytes"] = len(content)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    read_manifest(folder, "activations")


def test_a_truncated_shard_is_refused(copy: Path):
    file = copy / "L1.resid_post" / "00000.safetensors"
    _replace(copy, file, file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"00000.safetensors cannot be read \(.*\): put it back, or remove the folder"):
        store.open_activations(copy).shard(SITE, 0)


def test_sites_that_are_not_there(tiny_run: Path):
    activations = store.open_activations(tiny_run / "activations")
    with pytest.raises(InputError, match=r"holds no L0.resid_pre; it holds L1.resid_post"):
        activations.only_site("L0.resid_pre")
    with pytest.raises(InputError, match=r"holds no L0.resid_pre"):
        activations.shard(Site.parse("L0.resid_pre"), 0)
