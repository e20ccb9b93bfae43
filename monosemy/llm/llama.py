"""A Llama in pure PyTorch: the model under study.

One forward pass, on a residual stream (batch, position, d_model):

1. `embed`: token ids -> rows of the embedding.
2. `run_layers`: per layer, add attention (grouped queries, rotary positions) of the normed stream, then add the
   SwiGLU MLP of the normed sum. Every point in between is a site (`sites.py`).
3. `unembed`: final norm, then the unembedding, in float32.

The projections that read the same input (queries, keys, values; gate and up) are one matrix each: fewer and larger
products. `named_weights` shows them under Hugging Face's names.

Several texts run together padded or packed (`layout.py`).

Papers: Llama (arXiv 2302.13971), grouped-query attention (2305.13245), rotary positions (2104.09864), sliding windows
(Mistral, 2310.06825).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from monosemy.llm.layout import KeyValueCache, Positions, check_ids, packed_positions, padded_positions
from monosemy.llm.sites import Taps
from monosemy.runtime import InputError

if TYPE_CHECKING:
    from monosemy.llm import decode
    from monosemy.llm.tokenizer import Tokenizer


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    """Heads of keys and values; each serves n_heads / n_kv_heads query heads."""
    head_dim: int
    d_mlp: int
    vocabulary: int
    context_length: int
    """Most tokens the model was made for."""
    rope_theta: float
    norm_epsilon: float
    tied_embeddings: bool
    rope_divisors: tuple[float, ...] | None = None
    """What each of the head_dim / 2 rotary frequencies is divided by (Llama 3.1's scaling); None: by 1."""
    attention_bias: bool = False
    """Whether the four projections of attention add a bias."""
    mlp_bias: bool = False
    """Whether the three projections of the MLP add a bias."""
    sliding_window: int | None = None
    """Attention sees this many tokens, its own among them (Mistral); None: all before it."""

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_mlp", "vocabulary"):
            if getattr(self, name) < 1:
                raise InputError(f"the model's {name} is {getattr(self, name)}; expected at least 1")
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"{self.n_heads} query heads cannot share {self.n_kv_heads} key-value heads evenly")
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd; rotary positions need an even one")
        if self.rope_divisors is not None and len(self.rope_divisors) != self.head_dim // 2:
            raise InputError(f"{len(self.rope_divisors)} rotary divisors; expected head_dim / 2 = {self.head_dim // 2}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise InputError(f"the sliding window is {self.sliding_window} tokens; expected at least 1, or none")


class Linear(nn.Module):
    """A matrix, with or without bias, whose values are always loaded: PyTorch's own spends seconds on initial ones."""

    def __init__(self, columns: int, rows: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))
        self.bias = nn.Parameter(torch.empty(rows)) if bias else None

    def forward(self, x: Float[Tensor, "*batch column"]) -> Float[Tensor, "*batch row"]:
        return functional.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Divide by the root mean square, in float32, and scale."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Float[Tensor, "batch position d_model"]) -> Float[Tensor, "batch position d_model"]:
        # PyTorch's rms_norm is ten separate passes on a CPU; this is five.
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = (length.square() / x.shape[-1] + self.epsilon).rsqrt()
        return (wide * scale).to(x.dtype).mul_(self.weight)


class Attention(nn.Module):
    """Causal self-attention with grouped queries and rotary positions."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        rows = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
        self.qkv = Linear(config.d_model, rows, config.attention_bias)
        self.output = Linear(config.n_heads * config.head_dim, config.d_model, config.attention_bias)

    def forward(
        self, x: Float[Tensor, "batch position d_model"], positions: Positions, cache: KeyValueCache | None
    ) -> Float[Tensor, "batch position d_model"]:
        heads = self.qkv(x).view(*x.shape[:2], -1, self.head_dim)
        turned = rotate(heads[:, :, : self.n_heads + self.n_kv_heads], positions)
        values = heads[:, :, self.n_heads + self.n_kv_heads :]
        if positions.packing is not None:
            turned, values = positions.packing.pad(turned), positions.packing.pad(values)
        queries, keys = turned.transpose(1, 2).split((self.n_heads, self.n_kv_heads), dim=1)
        values = values.transpose(1, 2)
        if cache is not None:
            keys, values = cache.extend(self.layer, keys, values)
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, positions.visible, is_causal=positions.causal, enable_gqa=True
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        return self.output(mixed if positions.packing is None else positions.packing.unpad(mixed))


def rotate(
    heads: Float[Tensor, "batch position head head_dim"], positions: Positions
) -> Float[Tensor, "batch position head head_dim"]:
    """Turn each pair (i, i + head_dim / 2) of a head by its position's angle."""
    first, second = heads.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    return torch.addcmul(heads * positions.cosine, swapped, positions.sine)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.d_model, 2 * config.d_mlp, config.mlp_bias)
        self.down = Linear(config.d_mlp, config.d_model, config.mlp_bias)

    def forward(self, x: Float[Tensor, "batch position d_model"]) -> Float[Tensor, "batch position d_model"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate).mul_(up))


