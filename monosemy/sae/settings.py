"""What a training run is told: the kind of dictionary, the optimiser, how it is watched. Nothing here touches anything.

`TrainConfig.members` turns a grid into the configs of its SAEs.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from monosemy import options
from monosemy.activations.capture import DeviceName
from monosemy.artifact import unrecorded
from monosemy.kernels import Activation, Decoder, StepSettings
from monosemy.llm.sites import Site
from monosemy.runtime import InputError
from monosemy.sae.autoencoder import SAEConfig

RULE_LEARNING_RATE, RULE_LATENTS = 3e-3, 8192
HIGHEST_LEARNING_RATE = 6e-3
"""The measured rule of `learning_rate`: the best rate at so many latents; docs/log.md has the runs."""

DEAD_SHARE, DEAD_AT_MOST, DEAD_BATCHES = 0.02, 10_000_000, 10
"""The rule of `dead_after_tokens`: this share of the run's rows, and at most so many (Gao et al. 2024); but not fewer
than so many batches, or latents that fire in every other batch would count as dead in a short run."""

SHARED = ("out", "activations", "model", "tokens", "train_tokens", "batch_size", "data_seed", "device", "grid")
"""Options that a grid cannot vary: its SAEs see the same batches."""


@dataclass(frozen=True)
class Variant:
    """Which kind of dictionary is trained."""

    activation: Activation = "topk"
    """`topk`: the k largest latents of a row; `batch_topk`: the k x rows largest of a batch, and one threshold
    afterwards; `relu`: all positive ones, kept few by --l1."""
    decoder: Decoder = "unit"
    """`unit`: directions of norm 1; `free`: any norm, latents ranked by activation x norm (Llama Scope)."""
    start_k: int = 0
    """K annealing: latents on a row at the first step, from where it falls to k; 0: k from the start."""
    anneal: float = 0.1
    """Share of the steps over which it falls."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka: sizes of the dictionaries nested in the whole one, for example 512 2048."""
    l1: float = 0.0
    """Weight of the sum of a row's activations beside its squared error, with `relu`."""
    target_site: str | None = None
    """Transcoder: the site that is reconstructed, of the rows at --site."""
    skip: bool = False
    """Transcoder: add a linear path around the latents."""
    normalize: Literal["token", "dataset", "none"] = "token"
    """`token`: every row to mean 0 and standard deviation 1; `dataset`: rows by one factor, to a mean norm of
    sqrt(d_model), folded into the weights at the end; `none`: as stored."""
    initial_bias: Literal["mean", "geometric_median"] = "mean"
    """What b_pre (and a transcoder's b_dec) starts at."""
    encoder_scale: float = 0.25
    """Norm of an encoder row at the start; its decoder direction has norm 1."""
    jumprelu: bool = False
    """At the end, replace the choice of the k largest by one threshold that keeps k on average (JumpReLU), so that
    latents do not compete any more; `batch_topk` always does. The FVUs of history.jsonl are without it."""

    def __post_init__(self) -> None:
        options.check_values(self)
        if self.encoder_scale <= 0:
            raise InputError(f"encoder_scale is {self.encoder_scale}; expected a positive number")
        if self.l1 < 0:
            raise InputError(f"l1 is {self.l1}; expected 0 or more")
        if not self.l1 and self.activation == "relu":
            raise InputError("with --activation relu nothing but --l1 keeps latents few: give it, for example --l1 0.3")
        if self.l1 and self.activation != "relu":
            raise InputError(f"l1 is {self.l1}, but only --activation relu has that penalty: drop one of them")
        if self.activation == "relu" and self.jumprelu:
            raise InputError("relu has no k that a threshold could keep: drop --jumprelu")
        if not 0 <= self.anneal <= 1:
            raise InputError(f"anneal is {self.anneal}; expected a share of the steps, 0 to 1")
        if self.skip and self.target_site is None:
            raise InputError("--skip is a transcoder's path around the latents: give --target-site too")
        if self.target_site is not None:
            Site.parse(self.target_site)
            if self.normalize == "token":
                raise InputError(
                    "a transcoder cannot know the scale of the row it predicts, so --normalize token cannot be undone: "
                    "use --normalize dataset"
                )


