"""Everything that the next step of a training depends on, how it starts, and how it is kept on disk.

1. Directions are drawn in blocks of latents, from (seed, block): a rank that holds some of them draws those alone.
2. b_pre starts at the mean or the geometric median of the first rows; the encoder is the decoder's transpose, scaled
   down (`encoder_scale`): at full scale, unrelated latents add up and training starts in a hole.
3. A checkpoint is a folder: each rank writes its latents, the first one renames the folder when all have. A reader
   takes the latents it needs from whatever files there are, so a run may go on with another number of shards.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from monosemy.artifact import PARTIAL, write_tensors, write_text
from monosemy.kernels import Moments, Parameters
from monosemy.runtime import InputError, Ranks, random_stream
from monosemy.sae.settings import TrainConfig

BLOCK = 4096
"""Latents that are drawn at once."""

BY_LATENT = ("W_enc", "b_enc", "W_dec", "last_fired", "fired")
"""Tensors that have a row per latent; every rank has the others whole."""


class TrainState(NamedTuple):
    """Tensors that change from step to step."""

    parameters: Parameters
    moments: Moments
    last_fired: Int[Tensor, " latent"]
    """Rows seen when the latent last fired."""
    fired: Int[Tensor, " latent"]
    """Rows on which it fired in the present interval."""
    average: Parameters | None
    """Average of the parameters over time, if one is kept."""

    def named(self) -> dict[str, Tensor]:
        """Name in a checkpoint -> tensor."""
        groups = {"weight": self.parameters, "first": self.moments.first, "second": self.moments.second}
        if self.average is not None:
            groups["average"] = self.average
        tensors = {f"{group}.{name}": part for group, whole in groups.items() for name, part in whole.named().items()}
        return tensors | {"last_fired": self.last_fired, "fired": self.fired}


class Scales(NamedTuple):
    """What rows are multiplied by before training (`dataset`), 1 otherwise."""

    input: float
    target: float


class Latents(NamedTuple):
    """The latents that a rank holds."""

    first: int
    end: int


def initial_state(
    config: TrainConfig,
    rows: list[Float[Tensor, "row _"]],
    latents: Latents,
    device: torch.device,
) -> TrainState:
    """The state before the first step. `rows`: normalised rows that the biases start from, at the site and, for a
    transcoder, at its target."""
    inputs, targets = rows[0], rows[-1]
    is_transcoder = config.variant.target_site is not None
    centre = {"mean": lambda x: x.mean(dim=0), "geometric_median": geometric_median}[config.variant.initial_bias]
    directions = _directions(config.seed, latents, targets.shape[1])
    encoder = (
        directions if inputs.shape[1] == targets.shape[1] else _directions(config.seed + 1, latents, inputs.shape[1])
    )
    parameters = Parameters(
        W_enc=encoder * config.variant.encoder_scale,
        b_enc=torch.zeros(len(directions)),
        W_dec=directions,
        b_pre=centre(inputs),
        b_dec=centre(targets) if is_transcoder else None,
        W_skip=torch.zeros(targets.shape[1], inputs.shape[1]) if config.variant.skip else None,
    ).map(lambda tensor: tensor.to(device))
    counts = torch.zeros(len(directions), dtype=torch.int64, device=device)
    average = parameters.map(torch.clone) if config.optimizer.ema else None
    return TrainState(
        parameters, Moments(parameters.zeros_like(), parameters.zeros_like()), counts, counts.clone(), average
    )


def _directions(seed: int, latents: Latents, width: int) -> Float[Tensor, "latent width"]:
    """Random unit vectors, each a function of (seed, its number)."""
    first, last = latents.first // BLOCK, (latents.end - 1) // BLOCK
    blocks = [
        random_stream(seed, block).standard_normal((BLOCK, width), dtype="float32") for block in range(first, last + 1)
    ]
    rows = torch.cat([torch.from_numpy(block) for block in blocks])[latents.first - first * BLOCK :][
        : latents.end - latents.first
    ]
    return rows / rows.norm(dim=1, keepdim=True)


def geometric_median(x: Float[Tensor, "row d"], tolerance: float = 1e-5, most: int = 100) -> Float[Tensor, " d"]:
    """The point with the least sum of distances to the rows, by Weiszfeld's iteration: each row counts by the inverse
    of its distance. Outliers move it less than the mean."""
    point = x.mean(dim=0)
    for _ in range(most):
        weight = 1 / (x - point).norm(dim=1).clamp(min=1e-12)
        following = weight @ x / weight.sum()
        moved = (following - point).norm()
        point = following
        if moved <= tolerance * point.norm():
            break
    return point


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path, step: int, state: TrainState, progress: dict[str, Any], latents: Latents, ranks: Ranks,
    writes: bool, keep: int,
) -> None:  # fmt: skip
    """Write everything that the step after `step` depends on, whole or not at all, and drop all but the last `keep`.

    Every rank comes here; those of the first replica write. Raises `InputError` for weights that are not finite.
    """
    bad = [name for name, tensor in state.parameters.named().items() if not torch.isfinite(tensor.sum())]
    if any(ranks.gather(bad)):
        raise InputError(f"the weights are no longer finite after step {step}: the last checkpoint is kept")
    partial = folder / f"checkpoint-{step:09}{PARTIAL}"
    partial.mkdir(parents=True, exist_ok=True)
    if writes:
        write_tensors(_file_of(partial, "", latents), state.named())
    ranks.wait()
    if ranks.number == 0:
        write_text(partial / "progress.json", json.dumps(progress))
        os.replace(partial, folder / f"checkpoint-{step:09}")
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    ranks.wait()


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first. What an interruption left of another is of no use."""
    return sorted(path for path in folder.glob("checkpoint-*") if not path.name.endswith(PARTIAL))


