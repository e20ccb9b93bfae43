"""The command line: `monosemy COMMAND --help` shows the options of a command, derived from its config dataclass.

Only the chosen command's module is imported, so that help is instant. Bad input is one line on stderr and exit code 2;
a bug is a traceback and exit code 1; Ctrl-C is 130 and SIGTERM 143, and the same command goes on afterwards.
"""

from __future__ import annotations

import importlib
import signal
import sys
from typing import NamedTuple

from monosemy import __version__


class Command(NamedTuple):
    """Where a command's config and the function that takes it are."""

    module: str
    config: str
    function: str
    summary: str


COMMANDS = {
    "run": Command("recipe", "RunConfig", "run", "all stages of a recipe, from text to a steered latent and a report"),
    "tokenize": Command("corpus", "TokenizeConfig", "run", "documents -> sentences -> token file"),
    "capture": Command("activations.capture", "CaptureConfig", "run", "token file -> activations at the named sites"),
    "train": Command("sae.train", "TrainConfig", "train_all", "activations -> sparse autoencoder, or a grid of them"),
    "evaluate": Command("sae.evaluate", "EvaluateConfig", "run_and_print", "FVU, L0, dead latents, loss recovered"),
    "compare": Command("sae.compare", "CompareConfig", "run_and_print", "several SAEs: sparsity against fidelity"),
    "probe": Command(
        "sae.probe", "ProbeConfig", "run_and_print", "a few latents tell classes of text apart, or do not"
    ),
    "geometry": Command(
        "sae.geometry", "GeometryConfig", "run_and_print", "near duplicates, agreement of SAEs, splitting"
    ),
    "index": Command("latents.index", "IndexConfig", "run", "examples and statistics of every latent"),
    "explain": Command("explain.explainer", "ExplainConfig", "run", "a label for every latent"),
    "features": Command("latents.query", "FeaturesConfig", "run", "search and show latents"),
    "steer-sweep": Command("explain.dose", "DoseConfig", "run_and_print", "strength of steering -> effect and fluency"),
    "generate": Command("app.terminal", "GenerateConfig", "run", "steered completion or chat, in the terminal"),
    "convert": Command("sae.convert", "ConvertConfig", "run", "SAEs of other libraries, in and out"),
    "push": Command("sae.publish", "PushConfig", "run", "publish an SAE on the Hugging Face Hub, with a card"),
    "verify": Command("verify", "VerifyConfig", "run", "check every byte of an artifact"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command in `arguments` (default: those of the process) and return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"monosemy {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"monosemy: there is no command {name!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run_command(name, rest)


def overview() -> str:
    """What bare `monosemy --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"monosemy {__version__}: an open-weight Llama as a dictionary of steerable features",
            "",
            "usage: monosemy COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "monosemy COMMAND --help shows the options of a command.",
            "Start with: monosemy run smollm2-sotu --out runs/demo",
        ]
    )


def run_command(name: str, arguments: list[str]) -> int:
    """Parse `arguments` into the command's config, run it, and turn what goes wrong into an exit code."""
    from monosemy.runtime import InputError

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    command = COMMANDS[name]
    try:
        module = importlib.import_module(f"monosemy.{command.module}")
        config = parse(name, getattr(module, command.config), arguments)
        getattr(module, command.function)(config)
    except InputError as error:
        print(f"monosemy {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command again, and it goes on from what is finished", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `monosemy features | head`
        sys.stderr.close()
        return 141
    return 0


def parse(name: str, config: type, arguments: list[str]) -> object:
    """An instance of the dataclass `config` from command-line `arguments`; usage errors exit with code 2."""
    import tyro

    return tyro.cli(config, prog=f"monosemy {name}", args=arguments, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    sys.exit(main())
