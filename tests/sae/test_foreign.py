"""Formats that no installable library writes, against their mathematics; the Hub's cache; and bad input.

`test_interop` has the others, written by their own libraries.
"""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from monosemy import load_sae
from monosemy.__main__ import main
from monosemy.runtime import InputError
from monosemy.sae.autoencoder import SAE, open_sae
from monosemy.sae.writers import write_foreign

WIDTH, LATENTS, K = 16, 40, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + math.prod(shape)))


X = 3 * normal(200, WIDTH, seed=7) + 1
W_ENC, W_DEC = normal(LATENTS, WIDTH) / 4, normal(LATENTS, WIDTH, seed=1) / 2  # norms differ from 1
B_ENC, B_DEC = normal(LATENTS, seed=2) / 4, normal(WIDTH, seed=3)
THRESHOLD = torch.linspace(0.1, 1.5, LATENTS)
NORMS = W_DEC.norm(dim=1)


def check(sae: SAE, features: Tensor, reconstruction: Tensor) -> None:
    """`sae` gives `features` and `reconstruction` for X."""
    assert 0.02 < (features > 0).float().mean() < 0.6
    torch.testing.assert_close(sae.encode(X).dense(LATENTS), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(X), reconstruction, rtol=1e-4, atol=1e-4)


def jump(pre: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.where(pre > threshold, pre, 0.0).relu()


def topk(pre: Tensor, k: int) -> Tensor:
    found = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter_(1, found.indices, found.values.relu())


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], weights: str, text: str) -> Path:
    (folder / weights).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / weights)
    (folder / text).write_text(json.dumps(config))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Llama Scope, Llamascopium
# ---------------------------------------------------------------------------------------------------------------------

SCOPE_TENSORS = {
    "encoder.weight": W_ENC, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T, "decoder.bias": B_DEC
}  # fmt: skip
SCOPE_CONFIG = {
    "d_model": WIDTH, "d_sae": LATENTS, "hook_point_in": "blocks.15.hook_resid_post",
    "hook_point_out": "blocks.15.hook_resid_post", "act_fn": "jumprelu", "jump_relu_threshold": 0.6,
    "dataset_average_activation_norm": {"in": 12.0, "out": 12.0}, "sparsity_include_decoder_norm": True, "top_k": 8,
    "norm_activation": "dataset-wise", "apply_decoder_bias_to_pre_encoder": False,
}  # fmt: skip


def test_llama_scope_is_read(tmp_path: Path):
    """In the order in which Llama Scope itself folds scales and norms: the threshold is of raw activation x norm."""
    config = SCOPE_CONFIG | {"dataset_average_activation_norm": {"in": 12.0, "out": 9.0}}
    write(tmp_path, SCOPE_TENSORS, config, "checkpoints/final.safetensors", "hyperparams.json")
    s_in, s_out = WIDTH**0.5 / 12, WIDTH**0.5 / 9
    b_enc, b_dec, W_dec = B_ENC / s_in, B_DEC / s_out, W_DEC * s_in / s_out
    norms = W_dec.norm(dim=1)
    features = jump((X @ W_ENC.T + b_enc) * norms, 0.6)
    sae = load_sae(tmp_path)
    check(sae, features, features @ (W_dec / norms[:, None]) + b_dec)
    assert (sae.config.site, sae.config.k) == ("L15.resid_post", 8)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(LATENTS))


def test_llama_scope_is_its_own_training_mathematics(tmp_path: Path):
    """Normalised in, act(pre x norm) / norm, decoded, scaled back: the same reconstruction, if the threshold is put in
    the same units."""
    s = WIDTH**0.5 / 12
    write(tmp_path, SCOPE_TENSORS, SCOPE_CONFIG, "checkpoints/final.safetensors", "hyperparams.json")
    pre = (X * s) @ W_ENC.T + B_ENC
    features = jump(pre * NORMS, 0.6 * s) / NORMS
    torch.testing.assert_close(load_sae(tmp_path)(X), (features @ W_DEC + B_DEC) / s, rtol=1e-4, atol=1e-4)


