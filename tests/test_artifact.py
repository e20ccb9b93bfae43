"""A result on disk is complete or not there, and says so when it is damaged."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monosemy import artifact, verify
from monosemy.artifact import Draft, Manifest, read_manifest, read_tensors, write_tensors, write_text
from monosemy.runtime import InputError
from monosemy.verify import VerifyConfig


@dataclasses.dataclass(frozen=True)
class Config:
    source: str = artifact.unrecorded("here")
    size: int = 3


def make(out: Path, config: Config | None = None, parents: dict[str, str] | None = None) -> Manifest:
    """One finished artifact of kind `numbers` with two files."""
    with Draft(out, "numbers", config or Config(), parents or {"text": "abc"}) as draft:
        if draft.complete:
            return read_manifest(out, "numbers")
        write_text(draft.file("a.txt"), "one\n")
        write_tensors(draft.file("deep/b.safetensors"), {"x": torch.arange(4), "y": torch.ones(2, 2)})
        return draft.commit({"numbers": 4}, {"largest": 3})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestMaking:
    def test_a_finished_artifact(self, tmp_path: Path):
        manifest = make(tmp_path / "n")
        assert set(contents(tmp_path / "n")) == {"a.txt", "deep/b.safetensors", "manifest.json"}
        assert read_manifest(tmp_path / "n", "numbers", verify=True) == manifest
        assert manifest.config == {"size": 3}
        assert os.listdir(tmp_path) == ["n"]

    def test_equal_work_gives_equal_bytes(self, tmp_path: Path):
        first, second = make(tmp_path / "n", Config("here")), make(tmp_path / "m", Config("there"))
        assert contents(tmp_path / "n") == contents(tmp_path / "m")
        assert first.digest == second.digest

    def test_the_same_command_finds_it_complete(self, tmp_path: Path):
        manifest = make(tmp_path / "n")
        before = (tmp_path / "n" / "a.txt").stat().st_mtime_ns
        assert make(tmp_path / "n", Config("elsewhere")) == manifest
        assert (tmp_path / "n" / "a.txt").stat().st_mtime_ns == before

    def test_another_config_is_refused(self, tmp_path: Path):
        make(tmp_path / "n")
        with pytest.raises(
            InputError, match=r"was made with other settings \(config size: 3 then, 4 now\): give another"
        ):
            make(tmp_path / "n", Config(size=4))

    def test_other_parents_are_refused(self, tmp_path: Path):
        make(tmp_path / "n")
        with pytest.raises(InputError, match="parents text: 'abc' then, 'abd' now"):
            make(tmp_path / "n", parents={"text": "abd"})

    def test_another_kind_is_refused(self, tmp_path: Path):
        make(tmp_path / "n")
        with pytest.raises(InputError, match="holds a 'numbers' artifact; expected a 'letters' artifact"):
            Draft(tmp_path / "n", "letters", Config(), {}).__enter__()

    def test_a_folder_of_something_else_is_refused(self, tmp_path: Path):
        (tmp_path / "n").mkdir()
        (tmp_path / "n" / "thesis.tex").write_text("precious")
        with pytest.raises(InputError, match="has no manifest.json, so it is not a monosemy artifact"):
            make(tmp_path / "n")
        assert os.listdir(tmp_path) == ["n"]

    def test_a_partial_folder_of_something_else_is_refused(self, tmp_path: Path):
        (tmp_path / "n.partial").mkdir()
        (tmp_path / "n.partial" / "thesis.tmp").write_text("precious")
        with pytest.raises(InputError, match="holds files that no monosemy command wrote: choose another"):
            make(tmp_path / "n")
        assert (tmp_path / "n.partial" / "thesis.tmp").read_text() == "precious"

    @pytest.mark.parametrize("name", ["n", "n.partial"])
    def test_a_file_in_its_place_is_refused(self, tmp_path: Path, name: str):
        (tmp_path / name).write_text("precious")
        with pytest.raises(InputError, match="is not a folder|is a file, but a folder is to be written"):
            make(tmp_path / "n")
        assert (tmp_path / name).read_text() == "precious"

    def test_a_place_that_cannot_be_written_is_refused(self, tmp_path: Path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match=r"cannot be written \(Not a directory\): choose another folder"):
            make(tmp_path / "file" / "n")

    def test_refused_input_leaves_nothing(self, tmp_path: Path):
        with pytest.raises(InputError, match="bad"), Draft(tmp_path / "n", "numbers", Config(), {}):
            raise InputError("bad")
        assert os.listdir(tmp_path) == []


class TestGoingOn:
    def test_after_an_error(self, tmp_path: Path):
        def interrupted() -> None:
            with Draft(tmp_path / "n", "numbers", Config(), {"text": "abc"}) as draft:
                write_text(draft.file("a.txt"), "one\n")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        with pytest.raises(InputError, match="is not complete: run the command that makes it again"):
            read_manifest(tmp_path / "n", "numbers")
        with Draft(tmp_path / "n", "numbers", Config(), {"text": "abc"}) as draft:
            assert not draft.complete
            assert (draft.path / "a.txt").read_text() == "one\n"

    def test_with_other_settings_is_refused_until_they_are_right_again(self, tmp_path: Path):
        with Draft(tmp_path / "n", "numbers", Config(), {"text": "abc"}) as draft:
            write_text(draft.file("a.txt"), "one\n")
        with pytest.raises(
            InputError, match=r"n.partial was started with other settings \(config size: 3 then, 5 now\)"
        ):
            make(tmp_path / "n", Config(size=5))
        make(tmp_path / "n")
        assert os.listdir(tmp_path) == ["n"]

    def test_while_another_is_writing_is_refused(self, tmp_path: Path):
        refused = pytest.raises(InputError, match="another process is writing .*n.partial: wait for it")
        with Draft(tmp_path / "n", "numbers", Config(), {"text": "abc"}), refused:
            make(tmp_path / "n")

    @pytest.mark.parametrize("sync", range(1, 8))
    def test_after_a_kill_at_any_sync_the_bytes_are_the_same(self, tmp_path: Path, sync: int):
        """A child process kills itself in place of its n-th sync to disk; the next one goes on."""
        killed = subprocess.run([sys.executable, "-c", MAKE_TWO_FILES, tmp_path / "n", str(sync)], check=False)
        syncs = 6  # identity, a.txt, b.txt, manifest, the folder, the folder above
        assert killed.returncode == (-signal.SIGKILL if sync <= syncs else 0)
        for name in ("n", "whole"):
            subprocess.run([sys.executable, "-c", MAKE_TWO_FILES, tmp_path / name, "0"], check=True)
        assert contents(tmp_path / "n") == contents(tmp_path / "whole")
        assert sorted(os.listdir(tmp_path)) == ["n", "whole"]
        read_manifest(tmp_path / "n", "numbers", verify=True)


MAKE_TWO_FILES = """
import dataclasses, os, signal, sys
from pathlib import Path
from monosemy import artifact, verify

