"""What other libraries' files mean: tensors and config of each format -> an `SAE` that computes the same.

One function per format, called by `foreign`. Latent activations and reconstructions are those of the library itself,
with these exact rewritings:

- A bias that is not subtracted from the input is `b_dec`, with `b_pre` 0.
- Scales of activations are folded into the weights, so that raw rows go in and come out.
- Where latents are ranked or gated by activation x decoder norm, the norm is folded into the encoder: directions become
  unit vectors and activations absorb the norms. (So does `rescale_acts_by_decoder_norm` in SAELens itself.)
- A gated SAE is a JumpReLU (Rajamanoharan et al. 2024, arXiv 2404.16014): with the magnitude m = exp(r) z + b, the
  gate z + c > 0 is m > b - exp(r) c.

What cannot be rewritten is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from monosemy.kernels.types import Parameters
from monosemy.llm.sites import Site
from monosemy.runtime import InputError
from monosemy.sae.autoencoder import SAE, Normalization, SAEConfig, folded

Activation = Literal["topk", "jumprelu", "relu"]


class Tensors:
    """The tensors of a file: taken by name, in float32, each once; what is left over was not understood."""

    def __init__(self, found: Mapping[str, Tensor]) -> None:
        self.left = dict(found)

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str) -> Tensor:
        if name not in self.left:
            raise InputError(f"the tensor {name} is missing; there are {', '.join(sorted(self.left)) or 'none'}")
        return self.left.pop(name).detach().float().contiguous()

    def maybe(self, name: str) -> Tensor | None:
        return self.take(name) if name in self else None

    def drop(self, *names: str) -> None:
        """What is only for training, or said twice."""
        for name in names:
            self.left.pop(name, None)

    def check_nothing_left(self) -> None:
        if self.left:
            raise InputError(
                f"the tensors {', '.join(sorted(self.left))} are of an architecture that monosemy does not know"
            )


def site_name(name: Any) -> str:
    """Our name of the site that another library calls `name`; its own where we have none."""
    try:
        return str(Site.parse(str(name)))
    except InputError:
        return str(name or "unknown")


def agree(config: Mapping[str, Any], **found: int) -> None:
    """Raise `InputError` if a key of the config that is there says something else than the tensors."""
    for key, value in found.items():
        if config.get(key) not in (None, 0, value):
            raise InputError(f"the config has {key} {config[key]}, but the tensors have {value}: one of them is wrong")


def build(
    *,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    subtracted: bool,
    activation: Activation = "relu",
    k: int | None = None,
    threshold: Tensor | None = None,
    W_skip: Tensor | None = None,
    normalize: Normalization = "none",
    site: Any = None,
    target_site: Any = None,
    model: Any = None,
) -> SAE:
    """Rows of `W_enc` and `W_dec` are latents. `subtracted`: whether `b_dec` is taken from the input of the encoder.
    `W_skip` is applied to the input as it is."""
    if W_enc.ndim != 2 or W_dec.shape != W_enc.shape:
        expected = f"one row for each latent in both, of one width, with {len(b_enc)} latents"
        raise InputError(f"the encoder is {tuple(W_enc.shape)}, the decoder {tuple(W_dec.shape)}: expected {expected}")
    W_enc, W_dec, (n_latents, width) = W_enc.contiguous(), W_dec.contiguous(), W_enc.shape
    b_pre, bias = (b_dec, None) if subtracted else (torch.zeros(width), b_dec)
    if W_skip is not None and subtracted:
        bias = b_dec + W_skip @ b_pre
    config = SAEConfig(
        d_model=width, n_latents=n_latents, k=n_latents if k is None else int(k), site=site_name(site),
        model=str(model or "unknown"), normalize=normalize, activation=activation,
        target_site=None if target_site is None else site_name(target_site),
    )  # fmt: skip
    if threshold is not None:
        threshold = threshold.expand(n_latents).clamp(min=0).contiguous()
    tensors = (W_enc, b_enc, W_dec, b_pre, *(() if bias is None else (bias,)))
    return SAE(config, Parameters(*tensors, W_skip=W_skip), threshold)


def scaled(sae: SAE, input_scale: float, output_scale: float) -> SAE:
    """`sae` for raw rows, if it was made for input_scale x them and gives output_scale x what is wanted."""
    of = sae.parameters
    parameters = of._replace(
        W_enc=of.W_enc * input_scale,
        W_dec=of.W_dec / output_scale,
        b_pre=of.b_pre / input_scale,
        b_dec=None if of.b_dec is None else of.b_dec / output_scale,
        W_skip=None if of.W_skip is None else of.W_skip * (input_scale / output_scale),
    )
    return SAE(sae.config, parameters, sae.threshold)


def norms_folded(sae: SAE) -> SAE:
    """`sae` with unit directions; thresholds are taken as of activation x norm already."""
    return SAE(sae.config, folded(sae.parameters), sae.threshold)


def gated(W_enc: Tensor, r_mag: Tensor, b_gate: Tensor, b_mag: Tensor) -> dict[str, Any]:
    """Encoder and thresholds of the JumpReLU that a gated SAE is; `W_enc` has latents as rows."""
    gain = r_mag.exp()
    return {
        "W_enc": W_enc * gain[:, None], "b_enc": b_mag, "threshold": b_mag - gain * b_gate, "activation": "jumprelu",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# SAELens
# ---------------------------------------------------------------------------------------------------------------------

RENAMED = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
"""Keys of configs before version 6."""


def read_saelens(tensors: Tensors, config: Mapping[str, Any], scaling_factor: float | None = None) -> SAE:
    """`scaling_factor`: what the activations of a checkpoint in the middle of training are multiplied by."""
    config = {RENAMED.get(key, key): value for key, value in config.items()}
    metadata = config | (config.get("metadata") or {})
    architecture, activation_fn = config.get("architecture", "standard"), config.get("activation_fn", "relu")
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    if activation_fn == "topk":
        architecture = "topk"
    elif activation_fn != "relu":
        raise InputError(f"activation_fn {activation_fn} of SAELens is not known to monosemy; relu and topk are")
    if config.get("finetuning_scaling_factor"):
        raise InputError("finetuning_scaling_factor of SAELens is not known to monosemy: fold it into W_dec first")

    is_transcoder = "transcoder" in architecture
    built: dict[str, Any] = {
        "W_dec": tensors.take("W_dec"),
        "b_dec": tensors.take("b_dec"),
        "subtracted": not is_transcoder and config.get("apply_b_dec_to_input", True),
        "normalize": _saelens_normalization(config, is_transcoder),
        "site": metadata.get("hook_name"),
        "target_site": metadata.get("hook_name_out") or ("unknown" if is_transcoder else None),
        "model": metadata.get("model_name"),
        "W_skip": tensors.take("W_skip") if "skip_transcoder" in architecture else None,
    }
    W_enc = tensors.take("W_enc").T
    match architecture:
        case "standard" | "transcoder" | "skip_transcoder":
            built |= {"W_enc": W_enc, "b_enc": tensors.take("b_enc")}
        case "topk":
            built |= {"W_enc": W_enc, "b_enc": tensors.take("b_enc"), "activation": "topk", "k": _k(k)}
        case "jumprelu" | "jumprelu_transcoder" | "jumprelu_skip_transcoder":
            built |= {"W_enc": W_enc, "b_enc": tensors.take("b_enc"), "threshold": tensors.take("threshold")}
            built["activation"] = "jumprelu"
        case "batchtopk" | "matryoshka_batchtopk":  # a checkpoint of their training
            built |= {"W_enc": W_enc, "b_enc": tensors.take("b_enc"), "threshold": tensors.take("topk_threshold")}
            built["activation"] = "jumprelu"
        case "gated":
            built |= gated(W_enc, tensors.take("r_mag"), tensors.take("b_gate"), tensors.take("b_mag"))
        case _:
            raise InputError(f"the architecture {architecture} of SAELens is not known to monosemy")
    tensors.check_nothing_left()
    sae = build(**built)
    agree(config, d_in=sae.config.d_model, d_sae=sae.config.n_latents, d_out=sae.config.d_model)
    by_norm = config.get("rescale_acts_by_decoder_norm", "batchtopk" in architecture)
    if config.get("normalize_activations") in ("expected_average_only_in", True):
        if scaling_factor is None:
            raise InputError(
                "normalize_activations is expected_average_only_in, not folded into the weights, and there is no "
                "activation_scaler.json that says by how much: save the SAE with SAELens' fold_activation_norm_"
                "scaling_factor applied"
            )
        sae = scaled(sae, scaling_factor, scaling_factor)
        if sae.threshold is not None and by_norm:
            sae.threshold = sae.threshold / scaling_factor
    return norms_folded(sae) if by_norm else sae


def _saelens_normalization(config: Mapping[str, Any], is_transcoder: bool) -> Normalization:
    name = config.get("normalize_activations") or "none"
    ours: dict[Any, Normalization] = {
        "none": "none", "expected_average_only_in": "none", True: "none",
        "layer_norm": "token", "constant_norm_rescale": "constant_norm",
    }  # fmt: skip
    if name not in ours or (is_transcoder and ours[name] != "none"):
        what = "a transcoder with " if is_transcoder else ""
        raise InputError(f"{what}normalize_activations {name} of SAELens is not known to monosemy")
    return ours[name]


def _k(value: Any) -> int:
    if not isinstance(value, int | float) or value < 1 or value != int(value):
        raise InputError(f"k is {value}; expected a whole number of latents, at least 1")
    return int(value)


# ---------------------------------------------------------------------------------------------------------------------
# sparsify, dictionary_learning
# ---------------------------------------------------------------------------------------------------------------------


def read_sparsify(tensors: Tensors, config: Mapping[str, Any], hookpoint: str, run: Mapping[str, Any]) -> SAE:
    """`hookpoint`: the folder's name; `run`: the config of the whole training, if there is one."""
    activation = config.get("activation", "topk")
    if activation != "topk" or config.get("signed"):
        name = "signed" if config.get("signed") else activation
        raise InputError(f"the activation {name} of sparsify is not known to monosemy; topk is")
    transcode = bool(config.get("transcode"))
    hook = hookpoint.removeprefix("model.")
    is_mlp = hook.endswith(".mlp")
    source = site_name(hook.removesuffix(".mlp")).replace("resid_post", "mlp_in") if is_mlp else "unknown"
    sae = build(
        W_enc=tensors.take("encoder.weight"), b_enc=tensors.take("encoder.bias"), W_dec=tensors.take("W_dec"),
        b_dec=tensors.take("b_dec"), W_skip=tensors.take("W_skip") if config.get("skip_connection") else None,
        subtracted=not transcode, activation="topk", k=_k(config.get("k")), model=run.get("model"),
        site=source if transcode else hook, target_site=hook if transcode else None,
    )  # fmt: skip
    tensors.check_nothing_left()
    agree(config, d_in=sae.config.d_model, num_latents=sae.config.n_latents)
    return sae


