"""Capture puts the model's own activations on disk, whoever computes them and however often it is interrupted."""

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from monosemy.activations import capture, store
from monosemy.activations.capture import CaptureConfig, length_batches, plan_shards, rank_device
from monosemy.activations.writer import Waiting, Writer
from monosemy.corpus import open_tokens
from monosemy.llm.checkpoint import load_model
from monosemy.llm.llama import Llama
from monosemy.llm.sites import Site, Taps
from monosemy.runtime import InputError, Ranks


@pytest.fixture
def config(capture_config: CaptureConfig) -> CaptureConfig:
    return replace(capture_config, sites=("L0.resid_mid", "L1.mlp_out"))


def test_rows_are_what_the_model_computes(config: CaptureConfig, tiny_llama: Llama):
    capture.run(config)
    tokens, activations = open_tokens(config.tokens), store.open_activations(config.out)
    seen = 0
    for number in range(activations.n_shards):
        table = activations.table(number)
        for name in config.sites:
            site = Site.parse(name)
            sentence = int(table.sentence[0])
            rows = table.sentence == sentence
            taps = Taps(reads={site})
            with torch.inference_mode():
                tiny_llama(tokens.sentence(sentence)[None].long(), taps=taps)
            found = activations.shard(site, number).rows[rows]
            torch.testing.assert_close(found, taps.values[site][0], atol=1e-5, rtol=1e-5)
        assert torch.equal(table.token[rows], tokens.sentence(sentence))
        assert table.position[rows].tolist() == list(range(int(rows.sum())))
        assert bool(table.validation[0]) == bool(tokens.validation[sentence])
        seen += len(table.token)
    assert seen == tokens.n_tokens == activations.n_rows


def test_arithmetic_is_recorded_as_what_auto_became(config: CaptureConfig, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # a processor without bfloat16
    monkeypatch.setattr(capture, "load_model", load_model)
    assert capture.run(replace(config, dtype="auto", device="cpu")).config["dtype"] == "float32"
    assert "computes in float32 on cpu" in capsys.readouterr().err
    with pytest.raises(InputError, match="config dtype: 'float32' then, 'bfloat16' now"):
        capture.run(replace(config, dtype="bfloat16"))
    capture.run(replace(config, dtype="float32"))
    assert f"{config.out} is complete already" in capsys.readouterr().err


def test_later_layers_are_not_run(config: CaptureConfig, tiny_llama: Llama, monkeypatch):
    ends = []
    run_layers = Llama.run_layers
    monkeypatch.setattr(Llama, "run_layers", lambda *a, end, **b: (ends.append(end), run_layers(*a, end=end, **b))[1])
    capture.run(replace(config, sites=("L0.mlp_out", "L0.attn_out")))
    assert set(ends) - {0} == {1}  # 0: checking the sites runs nothing


def test_shards_hold_every_sentence_once(tiny_run: Path):
    tokens = open_tokens(tiny_run / "tokens")
    shards = plan_shards(tokens, 300, seed=1)
    assert sorted(np.concatenate(shards).tolist()) == list(range(tokens.n_sentences))
    sizes = [int(tokens.lengths[shard].sum()) for shard in shards]
    longest = int(tokens.lengths.max())
    assert all(300 - longest <= size <= 300 + longest for size in sizes[:-1])


def test_batches_hold_every_sentence_once(tiny_run: Path):
    tokens = open_tokens(tiny_run / "tokens")
    sentences = np.arange(0, tokens.n_sentences, 2)
    seen = []
    for batch in length_batches(tokens, sentences, 200):
        assert batch.ids.numel() <= max(200, int(batch.lengths.max()))
        for ids, sentence in zip(batch.ids[0].split(batch.lengths.tolist()), batch.sentences, strict=True):
            assert torch.equal(ids.int(), tokens.sentence(int(sentence)))
        seen += batch.sentences.tolist()
    assert sorted(seen) == sentences.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions
# ---------------------------------------------------------------------------------------------------------------------


def test_interrupted_capture_goes_on_and_ends_in_the_same_bytes(
    config: CaptureConfig, tmp_path: Path, monkeypatch, stopped_capture
):
    whole = capture.run(config)
    again = replace(config, out=tmp_path / "again")
    stopped_capture(again, 3)
    written = [number for number in range(3) if (tmp_path / f"again.partial/rows/{number:05d}.safetensors").exists()]
    compute, computed = capture.ShardMaker.compute, []
    monkeypatch.setattr(capture.ShardMaker, "compute", lambda m, n, *r: (computed.append(n), compute(m, n, *r))[1])
    resumed = capture.run(again)
    assert 0 in written
    assert computed == [number for number in range(whole.rows["shards"]) if number not in written]  # nothing twice
    assert resumed.digest == whole.digest


def test_a_full_disk_stops_at_once_and_resumes(config: CaptureConfig, tmp_path: Path, monkeypatch):
    whole = capture.run(config)
    save = store.write_tensors

    def full(path: Path, *rest) -> None:
        from monosemy.artifact import atomic

        if path.name.startswith("00001"):
            with atomic(path) as temporary:
                temporary.write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, *rest)

    again = replace(config, out=tmp_path / "again")
    with monkeypatch.context() as patch:
        patch.setattr(store, "write_tensors", full)
        with pytest.raises(InputError, match="no space left on the disk of .*: make room, then run the same command"):
            capture.run(again)
    assert (tmp_path / "again.partial" / "rows" / "00000.safetensors").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    assert capture.run(again).digest == whole.digest


