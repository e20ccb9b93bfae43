"""How strongly must a latent be added, before the text turns towards its label and while it still reads well?

1. Take the latents that `candidates` ranks first, or those that were asked for.
2. Each is added at several strengths, in units of its own largest activation, while neutral prompts are continued.
3. The plain model reads each text once more. *Effect*: does the text contain a word that the latent fires on, and how
   strongly does the latent itself fire on it, now without steering? *Fluency*: cross-entropy of the text under the
   plain model, and the share of its word pairs that are not repetitions.
4. Chosen is the latent and strength with the largest effect among those whose text stays fluent: cross-entropy at most
   `MAX_LOSS_RISE` nats above the plain completions', and at least `MIN_DISTINCT` of word pairs distinct.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import torch
from jaxtyping import Float

from monosemy.artifact import Draft, Manifest, read_manifest, to_json, unrecorded, write_table, write_text
from monosemy.explain.candidates import WORD, Candidate, make_candidate, rank_candidates
from monosemy.latents.labels import Label, open_labels
from monosemy.latents.record import Index, open_index
from monosemy.llm.checkpoint import load_model
from monosemy.llm.generate import generate
from monosemy.llm.model import LanguageModel, resolved
from monosemy.llm.sampling import SamplingSettings
from monosemy.llm.sites import Site, Taps
from monosemy.runtime import DtypeName, InputError, Progress, random_stream
from monosemy.sae.autoencoder import SAE, open_sae
from monosemy.sae.evaluate import check_fits
from monosemy.steer import vector_edit

MAX_LOSS_RISE = 1.0
"""Nats per token that a steered text may cost the plain model above plain text."""

MIN_DISTINCT = 0.85
"""Share of a text's word pairs that must be distinct, as a mean over prompts."""

NEUTRAL_PROMPTS = (
    "I think that",
    "Last week, my neighbor told me about",
    "The most important thing is",
    "Yesterday morning I went to",
    "My friend said that",
    "The story begins with",
)
"""Beginnings that lead nowhere in particular."""

READ_TOGETHER = 24
"""Completions read side by side: their logits are the largest thing in memory."""


@dataclass(frozen=True)
class DoseConfig:
    """Find the strength at which steering works: effect and fluency for several latents and strengths."""

    sae: Path = unrecorded()
    """SAE, made by `monosemy train`."""
    index: Path = unrecorded()
    """Index of its latents."""
    labels: Path = unrecorded()
    """Labels, made by `monosemy explain`."""
    out: Path = unrecorded()
    """Folder for the results."""
    model: str = unrecorded("smollm2")
    """The model the SAE was trained on."""
    latents: tuple[int, ...] = ()
    """Latents to try; none given: the most promising ones."""
    n_candidates: int = 12
    """How many latents to try where none are given."""
    strengths: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """Strengths to try, in units of the latent's largest activation."""
    prompts: tuple[str, ...] = NEUTRAL_PROMPTS
    """Texts to continue."""
    max_new_tokens: int = 32
    """Tokens per completion."""
    temperature: float = 0.7
    """Randomness of the choice of tokens."""
    top_p: float = 0.9
    """Draw only from the likeliest tokens that together have this probability."""
    seed: int = 42
    """Seed of the sampling."""
    dtype: DtypeName = "auto"
    """Arithmetic of the model; `auto` is bfloat16 where the processor multiplies it, or else float32."""
    batch_size: int = unrecorded(120)
    """Completions written side by side."""

    def __post_init__(self) -> None:
        if not self.strengths or not self.prompts:
            raise InputError("give at least one strength and one prompt")
        if self.n_candidates < 1 or self.batch_size < 1:
            raise InputError(f"n_candidates is {self.n_candidates}, batch_size {self.batch_size}; expected at least 1")
        if not all(math.isfinite(strength) and strength != 0 for strength in self.strengths):
            raise InputError(f"strengths are {self.strengths}; expected finite numbers other than 0")
        self.sampling()

    def sampling(self) -> SamplingSettings:
        return SamplingSettings(self.max_new_tokens, self.temperature, self.top_p, self.seed)