def test_llama_scope_r1_distill_is_read(tmp_path: Path):
    tensors = SCOPE_TENSORS | {"log_jumprelu_threshold": THRESHOLD.log()}
    config = {name: value for name, value in SCOPE_CONFIG.items() if name not in ("jump_relu_threshold", "d_sae")}
    write(tmp_path, tensors, config | {"expansion_factor": 2.5}, "sae_weights.safetensors", "config.json")
    s = WIDTH**0.5 / 12
    features = jump((X @ W_ENC.T + B_ENC / s) * NORMS, THRESHOLD)
    check(load_sae(tmp_path), features, features @ (W_DEC / NORMS[:, None]) + B_DEC / s)


SCOPIUM_TENSORS = {"W_E": W_ENC.T, "b_E": B_ENC, "W_D": W_DEC, "b_D": B_DEC}
SCOPIUM_CONFIG = {
    "sae_type": "sae", "d_model": WIDTH, "expansion_factor": 2.5, "use_decoder_bias": True, "act_fn": "topk",
    "top_k": K, "norm_activation": "inference", "sparsity_include_decoder_norm": True,
    "hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post",
}  # fmt: skip


@pytest.mark.parametrize("act_fn", ["topk", "jumprelu", "relu"])
@pytest.mark.parametrize("by_norm", [True, False])
def test_llamascopium_is_read(tmp_path: Path, act_fn: str, by_norm: bool):
    tensors, g = dict(SCOPIUM_TENSORS), NORMS if by_norm else torch.ones(LATENTS)
    if act_fn == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = THRESHOLD.log()
    config = SCOPIUM_CONFIG | {"act_fn": act_fn, "sparsity_include_decoder_norm": by_norm}
    write(tmp_path, tensors, config, "sae_weights.safetensors", "config.json")
    pre = (X @ W_ENC.T + B_ENC) * g
    features = {"topk": topk(pre, K), "jumprelu": jump(pre, THRESHOLD), "relu": pre.relu()}[act_fn]
    sae = load_sae(tmp_path)
    torch.testing.assert_close(sae.encode(X).dense(LATENTS), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(X), (features / g) @ W_DEC + B_DEC, rtol=1e-4, atol=1e-4)
    assert sae.config.site == "L3.resid_post"


def test_llamascopium_with_scales_and_as_a_pickle(tmp_path: Path):
    """`dataset-wise`: raw rows are multiplied on the way in, and the other site's on the way out."""
    config = SCOPIUM_CONFIG | {"norm_activation": "dataset-wise", "hook_point_out": "blocks.3.hook_mlp_out"}
    prefix = "dataset_average_activation_norm."
    norms = {
        prefix + "blocks.3.hook_resid_post": torch.tensor(12.0),
        prefix + "blocks.3.hook_mlp_out": torch.tensor(2.0),
    }
    torch.save({"sae": SCOPIUM_TENSORS | norms}, tmp_path / "sae_weights.pt")
    (tmp_path / "config.json").write_text(json.dumps(config))
    s_in, s_out = WIDTH**0.5 / 12, WIDTH**0.5 / 2
    features = topk(((X * s_in) @ W_ENC.T + B_ENC) * NORMS, K) / NORMS
    sae = load_sae(tmp_path)
    assert sae.config.target_site == "L3.mlp_out"
    torch.testing.assert_close(sae(X), (features @ W_DEC + B_DEC) / s_out, rtol=1e-4, atol=1e-4)


def test_llamascopium_of_rows_of_one_norm(tmp_path: Path):
    config = SCOPIUM_CONFIG | {"norm_activation": "token-wise", "sparsity_include_decoder_norm": False}
    write(tmp_path, SCOPIUM_TENSORS, config, "sae_weights.safetensors", "config.json")
    factor = WIDTH**0.5 / X.norm(dim=1, keepdim=True)
    features = topk((X * factor) @ W_ENC.T + B_ENC, K)
    check(load_sae(tmp_path), features, (features @ W_DEC + B_DEC) / factor)


# ---------------------------------------------------------------------------------------------------------------------
# OpenAI, Gemma Scope
# ---------------------------------------------------------------------------------------------------------------------

OPENAI = {
    "pre_bias": B_DEC, "encoder.weight": W_ENC, "latent_bias": B_ENC, "decoder.weight": W_DEC.T,
    "stats_last_nonzero": torch.zeros(LATENTS), "latents_activation_frequency": torch.zeros(LATENTS),
}  # fmt: skip


