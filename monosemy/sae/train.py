"""Room 3: train a TopK sparse autoencoder on activations, from disk or straight from the model.

1. b_pre starts at the mean of the normalised rows; decoder directions are random unit vectors; the encoder is their
   transpose, scaled down (`encoder_scale`): at full scale, unrelated latents add up and training starts in a hole.
2. Every step: take the batch that (seed, epoch, step) names, normalise it, and let the kernel do forward, gradients,
   Adam and renormalisation in one go.
3. A latent that has not fired for `dead_after_tokens` tokens counts as dead and is taught by the auxiliary loss.
4. Every `checkpoint_every` steps, everything that the next step depends on is written in one file; a run that was
   killed goes on from there and ends in the same bytes.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import pyarrow
import torch
from safetensors import safe_open
from torch import Tensor

from monosemy import kernels
from monosemy.activations.capture import CaptureConfig
from monosemy.activations.live import LiveActivations, open_live
from monosemy.activations.store import Activations, ShardFolder, open_activations
from monosemy.activations.stream import Stream
from monosemy.artifact import Draft, Manifest, read_manifest, read_tensors, unrecorded, write_table, write_tensors
from monosemy.llm.sites import Site
from monosemy.runtime import InputError, Progress
from monosemy.sae.autoencoder import SAE, Normalization, SAEConfig, normalize_rows

CHECKPOINT = "checkpoint.safetensors"
LIVE = "live"
"""Folder of what is remembered of activations that are computed on the fly."""

ROWS_FOR_MEAN = 1 << 17
"""Rows that the initial b_pre is averaged over, at most."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a sparse autoencoder on activations, stored or computed on the fly."""

    out: Path = unrecorded()
    """Folder for the SAE."""
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
    """Rows per step."""
    learning_rate: float = 2e-3
    """Adam's step size at its height."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    decay: float = 0.5
    """Share of the steps, at the end, over which it falls linearly to 0."""
    encoder_scale: float = 0.25
    """Norm of an encoder row at the start; its decoder direction has norm 1."""
    dead_after_tokens: int = 50_000
    """Rows without firing after which a latent counts as dead."""
    k_aux: int = 256
    """Dead latents that may reconstruct the residual of a row; 0 turns the auxiliary loss off."""
    aux_weight: float = 1.0
    """Weight of the auxiliary loss; it moves dead latents only."""
    normalize: Normalization = "token"
    """`token`: every row to mean 0 and standard deviation 1; `none`: as stored."""
    seed: int = 0
    """Seed of the initial directions and of the order of rows."""
    log_every: int = 10
    """Steps between two lines of the history."""
    checkpoint_every: int = unrecorded(100)
    """Steps between two checkpoints: what an interruption costs at most."""

    def __post_init__(self) -> None:
        live = (self.model, self.tokens, self.site)
        if (self.activations is None and None in live) or (self.activations is not None and (live[0] or live[1])):
            raise InputError("give either --activations, or all of --model, --tokens and --site to compute them")
        SAEConfig(1, self.n_latents, self.k, "", "")  # says what is wrong with n_latents and k
        for name in ("train_tokens", "batch_size", "log_every", "checkpoint_every", "dead_after_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("learning_rate", "encoder_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}; expected a positive number")
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected a share of the steps, 0 to 1")
        if self.k_aux < 0 or self.aux_weight < 0:
            raise InputError(f"k_aux is {self.k_aux} and aux_weight {self.aux_weight}; expected 0 or more")
        if self.train_tokens < self.batch_size:
            raise InputError(f"train_tokens is {self.train_tokens}, less than one batch of {self.batch_size}")


class HistoryRow(NamedTuple):
    """One line of `history.parquet`; losses and FVU are of the step's own batch, before the step."""

    tokens: int
    loss: float
    fvu: float
    aux_loss: float
    l0: float
    dead: int
    learning_rate: float


class TrainState(NamedTuple):
    """Everything that the next step depends on."""

    parameters: kernels.Parameters
    moments: kernels.Moments
    last_fired: Tensor
    """(latent,) int64: tokens seen when the latent last fired."""


class Checkpoint(NamedTuple):
    """Where an interrupted training goes on."""

    step: int
    """Steps done."""
    state: TrainState
    history: list[HistoryRow]


def run(config: TrainConfig) -> Manifest:
    """Make the SAE artifact `config.out`, or go on with it."""
    source, site, parents = _open_source(config)
    with Draft(config.out, "sae", config, parents) as draft:
        if draft.complete:
            return read_manifest(config.out, "sae")
        if isinstance(source, LiveActivations):
            source.memory = ShardFolder((draft.path / LIVE).joinpath, draft.identity)
        stream = Stream(source, site, config.batch_size, config.seed)
        path = draft.path / CHECKPOINT
        checkpoint = load_checkpoint(path) if path.exists() else Checkpoint(0, initial_state(config, stream), [])
        state, history = _train(config, stream, checkpoint, path)
        sae_config = SAEConfig(
            d_model=source.d_model,
            n_latents=config.n_latents,
            k=config.k,
            site=str(site),
            model=source.model_name,
            normalize=config.normalize,
            sink_norm=source.sink_norm(site),
        )
        SAE(sae_config, state.parameters).save(draft.path)
        write_table(draft.path / "history.parquet", pyarrow.Table.from_pylist([row._asdict() for row in history]))
        path.unlink(missing_ok=True)
        shutil.rmtree(draft.path / LIVE, ignore_errors=True)
        return draft.commit({"latents": config.n_latents, "tokens": _n_steps(config) * config.batch_size})


