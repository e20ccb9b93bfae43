"""Latents worth steering by: those that write what they read.

1. A latent's concept is the set of telling words it fires on, from the evidence of its label.
2. Candidates have a certain label, and their direction, read through the unembedding, promotes a word of their concept.
3. They are ranked by *output score*: added right after neutral prompts, how much likelier does such a word become?

A latent that reads a concept need not write it; filtering by output made steering two to three times better (Arad,
Mueller and Belinkov 2025, arXiv 2505.20063).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from monosemy.explain.lexicon import GENERIC
from monosemy.latents.labels import Label
from monosemy.latents.record import Index
from monosemy.llm.model import LanguageModel
from monosemy.llm.sites import Site, Taps
from monosemy.runtime import InputError, Progress
from monosemy.sae.autoencoder import SAE
from monosemy.steer import Addition, Edit, addition_edit

MIN_CERTAINTY = 0.5
"""Certainty of a label from which on its latent is worth trying."""

MAX_SCREENED = 800
"""Latents whose output score is measured, at most: the most certain ones."""

SCREEN_FRACTION = 1.0
"""Strength at which it is measured, in units of the largest activation."""

MIN_LIFT = 20.0
"""How many times more frequent than in the text a word must be where a latent fires, to stand for its concept."""

WORD = re.compile(r"[a-z](?:[a-z'-]|\.(?=[a-z]))+\.?")
"""A word of two letters or more, or an abbreviation such as u.n., in lower case."""


class Candidate(NamedTuple):
    """A latent to try."""

    latent: int
    label: str
    words: tuple[str, ...]
    """Words that stand for its concept, lower case; the effect is that a text contains one."""
    max_activation: float


def concept_words(label: Label) -> tuple[str, ...]:
    """The telling words a latent fires on, lower case: those that are much more frequent there than in the text."""
    words = [entry["word"].lower() for entry in label.evidence["words"] if entry["lift"] >= MIN_LIFT]
    return tuple(dict.fromkeys(word for word in words if WORD.fullmatch(word) and word not in GENERIC))


def make_candidate(index: Index, label: Label) -> Candidate:
    """The latent that `label` names, as something to try."""
    return Candidate(label.latent, label.label, concept_words(label), float(index.statistics.max[label.latent]))


def rank_candidates(
    model: LanguageModel, sae: SAE, index: Index, labels: Sequence[Label], prompts: Sequence[str]
) -> list[Candidate]:
    """The latents worth trying, those of the highest output score first.

    Raises `InputError` if there are none.
    """
    certain = sorted(labels, key=lambda label: (-label.certainty, label.latent))
    pool = [make_candidate(index, label) for label in certain if label.certainty >= MIN_CERTAINTY]
    pool = [each for each in pool if writes_what_it_reads(index, each)][:MAX_SCREENED]
    if not pool:
        raise InputError(
            f"no latent with a label of certainty {MIN_CERTAINTY} promotes a word that it fires on: "
            "name latents to try with --latents"
        )
    scores = output_scores(model, sae, pool, prompts)
    order = sorted(range(len(pool)), key=lambda place: (-scores[place], pool[place].latent))
    return [pool[place] for place in order]


def writes_what_it_reads(index: Index, candidate: Candidate) -> bool:
    """Whether the latent promotes, through the unembedding, the beginning of a word that it fires on."""
    promoted = [effect.piece.strip().lower() for effect in index.logits(candidate.latent).promoted]
    return any(len(piece) >= 3 and word.startswith(piece) for piece in promoted for word in candidate.words)


@torch.inference_mode()
def output_scores(model: LanguageModel, sae: SAE, pool: Sequence[Candidate], prompts: Sequence[str]) -> list[float]:
    """How much likelier a word of its concept becomes right after the prompts, when a latent is added.

    With p the probability that the next token begins such a word, steered at `SCREEN_FRACTION` of the largest
    activation, and q that of the plain model: p log(p / q), the concept's part of their Kullback-Leibler divergence,
    which is large when p is, and small for words that were likely anyway; a mean over the prompts. The layers below
    the SAE's site run once.
    """
    site = Site.parse(sae.config.output_site)
    texts = [model.tokenizer.encode_prompt(prompt) for prompt in prompts]
    lengths = torch.tensor([len(text) for text in texts])
    packed = torch.tensor([[id for text in texts for id in text]])
    before = model.run_layers(model.embed(packed), end=site.layer, lengths=lengths)
    last = lengths.cumsum(0) - 1

    def next_token(edit: Edit) -> torch.Tensor:
        hidden = model.run_layers(before, start=site.layer, taps=Taps(edits={site: edit}), lengths=lengths)
        return model.unembed(hidden[:, last])[0].softmax(dim=-1)

    plain = next_token(lambda hidden, _: hidden)
    scores = []
    with Progress("output scores", len(pool), "latent") as progress:
        for each in pool:
            first = [model.tokenizer.encode(form)[0] for form in _spellings(each.words)]
            steered = next_token(addition_edit(sae, [Addition(each.latent, SCREEN_FRACTION * each.max_activation)]))
            p, q = (probability[:, sorted(set(first))].sum(dim=1) for probability in (steered, plain))
            scores.append((p * (p / q).log()).mean().item())
            progress.advance(1)
    return scores


def _spellings(words: Sequence[str]) -> list[str]:
    return [f" {form}" for word in words for form in (word, word.capitalize(), word.upper())]