@pytest.mark.parametrize("flat", [True, False])
def test_openai_topk_is_read(tmp_path: Path, flat: bool):
    state: dict[str, Any] = {"k": K, "postact_fn": "ReLU"}
    state = {f"activation_state_dict.{name}": value for name, value in state.items()} if flat else {
        "activation_state_dict": state
    }  # fmt: skip
    torch.save(OPENAI | {"activation": "TopK"} | state, tmp_path / "autoencoder.pt")
    mean, std = X.mean(dim=1, keepdim=True), X.std(dim=1, keepdim=True)
    features = topk(((X - mean) / (std + 1e-5) - B_DEC) @ W_ENC.T + B_ENC, K)
    check(load_sae(tmp_path / "autoencoder.pt"), features, (features @ W_DEC + B_DEC) * std + mean)


def test_openai_relu_is_read(tmp_path: Path):
    torch.save(OPENAI | {"activation": "ReLU"}, tmp_path / "autoencoder.pt")
    features = ((X - B_DEC) @ W_ENC.T + B_ENC).relu()
    check(load_sae(tmp_path / "autoencoder.pt", site="L2R", model="gpt2"), features, features @ W_DEC + B_DEC)


def test_gemma_scope_is_read(tmp_path: Path):
    arrays = {"W_enc": W_ENC.T, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC, "threshold": THRESHOLD}
    folder = tmp_path / "layer_20" / "width_16k"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})  # pyright: ignore
    features = jump(X @ W_ENC.T + B_ENC, THRESHOLD)
    for source in (folder, folder / "params.npz"):
        sae = load_sae(source, site="blocks.20.hook_resid_post", model="google/gemma-2-2b")
        check(sae, features, features @ W_DEC + B_DEC)
        assert (sae.config.site, sae.config.model) == ("L20.resid_post", "google/gemma-2-2b")


# ---------------------------------------------------------------------------------------------------------------------
# Where they are found
# ---------------------------------------------------------------------------------------------------------------------

SPARSIFY_TENSORS = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
SPARSIFY_CONFIG = {"activation": "topk", "k": K, "num_latents": LATENTS, "d_in": WIDTH, "transcode": False}