def _open_source(config: TrainConfig) -> tuple[Activations | LiveActivations, Site, dict[str, str]]:
    """Where rows come from, the site, and what the SAE's manifest names as its parents."""
    if config.activations is not None:
        stored = open_activations(config.activations)
        return stored, stored.only_site(config.site), {"activations": stored.manifest.digest}
    assert config.model is not None
    assert config.tokens is not None
    assert config.site is not None
    live = open_live(CaptureConfig(tokens=config.tokens, out=config.out, model=config.model, sites=(config.site,)))
    return live, live.sites[0], live.maker.parents | {"dtype": live.maker.config.dtype}


def _n_steps(config: TrainConfig) -> int:
    return config.train_tokens // config.batch_size


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step `step`, from 1: a linear rise, a plateau, a linear fall that ends just above 0."""
    n_steps = _n_steps(config)
    rise = step / max(config.warmup * n_steps, 1)
    fall = (n_steps - step + 1) / (config.decay * n_steps + 1)
    return config.learning_rate * min(1.0, rise, fall)


def _train(
    config: TrainConfig, stream: Stream, checkpoint: Checkpoint, path: Path
) -> tuple[TrainState, list[HistoryRow]]:
    settings = kernels.StepSettings(config.k, config.k_aux, config.aux_weight)
    workspace = kernels.Workspace()
    n_steps = _n_steps(config)
    done, state, history = checkpoint
    with Progress("train", n_steps * config.batch_size, "token") as progress:
        progress.skip(done * config.batch_size)
        for step in range(done + 1, n_steps + 1):
            rows, _, _ = normalize_rows(stream.batch(step - 1), config.normalize)
            seen = step * config.batch_size
            dead = seen - state.last_fired > config.dead_after_tokens
            rate = learning_rate(config, step)
            result = kernels.train_step(state.parameters, state.moments, rows, dead, settings, rate, step, workspace)
            _check_finite(result, step, config)
            state.last_fired[result.fired] = seen
            if step % config.log_every == 0 or step == n_steps:
                n_dead = int(dead.sum())
                history.append(HistoryRow(seen, result.loss, result.fvu, result.aux_loss, result.l0, n_dead, rate))
                progress.advance(0, fvu=result.fvu, dead=n_dead)
            progress.advance(config.batch_size)
            if step % config.checkpoint_every == 0 and step < n_steps:
                save_checkpoint(path, Checkpoint(step, state, history))
    return state, history


def _check_finite(result: kernels.StepResult, step: int, config: TrainConfig) -> None:
    if not math.isfinite(result.loss):
        raise InputError(
            f"the loss became {result.loss} at step {step}: try a learning rate below {config.learning_rate:g}; "
            "the last checkpoint is kept"
        )


def initial_state(config: TrainConfig, stream: Stream) -> TrainState:
    steps = range(max(1, ROWS_FOR_MEAN // config.batch_size))
    batches = (stream.batch(step) for step in takewhile(lambda step: stream.epoch(step) == 0, steps))
    means = [normalize_rows(batch, config.normalize)[0].mean(dim=0) for batch in batches]
    random = torch.Generator().manual_seed(config.seed)
    directions = torch.randn(config.n_latents, stream.d_model, generator=random)
    directions /= directions.norm(dim=1, keepdim=True)
    parameters = kernels.Parameters(
        W_enc=directions * config.encoder_scale,
        b_enc=torch.zeros(config.n_latents),
        W_dec=directions,
        b_pre=torch.stack(means).mean(dim=0),
    )
    moments = kernels.Moments(parameters.zeros_like(), parameters.zeros_like())
    return TrainState(parameters, moments, torch.zeros(config.n_latents, dtype=torch.int64))


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write everything that the next step depends on into one file, atomically."""
    step, state, history = checkpoint
    groups = {"weight": state.parameters, "first": state.moments.first, "second": state.moments.second}
    tensors = {
        f"{group}.{name}": tensor for group, values in groups.items() for name, tensor in values._asdict().items()
    }
    tensors["last_fired"] = state.last_fired
    write_tensors(path, tensors, {"progress": json.dumps({"step": step, "history": history})})


def load_checkpoint(path: Path) -> Checkpoint:
    """What `save_checkpoint` wrote; the tensors are copies that training may change."""
    tensors = {name: tensor.clone() for name, tensor in read_tensors(path).items()}
    with safe_open(path, framework="pt") as file:
        progress = json.loads(file.metadata()["progress"])

    def group(prefix: str) -> kernels.Parameters:
        return kernels.Parameters(*(tensors[f"{prefix}.{name}"] for name in kernels.Parameters._fields))

    state = TrainState(group("weight"), kernels.Moments(group("first"), group("second")), tensors["last_fired"])
    return Checkpoint(progress["step"], state, [HistoryRow(*row) for row in progress["history"]])
