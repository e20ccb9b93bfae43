"""What the tests run on: shape checks switched on, a real small model, and a tiny random one."""

import json
from pathlib import Path

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

check_types = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float
install_import_hook("monosemy", "conftest.check_types")  # before anything of monosemy is imported

import pytest
import torch

from monosemy.artifact import write_tensors
from monosemy.llm.checkpoint import load_model, load_tokenizer
from monosemy.llm.llama import Llama
from monosemy.llm.tokenizer import Tokenizer

TINY = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_mlp": 64, "vocabulary": 49152}


@pytest.fixture(scope="session")
def smollm2() -> Llama:
    """The real SmolLM2-135M-Instruct in float32."""
    model = load_model("smollm2", dtype="float32", device="cpu")
    assert isinstance(model, Llama)
    return model


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Tokenizer:
    return load_tokenizer("smollm2")


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory, smollm2_tokenizer: Tokenizer) -> Path:
    """A Hugging Face folder with a random Llama: 2 layers, d_model 32, 4 heads, 2 key-value heads, SmolLM2's tokenizer.

    Tests must not write into it: they share it.
    """
    folder = tmp_path_factory.mktemp("tiny-llama")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": TINY["d_model"],
        "num_hidden_layers": TINY["n_layers"],
        "num_attention_heads": TINY["n_heads"],
        "num_key_value_heads": TINY["n_kv_heads"],
        "head_dim": TINY["head_dim"],
        "intermediate_size": TINY["d_mlp"],
        "vocab_size": TINY["vocabulary"],
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder / "model.safetensors", _random_weights(), {"format": "pt"})
    tokenizer = smollm2_tokenizer
    tokenizer.inner.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": tokenizer.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tiny_llama_folder: Path) -> Llama:
    """The model in `tiny_llama_folder`, in float32."""
    model = load_model(str(tiny_llama_folder), dtype="float32", device="cpu")
    assert isinstance(model, Llama)
    return model


def _random_weights() -> dict[str, torch.Tensor]:
    """Weights under Hugging Face's names, large enough that every part moves the logits."""
    random = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random) / columns**0.5

    width, attended, shared = TINY["d_model"], TINY["n_heads"] * TINY["head_dim"], TINY["n_kv_heads"] * TINY["head_dim"]
    weights = {"model.embed_tokens.weight": torch.randn(TINY["vocabulary"], width, generator=random)}
    weights["model.norm.weight"] = 1 + 0.1 * torch.randn(width, generator=random)
    for layer in range(TINY["n_layers"]):
        shapes = {
            "self_attn.q_proj": (attended, width),
            "self_attn.k_proj": (shared, width),
            "self_attn.v_proj": (shared, width),
            "self_attn.o_proj": (width, attended),
            "mlp.gate_proj": (TINY["d_mlp"], width),
            "mlp.up_proj": (TINY["d_mlp"], width),
            "mlp.down_proj": (width, TINY["d_mlp"]),
        }
        for name, (rows, columns) in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = matrix(rows, columns)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = 1 + 0.1 * torch.randn(width, generator=random)
    return weights


TINY_TEXT = "The delegates gathered at the United Nations. They spoke of peace. We must act now, said the chairman! "