class Layer(nn.Module):
    """One layer of the residual stream."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden: Float[Tensor, "batch position d_model"],
        positions: Positions,
        taps: Taps | None,
        cache: KeyValueCache | None,
    ) -> Float[Tensor, "batch position d_model"]:
        def site(point: str, tensor: Tensor) -> Tensor:
            return tensor if taps is None else taps.visit(self.layer, point, tensor)

        hidden = site("resid_pre", hidden)
        added = site("attn_out", self.attention(self.attention_norm(hidden), positions, cache))
        hidden = site("resid_mid", hidden + added)
        added = site("mlp_out", self.mlp(site("mlp_in", self.mlp_norm(hidden))))
        return site("resid_post", hidden + added)

    def weights(self) -> decode.LayerWeights:
        """Its tensors as `decode` wants them."""
        from monosemy.llm import decode

        attention, mlp = self.attention, self.mlp
        return decode.LayerWeights(
            self.attention_norm.weight, attention.qkv.weight, attention.qkv.bias, attention.output.weight,
            attention.output.bias, self.mlp_norm.weight, mlp.gate_up.weight, mlp.gate_up.bias, mlp.down.weight,
            mlp.down.bias,
        )  # fmt: skip


class Llama(nn.Module):
    """The model. `checkpoint.load_model` makes one with weights, tokenizer, name and fingerprint."""

    tokenizer: Tokenizer
    name: str = "the model"
    fingerprint: str = ""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Linear(config.d_model, config.vocabulary)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_epsilon)
        self.unembedding = Linear(config.d_model, config.vocabulary)
        if config.tied_embeddings:
            self.unembedding.weight = self.embedding.weight
        self.rotary: tuple[Tensor, Tensor] | None = None

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
        cache: KeyValueCache | None = None,
        lengths: Int[Tensor, " text"] | None = None,
    ) -> Float[Tensor, "batch position vocabulary"]:
        """Logits, float32, of the token after each position. Arguments as in `run_layers`."""
        hidden = self.run_layers(self.embed(ids), taps=taps, mask=mask, cache=cache, lengths=lengths)
        return self.unembed(hidden)

    def embed(self, ids: Int[Tensor, "batch position"]) -> Float[Tensor, "batch position d_model"]:
        """The residual stream that enters layer 0. Raises `InputError` for what are no token ids."""
        check_ids(ids, self.config.vocabulary)
        return functional.embedding(ids.to(self.device), self.embedding.weight)

    def run_layers(
        self,
        hidden: Float[Tensor, "batch position d_model"],
        start: int = 0,
        end: int | None = None,
        taps: Taps | None = None,
        mask: Bool[Tensor, "batch position"] | None = None,
        cache: KeyValueCache | None = None,
        lengths: Int[Tensor, " text"] | None = None,
    ) -> Float[Tensor, "batch position d_model"]:
        """The residual stream after layers `start` to `end` - 1, given the one that enters layer `start`.

        Args:
            taps: sites to read and to edit.
            mask: False where a batch is padded on the left. Padding on the right needs none for the model (attention
                is causal), but edits are told of it only by a mask.
            cache: keys and values of the tokens before these; `mask` speaks of the new positions only.
            lengths: of the texts that are packed, one after the other, in the one row of `hidden`; each sees only
                itself. Not together with `mask` or `cache`.

        Raises:
            InputError: a site beyond the model, a cache that is full, or lengths that do not sum to the row.
        """
        window = self.config.sliding_window
        if lengths is None:
            positions = padded_positions(hidden, mask, cache, window, self._rotary_tables)
        else:
            if mask is not None or cache is not None:
                raise InputError("a packed row takes neither mask nor cache: pad the texts on the left instead")
            positions = packed_positions(hidden, lengths, window, self._rotary_tables)
        if taps is not None:
            taps.check(self.config.n_layers, self.name)
            taps.mask = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask
            taps.mask = taps.mask.to(self.device)
        stop = len(self.layers) if end is None else end
        while start < stop:
            hidden, start = self._run_some(hidden, start, stop, positions, taps, cache)
        if cache is not None:
            cache.length += hidden.shape[1]
        return hidden

    def _run_some(
        self,
        hidden: Tensor,
        start: int,
        stop: int,
        positions: Positions,
        taps: Taps | None,
        cache: KeyValueCache | None,
    ) -> tuple[Tensor, int]:
        """Run layer `start`, or up to `stop` those that `decode` can run at once; says which one is next."""
        tapped = set() if taps is None else {site.layer for site in taps.sites}
        if cache is None or start in tapped or not decodes(hidden):
            return self.layers[start](hidden, positions, taps, cache), start + 1
        from monosemy.llm import decode

        stop = min([stop, *(layer for layer in tapped if layer > start)])
        if cache.weights is None:
            cache.weights = decode.Weights([cast(Layer, layer).weights() for layer in self.layers])
        epsilon, window = self.config.norm_epsilon, self.config.sliding_window
        return decode.run_layers(hidden, cache.weights, start, stop, epsilon, window, positions, cache), stop

    def unembed(self, hidden: Float[Tensor, "batch position d_model"]) -> Float[Tensor, "batch position vocabulary"]:
        """Logits, float32: final norm, then unembedding."""
        if decodes(hidden):
            from monosemy.llm import decode

            return decode.unembed(hidden, self.norm.weight, self.norm.epsilon, self.unembedding.weight)
        return self.unembedding(self.norm(hidden)).float()

    def make_cache(self, batch: int, capacity: int) -> KeyValueCache:
        """An empty cache for `batch` texts of at most `capacity` tokens, padding included."""
        config = self.config
        shape = (config.n_layers, batch, config.n_kv_heads, capacity, config.head_dim)
        return KeyValueCache(shape, self.device, self.dtype)

    def named_weights(self) -> dict[str, Tensor]:
        """Every weight under its Hugging Face name: views of the fused matrices, so writing one changes the model."""
        config = self.config
        sizes = [heads * config.head_dim for heads in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
        named = {"model.embed_tokens.weight": self.embedding.weight.data, "model.norm.weight": self.norm.weight.data}
        if not config.tied_embeddings:
            named["lm_head.weight"] = self.unembedding.weight.data
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            prefix = f"model.layers.{number}."
            named[prefix + "input_layernorm.weight"] = layer.attention_norm.weight.data
            named[prefix + "post_attention_layernorm.weight"] = layer.mlp_norm.weight.data
            for parts, linear, rows in (
                (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), layer.attention.qkv, sizes),
                (("self_attn.o_proj",), layer.attention.output, [config.d_model]),
                (("mlp.gate_proj", "mlp.up_proj"), layer.mlp.gate_up, [config.d_mlp] * 2),
                (("mlp.down_proj",), layer.mlp.down, [config.d_model]),
            ):
                for kind, fused in (("weight", linear.weight), ("bias", linear.bias)):
                    if fused is not None:
                        pieces = zip(parts, fused.data.split(rows), strict=True)
                        named |= {f"{prefix}{part}.{kind}": piece for part, piece in pieces}
        return named

    def _rotary_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines (position, 1, head_dim) for at least `length` positions; kept, grown by doubling."""
        if self.rotary is None or len(self.rotary[0]) < length or self.rotary[0].device != self.device:
            size = max(256, 1 << (length - 1).bit_length())
            with torch.inference_mode(False):  # kept for passes that need gradients, too
                angles = torch.arange(size).double()[:, None] * rotary_frequencies(self.config)
                cosine, sine = angles.cos(), angles.sin()
                tables = torch.cat((cosine, cosine), -1), torch.cat((-sine, sine), -1)
                cosines, sines = (table[:, None].to(self.device, self.dtype) for table in tables)
            self.rotary = cosines, sines
        return self.rotary


