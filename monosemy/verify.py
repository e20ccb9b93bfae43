"""Reads every byte of artifacts and says whether each is whole: folders, runs that hold some, and URLs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from monosemy.activations.remote import RemoteFolder, remote_url
from monosemy.artifact import MANIFEST, PARTIAL, Manifest, article, parse_manifest, read_manifest
from monosemy.runtime import InputError


@dataclass(frozen=True)
class VerifyConfig:
    """Check every byte of artifacts against their manifests."""

    paths: Positional[tuple[Path, ...]]
    """Artifact folders, folders that hold some (a run, for example), or URLs that `capture` wrote."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise InputError("no folder was given: name artifacts, or a run that holds some")


def run(config: VerifyConfig) -> None:
    """Print a line per artifact that is whole. Raises `InputError` for the first that is not."""
    for path in config.paths:
        if (url := remote_url(path)) is not None:
            _tell(url, RemoteFolder(url).read_manifest("activations", verify=True))
            continue
        found = [path] if (path / MANIFEST).exists() else sorted(file.parent for file in path.glob(f"*/{MANIFEST}"))
        for folder in found or [path]:
            _tell(str(folder), read_manifest(folder, parse_manifest(folder).kind, verify=True))
        for partial in sorted(path.glob(f"*{PARTIAL}")):
            print(f"{partial} is not complete: run the command that makes it again, it goes on there")


def _tell(where: str, manifest: Manifest) -> None:
    size = sum(record["bytes"] for record in manifest.files.values())
    print(f"{where}: {article(manifest.kind)} artifact, {len(manifest.files)} files, {size / 1e6:.1f} MB, whole")
