"""Our SAEs in the files of SAELens, sparsify and dictionary_learning, which then compute the same.

What a format has no room for (a normalisation, thresholds, a skip path) is refused by name, never approximated. These
rewritings are exact: a bias that the format does not subtract from the input is folded into the encoder's,
b_enc - W_enc b_pre, and a skip path's share of it into the output bias, b_dec - W_skip b_pre.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from monosemy.artifact import atomic, to_json, write_tensors, write_text
from monosemy.llm.sites import Site
from monosemy.runtime import InputError
from monosemy.sae.autoencoder import SAE

ForeignFormat = Literal["saelens", "sparsify", "dictionary_learning"]


def write_foreign(sae: SAE, folder: Path, form: str) -> None:
    """Write `sae` into the new folder `folder`, whole or not at all.

    Raises:
        InputError: the format cannot express it, or the folder is there already.
    """
    if form not in get_args(ForeignFormat):
        raise InputError(f"{form!r} is not a format that can be written; {', '.join(get_args(ForeignFormat))} are")
    if folder.exists():
        raise InputError(f"{folder} is there already: choose another folder, or remove it first")
    write = {"saelens": _write_saelens, "sparsify": _write_sparsify, "dictionary_learning": _write_dictionary_learning}
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write[form](sae, partial)
        partial.rename(folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_transcoder(sae: SAE) -> bool:
    return sae.config.target_site is not None


def _unsubtracted(sae: SAE) -> tuple[Tensor, Tensor]:
    """(b_enc, b_dec) for a format that takes nothing from the input."""
    of = sae.parameters
    b_dec = of.output_bias if of.W_skip is None else of.output_bias - of.W_skip @ of.b_pre
    return of.b_enc - of.W_enc @ of.b_pre, b_dec


def _refuse(sae: SAE, form: str, what: str) -> InputError:
    return InputError(f"{form} cannot express {what}, which this SAE of {sae.config.site} has")


def _hook(site: str) -> str:
    """TransformerLens' name of a site."""
    try:
        found = Site.parse(site)
    except InputError:
        return site
    return f"blocks.{found.layer}." + ("ln2.hook_normalized" if found.point == "mlp_in" else f"hook_{found.point}")


def _write_saelens(sae: SAE, folder: Path) -> None:
    of, config, transcoder = sae.parameters, sae.config, _is_transcoder(sae)
    if transcoder and config.normalize != "none":
        raise _refuse(sae, "SAELens", f"a transcoder with normalize {config.normalize}")
    if transcoder and config.activation == "topk":
        raise _refuse(sae, "SAELens", "a TopK transcoder (train with --jumprelu)")
    if not transcoder and of.W_skip is not None:
        raise _refuse(sae, "SAELens", "an autoencoder with a skip path")
    subtracted = not transcoder and of.b_dec is None
    b_enc, b_dec = (of.b_enc, of.b_pre) if subtracted else _unsubtracted(sae)
    tensors = {"W_enc": of.W_enc.T, "b_enc": b_enc, "W_dec": of.W_dec, "b_dec": b_dec}
    architecture = {"topk": "topk", "jumprelu": "jumprelu", "relu": "standard"}[config.activation]
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
    if transcoder:
        kind = "skip_transcoder" if of.W_skip is not None else "transcoder"
        architecture = f"jumprelu_{kind}" if config.activation == "jumprelu" else kind
        tensors |= {} if of.W_skip is None else {"W_skip": of.W_skip}
    normalize = {"none": "none", "token": "layer_norm", "constant_norm": "constant_norm_rescale"}[config.normalize]
    settings: dict[str, Any] = {
        "architecture": architecture, "d_in": config.d_model, "d_sae": config.n_latents, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": subtracted, "normalize_activations": normalize,
        "reshape_activations": "none", "metadata": _saelens_metadata(sae),
    }  # fmt: skip
    settings |= {"k": config.k, "rescale_acts_by_decoder_norm": False} if config.activation == "topk" else {}
    settings |= {"d_out": config.d_model} if transcoder else {}
    write_tensors(folder / "sae_weights.safetensors", tensors)
    write_text(folder / "cfg.json", to_json(settings))


def _saelens_metadata(sae: SAE) -> dict[str, Any]:
    config = sae.config
    found = {"model_name": config.model, "hook_name": _hook(config.site), "sae_lens_version": "6.0.0"}
    return found | ({} if config.target_site is None else {"hook_name_out": _hook(config.target_site)})