def random_llama(config: LlamaConfig, seed: int = 0) -> Llama:
    """A model of random weights, float32, for tests and benchmarks."""
    model, generator = Llama(config), torch.Generator().manual_seed(seed)
    for name, weight in model.named_weights().items():
        if "norm" not in name:
            weight.normal_(std=config.d_model**-0.5, generator=generator)  # biases too
    return model.requires_grad_(False).eval()


MOST_DECODED = 16
"""Texts that `decode` continues together; beyond, the products are PyTorch's business."""


def decodes(hidden: Float[Tensor, "batch position d_model"]) -> bool:
    """Whether `decode` computes what follows: one position of a few texts, on a CPU, without gradients, in a dtype that
    it reads."""
    return (
        hidden.shape[1] == 1
        and len(hidden) <= MOST_DECODED
        and hidden.device.type == "cpu"
        and hidden.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
    )


def rotary_frequencies(config: LlamaConfig) -> Float[Tensor, " half"]:
    """Radians per position of each pair of a head."""
    exponents = torch.arange(0, config.head_dim, 2).double() / config.head_dim
    frequencies = torch.exp(-math.log(config.rope_theta) * exponents)
    if config.rope_divisors is not None:
        frequencies = frequencies / torch.tensor(config.rope_divisors, dtype=torch.float64)
    return frequencies