def read_dictionary_learning(tensors: Tensors, config: Mapping[str, Any], norm_factor: float = 1.0) -> SAE:
    """`norm_factor`: what activations were divided by, if the biases are not yet scaled back (a backup's)."""
    trainer = config.get("trainer", {})
    kind = trainer.get("dict_class")
    name, layer = str(trainer.get("submodule_name") or "unknown"), trainer.get("layer")
    site = f"L{layer}.resid_post" if "resid" in name and isinstance(layer, int) else name
    built: dict[str, Any] = {"model": trainer.get("lm_name"), "site": site}
    take = tensors.take
    match kind:
        case "AutoEncoder" | "AutoEncoderNew" | "AutoEncoderTopK" | "BatchTopKSAE":
            built |= {"W_enc": take("encoder.weight"), "b_enc": take("encoder.bias"), "W_dec": take("decoder.weight").T}
            bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")
            built |= {"b_dec": take(bias), "subtracted": kind != "AutoEncoderNew"}
        case "MatryoshkaBatchTopKSAE" | "JumpReluAutoEncoder":
            built |= {"W_enc": take("W_enc").T, "b_enc": take("b_enc"), "W_dec": take("W_dec"), "b_dec": take("b_dec")}
            built |= {"subtracted": kind != "JumpReluAutoEncoder"}
        case "GatedAutoEncoder":
            built |= gated(take("encoder.weight"), take("r_mag"), take("gate_bias"), take("mag_bias"))
            built |= {"W_dec": take("decoder.weight").T, "b_dec": take("decoder_bias")}
            built |= {"subtracted": True}
        case _:
            raise InputError(f"the dict_class {kind} of dictionary_learning is not known to monosemy")
    match kind:
        case "AutoEncoderTopK":
            built |= {"activation": "topk", "k": _k(trainer.get("k"))}
            agree(trainer, k=int(take("k")) if "k" in tensors else built["k"])
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            built |= {"activation": "jumprelu", "k": _k(trainer.get("k")), "threshold": take("threshold")}
            if built["threshold"] < 0:
                raise InputError(
                    f"the threshold of this {kind} was never set (it is -1), so it has no activation of single rows: "
                    "train it past threshold_start_step"
                )
        case "JumpReluAutoEncoder":
            built |= {"activation": "jumprelu", "threshold": take("threshold")}
    tensors.drop("k", "threshold", "group_sizes")
    tensors.check_nothing_left()
    sae = build(**built)
    agree(trainer, activation_dim=sae.config.d_model, dict_size=sae.config.n_latents)
    if norm_factor != 1:
        sae = _biases_scaled(sae, norm_factor)
    return norms_folded(sae) if kind == "AutoEncoder" else sae  # as its own loader does