def _write_sparsify(sae: SAE, folder: Path) -> None:
    of, config, transcoder = sae.parameters, sae.config, _is_transcoder(sae)
    if config.activation != "topk":
        raise _refuse(sae, "sparsify", f"the activation {config.activation}")
    if config.normalize != "none":
        raise _refuse(sae, "sparsify", f"normalize {config.normalize} (train with --normalize dataset)")
    if not transcoder and of.b_dec is not None and of.W_skip is None:
        raise _refuse(sae, "sparsify", "an output bias other than the input's")
    if not transcoder and of.W_skip is not None:
        raise _refuse(sae, "sparsify", "an autoencoder with a skip path")
    b_enc, b_dec = _unsubtracted(sae) if transcoder else (of.b_enc, of.b_pre)
    tensors = {"encoder.weight": of.W_enc, "encoder.bias": b_enc, "W_dec": of.W_dec, "b_dec": b_dec}
    tensors |= {} if of.W_skip is None else {"W_skip": of.W_skip}
    unit = torch.allclose(of.W_dec.norm(dim=1), torch.ones(config.n_latents), atol=1e-3)
    settings = {
        "activation": "topk", "expansion_factor": max(1, config.n_latents // config.d_model),
        "normalize_decoder": unit, "num_latents": config.n_latents, "k": config.k, "multi_topk": False,
        "skip_connection": of.W_skip is not None, "transcode": transcoder, "d_in": config.d_model,
    }  # fmt: skip
    write_tensors(folder / "sae.safetensors", tensors)
    write_text(folder / "cfg.json", to_json(settings))


def _write_dictionary_learning(sae: SAE, folder: Path) -> None:
    of, config = sae.parameters, sae.config
    if _is_transcoder(sae) or of.W_skip is not None:
        raise _refuse(sae, "dictionary_learning", "a target site or a skip path")
    if config.normalize != "none":
        raise _refuse(sae, "dictionary_learning", f"normalize {config.normalize} (train with --normalize dataset)")
    if (kind := _dictionary_class(sae)) in ("AutoEncoderTopK", "BatchTopKSAE", "AutoEncoder") and of.b_dec is not None:
        raise _refuse(sae, "dictionary_learning", f"an output bias of its own in a {kind}")
    linear = {"encoder.weight": of.W_enc, "encoder.bias": of.b_enc, "decoder.weight": of.W_dec.T}
    match kind:
        case "AutoEncoder":
            tensors = linear | {"bias": of.b_pre}
        case "AutoEncoderTopK":
            tensors = linear | {"b_dec": of.b_pre, "k": torch.tensor(config.k).int(), "threshold": torch.tensor(-1.0)}
        case "BatchTopKSAE":
            assert sae.threshold is not None
            tensors = linear | {"b_dec": of.b_pre, "k": torch.tensor(config.k).int(), "threshold": sae.threshold[0]}
        case _:
            assert sae.threshold is not None
            b_enc, b_dec = _unsubtracted(sae)
            tensors = {"W_enc": of.W_enc.T, "b_enc": b_enc, "W_dec": of.W_dec, "b_dec": b_dec}
            tensors |= {"threshold": sae.threshold}
    try:
        site = Site.parse(config.site)
        place = {"layer": site.layer, "submodule_name": f"{site.point}_layer_{site.layer}"}
    except InputError:
        place = {"layer": None, "submodule_name": config.site}
    trainer = {
        "dict_class": kind, "activation_dim": config.d_model, "dict_size": config.n_latents, "k": config.k,
        "lm_name": config.model, **place,
    }  # fmt: skip
    _write_pickle(folder / "ae.pt", tensors)
    write_text(folder / "config.json", to_json({"trainer": trainer}))


def _dictionary_class(sae: SAE) -> str:
    if sae.config.activation == "topk":
        return "AutoEncoderTopK"
    if sae.threshold is None:
        return "AutoEncoder"
    one_for_all = bool((sae.threshold == sae.threshold[0]).all()) and sae.parameters.b_dec is None
    return "BatchTopKSAE" if one_for_all else "JumpReluAutoEncoder"


def _write_pickle(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with atomic(path) as temporary:
        torch.save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary)
