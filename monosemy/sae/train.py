"""Room 3: train sparse autoencoders on activations, from disk or straight from the model.

1. A grid becomes one `Training` per SAE, each with its own artifact, as if it were trained alone. Those that read the
   same site share a `Feed`, which normalises every batch once.
2. Every step: take the batch that (seed, epoch, step) names, and let the kernel do forward, gradients, AdamW and
   renormalisation in one go. A latent that has not fired for `dead_after_tokens` rows counts as dead and is taught by
   the auxiliary loss.
3. On the way: a line of history, a validation on held-out rows, the activity of every latent, a checkpoint with
   everything that the next step depends on. A run that was killed goes on from there and ends in the same bytes.
4. At the end, scales and norms are folded into the weights, and one threshold replaces the choice of the k largest if
   that is wanted.

Under `torchrun`, latents are shared by ranks and rows by groups of them: `sharding`.
"""

from __future__ import annotations

import math
import shutil
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from monosemy import kernels
from monosemy.activations.capture import CaptureConfig, rank_device
from monosemy.activations.live import LiveActivations, open_live
from monosemy.activations.store import Activations, ShardFolder, open_activations
from monosemy.activations.stream import Stream
from monosemy.artifact import Draft, Manifest, read_manifest
from monosemy.llm.sites import Site
from monosemy.runtime import InputError, Progress, Ranks, joined_ranks, say
from monosemy.sae import activity
from monosemy.sae.autoencoder import SAE, SAEConfig, folded, normalize_rows
from monosemy.sae.settings import TrainConfig
from monosemy.sae.sharding import place_and_exchange
from monosemy.sae.tracking import Tracker, read_history
from monosemy.sae.training_state import (
    Latents,
    Scales,
    checkpoints,
    collect_parameters,
    initial_state,
    load_checkpoint,
    save_checkpoint,
    write_parameters,
)  # fmt: skip

LIVE = "live"
"""Folder of what is remembered of activations that are computed on the fly."""

START_ROWS = 1 << 15
"""Rows, at most, that biases and scales start from, and that the threshold of a JumpReLU is measured on."""


def run(config: TrainConfig) -> Manifest:
    """Make the SAE artifact `config.out`, or go on with it."""
    [manifest] = train_all(config)
    return manifest


def train_all(config: TrainConfig) -> list[Manifest]:
    """Make the artifacts of all SAEs of the grid in one pass over the data, or go on with them.

    An SAE that fails (a loss that is not finite) does not stop the others. Raises `InputError` at the end if one did.
    """
    members = config.members()
    with joined_ranks() as ranks, ExitStack() as stack:
        device = rank_device(config.device)
        source, parents = _open_source(config, members)
        drafts = [stack.enter_context(Draft(member.out, "sae", member, parents, ranks)) for member in members]
        feeds = _Feeds(source, device)
        trainings = [
            Training(member, draft, feeds.of(member), ranks, device)
            for member, draft in zip(members, drafts, strict=True)
            if not draft.complete
        ]
        if trainings and isinstance(source, LiveActivations):
            draft = trainings[0].draft
            # Each rank remembers for itself: they would write the same files at once.
            source.memory = ShardFolder((draft.path / LIVE / str(ranks.number)).joinpath, draft.identity)
        for training in trainings:
            stack.callback(training.close)
        failures = _train(trainings)
        for training in trainings:
            if training.failure is None:
                training.commit()
        if failures:
            raise InputError("; ".join(failures))
    if config.grid:
        for member in members:
            last = read_history(member.out)[-1]
            held_out = f", held-out {last['validation_fvu']:.4f}" if "validation_fvu" in last else ""
            say(f"{member.out}: FVU {last['fvu']:.4f}{held_out}, L0 {last['l0']:.1f}, {last['dead']:,} dead")
    return [read_manifest(member.out, "sae") for member in members]


def _open_source(
    config: TrainConfig, members: list[TrainConfig]
) -> tuple[Activations | LiveActivations, dict[str, str]]:
    """Where rows come from, and what the SAEs' manifests name as their parents."""
    if config.activations is not None:
        stored = open_activations(config.activations)
        return stored, {"activations": stored.manifest.digest}
    assert config.model is not None
    assert config.tokens is not None
    named = [name for member in members for name in (member.site, member.variant.target_site) if name is not None]
    sites = tuple(dict.fromkeys(str(Site.parse(name)) for name in named))
    live = open_live(CaptureConfig(tokens=config.tokens, out=config.out, model=config.model, sites=sites))
    return live, live.maker.parents | {"dtype": live.maker.config.dtype}


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


