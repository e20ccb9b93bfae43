"""Text and chat in the terminal: plain or steered, and which latents fired on which token.

1. Prompts are taken as they are, or as a user's message by the model's own chat template (`--chat`).
2. One prompt streams word by word; several are continued together and printed one after another.
3. `--explain` reads each completion once more, without steering, and lists its strongest latents with their labels.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro
from tyro.conf import Positional

from monosemy.artifact import read_manifest
from monosemy.latents.labels import open_labels
from monosemy.llm.checkpoint import load_model
from monosemy.llm.generate import SamplingSettings, TextStream, generate
from monosemy.llm.llama import Llama
from monosemy.llm.sites import Site, Taps
from monosemy.runtime import DtypeName, InputError
from monosemy.sae.autoencoder import SAE, load_sae
from monosemy.sae.evaluate import check_fits
from monosemy.steer import Addition, steering

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class GenerateConfig:
    """Continue prompts, steered by latents if asked; prints to standard output."""

    prompts: Positional[tuple[str, ...]]
    """One or more texts to continue."""
    model: str = "smollm2"
    """Model: `smollm2`, a .gguf file, or a Hugging Face folder."""
    sae: Path | None = None
    """SAE, made by `monosemy train`; needed to steer or explain."""
    steer: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="LATENT=STRENGTH")] = ()
    """What to add to which latent, in units of its activation, for example 896=+20; may be given several times."""
    explain: bool = False
    """List the latents that fire most on each token of the completion."""
    labels: Path | None = None
    """Labels, made by `monosemy explain`, to show with --explain."""
    chat: bool = False
    """Send each prompt as a user's message, by the model's chat template."""
    max_new_tokens: int = 128
    """Tokens to write, at most."""
    temperature: float = 0.7
    """Randomness of the choice of tokens; 0 always takes the likeliest."""
    top_p: float = 0.9
    """Draw only from the likeliest tokens that together have this probability."""
    seed: int = 42
    """Equal seeds give equal text."""
    dtype: DtypeName = "auto"
    """Arithmetic of the model."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError('no prompt was given: monosemy generate "The delegates gathered at the"')
        if self.sae is None and (self.steer or self.explain):
            raise InputError("--steer and --explain need an SAE: give --sae DIR, made by `monosemy train`")
        if self.labels is not None and not self.explain:
            raise InputError("--labels are shown by --explain: give both")
        for text in self.steer:
            Addition.parse(text)

    def sampling(self) -> SamplingSettings:
        return SamplingSettings(self.max_new_tokens, self.temperature, self.top_p, self.seed)


def run(config: GenerateConfig) -> None:
    """Print the completions."""
    from rich.console import Console

    sampling = config.sampling()
    sae = load_sae(config.sae) if config.sae is not None else None
    names = read_labels(config.labels, config.sae)
    taps = steering(sae, [Addition.parse(text) for text in config.steer]) if sae is not None and config.steer else None
    model = load_model(config.model, config.dtype)
    if sae is not None:
        check_fits(sae, model)
    texts = [model.tokenizer.chat([{"role": "user", "content": p}]) for p in config.prompts] if config.chat else None
    prompts = [model.tokenizer.encode(text) for text in texts or config.prompts]
    console = Console(highlight=False)
    completions = stream_to(sys.stdout, model, prompts, config, sampling, taps)
    if config.explain and sae is not None:
        for prompt, completion in zip(prompts, completions, strict=True):
            console.print(explanation_table(model, sae, names, prompt, completion))


def read_labels(path: Path | None, sae: Path | None) -> dict[int, str]:
    """Latent -> label; empty without a path. Raises `InputError` for the labels of another SAE."""
    if path is None:
        return {}
    digest = None if sae is None else read_manifest(sae, "sae").digest
    return {label.latent: label.label for label in open_labels(path, sae_digest=digest)}


def stream_to(
    out,
    model: Llama,
    prompts: Sequence[list[int]],
    config: GenerateConfig,
    sampling: SamplingSettings,
    taps: Taps | None,
) -> list[list[int]]:
    """Print every prompt with its completion to `out`; a single one as it is written. Returns the completions' ids."""
    completions: list[list[int]] = [[] for _ in prompts]
    alone = len(prompts) == 1
    text = TextStream(model.tokenizer)
    if alone and not config.chat:
        out.write(config.prompts[0])
    for step in generate(model, prompts, sampling, taps):
        for completion, token in zip(completions, step, strict=True):
            if token is not None:
                completion.append(token)
                if alone:
                    out.write(text.add(token))
                    out.flush()
    if alone:
        out.write(text.finish() + "\n")
    else:
        for prompt, completion in zip(config.prompts, completions, strict=True):
            written = model.tokenizer.decode(completion)
            out.write(f"{'> ' + prompt + chr(10) if config.chat else prompt}{written}\n\n")
    out.flush()
    return completions


class Firing(NamedTuple):
    """One latent on one token."""

    latent: int
    activation: float


def strongest_latents(model: Llama, sae: SAE, ids: Sequence[int], n: int = 3) -> list[list[Firing]]:
    """The `n` strongest latents of every token of `ids`, read without steering; none on attention sinks."""
    import torch

    site = Site.parse(sae.config.site)
    taps = Taps(reads={site})
    with torch.inference_mode():
        model.run_layers(model.embed(torch.tensor([list(ids)])), end=site.layer + 1, taps=taps)
        rows = taps.values[site][0]
        code, sink = sae.encode(rows), sae.is_sink(rows)
    firings = []
    for values, indices, is_sink in zip(code.values, code.indices, sink, strict=True):
        order = values.argsort(descending=True)[: 0 if is_sink else n]
        firings.append([Firing(int(indices[i]), float(values[i])) for i in order if values[i] > 0])
    return firings


def explanation_table(model: Llama, sae: SAE, names: dict[int, str], prompt: list[int], completion: list[int]):
    """A table of the completion's tokens with their strongest latents."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("token", "latents that fire most: id, activation, label", title="read without steering")
    pieces = model.tokenizer.pieces(completion)
    firings = strongest_latents(model, sae, [*prompt, *completion])[len(prompt) :]
    for piece, strongest in zip(pieces, firings, strict=True):
        described = [f"[bold]{f.latent}[/] {f.activation:.1f} {escape(names.get(f.latent, ''))}" for f in strongest]
        table.add_row(escape(repr(piece)[1:-1]), "  ·  ".join(described))
    return table
