"""An artifact at a URL that fsspec understands: s3://bucket/run/activations, gs://, memory://, file:// and others.

1. It is made in a local folder. Each file is sent when it is whole, the manifest last: a URL with a manifest is
   complete. The local folder is removed then; until then it holds everything, so an interrupted run goes on.
2. It is read through a local copy: the manifest always, any other file when it is first asked for. Sizes are checked
   then, hashes by `verify`.

Local folders are in $XDG_CACHE_HOME/monosemy (~/.cache/monosemy), by URL, and may be removed at any time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from monosemy.artifact import MANIFEST, URL, Manifest, atomic, parse_manifest, read_manifest
from monosemy.runtime import InputError, require


def remote_url(path: Path | str) -> str | None:
    """The URL that `path` is, or None for a path on this machine. A `Path` has lost one of its slashes."""
    if match := URL.fullmatch(str(path)):
        protocol, rest = match.groups()
        return f"{protocol}://{'/' if protocol in ('file', 'local') else ''}{rest}"
    return None


class RemoteFolder:
    """The artifact at `url`, with its local folders."""

    def __init__(self, url: str) -> None:
        require("fsspec", "remote")
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        try:
            self.files, self.root = url_to_fs(self.url)
        except ImportError as error:
            raise InputError(f"{url} needs a package that is not installed: {error} (with pip)") from error
        except (ValueError, OSError) as error:
            raise InputError(f"{url} cannot be opened ({error}): give a URL that fsspec understands") from error
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "monosemy"
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.draft, self.copy = cache / name / "made", cache / name / "read"
        """Where it is made, and where it is read."""
        self.manifest: Manifest | None = None

    # -- making ------------------------------------------------------------------------------------------------------

    def send(self, path: Path, name: str) -> None:
        """Send the local file `path`, the artifact's file `name`."""
        target = f"{self.root}/{name}"
        with self._said(f"{self.url}/{name} cannot be written"):
            self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.files.put_file(str(path), target)

    def send_rest(self, folder: Path) -> None:
        """Send what is not there yet of the complete artifact in `folder`, its manifest last, and remove the folder."""
        sizes = self._sizes()
        for name, record in parse_manifest(folder).files.items():
            if sizes.get(name) != record["bytes"]:
                self.send(folder / name, name)
        self.send(folder / MANIFEST, MANIFEST)
        shutil.rmtree(folder)

    # -- reading -----------------------------------------------------------------------------------------------------

    @property
    def is_complete(self) -> bool:
        with self._said(f"{self.url} cannot be read"):
            return self.files.exists(f"{self.root}/{MANIFEST}")

    def read_manifest(self, kind: str, verify: bool = False) -> Manifest:
        """As `artifact.read_manifest`; `verify` fetches every file."""
        if not self.is_complete:
            raise InputError(f"{self.url} has no {MANIFEST}, so it is no complete artifact: check the URL")
        self._renew_copy()
        self.manifest = manifest = parse_manifest(self.copy)
        if manifest.kind != kind:
            raise InputError(f"{self.url} holds artifact {manifest.kind!r}; expected {kind!r}")
        sizes = self._sizes()
        wrong = [name for name, record in manifest.files.items() if sizes.get(name) != record["bytes"]]
        if wrong:
            raise InputError(f"{self.url} is damaged: {wrong[0]} is missing or has another size. Make it again")
        if verify:
            for name in manifest.files:
                self.fetch(name)
            read_manifest(self.copy, kind, verify=True)
        return manifest

    def fetch(self, name: str) -> Path:
        """The local copy of the artifact's file `name`, fetched if it is not there yet."""
        assert self.manifest is not None, "the manifest is read first"
        path, size = self.copy / name, self.manifest.files[name]["bytes"]
        if not (path.exists() and path.stat().st_size == size):
            self._download(name)
            if path.stat().st_size != size:
                raise InputError(
                    f"{self.url}/{name} came with {path.stat().st_size} bytes instead of {size}: try again"
                )
        return path

    def _renew_copy(self) -> None:
        """Fetch the manifest; local copies of another artifact's files are removed."""
        manifest = self.copy / MANIFEST
        before = manifest.read_bytes() if manifest.exists() else None
        self._download(MANIFEST)
        if before not in (None, manifest.read_bytes()):
            shutil.rmtree(self.copy)
            self._download(MANIFEST)

    def _download(self, name: str) -> None:
        path = self.copy / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._said(f"{self.url}/{name} cannot be read"), atomic(path) as temporary:
            self.files.get_file(f"{self.root}/{name}", str(temporary))

    def _sizes(self) -> dict[str, int]:
        with self._said(f"{self.url} cannot be read"):
            self.files.invalidate_cache()
            found = self.files.find(self.root, detail=True)
        return {name.removeprefix(self.root).lstrip("/"): int(entry["size"]) for name, entry in found.items()}

    @contextmanager
    def _said(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{what} ({error}): check the URL and your access, then run the same command") from error
