"""The command line as a person uses it: help at once, options that do not drift, errors in one line."""

import ast
import dataclasses
import importlib
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from monosemy import options
from monosemy.__main__ import COMMANDS, main

FROZEN = Path(__file__).parent / "cli_options.json"


def run_python(*arguments: str, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, **settings)


def options_now() -> dict[str, dict[str, str]]:
    found = {}
    for name, command in COMMANDS.items():
        config = getattr(importlib.import_module(f"monosemy.{command.module}"), command.config)
        fields = options.options(config).values()
        found[name] = {f.name: "required" if f.default is dataclasses.MISSING else repr(f.default) for f in fields}
        for field in dataclasses.fields(config):
            if dataclasses.is_dataclass(field.default) and not isinstance(field.default, type):
                found[name] |= {option: repr(value) for option, value in options.values(field.default).items()}
    return found


def test_options_are_frozen():
    """A new, renamed or changed option is a decision: write it into cli_options.json with the change."""
    if os.environ.get("FREEZE_OPTIONS"):
        FROZEN.write_text(json.dumps(options_now(), indent=1) + "\n")
    assert options_now() == json.loads(FROZEN.read_text())


def nested_in(config: type) -> list[type]:
    """`config` and the dataclasses whose options it takes over."""
    kinds = [get_type_hints(config)[field.name] for field in dataclasses.fields(config)]
    return [config, *(each for kind in kinds if dataclasses.is_dataclass(kind) for each in nested_in(kind))]  # pyright: ignore


def test_every_option_has_help():
    seen = set()
    for command in COMMANDS.values():
        for config in nested_in(getattr(importlib.import_module(f"monosemy.{command.module}"), command.config)):
            tree = ast.parse(Path(str(sys.modules[config.__module__].__file__)).read_text())  # where it really is
            source = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == config.__name__)
            assert ast.get_docstring(source), config
            options_of = [name for name in options.options(config) if name in config.__annotations__]
            for statement, following in zip(source.body, [*source.body[1:], None], strict=True):
                name = ast.unparse(statement.target) if isinstance(statement, ast.AnnAssign) else None
                if name in options_of:
                    documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                    assert documented, f"{config.__name__}.{name} has no help"
                    seen.add(name)
    assert seen == {name for options in options_now().values() for name in options}


def test_bare_help_imports_no_torch_and_answers_at_once():
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    code = "import sys; from monosemy.__main__ import main; main(['--help']); assert 'torch' not in sys.modules"
    result = run_python("-c", code)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert result.returncode == 0, result.stderr
    for name, command in COMMANDS.items():
        assert name in result.stdout
        assert command.summary in result.stdout
    assert spent < 1


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name: str, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: monosemy {name}" in capsys.readouterr().out


def test_python_m_and_version():
    result = run_python("-m", "monosemy", "--version")
    assert result.returncode == 0
    assert result.stdout.startswith("monosemy ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "there is no command 'trian'; the commands are run, tokenize"),
        (["run", "nosuch", "--out", "OUT"], "there is no recipe 'nosuch': the recipes are .*smollm2-sotu"),
        (["tokenize", "--model", "nosuch", "--text", "corpus:sotu", "--out", "OUT"], "nosuch"),
        (["tokenize", "--model", "smollm2", "--text", "corpus:nosuch", "--out", "OUT"], "corpus:nosuch"),
        (["capture", "--tokens", "OUT", "--out", "OUT", "--sites", "Lx"], "'Lx' is not a site: expected L<layer>"),
        (["train", "--activations", "A", "--out", "OUT", "--k", "9000"], "k is 9000, but there are only 8192 latents"),
        (["evaluate", "--sae", "nosuch", "--tokens", "T", "--out", "OUT"], "nosuch is not a folder; expected a 'sae'"),
        (["generate", "Hello", "--steer", "896=+20"], "--steer and --explain need an SAE"),
        (["generate", "Hello", "--sae", "A", "--steer", "896"], "expected LATENT=STRENGTH with a finite number"),
        (["verify", "nosuch"], "nosuch"),
        (["verify"], "no folder was given"),
        (["generate", "Hello", "--labels", "L"], "--labels are shown by --explain: give both"),
    ],
)  # fmt: skip
def test_bad_input_is_a_message_and_exit_code_2(arguments, message, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stop:  # an option's own value: tyro prints the message in a box
        code = stop.code
    assert code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_unknown_option_is_exit_code_2():
    result = run_python("-m", "monosemy", "train", "--latents", "3")
    assert result.returncode == 2
    assert "--latents" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_an_existing_folder_that_holds_something_else_is_refused(tmp_path: Path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["run", "smollm2-sotu", "--out", str(tmp_path)]) == 2
    assert "holds something that is not a monosemy run: give another --out" in capsys.readouterr().err
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_full_disk_is_said_in_one_line(tmp_path: Path, monkeypatch, capsys):
    """ENOSPC from a real write: /dev/full takes no byte."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    from monosemy import artifact

    def onto_a_full_disk(path: Path, text: str) -> None:
        with artifact.atomic(path):
            Path("/dev/full").write_text(text)

    monkeypatch.setattr("monosemy.recipe.write_text", onto_a_full_disk)
    assert main(["run", "smollm2-sotu", "--out", str(tmp_path / "run")]) == 2
    assert "no space left on the disk" in capsys.readouterr().err


def test_verify_names_what_has_changed(tiny_run: Path, tmp_path: Path, capsys):
    import shutil

    copy = tmp_path / "run" / "sae"
    shutil.copytree(tiny_run / "sae", copy)
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert "a 'sae' artifact, 4 files" in capsys.readouterr().out
    weights = bytearray((copy / "sae.safetensors").read_bytes())
    weights[-5] ^= 1
    (copy / "sae.safetensors").write_bytes(weights)
    assert main(["verify", str(copy)]) == 2
    assert "sae.safetensors has changed (its SHA-256 differs)" in capsys.readouterr().err


def test_generate_plain_steered_and_explained(tiny_labels: Path, tiny_llama_folder: Path, capsys):
    base = ["generate", "The delegates gathered", "--model", str(tiny_llama_folder), "--max-new-tokens", "8"]
    base += ["--dtype", "float32", "--temperature", "0"]
    assert main(base) == 0
    plain = capsys.readouterr().out
    assert plain.startswith("The delegates gathered")
    sae = ["--sae", str(tiny_labels / "sae")]
    assert main([*base, *sae, "--steer", "5=+0"]) == 0
    assert capsys.readouterr().out == plain
    assert main([*base, *sae, "--steer", "5=+9", "--steer", "7=-3.5"]) == 0
    assert capsys.readouterr().out != plain
    assert main([*base, *sae, "--explain", "--labels", str(tiny_labels / "labels")]) == 0
    explained = capsys.readouterr().out
    assert explained.startswith(plain)
    assert "latents that fire most" in explained
    assert main([*base, *sae, "--steer", "64=+1"]) == 2
    assert "latent 64 does not exist: this SAE has latents 0 to 63" in capsys.readouterr().err


def test_generate_chat_and_several_prompts(tiny_llama_folder: Path, capsys):
    base = ["generate", "Hello", "Who are you?", "--model", str(tiny_llama_folder), "--max-new-tokens", "4"]
    assert main([*base, "--dtype", "float32", "--chat"]) == 0
    out = capsys.readouterr().out
    assert "> Hello" in out
    assert "> Who are you?" in out
