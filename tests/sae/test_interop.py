"""SAEs of other libraries, written and read by the libraries themselves: `make interop` installs them.

Both ways, on activations of the tiny Llama: latents and reconstructions equal to 1e-5 of the largest, in float32.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from monosemy import options
from monosemy.activations.store import open_activations
from monosemy.activations.stream import Stream
from monosemy.sae import train
from monosemy.sae.autoencoder import SAE, open_sae
from monosemy.sae.foreign import load_sae
from monosemy.sae.settings import TrainConfig
from monosemy.sae.writers import write_foreign

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]  # the libraries' own warnings

WIDTH, LATENTS, K = 32, 48, 5


@pytest.fixture(scope="module")
def x(tiny_run: Path) -> Tensor:
    """Activations at L1.resid_post, without the sinks."""
    store = open_activations(tiny_run / "activations")
    return Stream(store, store.sites[0], 512, 0).batches(0)[0].float()


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs.detach().float(), rtol=0, atol=1e-5 * theirs.abs().max().item())


def randomize(module: torch.nn.Module, x: Tensor) -> None:
    """Weights as of a trained SAE: every part matters, and about half of the latents are positive on a row."""
    random = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and "threshold" not in name:
            size = 1 / WIDTH**0.5 if tensor.ndim == 2 else 0.2
            tensor.copy_(torch.randn(tensor.shape, generator=random) * size)
    for name, tensor in module.state_dict().items():
        if name in ("b_dec", "bias", "decoder_bias", "decoder.bias") and len(tensor) == WIDTH:
            tensor.copy_(x.mean(dim=0))
        if "threshold" in name:
            tensor.copy_(torch.rand(tensor.shape, generator=random) if tensor.ndim else torch.tensor(0.8))


# ---------------------------------------------------------------------------------------------------------------------
# SAELens
# ---------------------------------------------------------------------------------------------------------------------

SAELENS = {
    "standard": ("StandardSAE", {}),
    "gated": ("GatedSAE", {}),
    "topk": ("TopKSAE", {"k": K}),
    "jumprelu": ("JumpReLUSAE", {}),
    "transcoder": ("Transcoder", {"apply_b_dec_to_input": False, "d_out": WIDTH}),
    "skip_transcoder": ("SkipTranscoder", {"apply_b_dec_to_input": False, "d_out": WIDTH}),
    "jumprelu_transcoder": ("JumpReLUTranscoder", {"apply_b_dec_to_input": False, "d_out": WIDTH}),
    "jumprelu_skip_transcoder": ("JumpReLUSkipTranscoder", {"apply_b_dec_to_input": False, "d_out": WIDTH}),
}
OTHER_OPTIONS = [
    ("standard", {"apply_b_dec_to_input": False}),
    ("standard", {"normalize_activations": "layer_norm"}),
    ("topk", {"normalize_activations": "layer_norm"}),
    ("topk", {"normalize_activations": "constant_norm_rescale"}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("gated", {"apply_b_dec_to_input": False}),
    ("jumprelu", {"apply_b_dec_to_input": False}),
]


@pytest.mark.parametrize(("architecture", "changes"), [*((name, {}) for name in SAELENS), *OTHER_OPTIONS])
def test_saelens_is_read(x: Tensor, tmp_path: Path, architecture: str, changes: dict[str, Any]):
    import sae_lens
    from sae_lens.saes import transcoder

    class_name, settings = SAELENS[architecture]
    module = transcoder if "ranscoder" in class_name else sae_lens
    kind, config_kind = getattr(module, class_name), getattr(module, f"{class_name}Config")
    theirs = kind(config_kind(d_in=WIDTH, d_sae=LATENTS, **settings | changes))
    theirs.cfg.metadata.hook_name, theirs.cfg.metadata.model_name = "blocks.1.hook_resid_post", "tiny"
    randomize(theirs, x)
    theirs.save_model(tmp_path)
    sae = load_sae(tmp_path)
    assert (sae.config.site, sae.config.model) == ("L1.resid_post", "tiny")
    code, features = sae.encode(x), theirs.encode(x)
    assert_same(code.dense(LATENTS), features)
    assert (features > 0).float().mean() > 0.02
    assert_same(sae.decode(code, x), theirs.decode(features) if "skip" not in architecture else theirs(x))


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rescale", [True, False])
def test_saelens_trainings_of_batch_topk_are_read(x: Tensor, tmp_path: Path, kind: str, rescale: bool):
    """A checkpoint in the middle of training, and what SAELens makes of it in the end, are the same."""
    import sae_lens

    name = {"batchtopk": "BatchTopK", "matryoshka_batchtopk": "MatryoshkaBatchTopK"}[kind]
    widths = {"matryoshka_widths": [16, LATENTS]} if "matryoshka" in kind else {}
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(
        d_in=WIDTH, d_sae=LATENTS, k=K, rescale_acts_by_decoder_norm=rescale, **widths
    )
    theirs = getattr(sae_lens, f"{name}TrainingSAE")(config)
    randomize(theirs, x)
    theirs.save_model(tmp_path / "checkpoint")
    theirs.save_inference_model(tmp_path / "final")
    final = sae_lens.SAE.load_from_disk(tmp_path / "final")
    for sae in (load_sae(tmp_path / "final"), load_sae(tmp_path / "checkpoint")):
        assert_same(sae.encode(x).dense(LATENTS), final.encode(x))
        assert_same(sae(x), final(x))


def test_saelens_before_version_6_is_read(x: Tensor, tmp_path: Path):
    import sae_lens

    theirs = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=K))
    randomize(theirs, x)
    theirs.save_model(tmp_path)
    old = {
        "d_in": WIDTH, "d_sae": LATENTS, "dtype": "float32", "device": "cpu", "hook_point": "blocks.1.hook_resid_post",
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "model_name": "tiny",
        "normalize_activations": False,
    }  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    sae, again = load_sae(tmp_path), sae_lens.SAE.load_from_disk(tmp_path)
    assert sae.config.site == "L1.resid_post"
    assert_same(sae.encode(x).dense(LATENTS), again.encode(x))
    assert_same(sae(x), again(x))


def test_saelens_scale_that_is_not_folded_yet(x: Tensor, tmp_path: Path):
    """A checkpoint with its activation_scaler.json is what SAELens folds at the end."""
    import sae_lens

    settings = {"d_in": WIDTH, "d_sae": LATENTS, "normalize_activations": "expected_average_only_in"}
    theirs = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**settings))
    randomize(theirs, x)
    theirs.save_model(tmp_path)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.37}))
    theirs.fold_activation_norm_scaling_factor(0.37)
    sae = load_sae(tmp_path)
    assert_same(sae.encode(x).dense(LATENTS), theirs.encode(x))
    assert_same(sae(x), theirs(x))


# ---------------------------------------------------------------------------------------------------------------------
# sparsify
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("transcode", "skip"), [(False, False), (False, True), (True, False), (True, True)])
def test_sparsify_is_read(x: Tensor, tmp_path: Path, transcode: bool, skip: bool):
    from sparsify import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    config = SparseCoderConfig(num_latents=LATENTS, k=K, transcode=transcode, skip_connection=skip)
    theirs = SparseCoder(WIDTH, config)
    randomize(theirs, x)
    folder = tmp_path / "layers.1.mlp"
    theirs.save_to_disk(folder)
    (tmp_path / "config.json").write_text(json.dumps({"model": "tiny"}))
    sae = load_sae(folder)
    sites = ("L1.mlp_in", "L1.mlp_out") if transcode else ("L1.mlp_out", None)
    assert (sae.config.site, sae.config.target_site, sae.config.model) == (*sites, "tiny")
    code, output = sae.encode(x), theirs(x)
    dense = torch.zeros(len(x), LATENTS).scatter_(1, output.latent_indices, output.latent_acts.detach())
    assert_same(code.dense(LATENTS), dense)
    assert_same(sae.decode(code, x), output.sae_out)


# ---------------------------------------------------------------------------------------------------------------------
# dictionary_learning
# ---------------------------------------------------------------------------------------------------------------------


def dictionary_classes() -> dict[str, Any]:
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    return {
        "AutoEncoder": lambda: dictionary.AutoEncoder(WIDTH, LATENTS),
        "AutoEncoderNew": lambda: dictionary.AutoEncoderNew(WIDTH, LATENTS),
        "GatedAutoEncoder": lambda: dictionary.GatedAutoEncoder(WIDTH, LATENTS),
        "JumpReluAutoEncoder": lambda: dictionary.JumpReluAutoEncoder(WIDTH, LATENTS),
        "AutoEncoderTopK": lambda: top_k.AutoEncoderTopK(WIDTH, LATENTS, K),
        "BatchTopKSAE": lambda: batch_top_k.BatchTopKSAE(WIDTH, LATENTS, K),
        "MatryoshkaBatchTopKSAE": lambda: matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(WIDTH, LATENTS, K, [16, 32]),
    }


DICTIONARIES = (
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)  # fmt: skip


def save_dictionary(module: Any, folder: Path, **extra: Any) -> None:
    trainer = {
        "dict_class": type(module).__name__, "activation_dim": WIDTH, "dict_size": LATENTS, "k": K, "layer": 1,
        "lm_name": "tiny", "submodule_name": "resid_post_layer_1",
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    torch.save(extra.pop("content", module.state_dict()), folder / "ae.pt")


@pytest.mark.parametrize("name", DICTIONARIES)
def test_dictionary_learning_is_read(x: Tensor, tmp_path: Path, name: str):
    from dictionary_learning.utils import load_dictionary

    module = dictionary_classes()[name]()
    randomize(module, x)
    save_dictionary(module, tmp_path)
    theirs, _ = load_dictionary(str(tmp_path), "cpu")
    sae = load_sae(tmp_path)
    assert (sae.config.site, sae.config.model) == ("L1.resid_post", "tiny")
    assert_same(sae.encode(x).dense(LATENTS), theirs.encode(x))
    assert_same(sae(x), theirs(x))


@pytest.mark.parametrize("name", DICTIONARIES)
def test_a_backup_of_dictionary_learning_is_read(x: Tensor, tmp_path: Path, name: str, capsys):
    """Its biases are of divided activations: they are scaled as the end of the training would have."""
    from dictionary_learning.utils import load_dictionary

    module = dictionary_classes()[name]()
    randomize(module, x)
    save_dictionary(module, tmp_path / "backup", content={"step": 7, "ae": module.state_dict(), "norm_factor": 2.5})
    with torch.no_grad():
        if name == "AutoEncoderNew":  # has no scale_biases: what its trainer would need
            module.encoder.bias *= 2.5
            module.decoder.bias *= 2.5
        else:
            module.scale_biases(2.5)
    save_dictionary(module, tmp_path / "final")
    theirs, _ = load_dictionary(str(tmp_path / "final"), "cpu")
    sae = load_sae(tmp_path / "backup")
    assert "interrupted at step 7" in capsys.readouterr().err
    assert_same(sae.encode(x).dense(LATENTS), theirs.encode(x))
    assert_same(sae(x), theirs(x))


# ---------------------------------------------------------------------------------------------------------------------
# Ours, in their hands
# ---------------------------------------------------------------------------------------------------------------------

OURS: dict[str, dict[str, Any]] = {
    "topk": {"normalize": "none"},
    "token": {},
    "dataset": {"normalize": "dataset"},
    "jumprelu": {"normalize": "none", "jumprelu": True},
    "relu": {"normalize": "none", "activation": "relu", "l1": 0.3},
}


@pytest.fixture(scope="module")
def trained(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SAE]:
    """SAEs of ours, trained on real activations."""
    saes, folder = {}, tmp_path_factory.mktemp("ours")
    for name, changes in OURS.items():
        sizes = {"n_latents": LATENTS, "k": K, "train_tokens": 6000, "batch_size": 256}
        places = {"activations": tiny_run / "activations", "out": folder / name}
        train.run(options.build(TrainConfig, sizes | places | changes))
        sae = saes[name] = open_sae(folder / name)
        if sae.threshold is not None:  # it was the activation of some row: there, rounding would decide
            sae.threshold = sae.threshold * 1.001
    return saes


def with_skip(sae: SAE) -> SAE:
    """A transcoder with a skip path, of the same weights."""
    from dataclasses import replace

    of, random = sae.parameters, torch.Generator().manual_seed(0)
    skip = torch.randn(WIDTH, WIDTH, generator=random) / WIDTH
    config = replace(sae.config, site="L1.mlp_in", target_site="L1.mlp_out")
    return SAE(config, of._replace(b_dec=of.b_pre + 1, W_skip=skip), sae.threshold)


@pytest.mark.parametrize("name", OURS)
def test_ours_in_saelens(trained: dict[str, SAE], x: Tensor, tmp_path: Path, name: str):
    import sae_lens

    sae = trained[name]
    write_foreign(sae, tmp_path / "out", "saelens")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "out")
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    code = sae.encode(x)
    assert_same(code.dense(LATENTS), theirs.encode(x))
    assert_same(sae.decode(code), theirs(x))
    assert_same(load_sae(tmp_path / "out")(x), sae(x))


@pytest.mark.parametrize("name", ["jumprelu", "relu"])
def test_our_transcoders_in_saelens(trained: dict[str, SAE], x: Tensor, tmp_path: Path, name: str):
    import sae_lens

    sae = with_skip(trained[name])
    write_foreign(sae, tmp_path / "out", "saelens")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "out")
    assert_same(sae.encode(x).dense(LATENTS), theirs.encode(x))
    assert_same(sae(x), theirs(x))


@pytest.mark.parametrize("transcoder", [False, True])
def test_ours_in_sparsify(trained: dict[str, SAE], x: Tensor, tmp_path: Path, transcoder: bool):
    from sparsify.sparse_coder import SparseCoder

    sae = with_skip(trained["topk"]) if transcoder else trained["topk"]
    write_foreign(sae, tmp_path / "layers.1", "sparsify")
    output = SparseCoder.load_from_disk(tmp_path / "layers.1")(x)
    dense = torch.zeros(len(x), LATENTS).scatter_(1, output.latent_indices, output.latent_acts.detach())
    assert_same(sae.encode(x).dense(LATENTS), dense)
    assert_same(sae(x), output.sae_out)


@pytest.mark.parametrize("name", ["topk", "dataset", "jumprelu", "relu"])
def test_ours_in_dictionary_learning(trained: dict[str, SAE], x: Tensor, tmp_path: Path, name: str):
    from dictionary_learning.utils import load_dictionary

    sae = trained[name]
    write_foreign(sae, tmp_path / "out", "dictionary_learning")
    theirs, config = load_dictionary(str(tmp_path / "out"), "cpu")
    assert config["trainer"]["lm_name"] == sae.config.model
    assert_same(sae.encode(x).dense(LATENTS), theirs.encode(x))
    assert_same(sae(x), theirs(x))


def test_thresholds_of_each_latent_in_dictionary_learning(trained: dict[str, SAE], x: Tensor, tmp_path: Path):
    from dictionary_learning.utils import load_dictionary

    of = trained["jumprelu"]
    assert of.threshold is not None
    sae = SAE(of.config, of.parameters, of.threshold * torch.linspace(0.5, 1.5, LATENTS))
    write_foreign(sae, tmp_path / "out", "dictionary_learning")
    theirs, _ = load_dictionary(str(tmp_path / "out"), "cpu")
    assert type(theirs).__name__ == "JumpReluAutoEncoder"
    assert_same(sae.encode(x).dense(LATENTS), theirs.encode(x))
    assert_same(sae(x), theirs(x))