class Trial(NamedTuple):
    """One completion."""

    latent: int
    fraction: float
    """Strength in units of the latent's largest activation."""
    strength: float
    """Strength in units of activation."""
    prompt: str
    text: str
    mentions: bool
    """Whether the text contains a word of the concept."""
    read_back: float
    """The latent's largest activation on the text, read without steering, in units of its largest in the index."""
    loss: float
    """Cross-entropy of the text under the plain model, nats per token."""
    distinct: float
    """Share of its word pairs that are distinct."""


@dataclass(frozen=True)
class Dose:
    """What one strength of one latent does, as means over the prompts."""

    latent: int
    label: str
    fraction: float
    strength: float
    effect: float
    """Share of texts that contain a word of the concept."""
    plain_effect: float
    """The same for the plain model."""
    read_back: float
    loss_rise: float
    """Cross-entropy above that of the plain completions, nats per token."""
    distinct: float

    @property
    def fluent(self) -> bool:
        return self.loss_rise <= MAX_LOSS_RISE and self.distinct >= MIN_DISTINCT


class Comparison(NamedTuple):
    """A prompt with its plain and its steered completion."""

    prompt: str
    plain: str
    steered: str
    mentions: bool
    """Whether the steered text contains a word of the concept."""


@dataclass(frozen=True)
class Choice:
    """What `choice.json` holds: every dose, the chosen one, and its texts beside the plain ones."""

    doses: list[Dose]
    chosen: Dose
    fluent: bool
    """False where no dose was fluent and the least harmful one was taken."""
    examples: list[Comparison]


def run(config: DoseConfig) -> Manifest:
    """Make the dose artifact `config.out`."""
    sae, index = open_sae(config.sae), open_index(config.index)
    labels = open_labels(config.labels, index.manifest.digest)
    if index.manifest.parents["sae"] != read_manifest(config.sae, "sae").digest:
        raise InputError(
            f"{config.index} is the index of another SAE than {config.sae}: run `monosemy index` on this one"
        )
    model = load_model(config.model, config.dtype)
    config = resolved(config, model)
    check_fits(sae, model)
    parents = {name: read_manifest(getattr(config, name), name).digest for name in ("sae", "index", "labels")}
    with Draft(config.out, "dose", config, parents | {"model": model.fingerprint}) as draft:
        if draft.complete:
            return read_manifest(config.out, "dose")
        candidates = _candidates(model, sae, index, labels, config)
        trials = _run_trials(model, sae, candidates, config)
        write_table(draft.path / "dose.parquet", pyarrow.Table.from_pylist([trial._asdict() for trial in trials]))
        write_text(draft.path / "choice.json", to_json(choose_dose(trials, candidates)))
        return draft.commit({"completions": len(trials)})


def load_choice(path: Path) -> Choice:
    """What the dose artifact in folder `path` chose."""
    read_manifest(path, "dose")
    content = json.loads((path / "choice.json").read_text(encoding="utf-8"))
    return Choice(
        doses=[Dose(**dose) for dose in content["doses"]],
        chosen=Dose(**content["chosen"]),
        fluent=content["fluent"],
        examples=[Comparison(*example) for example in content["examples"]],
    )


def _candidates(
    model: LanguageModel, sae: SAE, index: Index, labels: Sequence[Label], config: DoseConfig
) -> list[Candidate]:
    """The latents asked for; where none are, the most promising ones."""
    by_latent = {label.latent: label for label in labels if label.label}
    for latent in map(sae.check_latent, config.latents):
        if latent not in by_latent:
            raise InputError(f"latent {latent} has no label in {config.labels}: choose one that fires")
    if config.latents:
        return [make_candidate(index, by_latent[latent]) for latent in config.latents]
    return rank_candidates(model, sae, index, list(by_latent.values()), config.prompts)[: config.n_candidates]


class Job(NamedTuple):
    """One completion to write: a candidate at a strength, after a prompt."""

    candidate: Candidate
    fraction: float
    prompt: str

    @property
    def strength(self) -> float:
        return self.fraction * self.candidate.max_activation