def _biases_scaled(sae: SAE, factor: float) -> SAE:
    of = sae.parameters
    b_dec = None if of.b_dec is None else of.b_dec * factor
    parameters = of._replace(b_enc=of.b_enc * factor, b_pre=of.b_pre * factor, b_dec=b_dec)
    return SAE(sae.config, parameters, None if sae.threshold is None else sae.threshold * factor)


# ---------------------------------------------------------------------------------------------------------------------
# Llama Scope, Llamascopium, OpenAI, Gemma Scope
# ---------------------------------------------------------------------------------------------------------------------


def read_llama_scope(tensors: Tensors, config: Mapping[str, Any]) -> SAE:
    """Llama Scope of 2024 (`hyperparams.json`, one threshold for all latents) and its R1-Distill successor
    (`config.json`, one for each). Thresholds are of activations x decoder norm, in raw units of the output: SAELens'
    reader leaves the norms out, so that its latents are not these."""
    if config.get("use_glu_encoder"):
        raise InputError("a GLU encoder is not known to monosemy")
    W_enc, b_enc = tensors.take("encoder.weight"), tensors.take("encoder.bias")
    W_dec, b_dec = tensors.take("decoder.weight").T, tensors.take("decoder.bias")
    log_threshold = tensors.maybe("log_jumprelu_threshold")
    tensors.check_nothing_left()
    activation, k, threshold = _llama_scope_activation(config)
    if log_threshold is not None:
        threshold = log_threshold.exp()
    sae = build(
        W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, activation=activation, k=k, threshold=threshold,
        subtracted=bool(config.get("apply_decoder_bias_to_pre_encoder")), **_hooks(config),
    )  # fmt: skip
    agree(config, d_model=sae.config.d_model, d_sae=sae.config.n_latents)
    return _llama_scope_scaled(sae, config, config.get("dataset_average_activation_norm") or {})