@dataclass(frozen=True)
class Optimizer:
    """AdamW, its schedule, and the loss that revives dead latents."""

    learning_rate: float | None = None
    """Adam's step size at its height; not given: 3e-3 x sqrt(8192 / latents), at most 6e-3 (docs/log.md)."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How it falls at the end."""
    warmup: float = 0.05
    """Share of the steps over which it rises from 0."""
    decay: float = 0.5
    """Share of the steps, at the end, over which it falls."""
    final_share: float = 0.0
    """Share of it that is left at the end."""
    beta1: float = 0.9
    """Memory of the mean gradient."""
    beta2: float = 0.999
    """Memory of the mean squared gradient."""
    epsilon: float = 6.25e-10
    """Added to the root of that mean."""
    weight_decay: float = 0.0
    """AdamW: weights shrink by learning rate x this at every step."""
    ema: float = 0.0
    """Keep an average of the weights with this memory, for example 0.999, and save it instead; 0: do not. The memory
    grows to it, as (1 + step) / (10 + step), so that nothing of the initial weights is left."""
    dead_after_tokens: int | None = None
    """Rows without firing after which a latent counts as dead; not given: 2% of the run's rows, from 10
    batches to 10 million."""
    k_aux: int = 256
    """Dead latents that may reconstruct the residual of a row; 0 turns the auxiliary loss off."""
    aux_weight: float = 1.0
    """Weight of the auxiliary loss; it moves dead latents only."""

    def __post_init__(self) -> None:
        options.check_values(self)
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise InputError(f"learning_rate is {self.learning_rate}; expected a positive number")
        for name in ("warmup", "decay", "final_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected a share, 0 to 1")
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected 0 to 1, below 1")
        if self.epsilon <= 0 or self.weight_decay < 0:
            raise InputError(
                f"epsilon is {self.epsilon} and weight_decay {self.weight_decay}; expected above 0, and 0 or more"
            )
        if self.k_aux < 0 or self.aux_weight < 0:
            raise InputError(f"k_aux is {self.k_aux} and aux_weight {self.aux_weight}; expected 0 or more")
        if self.dead_after_tokens is not None and self.dead_after_tokens < 1:
            raise InputError(f"dead_after_tokens is {self.dead_after_tokens}; expected at least 1")


