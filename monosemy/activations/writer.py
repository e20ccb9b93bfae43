"""Writes in the background, so that the model never waits for the disk.

1. `put` hands over a piece of work; one thread does them in order.
2. While more than `most_bytes` wait to be written, `put` waits too: memory is bounded.
3. An error of the thread comes out of the next `check`, `put` or the end of the `with`; what still waits is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

MOST_BYTES = 1 << 29


class Waiting(NamedTuple):
    """Work that was handed over."""

    work: Future[Any]
    n_bytes: int


class Writer:
    """with Writer() as writer: writer.put(n_bytes, function, *arguments)"""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self.waiting: deque[Waiting] = deque()
        self.thread = ThreadPoolExecutor(1, "writer")

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            while error_type is None and self.waiting:
                self.waiting.popleft().work.result()
        finally:
            self.thread.shutdown(cancel_futures=True)

    def put(self, n_bytes: int, function: Callable[..., object], *arguments: Any) -> None:
        """Have `function(*arguments)` called by the thread; until then it holds `n_bytes` of memory."""
        self.check()
        while self.waiting and sum(item.n_bytes for item in self.waiting) + n_bytes > self.most_bytes:
            self.waiting.popleft().work.result()
        self.waiting.append(Waiting(self.thread.submit(function, *arguments), n_bytes))

    def check(self) -> None:
        """Raise the error of the thread, if there was one."""
        while self.waiting and self.waiting[0].work.done():
            self.waiting.popleft().work.result()