def read_llamascopium(tensors: Tensors, config: Mapping[str, Any]) -> SAE:
    """Language-Model-SAEs today. The norms that a `dataset-wise` SAE needs are among its tensors."""
    if config.get("use_glu_encoder"):
        raise InputError("a GLU encoder is not known to monosemy")
    if (kind := config.get("sae_type", "sae")) not in ("sae", "transcoder"):
        raise InputError(f"the sae_type {kind} of Llamascopium is not known to monosemy; sae and transcoder are")
    prefix = "dataset_average_activation_norm."
    norms = {name.removeprefix(prefix): tensors.take(name).item() for name in list(tensors.left) if prefix in name}
    W_enc, W_dec = tensors.take("W_E").T, tensors.take("W_D")
    log_threshold = tensors.maybe("activation_function.log_jumprelu_threshold")
    b_dec = tensors.take("b_D") if config.get("use_decoder_bias", True) else torch.zeros(W_dec.shape[1])
    b_enc = tensors.take("b_E")
    tensors.check_nothing_left()
    activation, k, threshold = _llama_scope_activation(config)
    if activation == "jumprelu":
        if log_threshold is None:
            raise InputError("the tensor activation_function.log_jumprelu_threshold is missing")
        threshold = log_threshold.exp()
    sae = build(
        W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, subtracted=False, activation=activation, k=k,
        threshold=threshold, normalize="constant_norm" if config.get("norm_activation") == "token-wise" else "none",
        **_hooks(config),
    )  # fmt: skip
    agree(config, d_model=sae.config.d_model, d_sae=sae.config.n_latents)
    if sae.config.target_site is not None and sae.config.normalize != "none":
        raise InputError("a transcoder whose norm_activation is token-wise is not known to monosemy")
    found = {
        "in": norms.get(str(config.get("hook_point_in"))), "out": norms.get(str(config.get("hook_point_out")))
    }  # fmt: skip
    return _llama_scope_scaled(sae, config, found)