@dataclass(frozen=True)
class Watch:
    """How a run is measured while it goes on, and what is kept of it."""

    log_every: int = 10
    """Steps between two lines of history.jsonl."""
    validations: int = 10
    """How often the FVU of held-out rows is measured, evenly over the run; 0: never."""
    validation_rows: int = 4096
    """Held-out rows for it, at most."""
    patience: int = 0
    """Stop when so many validations in a row have brought nothing better, and keep the best weights; 0: never."""
    activity_intervals: int = 20
    """Parts of the run for which activity.parquet counts how often each latent fired."""
    checkpoint_every: int = unrecorded(100)
    """Steps between two checkpoints: what an interruption costs at most."""
    keep_checkpoints: int = unrecorded(2)
    """Checkpoints that are kept while the run goes on."""
    wandb: str | None = unrecorded(None)
    """Weights & Biases project to log to as well (extra `wandb`)."""
    tensorboard: Path | None = unrecorded(None)
    """Folder to log to for TensorBoard as well (extra `tensorboard`)."""

    def __post_init__(self) -> None:
        for name in ("log_every", "validation_rows", "activity_intervals", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("validations", "patience"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if self.patience and not self.validations:
            raise InputError(f"patience is {self.patience}, but validations is 0: nothing would tell when to stop")


@dataclass(frozen=True)
class TrainConfig:
    """Train sparse autoencoders on activations, stored or computed on the fly."""

    out: Path = unrecorded()
    """Folder for the SAE; with --grid, for one folder per SAE."""
    activations: Path | None = unrecorded(None)
    """Activations, made by `monosemy capture`, or their URL; or give --model, --tokens and --site instead."""
    model: str | None = unrecorded(None)
    """The model whose activations are computed on the fly, as `monosemy capture` would by default."""
    tokens: Path | None = unrecorded(None)
    """The token file for it."""
    site: str | None = None
    """Site to train on; needed where the activations hold several."""
    n_latents: int = 8192
    """Number of latents."""
    k: int = 32
    """Latents that may be active on a row."""
    train_tokens: int = 1_500_000
    """Rows to train on in all; more than there are means several epochs."""
    batch_size: int = 2048
    """Rows per step, of all ranks together."""
    seed: int = 0
    """Seed of the initial directions."""
    data_seed: int = 0
    """Seed of the order of rows."""
    grid: tuple[str, ...] = unrecorded(())
    """Train an SAE for every combination in one pass over the data: for example k=16,32 learning_rate=1e-3,2e-3."""
    latent_shards: int = unrecorded(0)
    """Under torchrun: ranks that share the latents of one SAE; groups of so many share the rows. 0: all ranks."""
    device: DeviceName = unrecorded("auto")
    """Where to train; `auto` is a GPU if there is one."""
    variant: Variant = field(default_factory=Variant)
    optimizer: Optimizer = field(default_factory=Optimizer)
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        live = (self.model, self.tokens, self.site)
        if (self.activations is None and None in live) or (self.activations is not None and (live[0] or live[1])):
            raise InputError("give either --activations, or all of --model, --tokens and --site to compute them")
        SAEConfig(1, self.n_latents, self.k, "", "")  # says what is wrong with n_latents and k
        for name in ("train_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.train_tokens < self.batch_size:
            raise InputError(f"train_tokens is {self.train_tokens}, less than one batch of {self.batch_size}")
        if self.latent_shards < 0:
            raise InputError(f"latent_shards is {self.latent_shards}; expected 0 or more")
        if self.variant.start_k and not self.k <= self.variant.start_k <= self.n_latents:
            raise InputError(
                f"start_k is {self.variant.start_k}; expected from k to n_latents, {self.k} to {self.n_latents}"
            )
        sizes = (*self.variant.prefixes, self.n_latents)
        if any(a >= b for a, b in itertools.pairwise((0, *sizes))):
            raise InputError(
                f"prefixes are {self.variant.prefixes}; expected ascending sizes below the {self.n_latents} latents"
            )
        self.members()  # says what is wrong with the grid

    # ------------------------------------------------------------------------------------------------------------------

    @property
    def n_steps(self) -> int:
        return self.train_tokens // self.batch_size

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at its height."""
        if self.optimizer.learning_rate is not None:
            return self.optimizer.learning_rate
        return min(HIGHEST_LEARNING_RATE, RULE_LEARNING_RATE * math.sqrt(RULE_LATENTS / self.n_latents))

    @property
    def dead_after(self) -> int:
        """Rows without firing after which a latent counts as dead."""
        return dead_after(self.optimizer.dead_after_tokens, self.train_tokens, self.batch_size)

    def learning_rate(self, step: int) -> float:
        """The rate of step `step`, from 1: a linear rise, a plateau, a fall that ends just above its last share."""
        of = self.optimizer
        rise = step / max(of.warmup * self.n_steps, 1)
        left = min(1.0, (self.n_steps - step + 1) / (of.decay * self.n_steps + 1))
        match of.schedule:
            case "constant":
                fall = 1.0
            case "linear":
                fall = left
            case "cosine":
                fall = (1 - math.cos(math.pi * left)) / 2
        return self.peak_learning_rate * min(1.0, rise, of.final_share + (1 - of.final_share) * fall)

    def k_at(self, step: int) -> int:
        """Latents that may be active on a row at step `step`, from 1."""
        start, falling = self.variant.start_k, self.variant.anneal * self.n_steps
        if not start or step - 1 >= falling:
            return self.k
        return round(start + (self.k - start) * (step - 1) / falling)

    def memory(self, step: int) -> float:
        """Share of the averaged weights that is kept at step `step`, from 1."""
        return min(self.optimizer.ema, (1 + step) / (10 + step))

    def step_settings(self, step: int) -> StepSettings:
        """What the kernels are told at step `step`, from 1."""
        of, variant = self.optimizer, self.variant
        return StepSettings(
            k=self.k_at(step),
            k_aux=0 if variant.activation == "relu" else of.k_aux,  # its dead latents are negative on every row
            aux_weight=of.aux_weight,
            activation=variant.activation,
            decoder=variant.decoder,
            prefixes=(*variant.prefixes, self.n_latents) if variant.prefixes else (),
            l1=variant.l1,
            beta1=of.beta1,
            beta2=of.beta2,
            epsilon=of.epsilon,
            weight_decay=of.weight_decay,
        )

    def members(self) -> list[TrainConfig]:
        """The configs of a grid, each as if it were trained alone; without one, this config."""
        if not self.grid:
            return [self]
        axes = [_axis(text) for text in self.grid]
        names = [name for name, _ in axes]
        if len(set(names)) < len(names):
            raise InputError(f"--grid names an option twice: {' '.join(self.grid)}")
        found = []
        for choice in itertools.product(*(wanted for _, wanted in axes)):
            folder = ",".join(f"{name}={text}" for name, (text, _) in zip(names, choice, strict=True))
            changes: dict[str, Any] = {name: value for name, (_, value) in zip(names, choice, strict=True)}
            found.append(options.replaced(self, grid=(), out=self.out / folder.replace("/", "-"), **changes))
        return found


def _axis(text: str) -> tuple[str, list[tuple[str, Any]]]:
    """(option, [(as written, value)]) of `k=16,32`."""
    name, _, wanted = text.partition("=")
    name = name.strip().lstrip("-").replace("-", "_")
    fields = options.options(TrainConfig)
    allowed = [known for known in fields if known not in SHARED and fields[known].metadata.get("recorded", True)]
    if name not in allowed or not wanted:
        raise InputError(f"--grid {text!r}: expected OPTION=VALUE,VALUE with one of {', '.join(allowed)}")
    kind = next(hints[name] for hints in map(get_type_hints, (TrainConfig, Variant, Optimizer, Watch)) if name in hints)
    return name, [(value.strip(), _value(name, kind, value.strip())) for value in wanted.split(",")]


def _value(name: str, kind: Any, text: str) -> Any:
    """`text` as the type that an option has; sizes of nested dictionaries are joined by +."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind == tuple[int, ...]:
            return tuple(int(size) for size in text.split("+"))
        if kind in (int, float):
            return kind(text)
        if get_origin(kind) is Literal:
            return {str(allowed): allowed for allowed in get_args(kind)}[text]
        if kind in (int | None, float | None):
            return (int if kind == (int | None) else float)(text)
        return text
    except (ValueError, KeyError):
        raise InputError(f"--grid {name}: {text!r} is not a value of that option") from None


def dead_after(given: int | None, train_tokens: int, batch_size: int) -> int:
    """`dead_after_tokens`, or what the rule makes of a run of `train_tokens` rows."""
    return given or max(DEAD_BATCHES * batch_size, min(DEAD_AT_MOST, round(DEAD_SHARE * train_tokens)))