def test_from_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    repository = tmp_path / "models--org--saes"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    snapshot = repository / "snapshots" / "abc123"
    write(snapshot / "layers.10", SPARSIFY_TENSORS, SPARSIFY_CONFIG, "sae.safetensors", "cfg.json")
    (snapshot / "config.json").write_text(json.dumps({"model": "meta-llama/Llama-3.2-1B"}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    sae = load_sae("org/saes:layers.10")
    assert (sae.config.site, sae.config.model) == ("L10.resid_post", "meta-llama/Llama-3.2-1B")
    assert torch.equal(sae(X), load_sae("org/saes@main:layers.10/sae.safetensors")(X))
    with pytest.raises(InputError, match="org/saes: there is no SAE in this folder.*that hold one: layers.10"):
        load_sae("org/saes")
    with pytest.raises(InputError, match="org/saes has no layers.11"):
        load_sae("org/saes:layers.11")
    with pytest.raises(InputError, match="SAE 'org/nothing' is no file or folder here"):
        load_sae("org/nothing")


def test_ours_is_loaded_like_the_others(tiny_run: Path):
    ours, opened = load_sae(tiny_run / "sae"), open_sae(tiny_run / "sae")
    assert ours.config == opened.config
    assert all(torch.equal(a, b) for a, b in zip(ours.named().values(), opened.named().values(), strict=True))


def test_a_folder_without_an_sae(tmp_path: Path):
    with pytest.raises(InputError, match="there is no .*: give a folder, a file, or a Hub id such as org/name:folder"):
        load_sae(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"there is no SAE in this folder, none of manifest.json, .*; check the path"):
        load_sae(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"it ends in .txt; an SAE's file ends in .safetensors, .pt or .npz"):
        load_sae(tmp_path / "notes.txt")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------

SAELENS_TENSORS = {"W_enc": W_ENC.T, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
SAELENS_CONFIG = {"architecture": "standard", "d_in": WIDTH, "d_sae": LATENTS, "sae_lens_version": "6.54"}
NO_B_DEC = {name: tensor for name, tensor in SAELENS_TENSORS.items() if name != "b_dec"}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (NO_B_DEC, {}, "the tensor b_dec is missing; there are W_enc, b_enc"),
        ({"W_dec": W_DEC[:-1]}, {}, r"the encoder is \(40, 16\), the decoder \(39, 16\): expected one row for each"),
        ({"b_enc": B_ENC[:-1]}, {}, r"b_enc has shape \(39,\); expected \(40,\)"),
        ({"b_dec": normal(9)}, {}, r"b_pre has shape \(9,\); expected \(16,\)"),
        ({"W_extra": normal(3)}, {}, "the tensors W_extra are of an architecture that monosemy does not know"),
        ({}, {"d_sae": 99}, "the config has d_sae 99, but the tensors have 40: one of them is wrong"),
        ({}, {"d_in": 17}, "the config has d_in 17, but the tensors have 16"),
        ({}, {"architecture": "temporal"}, "the architecture temporal of SAELens is not known to monosemy"),
        ({}, {"architecture": "topk", "k": 41}, "k is 41, but there are only 40 latents"),
        ({}, {"architecture": "topk"}, "k is None; expected a whole number of latents"),
        ({}, {"architecture": "jumprelu"}, "the tensor threshold is missing"),
        ({}, {"activation_fn": "tanh-relu"}, "activation_fn tanh-relu of SAELens is not known"),
        ({}, {"finetuning_scaling_factor": True}, "finetuning_scaling_factor of SAELens is not known"),
        ({}, {"normalize_activations": "covariance_whitening"}, "normalize_activations covariance_whitening"),
        ({}, {"normalize_activations": "expected_average_only_in"}, "there is no activation_scaler.json"),
    ],
)
def test_bad_files_of_saelens(tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], message: str):
    tensors = tensors if tensors is NO_B_DEC else SAELENS_TENSORS | tensors
    write(tmp_path, tensors, SAELENS_CONFIG | config, "sae_weights.safetensors", "cfg.json")
    with pytest.raises(InputError, match=message) as caught:
        load_sae(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation": "groupmax"}, "the activation groupmax of sparsify is not known to monosemy; topk is"),
        ({"signed": True}, "the activation signed of sparsify is not known"),
        ({"num_latents": 41}, "the config has num_latents 41, but the tensors have 40"),
        ({"skip_connection": True}, "the tensor W_skip is missing"),
    ],
)
def test_bad_files_of_sparsify(tmp_path: Path, config: dict[str, Any], message: str):
    write(tmp_path, SPARSIFY_TENSORS, SPARSIFY_CONFIG | config, "sae.safetensors", "cfg.json")
    with pytest.raises(InputError, match=message):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dict_class": "IdentityDict"}, "the dict_class IdentityDict of dictionary_learning is not known"),
        ({"dict_class": "BatchTopKSAE", "k": K}, "the threshold of this BatchTopKSAE was never set"),
        (
            {"dict_class": "AutoEncoderTopK", "k": K, "dict_size": 9},
            "the config has dict_size 9, but the tensors",
        ),
        ({"dict_class": "AutoEncoderTopK", "k": 5}, "the config has k 5, but the tensors have 4"),
    ],
)
def test_bad_files_of_dictionary_learning(tmp_path: Path, config: dict[str, Any], message: str):
    tensors = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T, "b_dec": B_DEC}
    torch.save(tensors | {"k": torch.tensor(K), "threshold": torch.tensor(-1.0)}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": config}))
    with pytest.raises(InputError, match=message):
        load_sae(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"there is no config.json beside it"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_glu_encoder": True}, "a GLU encoder is not known"),
        ({"sae_type": "clt"}, "the sae_type clt of Llamascopium is not known"),
        ({"act_fn": "batchtopk"}, "the act_fn batchtopk of Llama Scope is not known"),
        ({"act_fn": "jumprelu"}, "the tensor activation_function.log_jumprelu_threshold is missing"),
        ({"norm_activation": "batch-wise"}, "norm_activation batch-wise of Llama Scope is not known"),
        ({"norm_activation": "dataset-wise"}, "dataset-wise, but the average norms of the activations are missing"),
        ({"d_model": 4096}, "the config has d_model 4096, but the tensors have 16"),
    ],
)
def test_bad_files_of_llamascopium(tmp_path: Path, config: dict[str, Any], message: str):
    write(tmp_path, SCOPIUM_TENSORS, SCOPIUM_CONFIG | config, "sae_weights.safetensors", "config.json")
    with pytest.raises(InputError, match=message):
        load_sae(tmp_path)


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this would have run",))


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save(OPENAI | {"activation": _Runs()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="evil.pt is a pickle that wants to run code, or is damaged, and was not read"):
        load_sae(tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Runs()))
    with pytest.raises(InputError, match="plain.pt"):
        load_sae(tmp_path / "plain.pt")
    assert "this would have run" not in capsys.readouterr().out