@pytest.fixture(scope="session")
def tiny_run(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the artifacts `tokens`, `activations` and `sae` of the tiny Llama. Tests must not write into it."""
    from monosemy import corpus, options
    from monosemy.activations import capture
    from monosemy.sae import train

    folder = tmp_path_factory.mktemp("tiny-run")
    words = ("war", "peace", "trade", "winter", "gold", "railroads", "children", "farmers")
    for number in range(8):
        sentences = [f"In year {1900 + i} the people of state {i % 7} asked for {words[i % 8]}. " for i in range(30)]
        text = TINY_TEXT * 3 + " ".join(sentences[number:] + sentences[:number])
        (folder / f"speech-{number}.txt").write_text(text)
    model = str(tiny_llama_folder)
    corpus.run(corpus.TokenizeConfig(model=model, text=(str(folder),), out=folder / "tokens", validation_fraction=0.2))
    capture.run(
        capture.CaptureConfig(
            tokens=folder / "tokens", out=folder / "activations", model=model, dtype="float32",
            sites=("L1.resid_post",), stored_as="float32", shard_tokens=1000, batch_tokens=256,
        )
    )  # fmt: skip
    sizes = {"n_latents": 64, "k": 4, "train_tokens": 20_000, "batch_size": 256, "dead_after_tokens": 4000, "k_aux": 8}
    places = {"activations": folder / "activations", "out": folder / "sae"}
    train.run(options.build(train.TrainConfig, sizes | places))
    return folder


@pytest.fixture
def training_config(tiny_run: Path, tmp_path: Path):
    """A training of 39 steps on the activations of `tiny_run`."""
    from monosemy import options
    from monosemy.sae.settings import TrainConfig

    sizes = {"n_latents": 64, "k": 4, "train_tokens": 10_000, "batch_size": 256, "dead_after_tokens": 2000, "k_aux": 8}
    places = {"activations": tiny_run / "activations", "out": tmp_path / "sae"}
    return options.build(TrainConfig, sizes | places | {"checkpoint_every": 7})


@pytest.fixture
def interrupted_training(monkeypatch):
    """`interrupted_training(config, 9)`: a training that a person stops in the ninth step that it takes."""
    from monosemy import kernels
    from monosemy.sae import train

    def interrupted(config: train.TrainConfig, stop_at: int) -> None:
        taken, train_step = [], kernels.train_step

        def stop(*arguments):
            taken.append(arguments)
            if len(taken) == stop_at:
                raise KeyboardInterrupt
            return train_step(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(kernels, "train_step", stop)
            with pytest.raises(KeyboardInterrupt):
                train.train_all(config)

    return interrupted


@pytest.fixture(scope="session")
def tiny_labels(tiny_run: Path, tiny_llama_folder: Path) -> Path:
    """`tiny_run` with the artifacts `index` and `labels` added."""
    from monosemy.explain import explainer
    from monosemy.latents import index

    index.run(
        index.IndexConfig(
            sae=tiny_run / "sae", tokens=tiny_run / "tokens", activations=tiny_run / "activations",
            out=tiny_run / "index", model=str(tiny_llama_folder), dtype="float32",
        )
    )  # fmt: skip
    explainer.run(explainer.ExplainConfig(index=tiny_run / "index", out=tiny_run / "labels"))
    return tiny_run


@pytest.fixture
def capture_config(tiny_run: Path, tiny_llama_folder: Path, tiny_llama: Llama, tmp_path: Path, monkeypatch):
    """What made the activations of `tiny_run`, five shards, to be made elsewhere; the model is loaded once for all."""
    from monosemy.activations import capture

    load = capture.load_model

    def loaded(name, dtype, device):
        return tiny_llama if device.type == "cpu" else load(name, dtype, device)

    monkeypatch.setattr(capture, "load_model", loaded)
    return capture.CaptureConfig(
        tokens=tiny_run / "tokens", out=tmp_path / "activations", model=str(tiny_llama_folder), dtype="float32",
        sites=("L1.resid_post",), stored_as="float32", shard_tokens=1000, batch_tokens=256,
    )  # fmt: skip


@pytest.fixture
def stopped_capture(monkeypatch):
    """`stopped_capture(config, 2)`: a capture that a person stops before its shard number 2."""
    from monosemy.activations import capture

    compute = capture.ShardMaker.compute

    def stopped(config: capture.CaptureConfig, shard: int) -> None:
        def stop(maker, number, *rest):
            if number == shard:
                raise KeyboardInterrupt
            return compute(maker, number, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(capture.ShardMaker, "compute", stop)
            with pytest.raises(KeyboardInterrupt):
                capture.run(config)

    return stopped
