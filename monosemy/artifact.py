"""A result on disk: one folder, one manifest, complete or not there at all.

1. A stage writes into `NAME.partial/`, which remembers what is being made (`identity.json`).
2. The same command finds the folder again after a crash and goes on; any other command is refused.
3. `commit` hashes every file, writes `manifest.json`, syncs, and renames: a folder without the suffix is complete.
4. Readers check kind, format version and file sizes always, and every hash when asked.

The manifest holds no time, no path and no machine name, so equal work gives equal bytes.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monosemy import options
from monosemy.runtime import ALONE, InputError, Ranks, say

if TYPE_CHECKING:
    import pyarrow
    import torch

URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)")
"""What a `Path` makes of a URL: one of its slashes is lost."""

FORMAT_VERSION = 2
"""Raised whenever a reader of the old format would misread the new one."""

PARTIAL = ".partial"
IDENTITY = "identity.json"
MANIFEST = "manifest.json"
LOCK = ".lock"


def unrecorded(default: Any = dataclasses.MISSING) -> Any:
    """A config field that says where or how a stage runs, not what it makes: the manifest leaves it out."""
    return dataclasses.field(default=default, metadata={"recorded": False})


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says about a complete artifact."""

    kind: str
    format_version: int
    config: dict[str, Any]
    """The stage's config, without the fields that are `unrecorded`."""
    parents: dict[str, str]
    """Role of each input -> its digest (an artifact's) or fingerprint (a model's)."""
    rows: dict[str, int]
    """What was counted, for example {"sentences": 812, "tokens": 20311}."""
    facts: dict[str, Any]
    """What a reader must know beyond the config, for example the threshold of sink rows."""
    files: dict[str, dict[str, Any]]
    """File name -> {"bytes": size, "sha256": hash}."""
    software: dict[str, str]

    @property
    def digest(self) -> str:
        """Identifies the content: the hash of everything but the software versions."""
        content = dataclasses.asdict(self)
        del content["software"]
        return hashlib.sha256(to_json(content).encode()).hexdigest()

    def to_text(self) -> str:
        """The content of `manifest.json`: the fields, and their own hash."""
        return to_json({**vars(self), "sha256": hashlib.sha256(to_json(self).encode()).hexdigest()})


def to_json(value: Any) -> str:
    """`value` as JSON with sorted keys: equal values give equal text. Dataclasses become objects, paths text."""

    def plain(item: Any) -> Any:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return dataclasses.asdict(item)
        if isinstance(item, Path):
            return str(item)
        raise TypeError(f"{type(item).__name__} cannot be written as JSON")

    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, default=plain, allow_nan=False) + "\n"


def recorded_config(config: Any) -> dict[str, Any]:
    """The options of dataclass `config` that decide what is made."""
    fields, values = options.options(type(config)), options.values(config)
    return json.loads(to_json({name: values[name] for name in fields if fields[name].metadata.get("recorded", True)}))


