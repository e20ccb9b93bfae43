"""Shows latents in the terminal: those whose label has the words of a query, or one in full by its number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from monosemy.artifact import unrecorded
from monosemy.latents.labels import Label, open_labels
from monosemy.latents.record import Example, Index, open_index
from monosemy.latents.tally import AGGREGATIONS
from monosemy.runtime import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

EXCERPT = 90
"""Characters of a sentence shown in a list."""
SENTENCES = 10
"""Sentences shown per aggregation when one latent is shown in full."""


@dataclass(frozen=True)
class FeaturesConfig:
    """Search latents and show them."""

    index: Path = unrecorded()
    """Index, made by `monosemy index`."""
    query: Positional[str] = unrecorded("")
    """Words to look for in the labels, or the number of one latent to show in full; empty lists all."""
    labels: Path | None = unrecorded(None)
    """Labels of that index, made by `monosemy explain`."""
    top: int = unrecorded(20)
    """Latents to list, at most."""
    sort: Literal["certainty", "density", "max", "latent"] = unrecorded("certainty")
    """What comes first: the highest, or with `latent` the lowest number."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise InputError(f"top is {self.top}; expected at least 1")


def run(config: FeaturesConfig, console: Console | None = None) -> None:
    """Print what `config` asks for to standard output, or to `console`."""
    from rich.console import Console

    console = console or Console()
    index = open_index(config.index)
    labels = None if config.labels is None else open_labels(config.labels, index.manifest.digest)
    if config.query.strip().removeprefix("-").isdigit():
        latent = index.check_latent(int(config.query))
        show_latent(console, index, latent, None if labels is None else labels[latent])
        return
    if labels is None and config.query.strip():
        raise InputError(f"searching for {config.query!r} needs labels: give --labels, or the number of a latent")
    found = search(index, labels, config)
    if not found:
        console.print(f"No label has all of the words: {config.query}")
        return
    show_list(console, index, labels, found[: config.top])
    if len(found) > config.top:
        console.print(f"{len(found) - config.top:,} more: raise --top to see them", style="dim")


def search(index: Index, labels: list[Label] | None, config: FeaturesConfig) -> list[int]:
    """The latents that fire and whose label has every word of the query, in the order asked for."""
    words = config.query.lower().split()
    statistics = index.statistics
    living = [latent for latent in range(index.n_latents) if statistics.n_fired[latent] > 0]
    if labels is not None:
        living = [latent for latent in living if all(word in labels[latent].label.lower() for word in words)]

    def key(latent: int) -> tuple[float, int]:
        match config.sort:
            case "certainty":
                return (0.0 if labels is None else -labels[latent].certainty, latent)
            case "density":
                return (-float(statistics.density[latent]), latent)
            case "max":
                return (-float(statistics.max[latent]), latent)
            case "latent":
                return (0.0, latent)

    return sorted(living, key=key)


def show_list(console: Console, index: Index, labels: list[Label] | None, latents: list[int]) -> None:
    """A table with a line per latent and its best example."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("latent", "certainty", "density", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("label", max_width=40)
    table.add_column("fires most on")
    for latent in latents:
        record = index.latent(latent)
        label = None if labels is None else labels[latent]
        table.add_row(
            str(latent),
            "" if label is None else f"{label.certainty:.2f}",
            f"{record.density:.3%}",
            f"{record.max:.1f}",
            "" if label is None else label.label,
            shaded(index.examples(latent, limit=1)[0], record.max, EXCERPT),
        )
    console.print(table)


def show_latent(console: Console, index: Index, latent: int, label: Label | None) -> None:
    """Everything the index knows about one latent."""
    from rich.rule import Rule

    record = index.latent(latent)
    console.print(Rule(f"latent {latent}"))
    if label is not None:
        console.print(label.label or "never fires", style="bold")
        _show_evidence(console, label)
    console.print(
        f"fires on {record.n_fired:,} tokens ({record.density:.3%}) in {record.n_sentences:,} sentences; "
        f"activation: mean {record.mean:.2f}, max {record.max:.2f}; "
        f"{record.first_share:.0%} on first and {record.last_share:.0%} on last tokens"
    )
    logits = index.logits(latent)
    for name, effects in (("promotes", logits.promoted), ("suppresses", logits.suppressed)):
        console.print(f"{name}: " + "  ".join(_visible(effect.piece) for effect in effects), markup=False)
    for aggregation in AGGREGATIONS:
        examples = index.examples(latent, aggregation, limit=SENTENCES)
        if examples:
            console.print(Rule(f"best sentences by {aggregation}", style="dim"))
        for example in examples:
            console.print(f"{example.score:7.2f}  ", shaded(example, record.max), sep="")


def _show_evidence(console: Console, label: Label) -> None:
    parts = [f"certainty {label.certainty:.2f}"]
    parts += [f"{name} {label.evidence[name]:.2f}" for name in ("coverage", "precision") if name in label.evidence]
    console.print(", ".join(parts))
    words = label.evidence.get("words", [])
    if words:
        shares = ", ".join(f"{word['word']} {word['share']:.0%}" for word in words)
        console.print(f"fires on: {shares}", markup=False)


def shaded(example: Example, largest: float, width: int | None = None) -> Text:
    """The sentence with a background as strong as the latent's activation; around the strongest token if `width`."""
    from rich.text import Text

    text = Text()
    for piece, activation in zip(example.pieces, example.activations.tolist(), strict=True):
        piece = piece.replace("\n", " ")
        if activation > 0:
            depth = round(40 + 160 * math.sqrt(min(1.0, activation / largest)))
            text.append(piece, style=f"bold white on rgb({depth},{depth // 3},0)")
        else:
            text.append(piece)
    if width is None or len(text) <= width:
        return text
    strongest = int(example.activations.argmax())
    middle = sum(len(piece) for piece in example.pieces[:strongest])
    start = max(0, min(middle - 2 * width // 3, len(text) - width))
    return text[start : start + width]


def _visible(piece: str) -> str:
    return piece.strip().replace("\n", "⏎") or "␣"
