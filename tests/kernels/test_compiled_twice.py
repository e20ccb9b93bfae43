"""A process that compiles the kernels and one that reads them from numba's cache compute the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import hashlib, torch
from monosemy.kernels import Moments, Parameters, StepSettings, make_workspace, train_step
random = torch.Generator().manual_seed(0)
directions = torch.nn.functional.normalize(torch.randn(48, 32, generator=random), dim=1)
parameters = Parameters(directions / 4, torch.zeros(48), directions.clone(), torch.zeros(32))
moments = Moments(parameters.zeros_like(), parameters.zeros_like())
dead = torch.arange(48) < 5
workspace = make_workspace(parameters)
for step in range(1, 20):
    x = torch.randn(128, 32, generator=random)
    train_step(parameters, moments, x, dead, StepSettings(4, 8), 2e-3, step, workspace)
state = [tensor for part in (parameters, *moments) for tensor in part.named().values()]
print(hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state)).hexdigest())
"""


GENERATION = """
import hashlib, torch
from monosemy.llm.llama import LlamaConfig, random_llama
model = random_llama(LlamaConfig(64, 2, 4, 2, 16, 96, 128, 64, 1e4, 1e-5, True))
digest = hashlib.sha256()
with torch.inference_mode():
    for texts in (1, 5):
        cache, ids = model.make_cache(texts, 20), torch.arange(texts)[:, None]
        for _ in range(20):
            logits = model(ids, cache=cache)
            digest.update(logits.numpy().tobytes())
            ids = logits[:, -1:].argmax(-1)
print(digest.hexdigest())
"""


@pytest.mark.parametrize("script", [SCRIPT, GENERATION], ids=["training", "generation"])
def test_fresh_and_cached_code_agree_bit_for_bit(script: str, tmp_path: Path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    hashes = []
    for _ in range(2):
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        hashes.append(result.stdout)
    assert list(tmp_path.rglob("*.nbc"))  # the second process had something to read
    assert hashes[0] == hashes[1]