# ---------------------------------------------------------------------------------------------------------------------
# Writing files: whole or not at all
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what was written there replaces `path` in one step, synced to disk.

    Raises `InputError` when the disk is full, and removes the half-written file.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise InputError(
                f"no space left on the disk of {path.parent}: make room, then run the same command again; "
                "it goes on where it stopped"
            ) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` to the safetensors file `path`, atomically. `metadata` is one entry at most."""
    assert len(metadata or {}) <= 1, "safetensors writes several entries in a random order: no two files would be equal"
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        save_file(contiguous, temporary, metadata=dict(metadata or {}))
        os.umask(mask := os.umask(0))
        temporary.chmod(0o666 & ~mask)  # safetensors makes a file that only its owner can read


def write_table(path: Path, table: pyarrow.Table, row_group_size: int | None = None) -> None:
    """Write `table` to the Parquet file `path`, atomically, Zstandard-compressed."""
    import pyarrow.parquet

    with atomic(path) as temporary:
        pyarrow.parquet.write_table(table, temporary, row_group_size=row_group_size, compression="zstd")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Memory-map every tensor of a safetensors file. Raises `InputError` if the file is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is not a complete safetensors file ({error}): write or download it again") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------------------------------
# Making an artifact
# ---------------------------------------------------------------------------------------------------------------------


class Draft:
    """An artifact being made, or one that the same command has already completed (`complete`).

    with Draft(config.out, "tokens", config, parents={"model": model.fingerprint}) as draft:
        if not draft.complete:
            write_text(draft.path / "a.txt", "...")
            draft.commit(rows={"sentences": 1})

    Under `torchrun` every rank enters the draft and commits it, and each writes files of its own in between; the first
    one owns the folder. It must be one folder for all: on a disk that they share.
    """

    def __init__(self, out: Path, kind: str, config: Any, parents: dict[str, str], ranks: Ranks = ALONE) -> None:
        self.out, self.ranks = out, ranks
        self.identity = {
            "kind": kind,
            "format_version": FORMAT_VERSION,
            "config": recorded_config(config),
            "parents": parents,
        }
        self.complete = False
        self.path = out.with_name(out.name + PARTIAL)

    def __enter__(self) -> Draft:
        if self.ranks.number == 0:
            self._open()
        self.complete = self.ranks.gather(self.complete)[0]
        if not self.path.is_dir() and not self.complete:
            raise InputError(f"rank {self.ranks.number} does not see {self.path}: write to a disk that all ranks share")
        return self

    def _open(self) -> None:
        if URL.fullmatch(str(self.out)):
            raise InputError(f"{self.out} is a URL, and only `monosemy capture` writes to one: give a folder")
        if self.out.exists():
            self.check_same_command(read_manifest(self.out, self.identity["kind"]))
            self.complete = True
            say(f"{self.out} is complete already")
            return
        for folder in (self.out, self.path):
            if folder.exists() and not folder.is_dir():
                raise InputError(f"{folder} is a file, but a folder is to be written there: move it, or choose another")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({error.strerror}): choose another folder") from error
        try:
            self._claim()
        except BaseException:
            os.close(self.lock)  # or this process could not try again with other settings
            raise

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if self.complete or self.ranks.number > 0:
            return
        os.close(self.lock)
        if error_type is not None and issubclass(error_type, InputError) and self._is_empty():
            shutil.rmtree(self.path)  # refused input leaves nothing behind

    def _is_empty(self) -> bool:
        """Whether nothing but the draft's own files has been written."""
        return self.path.is_dir() and all(item.name in (IDENTITY, LOCK) for item in self.path.iterdir())

    def file(self, name: str) -> Path:
        """The path of file `name` in the draft; folders in between are made."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def commit(self, rows: dict[str, int], facts: dict[str, Any] | None = None) -> Manifest:
        """Hash every file, write the manifest, and give the folder its final name; `rows` and `facts` of the first
        rank count."""
        self.ranks.wait()
        if self.ranks.number == 0:
            self._commit(rows, facts or {})
        self.ranks.wait()
        return read_manifest(self.out, self.identity["kind"])

    def _commit(self, rows: dict[str, int], facts: dict[str, Any]) -> None:
        names = sorted(str(p.relative_to(self.path)) for p in self.path.rglob("*") if p.is_file())
        manifest = Manifest(
            **self.identity,
            rows=rows,
            facts=facts,
            files={name: _file_record(self.path / name) for name in names if name not in (IDENTITY, LOCK, MANIFEST)},
            software=software_versions(),
        )
        write_text(self.path / MANIFEST, manifest.to_text())
        (self.path / IDENTITY).unlink()
        (self.path / LOCK).unlink()
        _sync(self.path)
        os.replace(self.path, self.out)
        _sync(self.out.parent)

    def _lock(self) -> None:
        self.lock = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.lock)
            raise InputError(f"another process is writing {self.path}: wait for it, or choose another folder") from None

    def _claim(self) -> None:
        """Start the folder, or go on in it if the same command started it."""
        identity = self.path / IDENTITY
        if identity.exists():
            self._refuse_difference(json.loads(identity.read_text(encoding="utf-8")), f"{self.path} was started")
        elif (self.path / MANIFEST).exists():  # killed in `commit`, just before the rename
            self.check_same_command(parse_manifest(self.path))
        elif any(item.name not in (LOCK, IDENTITY + ".tmp") for item in self.path.iterdir()):
            raise InputError(f"{self.path} holds files that no monosemy command wrote: choose another --out")
        for half_written in self.path.rglob("*.tmp"):
            half_written.unlink()
        write_text(identity, to_json(self.identity))

    def check_same_command(self, manifest: Manifest) -> None:
        found = {name: getattr(manifest, name) for name in self.identity}
        self._refuse_difference(found, f"{self.out} was made")

    def _refuse_difference(self, found: dict[str, Any], what: str) -> None:
        if found == self.identity:
            return
        differences = []
        for section in ("kind", "format_version", "config", "parents"):
            old, new = found.get(section), self.identity[section]
            if isinstance(old, dict) and isinstance(new, dict):
                keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
                differences += [f"{section} {key}: {old.get(key)!r} then, {new.get(key)!r} now" for key in keys]
            elif old != new:
                differences.append(f"{section}: {old!r} then, {new!r} now")
        raise InputError(
            f"{what} with other settings ({'; '.join(differences)}): give another --out, or remove that folder first"
        )


def _file_record(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def software_versions() -> dict[str, str]:
    """The versions of monosemy and of the packages that its numbers depend on."""

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    return {name: installed(name) for name in ("monosemy", "torch", "numpy", "numba", "tokenizers", "safetensors")}


# ---------------------------------------------------------------------------------------------------------------------
# Opening an artifact
# ---------------------------------------------------------------------------------------------------------------------


def read_manifest(path: Path, kind: str, verify: bool = False) -> Manifest:
    """Open the artifact in folder `path`.

    Checks that it is complete, of kind `kind` and of this format version, that every file is there with the
    recorded size, and with `verify` that every hash agrees. Raises `InputError` otherwise.
    """
    if not path.is_dir():
        partial = path.with_name(path.name + PARTIAL)
        if partial.is_dir():
            raise InputError(f"{path} is not complete: run the command that makes it again, it goes on in {partial}")
        raise InputError(f"{path} is not a folder; expected {article(kind)} artifact, made by a monosemy command")
    manifest = parse_manifest(path)
    if manifest.kind != kind:
        raise InputError(f"{path} holds {article(manifest.kind)} artifact; expected {article(kind)} artifact")
    problems = _problems(path, manifest, verify)
    if problems:
        raise InputError(f"{path} is damaged: {'; '.join(problems)}. Remove the folder and make it again")
    return manifest


def article(kind: str) -> str:
    """`kind` with its article, quoted."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind!r}"


def parse_manifest(path: Path) -> Manifest:
    """What the manifest in folder `path` says, of whatever kind. Raises `InputError` if it is none."""
    file = path / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} has no {MANIFEST}, so it is not a monosemy artifact: check the path") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({error}): remove the folder and make it again") from None
    names = {field.name for field in dataclasses.fields(Manifest)}
    content = content if isinstance(content, dict) else {}
    content.pop("sha256", None)  # `verify` compares it
    found = content.get("format_version")
    if found != FORMAT_VERSION or set(content) != names:
        raise InputError(f"{file} has format version {found}; this monosemy reads {FORMAT_VERSION}: make it again")
    return Manifest(**content)


def _problems(path: Path, manifest: Manifest, verify: bool) -> list[str]:
    problems = []
    for name, record in manifest.files.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != record["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes instead of {record['bytes']}")
        elif verify and _file_record(file) != record:
            problems.append(f"{name} has changed (its SHA-256 differs)")
    if verify:
        if (path / MANIFEST).read_bytes() != manifest.to_text().encode():
            problems.append(f"{MANIFEST} has changed (it does not agree with its own SHA-256)")
        present = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
        problems += [f"{name} does not belong to it" for name in sorted(present - set(manifest.files) - {MANIFEST})]
    return problems