class Feed:
    """Normalised batches of a site, and of a transcoder's target site."""

    def __init__(self, source: Activations | LiveActivations, site: Site, config: TrainConfig, device: torch.device):
        target = config.variant.target_site
        self.source, self.site, self.config, self.device = source, site, config, device
        self.target_site = None if target is None else Site.parse(target)
        self.stream = Stream(source, site, config.batch_size, config.data_seed, target_site=self.target_site)
        self._last: tuple[Any, list[Tensor]] = (None, [])

    def batch(self, step: int, rank: int, count: int) -> list[Float[Tensor, "row d_model"]]:
        """The part of training step `step`, from 1, that `rank` of `count` takes: rows, and their targets if any."""
        if self._last[0] != (step, rank, count):
            self._last = (step, rank, count), self.normalized(self.stream.batches(step - 1, rank, count))
        return self._last[1]

    def normalized(self, rows: list[Tensor]) -> list[Tensor]:
        how = "token" if self.config.variant.normalize == "token" else "none"
        found = [normalize_rows(part.to(self.device), how)[0] for part in rows]
        return [part if scale == 1 else part * scale for part, scale in zip(found, self.scales, strict=False)]

    @cached_property
    def scales(self) -> Scales:
        """What rows are multiplied by, at the site and at the target."""
        if self.config.variant.normalize != "dataset":
            return Scales(1.0, 1.0)
        found = [len(rows[0]) ** 0.5 / rows.norm(dim=1).mean().item() for rows in self.stream.first_rows(START_ROWS)]
        return Scales(found[0], found[-1])

    def first_rows(self) -> list[Float[Tensor, "row d_model"]]:
        """Normalised training rows to start from."""
        return self.normalized(self.stream.first_rows(START_ROWS))

    @cached_property
    def held_out(self) -> list[Float[Tensor, "row d_model"]] | None:
        """Normalised held-out rows; None if there are none."""
        if int(self.source.split_sizes(True).sum()) == 0:
            say("train: no rows are held out, so there is no validation (tokenize with --validation-fraction)")
            return None
        n_rows = self.config.watch.validation_rows
        stream = Stream(self.source, self.site, 1, 0, validation=True, window_rows=n_rows, target_site=self.target_site)
        return self.normalized(stream.first_rows(n_rows))


class _Feeds:
    """One feed for all SAEs that can share it."""

    def __init__(self, source: Activations | LiveActivations, device: torch.device) -> None:
        self.source, self.device = source, device
        self.known: dict[tuple, Feed] = {}

    def of(self, config: TrainConfig) -> Feed:
        source = self.source
        site = source.only_site(config.site) if isinstance(source, Activations) else Site.parse(str(config.site))
        target = config.variant.target_site
        if target is not None and Site.parse(target) == site:
            raise InputError(f"target_site is {target}, the site itself: a transcoder needs another, or drop it")
        if target is not None and isinstance(source, Activations):
            source.only_site(target)
        key = (site, target, config.variant.normalize, config.watch.validation_rows)
        if key not in self.known:
            self.known[key] = Feed(source, site, config, self.device)
        return self.known[key]


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Validations(NamedTuple):
    """What held-out rows have told so far."""

    best: float
    """The lowest FVU."""
    best_step: int
    stale: int
    """Validations since then."""