def load_checkpoint(path: Path, state: TrainState, latents: Latents) -> dict[str, Any]:
    """Fill `state` with what `save_checkpoint` wrote, and return its progress."""
    names = state.named()
    for file in sorted(path.glob("*.safetensors")):
        first, end = map(int, file.stem.split("-"))
        here, there = max(first, latents.first), min(end, latents.end)
        with safe_open(file, framework="pt") as content:
            for name, tensor in names.items():
                if name.split(".")[-1] not in BY_LATENT:
                    tensor.copy_(content.get_tensor(name))
                elif here < there:
                    wanted = content.get_slice(name)[here - first : there - first]
                    tensor[here - latents.first : there - latents.first].copy_(wanted)
    return json.loads((path / "progress.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# Parameters of all ranks
# ---------------------------------------------------------------------------------------------------------------------


def write_parameters(folder: Path, name: str, parameters: Parameters, latents: Latents) -> None:
    """Keep this rank's latents in the file `NAME-FIRST-END.safetensors`."""
    write_tensors(_file_of(folder, f"{name}-", latents), parameters.named())


def _file_of(folder: Path, prefix: str, latents: Latents) -> Path:
    """The file of `latents`. Others that hold some of them were left by a run with another number of shards: they are
    removed."""
    own = folder / f"{prefix}{latents.first:09}-{latents.end:09}.safetensors"
    for other in folder.glob(f"{prefix}*.safetensors"):
        first, end = map(int, other.stem.removeprefix(prefix).split("-"))
        if other != own and first < latents.end and latents.first < end:
            other.unlink(missing_ok=True)
    return own


def collect_parameters(folder: Path, name: str) -> Parameters:
    """The parameters of all latents, from the files that `write_parameters` wrote; they are removed."""
    parts: dict[str, list[Tensor]] = {}
    files = sorted(folder.glob(f"{name}-*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as content:
            for key in content.keys():  # noqa: SIM118
                parts.setdefault(key, []).append(content.get_tensor(key))
    for file in files:
        file.unlink()
    return Parameters(**{key: torch.cat(found) if key in BY_LATENT else found[0] for key, found in parts.items()})
