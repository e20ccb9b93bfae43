"""A capture to a URL, and training from it: on fsspec's own file systems."""

from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch

from monosemy import options, verify
from monosemy.activations import capture, remote, store
from monosemy.activations.capture import CaptureConfig
from monosemy.activations.stream import Stream
from monosemy.llm.sites import Site
from monosemy.runtime import InputError
from monosemy.sae import train

SITE = Site.parse("L1.resid_post")


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = f"{tmp_path.name}/activations"
    return f"memory://{name}" if request.param == "memory" else f"file://{tmp_path}/{name}"


@pytest.fixture
def config(capture_config: CaptureConfig, url: str) -> CaptureConfig:
    return replace(capture_config, out=Path(url))


def cached(tmp_path: Path, folder: str) -> list[str]:
    found = (tmp_path / "cache").rglob(f"{folder}/**/*")
    return sorted(str(path).split(f"/{folder}/")[1] for path in found if path.is_file())


def test_urls_and_paths():
    assert remote.remote_url(Path("s3://bucket/a/b")) == "s3://bucket/a/b"
    assert remote.remote_url(Path("file:///tmp/a")) == "file:///tmp/a"
    assert remote.remote_url("memory://a") == "memory://a"
    for local in ("a/b", "/a/b", "C:/a", "runs/demo:2"):
        assert remote.remote_url(Path(local)) is None


def test_what_is_sent_comes_back_lazily(config: CaptureConfig, tiny_run: Path, tmp_path: Path, url: str):
    manifest = capture.run(config)
    here = store.open_activations(tiny_run / "activations")
    assert manifest.digest == here.manifest.digest
    assert cached(tmp_path, "made") == []  # what was sent is not kept
    there = store.open_activations(url)
    assert cached(tmp_path, "read") == ["manifest.json"]
    assert torch.equal(there.shard(SITE, 1).rows, here.shard(SITE, 1).rows)
    assert cached(tmp_path, "read") == ["L1.resid_post/00001.safetensors", "manifest.json"]
    one, other = (Stream(source, SITE, 100, seed=0) for source in (here, there))
    assert torch.equal(one.batch(3), other.batch(3))
    assert store.open_activations(Path(url), verify=True).manifest.digest == manifest.digest
    assert capture.run(config).digest == manifest.digest  # complete: nothing is done
    with pytest.raises(InputError, match="was made with other settings"):
        capture.run(replace(config, seed=1))


def test_an_interrupted_capture_goes_on(config: CaptureConfig, tiny_run: Path, url: str, stopped_capture):
    stopped_capture(config, 2)
    with pytest.raises(InputError, match="has no manifest.json, so it is no complete artifact: check the URL"):
        store.open_activations(url)
    files, root = fsspec.core.url_to_fs(url)
    assert f"{root}/L1.resid_post/00000.safetensors" in files.find(root)  # sent while capture went on
    assert capture.run(config).digest == store.open_activations(tiny_run / "activations").manifest.digest


def test_training_from_a_url(config: CaptureConfig, tmp_path: Path):
    capture.run(config)
    manifest = train.run(
        options.build(
            train.TrainConfig,
            dict(out=tmp_path / "sae", activations=config.out, n_latents=64, k=4, train_tokens=1000, batch_size=200),
        )
    )
    assert manifest.parents["activations"] == store.open_activations(config.out).manifest.digest


def test_damage_and_change(config: CaptureConfig, tmp_path: Path, url: str):
    capture.run(config)
    files, root = fsspec.core.url_to_fs(url)
    store.open_activations(url).shard(SITE, 0)
    files.rm(f"{root}/manifest.json")
    capture.run(replace(config, seed=1))  # another artifact at the same URL, files of the same sizes
    activations = store.open_activations(url)
    assert cached(tmp_path, "read") == ["manifest.json"]  # copies of the old one are gone
    assert activations.shard(SITE, 0) is not None
    files.pipe(f"{root}/rows/00000.safetensors", b"short")
    with pytest.raises(InputError, match=r"is damaged: rows/00000.safetensors is missing or has another size"):
        store.open_activations(url)


def test_urls_that_lead_nowhere(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"nosuch://a cannot be opened .*: give a URL that fsspec understands"):
        store.open_activations("nosuch://a")
    with pytest.raises(InputError, match="has no manifest.json"):
        store.open_activations("memory://nowhere")


def test_verify_reads_what_is_at_a_url(config: CaptureConfig, url: str, capsys):
    capture.run(config)
    verify.run(verify.VerifyConfig((Path(url),)))
    assert f"{url}: an 'activations' artifact" in capsys.readouterr().out


def test_other_stages_refuse_a_url_before_they_begin(tiny_run: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"is a URL, and only `monosemy capture` writes to one: give a folder"):
        train.run(train.TrainConfig(activations=tiny_run / "activations", out=Path(f"file://{tmp_path}/sae")))
    assert not list(tmp_path.iterdir())