def _hooks(config: Mapping[str, Any]) -> dict[str, Any]:
    source, target = config.get("hook_point_in"), config.get("hook_point_out")
    model = config.get("model_name") or config.get("model_from_pretrained_path")
    return {"site": source, "target_site": target if target not in (None, source) else None, "model": model}


def _llama_scope_activation(config: Mapping[str, Any]) -> tuple[Activation, int | None, Tensor | None]:
    name = str(config.get("act_fn", "relu")).lower()
    match name:
        case "relu":
            return "relu", None, None
        case "topk":
            return "topk", _k(config.get("top_k")), None
        case "jumprelu":
            threshold = config.get("jump_relu_threshold")
            return "jumprelu", config.get("top_k"), None if threshold is None else torch.tensor(float(threshold))
    raise InputError(f"the act_fn {name} of Llama Scope is not known to monosemy; relu, topk and jumprelu are")


def _llama_scope_scaled(sae: SAE, config: Mapping[str, Any], norms: Mapping[str, float | None]) -> SAE:
    """`sae` for raw rows. Thresholds stay: they are of pre-activations x norm as the format stores them."""
    how = config.get("norm_activation", "dataset-wise")
    if how == "dataset-wise":
        if not norms.get("in") or not norms.get("out"):
            raise InputError("norm_activation is dataset-wise, but the average norms of the activations are missing")
        root = math.sqrt(sae.config.d_model)
        in_scale, out_scale = root / float(norms["in"] or 0), root / float(norms["out"] or 0)
        # b_enc / s_in and the input as it is, in place of b_enc and s_in x the input: in units of the raw output
        of = sae.parameters
        parameters = of._replace(
            b_enc=of.b_enc / in_scale,
            b_pre=of.b_pre / in_scale,
            W_dec=of.W_dec * (in_scale / out_scale),
            b_dec=None if of.b_dec is None else of.b_dec / out_scale,
        )
        sae = SAE(sae.config, parameters, sae.threshold)
    elif how not in ("token-wise", "inference", "none", None):
        raise InputError(f"norm_activation {how} of Llama Scope is not known to monosemy")
    return norms_folded(sae) if config.get("sparsity_include_decoder_norm", True) else sae


def read_openai(tensors: Tensors, activation: str, k: int | None, postact: str) -> SAE:
    """OpenAI's sparse_autoencoder: TopK with layer-normalised input, or ReLU."""
    if activation not in ("TopK", "ReLU") or (activation == "TopK" and postact not in ("ReLU", "")):
        raise InputError(f"the activation {activation} {postact} of OpenAI's autoencoders is not known to monosemy")
    tensors.drop("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
    is_topk = activation == "TopK"
    sae = build(
        W_enc=tensors.take("encoder.weight"), b_enc=tensors.take("latent_bias"),
        W_dec=tensors.take("decoder.weight").T, b_dec=tensors.take("pre_bias"), subtracted=True,
        activation="topk" if is_topk else "relu", k=_k(k) if is_topk else None,
        normalize="token" if is_topk else "none",
    )  # fmt: skip
    tensors.check_nothing_left()
    return sae


def read_gemma_scope(tensors: Tensors, site: str) -> SAE:
    """Gemma Scope's `params.npz`: JumpReLU with a threshold for each latent."""
    sae = build(
        W_enc=tensors.take("W_enc").T, b_enc=tensors.take("b_enc"), W_dec=tensors.take("W_dec"),
        b_dec=tensors.take("b_dec"), subtracted=False, activation="jumprelu", threshold=tensors.take("threshold"),
        site=site,
    )  # fmt: skip
    tensors.check_nothing_left()
    return sae