def test_the_writer_bounds_memory_and_keeps_order():
    held, most, done = 0, 0, []
    lock = threading.Lock()

    def write(number: int) -> None:
        nonlocal held
        time.sleep(0.005)
        with lock:
            held -= 1
        done.append(number)

    with Writer(most_bytes=30) as writer:
        for number in range(12):
            with lock:
                held += 1
            writer.put(10, write, number)
            most = max(most, held)
        writer.put(1000, done.append, "large")  # what is larger than the bound waits until it is alone
    assert done == [*range(12), "large"]
    assert most <= 4


def test_an_error_of_the_writer_comes_out_at_once():
    def fail() -> None:
        raise InputError("no space")

    with Writer() as writer:
        work = writer.thread.submit(fail)
        writer.waiting.append(Waiting(work, 1))
        wait([work])
        with pytest.raises(InputError, match="no space"):
            writer.check()
    with pytest.raises(InputError, match="no space"), Writer() as writer:
        writer.put(1, fail)  # and at the end


# ---------------------------------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------------------------------


def run_under_torchrun(config: CaptureConfig, ranks: int) -> subprocess.CompletedProcess:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "monosemy"]
    options = ["capture", "--tokens", config.tokens, "--out", config.out, "--model", config.model]
    options += ["--dtype", "float32", "--stored-as", config.stored_as, "--shard-tokens", str(config.shard_tokens)]
    options += ["--batch-tokens", str(config.batch_tokens), "--device", "cpu", "--sites", *config.sites]
    # As many threads as here: products of matrices differ with their number in the last bits.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(
        [sys.executable, *map(str, command + options)], capture_output=True, text=True, env=environment, timeout=120
    )


def test_two_ranks_make_the_same_bytes_as_one(config: CaptureConfig, tmp_path: Path):
    whole = capture.run(config)
    done = run_under_torchrun(replace(config, out=tmp_path / "two"), 2)
    assert done.returncode == 0, done.stderr
    assert store.open_activations(tmp_path / "two", verify=True).manifest.digest == whole.digest
    assert done.stderr.count(" tokens in ") == 1  # one rank speaks for all
    assert f"{whole.rows['tokens'] / 1000:.2f}k tokens" in done.stderr


class ThreadRanks(Ranks):
    """Ranks that are threads of this process: what `runtime.Ranks` promises, without the seconds it takes to start."""

    barrier: threading.Barrier
    values: list

    def gather(self, value):
        self.values[self.number] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


