"""Does an SAE have latents for what people call texts: parties, decades, topics? Probes on a few latents answer.

1. Sentences get the label of their document and are divided by document (`labelled`).
2. The model reads them; each keeps its pooled latents and its mean activation (`pooled`).
3. For every class, probes on k latents, and what to compare them with (`sparse_probe`), scored on held-out documents.
   Of two classes the second is told from the first; of more, each from the rest.

On disk: `probe.json` with everything, `probe.parquet` with a row per probe, `probe.png`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from monosemy.activations.capture import check_tokenizer
from monosemy.artifact import Draft, Manifest, read_manifest, to_json, unrecorded, write_table, write_text
from monosemy.corpus import TokenFile, open_tokens
from monosemy.llm.checkpoint import load_model
from monosemy.llm.model import LanguageModel, resolved
from monosemy.options import check_values
from monosemy.runtime import DtypeName, InputError, Progress, require, say
from monosemy.sae.autoencoder import SAE, open_sae
from monosemy.sae.evaluate import check_fits
from monosemy.sae.labelled import Labelled, label_sentences
from monosemy.sae.pooled import Pool, pool_sentences
from monosemy.sae.probe_result import MACRO_MEAN, RESULT, ClassCounts, ProbeResult, ProbeRow, load_probe, tables
from monosemy.sae.resampled import Resamples, macro_mean
from monosemy.sae.sparse_probe import ClassProbes, Examples, Probe

TABLE, PLOT = "probe.parquet", "probe.png"


@dataclass(frozen=True)
class ProbeConfig:
    """Tell classes of text apart by a few latents (k-sparse probing)."""

    label: str
    """Field of the documents' metadata, for example party; decade is made of a field year."""
    sae: Path = unrecorded()
    """SAE, made by `monosemy train`."""
    tokens: Path = unrecorded()
    """Token file whose documents carry the label; all its documents are used, training and validation."""
    out: Path = unrecorded()
    """Folder for the results."""
    at: float | None = None
    """Cut a field of numbers in two: below, and at or above this. None: every value is a class."""
    model: str = unrecorded("smollm2")
    """The model the SAE was trained on."""
    dtype: DtypeName = "auto"
    """Arithmetic of the model; `auto` is bfloat16 where the processor multiplies it, or else float32."""
    k: tuple[int, ...] = (1, 2, 5, 16)
    """Numbers of latents that probes read. One on all latents is always made too."""
    pool: Pool = "max"
    """A latent's value in a sentence: its largest activation on a token, or the mean over tokens."""
    max_sentences: int = 4000
    """Sentences that are read, at most: the same number of each class, as far as it has them."""
    test_fraction: float = 0.3
    """Share of each class's documents, and of the sentences, that probes are tested on."""
    random_draws: int = 5
    """Random choices of k latents that the control is the mean of."""
    resamples: int = 1000
    """Resamples of the test documents behind the 95% intervals."""
    seed: int = 0
    """Seed of the split, the choice of sentences, the control and the resamples."""

    def __post_init__(self) -> None:
        check_values(self)
        for name in ("max_sentences", "random_draws", "resamples"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not self.k or min(self.k) < 1 or len(set(self.k)) < len(self.k):
            given = " ".join(map(str, self.k)) or "empty"
            raise InputError(f"k is {given}; expected different numbers of at least 1, for example --k 1 2 5 16")
        if not 0 < self.test_fraction < 1:
            raise InputError(f"test_fraction is {self.test_fraction}; expected a number between 0 and 1, such as 0.3")
        object.__setattr__(self, "k", tuple(sorted(self.k)))


def run(config: ProbeConfig) -> Manifest:
    """Make the artifact `config.out`. Raises `InputError` for labels, SAEs and numbers of latents that do not do."""
    require("sklearn", "probe")
    require("matplotlib", "report")
    sae, tokens = open_sae(config.sae), open_tokens(config.tokens)
    if max(config.k) > sae.config.n_latents:
        n = sae.config.n_latents
        raise InputError(f"k is {max(config.k)}, but the SAE has only {n} latents: choose --k of at most {n}")
    labelled = label_sentences(tokens, config.label, config.at, config.max_sentences, config.test_fraction, config.seed)
    model = load_model(config.model, config.dtype)
    config = resolved(config, model)
    check_tokenizer(tokens, model, config.tokens)
    check_fits(sae, model)
    parents = {
        "sae": read_manifest(config.sae, "sae").digest,
        "tokens": tokens.manifest.digest,
        "model": model.fingerprint,
    }
    with Draft(config.out, "probe", config, parents) as draft:
        if draft.complete:
            return read_manifest(config.out, "probe")
        result = probe(sae, model, tokens, labelled, config)
        _write(draft, result)
        return draft.commit({"sentences": sum(each.train_sentences + each.test_sentences for each in result.classes)})


def probe(sae: SAE, model: LanguageModel, tokens: TokenFile, labelled: Labelled, config: ProbeConfig) -> ProbeResult:
    """All probes on the sentences that were chosen."""
    if labelled.left_out:
        say(f"probe: classes of one document, left out: {', '.join(labelled.left_out)}")
    pooled = pool_sentences(model, sae, tokens, labelled.sentences, config.pool)
    seen = np.flatnonzero(pooled.tokens > 0)
    of = labelled.document[seen], labelled.label[seen], labelled.test[seen]
    examples = Examples(pooled.latents[seen], pooled.mean[seen], pooled.tokens[seen], *of)
    return ProbeResult(
        label=config.label,
        pool=config.pool,
        classes=tuple(_counts(examples, number, name) for number, name in enumerate(labelled.classes)),
        left_out=labelled.left_out,
        documents_unlabelled=labelled.unlabelled,
        sentences_of_sinks=len(pooled.tokens) - len(seen),
        rows=tuple(fit_probes(examples, labelled.classes, config)),
    )


def _counts(examples: Examples, number: int, name: str) -> ClassCounts:
    """What there is of a class. Raises `InputError` where sinks have taken one side of it."""
    sides = [examples.document[(examples.label == number) & (examples.test == side)] for side in (False, True)]
    if not all(map(len, sides)):
        raise InputError(
            f"every sentence drawn of class {name!r} on one side is an attention sink alone: raise --max-sentences"
        )
    return ClassCounts(name, *(len(set(side.tolist())) for side in sides), *map(len, sides))


def fit_probes(examples: Examples, classes: Sequence[str], config: ProbeConfig) -> list[ProbeRow]:
    """The rows of every class, or of the second of two, and of their mean."""
    from threadpoolctl import threadpool_limits

    targets = range(len(classes)) if len(classes) > 2 else [1]
    test = examples.test
    resamples = Resamples(examples.document[test], examples.label[test], config.resamples, config.seed)
    found: list[list[Probe]] = [[] for _ in targets]
    # On one core, as in `runtime.one_thread`: small regressions wait for each other's threads longer than they work.
    with threadpool_limits(1), Progress("probe", len(targets) * (2 * len(config.k) + 4), "probe") as progress:
        for number, probes in zip(targets, found, strict=True):
            for each in ClassProbes(examples, number, resamples, config.seed).all(config.k, config.random_draws):
                probes.append(each)
                progress.advance(1)
    rows = [_row(classes[number], each) for number, probes in zip(targets, found, strict=True) for each in probes]
    return rows + (_macro_means(found) if len(targets) > 1 else [])


def _macro_means(found: Sequence[Sequence[Probe]]) -> list[ProbeRow]:
    """The mean over classes of each of their probes."""
    alike = zip(*found, strict=True)  # the same probe of every class
    means = [Probe(each[0].features, each[0].k, macro_mean([of.figures for of in each])) for each in alike]
    return [_row(MACRO_MEAN, mean) for mean in means]


def _row(target: str, of: Probe) -> ProbeRow:
    figure = of.figures.interval
    return ProbeRow(
        target=target,
        features=of.features,
        k=of.k,
        accuracy=figure("accuracy"),
        balanced_accuracy=figure("balanced_accuracy"),
        auroc=figure("auroc"),
        inverse_penalty=of.inverse_penalty,
        latents=of.latents,
    )


def _write(draft: Draft, result: ProbeResult) -> None:
    import pyarrow

    from monosemy.sae.probe_plot import draw

    write_text(draft.file(RESULT), to_json(result))
    columns = {
        "label": [result.label for _ in result.rows],
        "class": [row.target for row in result.rows],
        "features": [row.features for row in result.rows],
        "k": [row.k for row in result.rows],
        "accuracy": [row.accuracy.value for row in result.rows],
        "balanced_accuracy": [row.balanced_accuracy.value for row in result.rows],
        "auroc": [row.auroc.value for row in result.rows],
        "low": [row.auroc.low for row in result.rows],
        "high": [row.auroc.high for row in result.rows],
    }
    write_table(draft.file(TABLE), pyarrow.table(columns))
    draw(result, draft.file(PLOT))


def run_and_print(config: ProbeConfig) -> None:
    """What the command does: make the probes and show them as tables."""
    from rich.console import Console

    run(config)
    result, console = load_probe(config.out), Console()
    for table in tables(result, str(config.out / RESULT)):
        console.print(table)
    console.print("Look a latent up: monosemy features LATENT --index DIR --labels DIR", style="dim")