def _run_trials(model: LanguageModel, sae: SAE, candidates: Sequence[Candidate], config: DoseConfig) -> list[Trial]:
    """Every steered completion, and the plain ones judged anew for each candidate."""
    jobs = [Job(c, f, prompt) for c in candidates for f in config.strengths for prompt in config.prompts]
    with Progress("steer-sweep", len(jobs) + len(config.prompts), "completion") as progress:
        plain_jobs = [Job(candidates[0], 0.0, prompt) for prompt in config.prompts]
        plain = _complete(model, sae, plain_jobs, config)
        progress.advance(len(plain))
        trials = []
        for candidate in candidates:
            trials += _judge(model, sae, [Job(candidate, 0.0, prompt) for prompt in config.prompts], plain)
        for start in range(0, len(jobs), config.batch_size):
            part = jobs[start : start + config.batch_size]
            trials += _judge(model, sae, part, _complete(model, sae, part, config))
            progress.advance(len(part))
    return trials


def _complete(model: LanguageModel, sae: SAE, jobs: Sequence[Job], config: DoseConfig) -> list[list[int]]:
    """The token ids that continue each job's prompt. A prompt's random numbers are the same at every strength."""
    changes = torch.stack([sae.W_dec[job.candidate.latent] * job.strength for job in jobs])
    taps = Taps(edits={Site.parse(sae.config.output_site): vector_edit(sae, changes)})
    prompts = [model.tokenizer.encode_prompt(job.prompt) for job in jobs]
    streams = [random_stream(config.seed, *prompt) for prompt in prompts]
    completions: list[list[int]] = [[] for _ in jobs]
    for step in generate(model, prompts, config.sampling(), taps, streams):
        for completion, token in zip(completions, step, strict=True):
            if token is not None:
                completion.append(token)
    return completions


