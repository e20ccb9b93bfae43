"""monosemy: an open-weight Llama as a dictionary of named, tested, steerable features."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("monosemy")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0.1.0.dev0"
