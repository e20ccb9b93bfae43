"""Any other decoder language model, run by `transformers`, with our sites as hooks on its modules.

1. `load_decoder`: the model's type is looked up in `ARCHITECTURES`, which says what the parts of its layers are called;
   other types are refused. Weights that are missing, superfluous or not finite are refused too.
2. Hooks are set once. They and each layer ask the `Pass` under way which layers run and which sites are tapped; a layer
   outside the pass hands its input on, so layer numbers, masks and caches are those of `transformers`.
3. `HuggingFaceModel` has the methods of `llama.Llama`: whatever takes one takes the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from monosemy.llm.layout import Packing, check_ids, pack
from monosemy.llm.sites import Site, Taps
from monosemy.llm.tokenizer import Tokenizer, read_json
from monosemy.runtime import InputError, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """What `transformers` calls the parts of a model. Those of a layer are defined by what they do to the stream."""

    attn_out: str = "self_attn"
    """Its output is what attention adds."""
    resid_mid: str = "post_attention_layernorm"
    """Its input is the sum."""
    mlp_out: str = "mlp"
    """Its output is what the MLP adds."""
    mlp: str = "mlp"
    layers: str = "layers"
    norm: str = "norm"
    """The final one."""


NORMS_AROUND = Architecture(
    attn_out="post_attention_layernorm", resid_mid="pre_feedforward_layernorm", mlp_out="post_feedforward_layernorm"
)
NORMS_AFTER = Architecture(attn_out="post_attention_layernorm", resid_mid="mlp", mlp_out="post_feedforward_layernorm")

ARCHITECTURES = {
    "gemma": Architecture(),
    "gemma2": NORMS_AROUND,
    "gemma3_text": NORMS_AROUND,
    "gpt2": Architecture(attn_out="attn", resid_mid="ln_2", layers="h", norm="ln_f"),
    "gpt_neox": Architecture(attn_out="attention", norm="final_layer_norm"),
    "llama": Architecture(),
    "mistral": Architecture(),
    "olmo2": NORMS_AFTER,
    "phi3": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
}
"""The `model_type` of config.json -> its parts."""


@dataclass(frozen=True)
class HuggingFaceConfig:
    """The shape of a model."""

    d_model: int
    n_layers: int
    vocabulary: int
    context_length: int
    """Most tokens the model was made for."""
    model_type: str
    parallel_residual: bool
    """Whether attention and MLP both read the stream that enters the layer (Pythia): then there is no resid_mid."""


class HuggingFaceCache:
    """Keys and values of the tokens so far."""

    def __init__(self, config: Any, batch: int, capacity: int, device: torch.device) -> None:
        from transformers import DynamicCache

        self.inner = DynamicCache(config=config)
        self.real = torch.ones(batch, capacity, device=device, dtype=torch.bool)
        """Which positions hold a token rather than padding."""
        self.padded = False
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.real.shape[1]

    def select(self, rows: Int[Tensor, " text"]) -> None:
        """Keep only the texts `rows`, in that order."""
        self.inner.batch_select_indices(rows)
        self.real = self.real[rows]
        self.padded = not bool(self.real.all())


class Pass:
    """One run of layers `start` to `end` - 1, as the hooks see it."""

    def __init__(self, hidden: Tensor, start: int, end: int, taps: Taps | None, packing: Packing | None) -> None:
        self.hidden, self.start, self.end, self.taps, self.packing = hidden, start, end, taps, packing
        self.middle: Tensor | None = None
        """The edited resid_mid of the layer under way."""
        self.added: Tensor | None = None
        """What its MLP adds."""

    def run_layer(self, number: int, forward: Callable[..., Tensor], hidden: Tensor, *args: Any, **more: Any) -> Tensor:
        """Layer `number`, if it belongs to this pass."""
        if not self.start <= number < self.end:
            return hidden
        if number > 0:  # what enters layer 0 has learned positions added; it is as `transformers` made it
            hidden = self.hidden
        self.middle = None
        hidden = forward(self.visit(number, "resid_pre", hidden), *args, **more)
        if self.middle is not None:  # the hook changed only what the norm reads, not what the MLP's output is added to
            assert self.added is not None
            hidden = self.middle + self.added
        self.hidden = self.visit(number, "resid_post", hidden)
        return self.hidden

    def visit(self, number: int, point: str, tensor: Tensor) -> Tensor:
        """Read and edit a site; packed texts are padded for `transformers`, but taps see them in one row."""
        site, taps = Site(number, point), self.taps
        edited = taps is not None and site in taps.edits
        if taps is not None and (edited or site in taps.reads):
            seen = taps.visit(number, point, tensor if self.packing is None else self.packing.unpad(tensor))
            if edited:
                tensor = seen if self.packing is None else self.packing.pad(seen)
        if point == "resid_mid" and edited:
            self.middle = tensor
        elif point == "mlp_out":
            self.added = tensor
        return tensor


CURRENT: ContextVar[Pass | None] = ContextVar("CURRENT", default=None)
"""The pass under way. None: `transformers` runs as if there were no hooks."""


def set_hooks(layers: nn.ModuleList, architecture: Architecture) -> None:
    """Let the layers and the sites in them answer to `CURRENT`."""
    for number, layer in enumerate(layers):
        layer.forward = partial(_run_layer, number, layer.forward)
        part = layer.get_submodule
        part(architecture.attn_out).register_forward_hook(partial(_visit_output, number, "attn_out"))
        part(architecture.resid_mid).register_forward_pre_hook(partial(_visit_input, number, "resid_mid"))
        part(architecture.mlp).register_forward_pre_hook(partial(_visit_input, number, "mlp_in"))
        part(architecture.mlp_out).register_forward_hook(partial(_visit_output, number, "mlp_out"))


def _run_layer(number: int, forward: Callable[..., Tensor], *args: Any, **more: Any) -> Tensor:
    current = CURRENT.get()
    return forward(*args, **more) if current is None else current.run_layer(number, forward, *args, **more)


def _visit_input(number: int, point: str, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    current = CURRENT.get()
    return None if current is None else (current.visit(number, point, args[0]), *args[1:])


def _visit_output(number: int, point: str, _: nn.Module, __: Any, output: Any) -> Any:
    current = CURRENT.get()
    if current is None:
        return None
    if isinstance(output, tuple):  # attention gives its weights, too
        return (current.visit(number, point, output[0]), *output[1:])
    return current.visit(number, point, output)


class HuggingFaceModel(nn.Module):
    """A decoder of `transformers` with the methods of `llama.Llama`. `load_decoder` makes one."""

    tokenizer: Tokenizer
    name: str = "the model"
    fingerprint: str = ""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        config: Any = inner.config
        architecture = ARCHITECTURES[config.model_type]
        self.inner, self.base = inner, inner.base_model
        self.norm: nn.Module = self.base.get_submodule(architecture.norm)
        self.embedding: Any = inner.get_input_embeddings()
        self.unembedding: Any = inner.get_output_embeddings()
        self.config = HuggingFaceConfig(
            d_model=config.hidden_size,
            n_layers=config.num_hidden_layers,
            vocabulary=config.vocab_size,
            context_length=config.max_position_embeddings,
            model_type=config.model_type,
            parallel_residual=getattr(config, "use_parallel_residual", False),
        )
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        layers = self.base.get_submodule(architecture.layers)
        assert isinstance(layers, nn.ModuleList)
        set_hooks(layers, architecture)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def forward(
        self,
        ids: Int[Tensor, "batch position"],
        taps: Taps | None = None,
        mask: Bool[Tensor, "batch position"] | None = None,
        cache: HuggingFaceCache | None = None,
        lengths: Int[Tensor, " text"] | None = None,
    ) -> Float[Tensor, "batch position vocabulary"]:
        """Logits, float32, of the token after each position. Arguments as in `run_layers`."""
        hidden = self.run_layers(self.embed(ids), taps=taps, mask=mask, cache=cache, lengths=lengths)
        return self.unembed(hidden)

    def embed(self, ids: Int[Tensor, "batch position"]) -> Float[Tensor, "batch position d_model"]:
        """What `run_layers` takes at layer 0: the tokens' embeddings, scaled where the model scales them. Learned
        positions (GPT-2) are added by `run_layers`, which knows them, before the first site."""
        check_ids(ids, self.config.vocabulary)
        return self.embedding(ids.to(self.device))

    def run_layers(
        self,
        hidden: Float[Tensor, "batch position d_model"],
        start: int = 0,
        end: int | None = None,
        taps: Taps | None = None,
        mask: Bool[Tensor, "batch position"] | None = None,
        cache: HuggingFaceCache | None = None,
        lengths: Int[Tensor, " text"] | None = None,
    ) -> Float[Tensor, "batch position d_model"]:
        """The residual stream after layers `start` to `end` - 1, given the one that enters layer `start`.

        Arguments as in `llama.Llama.run_layers`; a cache needs all layers in one pass.

        Raises:
            InputError: a site that the model does not have, a text that is too long for the model or its cache, or
                lengths that do not sum to the row.
        """
        start, end, _ = slice(start, end).indices(self.config.n_layers)
        packing = None if lengths is None else pack(hidden, lengths)
        if packing is not None:
            assert mask is None, "a packed row has no padding"
            assert cache is None, "a packed row cannot be cached: pad the texts on the left"
        if taps is not None:
            self._check_taps(taps)
            taps.mask = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask
            taps.mask = taps.mask.to(self.device)
        if start >= end:
            return hidden
        assert cache is None or end - start == self.config.n_layers, "a cache needs all layers in one pass"
        hidden = hidden if packing is None else packing.pad(hidden)
        current = Pass(hidden, start, end, taps, packing)
        arguments = self._positions(hidden, mask, cache)
        token = CURRENT.set(current)
        try:
            self.base(inputs_embeds=hidden, use_cache=cache is not None, **arguments)
        finally:
            CURRENT.reset(token)
        if cache is not None:
            cache.length += hidden.shape[1]
        return current.hidden if packing is None else packing.unpad(current.hidden)

    def unembed(self, hidden: Float[Tensor, "batch position d_model"]) -> Float[Tensor, "batch position vocabulary"]:
        """Logits, float32: final norm, unembedding, and the soft cap of those models that have one."""
        logits = self.unembedding(self.norm(hidden)).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def make_cache(self, batch: int, capacity: int) -> HuggingFaceCache:
        """An empty cache for `batch` texts of at most `capacity` tokens, padding included."""
        return HuggingFaceCache(self.inner.config, batch, capacity, self.device)

    def _positions(self, hidden: Tensor, mask: Tensor | None, cache: HuggingFaceCache | None) -> dict[str, Any]:
        """What `transformers` must be told of the tokens before `hidden`'s, of padding, and of positions."""
        before = 0 if cache is None else cache.length
        end = before + hidden.shape[1]
        if end > self.config.context_length:
            raise InputError(
                f"a text of {end} tokens, but {self.name} reads at most {self.config.context_length}: shorten it"
            )
        if cache is not None:
            if end > cache.capacity:
                raise InputError(f"{end} tokens do not fit in a cache of {cache.capacity}: make a larger one")
            if mask is not None:
                cache.real[:, before:end] = mask.to(self.device)
                cache.padded |= not bool(mask.all())
            mask = cache.real[:, :end] if cache.padded else None
        past = None if cache is None else cache.inner
        if mask is None or bool(mask.all()):
            return {"past_key_values": past}
        mask = mask.to(self.device)
        # Padding has no position of its own; it counts as the first.
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, before:]
        return {"past_key_values": past, "attention_mask": mask, "position_ids": positions}

    def _check_taps(self, taps: Taps) -> None:
        taps.check(self.config.n_layers, self.name)
        for site in sorted(taps.sites):
            if self.config.parallel_residual and site.point == "resid_mid":
                raise InputError(
                    f"{site}: in {self.name}, attention and MLP both read resid_pre, so there is no stream between "
                    "them; name resid_pre or resid_post"
                )