@torch.inference_mode()
def _judge(model: LanguageModel, sae: SAE, jobs: Sequence[Job], completions: Sequence[list[int]]) -> list[Trial]:
    """Let the plain model read each completion after its prompt."""
    trials = []
    site = Site.parse(sae.config.site)
    for start in range(0, len(jobs), READ_TOGETHER):
        part = slice(start, start + READ_TOGETHER)
        prompts = [model.tokenizer.encode_prompt(job.prompt) for job in jobs[part]]
        texts = [prompt + completion for prompt, completion in zip(prompts, completions[part], strict=True)]
        lengths = torch.tensor([len(text) for text in texts])
        ids = torch.tensor([[id for text in texts for id in text]])
        taps = Taps(reads={site})
        logits = model(ids, taps=taps, lengths=lengths)[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        first = (lengths.cumsum(0) - lengths).tolist()
        for start, job, prompt, text in zip(first, jobs[part], prompts, texts, strict=True):
            written = slice(start + len(prompt), start + len(text))
            loss = losses[written.start - 1 : written.stop - 1]
            trials.append(_trial(model, sae, job, text[len(prompt) :], taps.values[site][0, written], loss))
    return trials


def _trial(
    model: LanguageModel,
    sae: SAE,
    job: Job,
    completion: list[int],
    rows: Float[torch.Tensor, "token d_model"],
    losses: Float[torch.Tensor, " token"],
) -> Trial:
    """The verdict on one completion, given its rows at the SAE's site and its tokens' losses in the plain model."""
    text = model.tokenizer.decode(completion)
    words = {word for match in WORD.findall(text.lower()) for word in (match, match.rstrip("."))}
    return Trial(
        latent=job.candidate.latent,
        fraction=job.fraction,
        strength=job.strength,
        prompt=job.prompt,
        text=text,
        mentions=not words.isdisjoint(job.candidate.words),
        read_back=_read_back(sae, rows, job.candidate),
        loss=losses.mean().item() if completion else 0.0,
        distinct=distinct_pairs(text),
    )


def _read_back(sae: SAE, rows: Float[torch.Tensor, "token d_model"], candidate: Candidate) -> float:
    if len(rows) == 0:
        return 0.0
    code = sae.encode(rows)
    activation = torch.where(code.indices == candidate.latent, code.values, 0.0).max().item()
    return activation / candidate.max_activation


def distinct_pairs(text: str) -> float:
    """The share of neighbouring word pairs of `text` that are distinct; 1 where there are fewer than two."""
    words = text.lower().split()
    pairs = list(pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def choose_dose(trials: Sequence[Trial], candidates: Sequence[Candidate]) -> Choice:
    """The fluent dose with the largest effect; of equals, the one that the latent itself reads best."""
    doses = []
    for candidate in candidates:
        own = [trial for trial in trials if trial.latent == candidate.latent]
        plain = [trial for trial in own if trial.fraction == 0]
        for fraction in sorted({trial.fraction for trial in own} - {0.0}):
            steered = [trial for trial in own if trial.fraction == fraction]
            doses.append(_mean_dose(candidate, steered, plain))
    pool = [dose for dose in doses if dose.fluent]
    if pool:
        chosen = max(pool, key=lambda dose: (dose.effect - dose.plain_effect, dose.read_back, -dose.latent))
    else:
        chosen = min(doses, key=lambda dose: (dose.loss_rise, dose.latent))
    own = [trial for trial in trials if trial.latent == chosen.latent]
    plain_texts = {trial.prompt: trial.text for trial in own if trial.fraction == 0}
    steered = [trial for trial in own if trial.fraction == chosen.fraction]
    examples = [Comparison(t.prompt, plain_texts[t.prompt], t.text, t.mentions) for t in steered]
    return Choice(doses, chosen, bool(pool), examples)


def _mean_dose(candidate: Candidate, steered: Sequence[Trial], plain: Sequence[Trial]) -> Dose:
    def mean(trials: Sequence[Trial], field: str) -> float:
        return float(np.mean([getattr(trial, field) for trial in trials]))

    return Dose(
        latent=candidate.latent,
        label=candidate.label,
        fraction=steered[0].fraction,
        strength=steered[0].strength,
        effect=mean(steered, "mentions"),
        plain_effect=mean(plain, "mentions"),
        read_back=mean(steered, "read_back"),
        loss_rise=mean(steered, "loss") - mean(plain, "loss"),
        distinct=mean(steered, "distinct"),
    )


def run_and_print(config: DoseConfig) -> None:
    """What the command does: make the doses and show every one of the chosen latent, and the best of the others."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    run(config)
    choice = load_choice(config.out)
    table = Table("latent", "strength", "effect", "reads back", "loss rise", "distinct", "label")
    for dose in shown_doses(choice):
        mark = "chosen" if dose == choice.chosen else "" if dose.fluent else "not fluent"
        label = f"{escape(dose.label)}{f' [bold]({mark})[/]' if mark else ''}"
        effect = f"{dose.effect:.0%} (plain {dose.plain_effect:.0%})"
        numbers = [f"{number:.2f}" for number in (dose.read_back, dose.loss_rise, dose.distinct)]
        table.add_row(str(dose.latent), f"{dose.strength:+.1f} ({dose.fraction:g}x)", effect, *numbers, label)
    console = Console()
    console.print(table)
    for prompt, plain, steered, _ in choice.examples:
        console.print(f"[bold]{escape(prompt)}[/]")
        console.print(
            f"  plain    {escape(' '.join(plain.split()))}", f"  steered  {escape(' '.join(steered.split()))}", sep="\n"
        )


def shown_doses(choice: Choice) -> list[Dose]:
    """Every dose of the chosen latent, then the most effective dose of each other one."""
    shown = [dose for dose in choice.doses if dose.latent == choice.chosen.latent]
    for latent in dict.fromkeys(dose.latent for dose in choice.doses):
        if latent != choice.chosen.latent:
            doses = [dose for dose in choice.doses if dose.latent == latent]
            shown.append(max(doses, key=lambda dose: (dose.fluent, dose.effect, dose.read_back)))
    return shown
