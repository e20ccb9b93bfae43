"""`push`, over real HTTP to a stand-in of the Hub that keeps what it is sent, and `load_sae` from it."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from monosemy.__main__ import main
from monosemy.artifact import read_manifest
from monosemy.runtime import InputError
from monosemy.sae import evaluate
from monosemy.sae.autoencoder import open_sae
from monosemy.sae.evaluate import EvaluateConfig
from monosemy.sae.publish import PushConfig

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as making a repository, one commit, and a download need."""

    files: ClassVar[dict[str, bytes]] = {}
    made: ClassVar[list[dict]] = []
    token = "hf_right"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            self._answer(401, {"error": "Invalid credentials"})
        elif self.path.startswith("/api/repos/create"):
            self.made.append(json.loads(body))
            self._answer(200, {"url": f"http://{self.headers['Host']}/org/sae"})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            wanted = [file["path"] for file in json.loads(body)["files"]]
            self._answer(200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in wanted]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(
                200, {"commitUrl": f"http://{self.headers['Host']}/org/sae/commit/{COMMIT}", "commitOid": COMMIT}
            )
        else:
            self._answer(404, {"error": self.path})

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/org/sae/revision/"):
            self._answer(
                200, {"id": "org/sae", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            )
        elif self.path.startswith("/api/models/org/sae/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
            self._answer(200, tree)
        else:
            self._file(with_content=True)

    def do_HEAD(self) -> None:
        self._file(with_content=False)

    def _file(self, with_content: bool) -> None:
        content = self.files.get(self.path.split("?")[0].rsplit("/", 1)[-1])
        if content is None or "/resolve/" not in self.path:
            self._answer(404, {"error": self.path})
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def _answer(self, status: int, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which huggingface_hub talks to the stand-in."""
    Hub.files, Hub.made = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    yield {"HF_ENDPOINT": endpoint, "HF_TOKEN": Hub.token, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}
    server.shutdown()
    server.server_close()


def run(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


@pytest.fixture(scope="module")
def metrics(tiny_run: Path, tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("published") / "metrics"
    evaluate.run(
        EvaluateConfig(
            sae=tiny_run / "sae", tokens=tiny_run / "tokens", out=out, model=str(tiny_llama_folder), dtype="float32",
            loss_tokens=300,
        )
    )  # fmt: skip
    return out


def test_published_and_loaded_again(tiny_run: Path, metrics: Path, hub: dict[str, str]):
    done = run(hub, "-m", "monosemy", "push", tiny_run / "sae", "org/sae", "--metrics", metrics, "--private")
    assert done.returncode == 0, done.stderr
    assert 'load_sae("org/sae") reads it' in done.stderr
    assert "private" in (Hub.made[0].get("visibility"), "private" if Hub.made[0].get("private") else "")
    manifest = read_manifest(tiny_run / "sae", "sae")
    assert set(Hub.files) == {*manifest.files, "manifest.json", "metrics.json", "README.md"}
    assert Hub.files["sae.safetensors"] == (tiny_run / "sae" / "sae.safetensors").read_bytes()
    card = Hub.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: monosemy\n")
    assert "| FVU | " in card
    code = "from monosemy import load_sae; import sys, torch; x = torch.ones(2, 32) + torch.eye(2, 32); "
    code += "torch.save(load_sae('org/sae')(x), sys.argv[1])"
    out = Path(hub["HF_HOME"]).with_name("y.pt")
    loaded = run(hub, "-c", code, out)
    assert loaded.returncode == 0, loaded.stderr
    expected = open_sae(tiny_run / "sae")(torch.ones(2, 32) + torch.eye(2, 32))
    torch.testing.assert_close(torch.load(out), expected)


def test_without_the_right_to(tiny_run: Path, hub: dict[str, str]):
    done = run(hub | {"HF_TOKEN": "hf_wrong"}, "-m", "monosemy", "push", tiny_run / "sae", "org/sae")
    assert done.returncode == 2
    assert "run `hf auth login`" in done.stderr
    assert "Traceback" not in done.stderr
    assert Hub.files == {}


def test_the_card_can_be_read_first(tiny_run: Path, metrics: Path, tmp_path: Path):
    card = tmp_path / "card.md"
    assert main(["push", str(tiny_run / "sae"), "org/sae", "--metrics", str(metrics), "--card", str(card)]) == 0
    text = card.read_text()
    assert 'sae = load_sae("org/sae")' in text
    assert "TopK, k = 4" in text


def test_metrics_of_another_sae(tiny_run: Path, metrics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["convert", str(tiny_run / "sae"), str(tmp_path / "other"), "--model", "another"]) == 0
    assert main(["push", str(tmp_path / "other"), "org/sae", "--metrics", str(metrics)]) == 2
    assert "holds the metrics of another SAE than" in capsys.readouterr().err


def test_a_name_that_is_none(tiny_run: Path):
    with pytest.raises(InputError, match="'sae' is no name of a repository; expected org/name"):
        PushConfig(sae=tiny_run / "sae", repository="sae")
