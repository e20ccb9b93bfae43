"""Fetches models from the Hugging Face Hub, or finds them in its cache.

A model there is called `org/name`, `org/name@revision` or, for one GGUF file of it, `org/name:file.gguf`. Only
configuration, tokenizer and safetensors are fetched: nothing that would have to be unpickled or run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

from monosemy.runtime import InputError

MODEL_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""`org/name`."""
HUB_ID = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?(?::(?P<file>.+\.gguf))?")
TEXT_FILES = ["config.json", "generation_config.json", "special_tokens_map.json", "tokenizer*", "chat_template*"]
WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]
NOT_WANTED = ["*/*", "consolidated*", "*.bin", "*.pth"]
"""Folders, the same weights in other formats, and pickles."""


def fetch(name: str, weights: bool = True) -> Path:
    """The folder, or the GGUF file, of the model called `name`, downloaded unless the cache has it.

    Args:
        name: matches `HUB_ID`.
        weights: False: of a folder, only what the tokenizer needs.

    Raises:
        InputError: it is not on the Hub, may not be read, or cannot be reached.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    parts = HUB_ID.fullmatch(name)
    assert parts is not None, f"{name!r} is no Hub id"
    repository, revision, file = parts["repository"], parts["revision"], parts["file"]
    try:
        if file is not None:
            return Path(hf_hub_download(repository, file, revision=revision))
        wanted = TEXT_FILES + WEIGHT_FILES * weights
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=NOT_WANTED))
    except Exception as error:  # network errors of three libraries, without a common base
        explain(name, repository, error)


def fetch_files(name: str, repository: str, revision: str | None, patterns: list[str], what: str) -> Path:
    """The folder of `repository` with those of its files that match `patterns`, downloaded unless the cache has them.

    Raises:
        InputError: as `fetch`; it calls the `what` called `name`.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except Exception as error:  # network errors of three libraries, without a common base
        explain(name, repository, error, what)


def explain(name: str, repository: str, error: Exception, what: str = "model") -> NoReturn:
    """Raise the `InputError` that says what to do about `error`."""
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            remedy = (
                f"may be read only by those who accepted its licence: accept it at https://huggingface.co/{repository}"
                " and run `hf auth login`"
            )
        case errors.RepositoryNotFoundError():
            remedy = (
                "is no file or folder here, nor public on the Hub: check the spelling, or, if it is private, "
                "run `hf auth login`"
            )
        case errors.RevisionNotFoundError():
            remedy = (
                f"does not exist: {repository} has no such revision; see https://huggingface.co/{repository}/commits"
            )
        case errors.LocalEntryNotFoundError():
            remedy = (
                "is no file or folder here, not (completely) in the Hub's cache, and the Hub cannot be reached: "
                "check the spelling and the connection, and that HF_HUB_OFFLINE is not set"
            )
        case errors.EntryNotFoundError():
            remedy = f"does not exist: {repository} has no such file; see https://huggingface.co/{repository}/tree/main"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            remedy = "may not be read with this login: run `hf auth login` with a token that may read it"
        case _:
            reason = " ".join(str(error).split())[:200]
            remedy = (
                f"could not be fetched from the Hub ({type(error).__name__}: {reason}): try again, or give a folder"
            )
    raise InputError(f"{what} {name!r} {remedy}") from error
