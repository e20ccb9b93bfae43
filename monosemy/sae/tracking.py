"""Where the figures of a run go while it goes on: `history.jsonl` always, Weights & Biases and TensorBoard if asked.

The file holds nothing that depends on the machine, so an interrupted run ends with the same one: lines after the
checkpoint from which it goes on are cut off. Rates (rows per second) go to the other two only.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from monosemy import options
from monosemy.artifact import write_text
from monosemy.runtime import InputError, require
from monosemy.sae.settings import TrainConfig

HISTORY = "history.jsonl"


class Tracker:
    """Writes one line of figures at a time."""

    def __init__(self, folder: Path, config: TrainConfig, step: int) -> None:
        """Go on after step `step`, 0 at the start."""
        self.wandb = _open_wandb(config) if config.watch.wandb is not None else None
        self.board = _open_tensorboard(config) if config.watch.tensorboard is not None else None
        self.path, self.name = folder / HISTORY, config.out.name
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(self.path, "".join(kept))  # whole or not at all: a run may be killed twice
        self.file = self.path.open("a", encoding="utf-8")
        self.last_tokens, self.last_time = 0, time.monotonic()

    def log(self, figures: dict[str, Any]) -> None:
        """`figures` has `step` and `tokens`, and numbers."""
        self.file.write(json.dumps(figures) + "\n")
        self.file.flush()
        if self.wandb is None and self.board is None:
            return
        now = time.monotonic()
        rate = (figures["tokens"] - self.last_tokens) / max(now - self.last_time, 1e-9)
        self.last_tokens, self.last_time = figures["tokens"], now
        every = figures | {"tokens_per_second": rate}
        if self.wandb is not None:
            self.wandb.log(every, step=figures["step"])
        if self.board is not None:
            for name, value in every.items():
                self.board.add_scalar(name, value, figures["step"])

    def close(self) -> None:
        """Bring everything to disk; a second time does nothing."""
        if self.file.closed:
            return
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.board is not None:
            self.board.close()


def _open_wandb(config: TrainConfig) -> Any:
    require("wandb", "wandb")
    import wandb

    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.values(config).items()}
    try:
        return wandb.init(project=config.watch.wandb, name=config.out.name, config=plain, reinit="create_new")
    except wandb.Error as error:
        raise InputError(
            f"Weights & Biases cannot be reached or refuses ({error}): log in with `wandb login`, or set "
            "WANDB_MODE=offline"
        ) from error


def _open_tensorboard(config: TrainConfig) -> Any:
    require("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    assert config.watch.tensorboard is not None
    return SummaryWriter(str(config.watch.tensorboard / config.out.name))


def read_history(sae: Path) -> list[dict[str, Any]]:
    """The lines of an SAE artifact's history."""
    path = sae / HISTORY
    if not path.exists():
        raise InputError(f"{path} is missing: this SAE was trained by an older version; train it again")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
