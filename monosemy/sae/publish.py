"""The command `push`: an SAE on the Hugging Face Hub, with a card that says what it is, how good, and how to use it.

`load_sae("org/name")` reads it from there again.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from monosemy.artifact import MANIFEST, Manifest, read_manifest
from monosemy.llm.hub import MODEL_ID, explain
from monosemy.runtime import InputError, say
from monosemy.sae.autoencoder import SAE, open_sae
from monosemy.sae.evaluate import METRICS, Metrics, load_metrics, summary

CARD = "README.md"


@dataclass(frozen=True)
class PushConfig:
    """Publish an SAE on the Hugging Face Hub, with a model card."""

    sae: Positional[Path]
    """SAE, made by `monosemy train` or `monosemy convert`."""
    repository: Positional[str]
    """Where to, for example org/name; it is made if it is not there. `hf auth login` first."""
    metrics: Path | None = None
    """Metrics of it, made by `monosemy evaluate`, for the card."""
    private: bool = False
    """Make the repository, if it is new, visible to its owners only."""
    card: Path | None = None
    """Write the card into this file and publish nothing, to read it first."""

    def __post_init__(self) -> None:
        if MODEL_ID.fullmatch(self.repository) is None:
            raise InputError(f"{self.repository!r} is no name of a repository; expected org/name")


def run(config: PushConfig) -> None:
    """Upload everything in one commit. Raises `InputError` if it may not, or if the metrics are of another SAE."""
    manifest, sae = read_manifest(config.sae, "sae", verify=True), open_sae(config.sae)
    metrics = None
    if config.metrics is not None:
        metrics = load_metrics(config.metrics)
        if read_manifest(config.metrics, "metrics").parents["sae"] != manifest.digest:
            raise InputError(f"{config.metrics} holds the metrics of another SAE than {config.sae}: evaluate this one")
    card = model_card(sae, manifest, metrics, config.repository)
    if config.card is not None:
        config.card.write_text(card, encoding="utf-8")
        say(f"{config.card}: the card; nothing was published")
        return
    files = {name: config.sae / name for name in (*manifest.files, MANIFEST)}
    if config.metrics is not None:
        files[METRICS] = config.metrics / METRICS
    _upload(config, files, card)
    say(f'published: https://huggingface.co/{config.repository}; load_sae("{config.repository}") reads it')


def _upload(config: PushConfig, files: dict[str, Path], card: str) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    operations.append(CommitOperationAdd(CARD, card.encode()))
    try:
        api = HfApi()
        api.create_repo(config.repository, private=config.private, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a table belongs into a data set: this one is of the SAE
            api.create_commit(config.repository, operations, commit_message="Publish a sparse autoencoder")
    except Exception as error:  # network errors of three libraries, without a common base
        explain(config.repository, config.repository, error, "repository")


def model_card(sae: SAE, manifest: Manifest, metrics: Metrics | None, repository: str) -> str:
    """The text of README.md, with the header that the Hub reads."""
    of = sae.config
    base = f"base_model: {of.model}\n" if MODEL_ID.fullmatch(of.model) else ""
    what = {"topk": f"TopK, k = {of.k}", "jumprelu": f"JumpReLU, k = {of.k} on average", "relu": "ReLU"}[of.activation]
    site = of.site if of.target_site is None else f"{of.site}, reconstructing {of.target_site}"
    rows = f"{manifest.rows['tokens']:,}" if "tokens" in manifest.rows else ""
    facts = {
        "model": of.model, "site": site, "latents": f"{of.n_latents:,}", "width": str(of.d_model), "activation": what,
        "normalisation": of.normalize, "training rows": rows,
        "digest": f"`{manifest.digest[:16]}`",
    }  # fmt: skip
    lines = [
        f"---\nlibrary_name: monosemy\n{base}tags:\n- sparse-autoencoder\n- mechanistic-interpretability\n---\n",
        f"# {repository.split('/')[-1]}\n",
        f"A {'transcoder' if of.target_site else 'sparse autoencoder'} of {of.model} at {site}, trained with "
        "[monosemy](https://pypi.org/project/monosemy/).\n",
        "| | |\n|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items() if value),
        "",
        "```python",
        "from monosemy import load_sae\n",
        f'sae = load_sae("{repository}")',
        f"code = sae.encode(x)  # x: raw activations at {of.site}, (row, {of.d_model})",
        "y = sae.decode(code, x)" if sae.parameters.W_skip is not None else "y = sae.decode(code)",
        "```\n",
    ]
    if metrics is not None:
        lines += [
            "## Metrics\n",
            "On held-out text, by `monosemy evaluate`; intervals of 95%, over documents. Sinks: rows of a norm beyond "
            f"{of.sink_norm:.4g}.\n"
            if of.sink_norm is not None
            else "On held-out text, `monosemy evaluate`.\n",
            "| | without sinks | with sinks |\n|---|---|---|",
            *(f"| {name} | {a} | {b} |" for name, a, b in summary(metrics)),
            "",
        ]
    settings = ", ".join(f"{name} = {value}" for name, value in manifest.config.items() if value not in (None, (), []))
    return "\n".join([*lines, "## Settings\n", settings or "none recorded", ""])