def run_in_threads(config: CaptureConfig, count: int, monkeypatch) -> list:
    barrier, values = threading.Barrier(count, timeout=60), [None] * count
    numbers = iter(range(count))

    @contextmanager
    def joined():
        ranks = ThreadRanks(next(numbers), count)
        ranks.barrier, ranks.values = barrier, values
        yield ranks

    with monkeypatch.context() as patch, ThreadPoolExecutor(count) as pool:
        patch.setattr(capture, "joined_ranks", joined)
        return [work.result() for work in [pool.submit(capture.run, config) for _ in range(count)]]


@pytest.mark.parametrize("count", [3, 7])
def test_any_number_of_ranks_and_another_after_a_stop(
    config: CaptureConfig, tmp_path: Path, monkeypatch, stopped_capture, count: int
):  # fmt: skip
    """There are five shards: with seven ranks some have nothing to do."""
    whole = capture.run(config)
    assert whole.rows["shards"] == 5
    fresh = run_in_threads(replace(config, out=tmp_path / "fresh"), count, monkeypatch)
    again = replace(config, out=tmp_path / "again")
    stopped_capture(again, 1)
    resumed = run_in_threads(again, count, monkeypatch)
    assert {manifest.digest for manifest in (*fresh, *resumed)} == {whole.digest}


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def test_errors(config: CaptureConfig, tmp_path: Path):
    with pytest.raises(InputError, match=r"'L1.nonsense' is not a site: expected L<layer>.<point>"):
        replace(config, sites=("L1.nonsense",))
    with pytest.raises(InputError, match="names a site twice"):
        replace(config, sites=("L1.resid_post", "L1R"))
    with pytest.raises(InputError, match="no site was given"):
        replace(config, sites=())
    with pytest.raises(InputError, match=r"L7.resid_post: .* has layers 0 to 1"):
        capture.run(replace(config, sites=("L7.resid_post",)))
    foreign = tmp_path / "foreign"
    shutil.copytree(config.tokens, foreign)
    manifest = (foreign / "manifest.json").read_text()
    tokenizer = open_tokens(config.tokens).manifest.parents["tokenizer"]
    (foreign / "manifest.json").write_text(manifest.replace(tokenizer, "0" * len(tokenizer)))
    with pytest.raises(InputError, match="was tokenized for another model"):
        capture.run(replace(config, tokens=foreign))
    assert not config.out.exists()


def test_nan_activations_are_refused(config: CaptureConfig, monkeypatch):
    def broken(model, batch, sites):
        return {site: torch.full((int(batch.lengths.sum()), 32), float("nan")) for site in sites}

    monkeypatch.setattr(capture, "read_sites", broken)
    for stored_as in ("float32", "int8"):
        with pytest.raises(InputError, match="holds NaN or infinite activations"):
            capture.run(replace(config, stored_as=stored_as))
    assert not config.out.exists()
    assert not config.out.with_name("activations.partial").exists()


def test_a_rank_without_a_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert rank_device("auto") == rank_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="rank 0 of this machine needs a GPU, and it has 0: .* --device cpu"):
        rank_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="rank 2 of this machine needs a GPU, and it has 2: start fewer"):
        rank_device("auto")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stored_as", ["float32", "int8"])
def test_a_gpu_stores_what_a_cpu_stores(config: CaptureConfig, tmp_path: Path, stored_as):
    settings = replace(config, stored_as=stored_as, device="cpu")
    capture.run(settings)
    capture.run(replace(settings, out=tmp_path / "gpu", device="cuda"))
    cpu, gpu = (store.open_activations(path, verify=True) for path in (config.out, tmp_path / "gpu"))
    for site in cpu.sites:
        for number in range(cpu.n_shards):
            mine, theirs = cpu.shard(site, number).decoded(), gpu.shard(site, number).decoded()
            tolerance = 1e-4 if stored_as == "float32" else 0.01
            assert (mine - theirs).abs().max() <= tolerance * mine.abs().max()
            assert torch.equal(cpu.sinks(site, number), gpu.sinks(site, number))
