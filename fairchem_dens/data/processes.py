"""Worker processes for computing and converting structures."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context


@contextmanager
def worker_pool(processes: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes use one thread each and end with their parent, however that ends.

    Args:
        processes: None takes one for each of up to four cores.
    """
    processes = processes or min(4, os.cpu_count() or 1)
    threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    os.environ.update(dict.fromkeys(threads, "1"))  # read by the new processes; also makes results repeatable
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_end_with, initargs=(os.getpid(),)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        for name, value in threads.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _end_with(parent: int) -> None:
    """Watch the parent from a thread: a killed parent would leave a pool waiting for work for ever."""
    # Ctrl-C reaches all processes of a terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