class Training:
    """One SAE that is being trained: its draft, its state, and what it says about itself."""

    def __init__(self, config: TrainConfig, draft: Draft, feed: Feed, ranks: Ranks, device: torch.device) -> None:
        if ranks.count > 1 and config.variant.activation == "relu":
            raise InputError("relu is trained densely, by one process: start it without torchrun")
        self.config, self.draft, self.feed, self.ranks = config, draft, feed, ranks
        self.place, self.exchange = place_and_exchange(config.n_latents, ranks, config.latent_shards, device)
        self.latents = Latents(self.place.first_latent, self.place.end_latent)
        self.device, self.done, self.ended = device, 0, False
        self.failure: InputError | None = None
        self.tracker: Tracker | None = None
        self.validations = Validations(math.inf, 0, 0)
        self.facts: dict[str, float] = {}

    def begin(self) -> None:
        """Start, or go on from the last checkpoint."""
        config, n_steps = self.config, self.config.n_steps
        if config.watch.patience and self.feed.held_out is None:
            raise InputError(f"patience is {config.watch.patience}, but no rows are held out to tell when to stop")
        self.state = initial_state(config, self.feed.first_rows(), self.latents, self.device)
        saved = checkpoints(self.draft.path)
        if saved:
            progress = load_checkpoint(saved[-1], self.state, self.latents)
            self.done, self.validations = progress["step"], Validations(*progress["validations"])
            self.ended = progress["ended"]
        self.workspace = kernels.make_workspace(self.state.parameters)
        self.tracker = Tracker(self.draft.path, config, self.done) if self.ranks.number == 0 else None
        count = config.watch.validations
        self.validated = {round((part + 1) * n_steps / count) for part in range(count)} - {0}
        n_intervals = min(config.watch.activity_intervals, n_steps)
        self.intervals = {round((part + 1) * n_steps / n_intervals): part for part in range(n_intervals)}

    def advance(self, step: int) -> None:
        """Do training step `step`, from 1."""
        config, state, exchange = self.config, self.state, self.exchange
        rows = self.feed.batch(step, self.place.replica, self.place.n_replicas)
        target = rows[1] if len(rows) > 1 else None
        before, seen = (step - 1) * config.batch_size, step * config.batch_size
        dead = seen - state.last_fired > config.dead_after
        rate, settings = config.learning_rate(step), config.step_settings(step)
        result = kernels.train_step(
            state.parameters, state.moments, rows[0], dead, settings, rate, step, self.workspace, target, exchange
        )
        self._check_finite(result.loss, step, before)
        state.last_fired[result.counts > 0] = seen
        state.fired.add_(result.counts)
        if state.average is not None:
            for name, tensor in state.average.named().items():
                tensor.lerp_(getattr(state.parameters, name), 1 - config.memory(step))
        self.done, self.ended = step, step == config.n_steps
        held_out = {"validation_fvu": self._validate(step)} if step in self.validated and self.feed.held_out else {}
        figures: dict[str, Any] = {}
        if step % config.watch.log_every == 0 or self.ended:
            n_dead = int(exchange.sum_shards(dead.sum()))
            figures = {"loss": result.loss, "fvu": result.fvu, "aux_loss": result.aux_loss, "l0": result.l0}
            figures |= {"dead": n_dead, "learning_rate": rate}
            figures |= {} if config.variant.activation == "relu" else {"k": settings.k}
            self.facts |= {"loss": result.loss, "fvu": result.fvu, "dead": n_dead}
        if (figures or held_out) and self.tracker is not None:
            self.tracker.log({"step": step, "tokens": seen} | figures | held_out)
        if step in self.intervals or self.ended:
            if self.place.replica == 0:
                activity.write_interval(
                    self.draft.path, self._interval(step), seen, self.latents.first, state.fired, state.last_fired
                )
            state.fired.zero_()
        if step % config.watch.checkpoint_every == 0 or self.ended:
            self.checkpoint()

    def _interval(self, step: int) -> int:
        """The interval that `step` belongs to."""
        return min(part for end, part in self.intervals.items() if end >= step)

    def _check_finite(self, loss: float, step: int, before: int) -> None:
        if not math.isfinite(loss):
            raise InputError(
                f"{self.config.out}: the loss became {loss} at step {step}, after {before:,} rows: try a learning rate "
                f"below {self.config.peak_learning_rate:g}; the last checkpoint is kept"
            )

    def _validate(self, step: int) -> float:
        """Measure held-out rows, keep the weights if they are the best, and end the run if it has grown stale."""
        held_out = self.feed.held_out
        assert held_out is not None
        rows, target = held_out[0], held_out[1] if len(held_out) > 1 else None
        settings, parameters, workspace = self.config.step_settings(step), self._result, self.workspace
        settings = replace(settings, k=self.config.k)  # what is saved has that many, however far k has fallen yet
        if self.state.average is not None:  # its directions have other norms than 1, which are folded at the end
            settings, workspace = replace(settings, decoder="free"), kernels.make_workspace(parameters)
        fvu = kernels.fvu(parameters, rows, settings, workspace, target, self.exchange)
        self.facts["validation_fvu"] = fvu
        patience = self.config.watch.patience
        if patience and not math.isfinite(fvu):
            raise InputError(
                f"{self.config.out}: the held-out FVU is {fvu} at step {step}, so patience has nothing to go by: "
                "hold out more rows, or drop --patience"
            )
        if fvu < self.validations.best:
            self.validations = Validations(fvu, step, 0)
            if patience and self.place.replica == 0:
                write_parameters(self.draft.path, "best", self._result, self.latents)
        else:
            self.validations = self.validations._replace(stale=self.validations.stale + 1)
        if patience and self.validations.stale >= patience and not self.ended:
            best, best_step = self.validations.best, self.validations.best_step
            say(
                f"{self.config.out}: stopped at step {step}; the best held-out FVU, {best:.4f}, was at step {best_step}"
            )
            self.ended = True
        return fvu

    @property
    def _result(self) -> kernels.Parameters:
        """The weights that would be saved."""
        return self.state.average or self.state.parameters

    def checkpoint(self) -> None:
        """Keep everything that the next step depends on."""
        progress = {"step": self.done, "validations": self.validations, "ended": self.ended}
        save_checkpoint(
            self.draft.path, self.done, self.state, progress, self.latents, self.ranks, self.place.replica == 0,
            self.config.watch.keep_checkpoints,
        )  # fmt: skip

    def close(self) -> None:
        """Let go of the files and services that figures go to, however the run ended."""
        if self.tracker is not None:
            self.tracker.close()

    def commit(self) -> Manifest:
        """Finish the artifact."""
        config, draft, path = self.config, self.draft, self.draft.path
        if not config.watch.patience and self.place.replica == 0:
            write_parameters(path, "best", self._result, self.latents)
        self.ranks.wait()
        if self.tracker is not None:
            self.tracker.close()
            if (fvu := self.facts.get("validation_fvu", 0.0)) > 1:
                say(
                    f"{config.out}: the held-out FVU is {fvu:.3g}, worse than the mean of all rows: this SAE is of no "
                    f"use; try a learning rate below {config.peak_learning_rate:g}"
                )
            self._sae(collect_parameters(path, "best")).save(path)
            activity.collect(path, 1 + self._interval(self.done))
            for checkpoint in path.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            shutil.rmtree(path / LIVE, ignore_errors=True)
        return draft.commit({"latents": config.n_latents, "tokens": self.done * config.batch_size})

    def _sae(self, parameters: kernels.Parameters) -> SAE:
        """The trained parameters as users get them: unit directions, input as it is or normalised per token."""
        config, variant, feed = self.config, self.config.variant, self.feed
        parameters = folded(parameters, *feed.scales)
        sae_config = SAEConfig(
            d_model=feed.source.d_model,
            n_latents=config.n_latents,
            k=config.n_latents if variant.activation == "relu" else config.k,
            site=str(feed.site),
            model=feed.source.model_name,
            normalize="token" if variant.normalize == "token" else "none",
            sink_norm=feed.source.sink_norm(feed.site),
            activation="relu" if variant.activation == "relu" else "topk",
            target_site=None if feed.target_site is None else str(feed.target_site),
        )
        sae = SAE(sae_config, parameters)
        if variant.jumprelu or variant.activation == "batch_topk":
            return sae.to_jumprelu(feed.stream.first_rows(START_ROWS)[0])
        return sae


def _train(trainings: list[Training]) -> list[str]:
    """Take all steps of all trainings, in step, and say what failed."""
    for training in trainings:
        training.begin()
    failures: list[str] = []
    rows_of = lambda training: training.config.n_steps * training.config.batch_size  # noqa: E731
    with Progress("train", sum(map(rows_of, trainings)), "token") as progress:
        progress.skip(sum(training.done * training.config.batch_size for training in trainings))
        for step in range(1, 1 + max((training.config.n_steps for training in trainings), default=0)):
            for training in trainings:
                if training.done >= step or training.ended or training.failure is not None:
                    continue
                try:
                    training.advance(step)
                except InputError as error:
                    if len(trainings) == 1:
                        raise
                    training.failure = error
                    failures.append(str(error))
                progress.advance(training.config.batch_size, **training.facts)
    return failures