def load_decoder(folder: Path, dtype: torch.dtype, device: torch.device) -> HuggingFaceModel:
    """The model in a Hugging Face folder, from safetensors files only, for inference; never runs the folder's own code.

    Raises:
        InputError: `transformers` is not installed, the model's type is not supported, or its weights are damaged.
    """
    config = read_json(folder / "config.json")
    if (model_type := config.get("model_type")) not in ARCHITECTURES:
        raise InputError(
            f"{folder / 'config.json'}: models of type {model_type!r} are not supported; "
            f"expected one of {', '.join(ARCHITECTURES)}"
        )
    for key in ("quantization_config", "add_cross_attention", "use_bidirectional_attention"):
        if config.get(key):
            raise InputError(f"{folder / 'config.json'}: {key} = {config[key]!r} is not supported: use a plain model")
    require("transformers", "hf")
    with _quiet():
        inner, report = _from_pretrained(folder, dtype)
    for problem, names in (
        ("lacks", report["missing_keys"]),
        # Old checkpoints keep a constant of attention.
        ("has superfluous", {name for name in report["unexpected_keys"] if not name.endswith(".attn.masked_bias")}),
        ("has wrongly shaped", {name for name, *_ in report["mismatched_keys"]}),
        ("has not finite", {name for name, weight in inner.named_parameters() if not _finite(weight)}),
    ):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise InputError(f"{folder} {problem} tensors ({shown}): it is not a complete {model_type} model")
    return HuggingFaceModel(inner.to(device).requires_grad_(False).eval())


def _from_pretrained(folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named by the caller
        )
        return loaded
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: transformers cannot load it ({reason}): download the model again") from error


def _finite(weight: Tensor) -> bool:
    return bool(torch.isfinite(weight.sum(dtype=torch.float32)))


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and reports of `transformers`: what is wrong is raised."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
