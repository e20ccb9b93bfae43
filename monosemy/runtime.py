"""What every stage needs from the machine: dtype, random streams, ranks, progress, and a way to say no.

Nothing here imports torch at load time, so that `monosemy --help` stays instant.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
"""How weights and activations of the model are held; `auto` is bfloat16 where the processor multiplies it."""


class InputError(ValueError):
    """The caller's input cannot be used. Its text says what was given, what was expected, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def require(module: str, extra: str) -> None:
    """Raise `InputError` unless the optional package `module`, part of extra `extra`, is installed."""
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise InputError(f"this needs the package {module!r}, which is not installed: pip install 'monosemy[{extra}]'")


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The dtype called `name`; `auto` is bfloat16 where `device` multiplies it faster than float32."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    features = torch.cpu.get_capabilities()
    return torch.bfloat16 if features.get("avx512_bf16") or features.get("amx_bf16") else torch.float32


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch work on one core. Many small operations otherwise wait for each other's threads longer than they
    work, and threads that have worked go on spinning for a while, on a core that others need."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed. It would give them back to the system at once, and a loop that makes
    the same large arrays at every step would spend a tenth of its time on fresh pages. Elsewhere it does nothing."""
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        m_trim_threshold, m_mmap_threshold, bytes_kept = -1, -3, 1 << 30
        libc.mallopt(m_mmap_threshold, bytes_kept)
        libc.mallopt(m_trim_threshold, bytes_kept)


def random_stream(*key: int) -> np.random.Generator:
    """A random stream that depends on nothing but `key`, for example (seed, epoch, step)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key))))


def say(text: str) -> None:
    """One line for the person at the terminal, once for all ranks. Results go to standard output, all else here."""
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks: the processes that `torchrun` starts
# ---------------------------------------------------------------------------------------------------------------------


def rank() -> int:
    """Number of this process among those that `torchrun` started; 0 without it."""
    return int(os.environ.get("RANK", "0"))


class Ranks(NamedTuple):
    """This process and those it works with."""

    number: int
    count: int

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in order, on every rank. Waits for all."""
        if self.count == 1:
            return [value]
        import torch.distributed

        values = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Go on when every rank has come here."""
        self.gather(None)


ALONE = Ranks(0, 1)


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """All ranks under `torchrun`, joined; else `ALONE`. A rank that dies ends the others: `torchrun` sees to it."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    import torch
    from torch import distributed

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    patience = timedelta(days=7)  # one rank may compute for long before it answers
    store, number, count = next(iter(distributed.rendezvous("env://")))  # pyright: ignore
    if os.environ.get("LOCAL_WORLD_SIZE") == str(count):
        # torchrun keeps one store when it starts ranks again, and they must not find addresses of those that died
        # (pytorch issue 135712). On several machines this count differs between them.
        store = distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # pyright: ignore
    distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=patience)
    try:
        yield Ranks(number, count)
    finally:
        distributed.destroy_process_group()


def duration(seconds: float) -> str:
    """`seconds` as a person says it: 4.2 s, 3 min 10 s, 2 h 05 min."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(number: float) -> str:
    """A count in three digits: 812, 45.3k, 2.40M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:  # what rounds to 1000 of a unit is 1 of the next
            return f"{number / size:#.3g}".rstrip(".") + unit
    return f"{number:.0f}"


class Progress:
    """How far a long step is: a bar with rate and time left on a terminal, a plain line every ten seconds elsewhere.

    with Progress("capture", total=18_000, unit="token") as progress:
        progress.advance(512)
        progress.advance(512, fvu=0.2)   # facts to show beside the bar

    A `total` of None is not known before the end.
    """

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, title: str, total: int | None, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self.done_at_start = 0
        self.facts = ""

    def __enter__(self) -> Progress:
        self.start = self.last_line = time.monotonic()
        self.bar = self._terminal_bar() if sys.stderr.isatty() and rank() == 0 else None
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if error_type is None:
            elapsed = time.monotonic() - self.start
            fresh = self.done - self.done_at_start
            rate = f", {count(fresh / elapsed)} {self.unit}s/s" if fresh and elapsed > 0 else ""
            say(f"{self.title}: {count(self.done)} {self.unit}s in {duration(elapsed)}{rate}{self.facts}")

    def advance(self, amount: int, **facts: float) -> None:
        """Count `amount` more units as done, and show `facts` from now on."""
        self.done += amount
        if facts:
            self.facts = "".join(f", {name.replace('_', ' ')} {value:.4g}" for name, value in facts.items())
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done, facts=self.facts.removeprefix(", "))
        elif time.monotonic() - self.last_line >= self.SECONDS_BETWEEN_LINES:
            self._print_line()

    def skip(self, amount: int) -> None:
        """Count `amount` units as done by an earlier, interrupted run: they do not count towards the rate."""
        self.done_at_start += amount
        self.advance(amount)

    def _print_line(self) -> None:
        self.last_line = time.monotonic()
        rate = (self.done - self.done_at_start) / max(self.last_line - self.start, 1e-9)
        if self.total is None:
            say(f"{self.title}: {count(self.done)} {self.unit}s, {count(rate)} {self.unit}s/s{self.facts}")
            return
        left = duration((self.total - self.done) / rate) if rate else "unknown time"
        percent = 100 * self.done / max(self.total, 1)
        say(
            f"{self.title}: {percent:3.0f}%, {count(self.done)} of {count(self.total)} {self.unit}s, "
            f"{count(rate)} {self.unit}s/s, {left} left{self.facts}"
        )

    def _terminal_bar(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task):
                return Text(f"{count(task.speed or 0)}/s", style="progress.data.speed")

        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
            console=Console(stderr=True),
            transient=True,
        )
        bar.add_task(self.title, total=self.total, completed=self.done, facts="")
        bar.start()
        return bar


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
