"""The command `convert`: an SAE of any format -> an artifact of ours, or the files of another library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from monosemy.artifact import Draft, unrecorded
from monosemy.llm.sites import Site
from monosemy.runtime import say
from monosemy.sae.foreign import fingerprint, load_sae
from monosemy.sae.writers import write_foreign


@dataclass(frozen=True)
class ConvertConfig:
    """Turn an SAE of another library into an artifact that every command takes, or one of ours into its files."""

    source: Positional[str] = unrecorded()
    """Folder, file, or Hub id such as org/name:folder, of monosemy, SAELens, sparsify, dictionary_learning, Llama
    Scope, Llamascopium, OpenAI or Gemma Scope."""
    out: Positional[Path] = unrecorded()
    """Folder to write."""
    to: Literal["monosemy", "saelens", "sparsify", "dictionary_learning"] = unrecorded("monosemy")
    """Format of it."""
    site: str | None = None
    """Where in the model its activations are from, if the files do not say; for example L24.resid_post."""
    model: str | None = None
    """The model it was trained on, if the files do not say."""

    def __post_init__(self) -> None:
        if self.site is not None:
            Site.parse(self.site)


def run(config: ConvertConfig) -> None:
    """Write `config.out`. Raises `InputError` if the source cannot be read, or the format cannot express it."""
    sae = load_sae(config.source, config.site, config.model)
    if config.to == "monosemy":
        with Draft(config.out, "sae", config, {"source": fingerprint(sae)}) as draft:
            if not draft.complete:
                sae.save(draft.path)
                draft.commit({"latents": sae.config.n_latents})
    else:
        write_foreign(sae, config.out, config.to)
    of = sae.config
    which = f"k = {of.k}" if of.activation == "topk" else of.activation
    where = of.site if of.target_site is None else f"{of.site} -> {of.target_site}"
    say(f"{config.out}: {of.n_latents:,} latents of width {of.d_model}, {which}, at {where} of {of.model}")
    if of.site == "unknown" or of.model == "unknown":
        say("the files do not say which model or site it is of: give --model and --site, so that other commands know")