@dataclasses.dataclass(frozen=True)
class Config:
    size: int = 3

syncs = 0
def sync_or_die(path, sync=artifact._sync):
    global syncs
    syncs += 1
    if syncs == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    sync(path)

artifact._sync = sync_or_die
with artifact.Draft(Path(sys.argv[1]), "numbers", Config(), {}) as draft:
    if not draft.complete:
        for name in ("a.txt", "deep/b.txt"):
            artifact.write_text(draft.file(name), name)
        draft.commit({})
"""


class TestReading:
    def test_a_changed_byte_is_found_by_verify(self, tmp_path: Path):
        make(tmp_path / "n")
        (tmp_path / "n" / "a.txt").write_text("two\n")
        read_manifest(tmp_path / "n", "numbers")
        with pytest.raises(
            InputError, match=r"is damaged: a.txt has changed \(its SHA-256 differs\). Remove the folder"
        ):
            verify.run(VerifyConfig((tmp_path / "n",)))

    def test_a_truncated_file_is_always_found(self, tmp_path: Path):
        make(tmp_path / "n")
        (tmp_path / "n" / "a.txt").write_text("on")
        with pytest.raises(InputError, match="a.txt has 2 bytes instead of 4"):
            read_manifest(tmp_path / "n", "numbers")

    def test_a_missing_file_is_always_found(self, tmp_path: Path):
        make(tmp_path / "n")
        (tmp_path / "n" / "a.txt").unlink()
        with pytest.raises(InputError, match="a.txt is missing"):
            read_manifest(tmp_path / "n", "numbers")

    def test_a_file_too_many_is_found_by_verify(self, tmp_path: Path):
        make(tmp_path / "n")
        (tmp_path / "n" / "c.txt").write_text("")
        read_manifest(tmp_path / "n", "numbers")
        with pytest.raises(InputError, match="c.txt does not belong to it"):
            verify.run(VerifyConfig((tmp_path / "n",)))

    def test_verify_goes_through_a_run(self, tmp_path: Path, capsys):
        for name in ("n", "m"):
            make(tmp_path / name)
        verify.run(VerifyConfig((tmp_path,)))
        lines = [f"{tmp_path / name}: a 'numbers' artifact, 2 files, 0.0 MB, whole" for name in ("m", "n")]
        assert capsys.readouterr().out.splitlines() == lines

    def test_verify_refuses_what_is_no_artifact(self, tmp_path: Path):
        with pytest.raises(InputError, match="has no manifest.json, so it is not a monosemy artifact"):
            verify.run(VerifyConfig((tmp_path,)))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "manifest.json is damaged"),
            ("[]", "has format version None; this monosemy reads 2"),
            ('{"format_version": 99}', "has format version 99; this monosemy reads 2"),
            ('{"format_version": 2}', "has format version 2; this monosemy reads 2"),
        ],
    )
    def test_a_manifest_that_is_none(self, tmp_path: Path, text: str, message: str):
        make(tmp_path / "n")
        (tmp_path / "n" / "manifest.json").write_text(text)
        with pytest.raises(InputError, match=re.escape(message)):
            read_manifest(tmp_path / "n", "numbers")

    def test_a_folder_that_is_none(self, tmp_path: Path):
        with pytest.raises(InputError, match="n is not a folder; expected a 'numbers' artifact"):
            read_manifest(tmp_path / "n", "numbers")


class TestFiles:
    def test_tensors_come_back(self, tmp_path: Path):
        tensors = {"x": torch.arange(6).reshape(2, 3).T, "y": torch.tensor([True]), "z": torch.ones(2).bfloat16()}
        write_tensors(tmp_path / "t.safetensors", tensors, {"format": "pt"})
        found = read_tensors(tmp_path / "t.safetensors")
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)

    def test_a_truncated_tensor_file_is_refused(self, tmp_path: Path):
        write_tensors(tmp_path / "t.safetensors", {"x": torch.ones(100)})
        content = (tmp_path / "t.safetensors").read_bytes()
        for size in (0, 4, 40, len(content) - 1):
            (tmp_path / "t.safetensors").write_bytes(content[:size])
            with pytest.raises(InputError, match="is not a complete safetensors file"):
                read_tensors(tmp_path / "t.safetensors")

    def test_an_error_while_writing_keeps_the_old_file(self, tmp_path: Path):
        write_text(tmp_path / "a.txt", "old")

        def fail() -> None:
            with artifact.atomic(tmp_path / "a.txt") as temporary:
                temporary.write_text("new")
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            fail()
        assert contents(tmp_path) == {"a.txt": b"old"}

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
    def test_a_full_disk_is_said_and_leaves_nothing(self, tmp_path: Path):
        """The temporary file leads to /dev/full, which answers every write as a full disk does."""
        (tmp_path / "a.tmp").symlink_to("/dev/full")
        with pytest.raises(InputError, match="no space left on the disk of .*: make room, then run the same command"):
            write_text(tmp_path / "a", "x" * 100_000)
        assert os.listdir(tmp_path) == []

    def test_a_disk_of_64_kilobytes(self, tmp_path: Path):
        """A user namespace lets anyone mount a tiny disk, where the system allows such namespaces."""
        if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
            pytest.skip("this system allows no user namespaces")
        mount = 'mount -t tmpfs -o size=64k tmpfs "$0" && exec "$@"'
        command = ["unshare", "-rm", "sh", "-c", mount, tmp_path, sys.executable, "-c", FILL_A_DISK, tmp_path]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        refusal = f"no space left on the disk of {tmp_path}: make room, then run the same command again"
        assert [line.startswith(refusal) for line in done.stdout.splitlines()] == [True, True, True]

    def test_tensor_files_are_as_readable_as_the_others(self, tmp_path: Path):
        write_text(tmp_path / "a.txt", "x")
        write_tensors(tmp_path / "b.safetensors", {"x": torch.ones(1)})
        assert (tmp_path / "b.safetensors").stat().st_mode == (tmp_path / "a.txt").stat().st_mode


FILL_A_DISK = """
import os, sys
from pathlib import Path
import pyarrow, torch
from monosemy.artifact import write_table, write_tensors, write_text
from monosemy.runtime import InputError

disk, random = Path(sys.argv[1]), torch.randn(100_000)
writes = {
    "text": lambda path: write_text(path, "x" * 400_000),
    "tensors": lambda path: write_tensors(path, {"x": random}),
    "table": lambda path: write_table(path, pyarrow.table({"x": random.numpy()})),
}
for name, write in writes.items():
    try:
        write(disk / name)
    except InputError as error:
        print(error)
    assert os.listdir(disk) == [], os.listdir(disk)
"""

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values, max_size=5))
def test_json_comes_back_and_does_not_depend_on_order(value: dict):
    text = artifact.to_json(value)
    assert json.loads(text) == value
    assert artifact.to_json(dict(reversed(value.items()))) == text


def test_json_refuses_what_others_could_not_read():
    with pytest.raises(ValueError, match="Out of range float values"):
        artifact.to_json({"loss": float("nan")})
    with pytest.raises(TypeError, match="set cannot be written as JSON"):
        artifact.to_json({"names": {"a"}})
