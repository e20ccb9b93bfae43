"""Models of the Hugging Face Hub, without the network: what its cache holds, and what its errors become."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from monosemy.llm import checkpoint
from monosemy.llm.checkpoint import find_source, fingerprint, load_tokenizer
from monosemy.llm.hub import HUB_ID
from monosemy.llm.llama import Llama
from monosemy.runtime import InputError

load_model = partial(checkpoint.load_model, device="cpu")

COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache, offline, with the tiny model as tiny/llama: its main branch, and an older revision."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--tiny--llama"
    for ref, commit in (("main", COMMIT), ("v0", OLDER)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
        shutil.copytree(tiny_llama_folder, repository / "snapshots" / commit)
    config = repository / "snapshots" / OLDER / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 500.0}))
    return repository


def test_ids():
    for name in ("meta-llama/Llama-3.2-3B", "a/b@main", "a/b@refs/pr/1", "a/b:x-Q4_0.gguf", "a/b@v1:sub/x.gguf"):
        assert HUB_ID.fullmatch(name)
    for name in ("llama", "./runs/model", "/data/llama", "a/b/c", "../a", "a/b:x.bin", "a/b@", "~/llama"):
        assert not HUB_ID.fullmatch(name)


def test_models_in_the_cache(cache: Path, tiny_llama: Llama, tiny_llama_folder: Path):
    ids = torch.arange(8)[None]
    model = load_model("tiny/llama", dtype="float32")
    assert torch.equal(model(ids), tiny_llama(ids))
    assert (model.name, model.fingerprint) == ("tiny/llama", tiny_llama.fingerprint)
    older = load_model("tiny/llama@v0", dtype="float32")
    assert older.name == "tiny/llama@v0"
    assert isinstance(older, Llama)
    assert older.config.rope_theta == 500.0
    assert fingerprint("tiny/llama@v0") != tiny_llama.fingerprint
    assert load_tokenizer(f"tiny/llama@{OLDER}").fingerprint == model.tokenizer.fingerprint


def test_a_folder_on_disk_wins(cache: Path, tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama_folder, tmp_path / "tiny" / "llama")
    assert find_source("tiny/llama").path == Path("tiny/llama")
    assert find_source("tiny/llama").name == "llama"


def test_a_gguf_file_in_the_cache(cache: Path):
    file = cache / "snapshots" / COMMIT / "small.gguf"
    file.write_bytes(b"not really")
    assert find_source("tiny/llama:small.gguf") == ("tiny/llama:small.gguf", file, "gguf")
    with pytest.raises(InputError, match="is not a GGUF file"):
        load_model("tiny/llama:small.gguf")


def test_only_what_is_needed_is_fetched(monkeypatch: pytest.MonkeyPatch, tiny_llama_folder: Path):
    from huggingface_hub.utils import filter_repo_objects

    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    text = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    text |= {"special_tokens_map.json"}
    other = {
        "README.md",
        "pytorch_model.bin",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "modeling.py",
    }
    other |= {"original/tokenizer.model", "onnx/model.safetensors", "training_args.bin"}
    files = sorted(shards | text | other)
    fetched: list[set[str]] = []

    def snapshot_download(_: str, revision: Any, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        fetched.append(set(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)))
        return str(tiny_llama_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    find_source("org/name")
    load_tokenizer("org/name")
    assert fetched == [text | shards, text]


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_offline(cache: Path, load: Callable[[Any], Any]):
    message = "is no file or folder here, not .* in the Hub's cache, and the Hub cannot be reached: .* HF_HUB_OFFLINE"
    for name in ("org/name", "tiny/llama@v7", "org/name:x.gguf"):
        with pytest.raises(InputError, match=f"^model '{name}' {message}"):
            load(name)


def http_error(kind: Any, status: int) -> Exception:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("some\nlong text", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            http_error(errors.GatedRepoError, 403),
            "accept it at https://huggingface.co/org/name and run `hf auth login`",
        ),
        (http_error(errors.RepositoryNotFoundError, 404), "nor public on the Hub: check the spelling"),
        (http_error(errors.RevisionNotFoundError, 404), "org/name has no such revision"),
        (http_error(errors.RemoteEntryNotFoundError, 404), "org/name has no such file"),
        (http_error(errors.HfHubHTTPError, 401), "run `hf auth login` with a token that may read it"),
        (
            http_error(errors.HfHubHTTPError, 500),
            r"could not be fetched from the Hub \(HfHubHTTPError: some long text\)",
        ),
        (OSError(28, "No space left on device"), r"No space left on device\): try again, or give a folder"),
    ],
)
def test_errors_say_what_to_do(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=message) as raised:
        load_model("org/name")
    assert "\n" not in str(raised.value)