def test_damaged_files(tmp_path: Path):
    folder = write(tmp_path, SPARSIFY_TENSORS, SPARSIFY_CONFIG, "sae.safetensors", "cfg.json")
    content = (folder / "sae.safetensors").read_bytes()
    (folder / "sae.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="is not a complete safetensors file"):
        load_sae(folder)
    (folder / "sae.safetensors").write_bytes(content)
    (folder / "cfg.json").write_text("[1]")
    with pytest.raises(InputError, match="cfg.json holds a list; expected an object with the config"):
        load_sae(folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(InputError, match="cfg.json cannot be read"):
        load_sae(folder)
    (folder / "params.npz").write_bytes(b"no")
    with pytest.raises(InputError, match=r"params.npz is not a whole .npz file of numbers"):
        load_sae(folder / "params.npz")
    torch.save([1, 2], folder / "list.pt")
    with pytest.raises(InputError, match="list.pt holds a list; expected a dictionary of tensors"):
        load_sae(folder / "list.pt")


def test_a_site_that_is_none(tmp_path: Path):
    folder = write(tmp_path, SPARSIFY_TENSORS, SPARSIFY_CONFIG, "sae.safetensors", "cfg.json")
    with pytest.raises(InputError, match="'nowhere' is not a site"):
        load_sae(folder, site="nowhere")


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def convert(*arguments: str | Path) -> int:
    return main(["convert", *map(str, arguments)])


def test_there_and_back(tiny_run: Path, tiny_llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Ours -> SAELens -> ours: the same activations; the artifact is one that other commands take."""
    assert convert(tiny_run / "sae", tmp_path / "lens", "--to", "saelens") == 0
    assert convert(tmp_path / "lens", tmp_path / "back") == 0
    assert "64 latents of width 32, k = 4, at L1.resid_post of" in capsys.readouterr().err
    first, back, x = open_sae(tiny_run / "sae"), open_sae(tmp_path / "back", verify=True), 5 * normal(100, 32)
    assert torch.equal(first.encode(x).indices, back.encode(x).indices)
    torch.testing.assert_close(first(x), back(x))
    model, out = tiny_llama_folder, tmp_path / "metrics"
    tokens = tiny_run / "tokens"
    arguments = ["evaluate", "--sae", tmp_path / "back", "--tokens", tokens, "--out", out, "--model", model]
    assert main([*map(str, arguments)]) == 0
    assert convert(tmp_path / "lens", tmp_path / "back") == 0  # is complete already
    assert convert(tmp_path / "lens", tmp_path / "back", "--site", "L0R") == 2


def test_a_conversion_that_is_refused_leaves_nothing(tiny_run: Path, tmp_path: Path, capsys):
    assert convert(tiny_run / "sae", tmp_path / "out", "--to", "sparsify") == 2
    assert "sparsify cannot express normalize token (train with --normalize dataset)" in capsys.readouterr().err
    assert convert(tmp_path, tmp_path / "out") == 2
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_says_nothing_about_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save(OPENAI | {"activation": "ReLU"}, tmp_path / "autoencoder.pt")
    assert convert(tmp_path / "autoencoder.pt", tmp_path / "out") == 0
    assert "the files do not say which model or site it is of: give --model and --site" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("sparsify", "sparsify cannot express normalize token"),
        ("dictionary_learning", "dictionary_learning cannot express normalize token"),
        ("onnx", "'onnx' is not a format that can be written; saelens, sparsify, dictionary_learning are"),
    ],
)
def test_what_cannot_be_written(tiny_run: Path, tmp_path: Path, form: Any, message: str):
    with pytest.raises(InputError, match=message):
        write_foreign(open_sae(tiny_run / "sae"), tmp_path / "out", form)
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_is_not_overwritten(tiny_run: Path, tmp_path: Path):
    write_foreign(open_sae(tiny_run / "sae"), tmp_path / "out", "saelens")
    with pytest.raises(InputError, match="out is there already: choose another folder, or remove it first"):
        write_foreign(open_sae(tiny_run / "sae"), tmp_path / "out", "saelens")
