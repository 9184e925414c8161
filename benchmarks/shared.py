"""What both commands share: tables whose cells may fail, the clock, and what runs where."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that they run from any folder

import prdp

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SETTINGS = ("TORCHINDUCTOR_", "TORCH_CUDNN_", "PYTORCH_")  # environment variables that change speed

show = partial(print, file=sys.stdout, flush=True)  # what runs print goes to stderr


# ---- Tables, and cells that may fail -------------------------------------------------------------


def table(title: str, *columns: str) -> Callable:
    """Print a heading; the function that prints a row under it, filled up with empty cells."""

    def row(*cells) -> None:
        cells = [f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells]
        show("| " + " | ".join(cells + [""] * (len(columns) - len(cells))) + " |")

    show(f"\n## {title}\n")
    row(*columns)
    row(*["---"] * len(columns))
    return row


class Skipped(Exception):
    """Says what there is too little of."""


def require(needed: float, there: float, unit: str) -> None:
    """Skipped where there is less than an estimate of what is needed."""
    if there < needed:
        raise Skipped(f"takes about {needed:.3g} {unit}, and there are {max(there, 0):.3g}")


def attempt(call: Callable, *args) -> Iterable:
    """The cells that `call` returns, or one that says why there are none: a failure costs no other
    cell."""
    try:
        return call(*args) or ()
    except Skipped as error:
        return (f"skipped: {error}",)
    except Exception as error:
        traceback.print_exc()
        reason = " ".join(str(error).split())[:80].replace("|", "/")
        failure = f"failed: {type(error).__name__}: {reason}"
    free_memory()  # here, where the error no longer holds its frames and their tensors
    return (failure,)


def free_memory() -> None:
    torch.compiler.reset()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


# ---- Time ----------------------------------------------------------------------------------------


def milliseconds(call: Callable) -> list[float]:
    """At the 20th, 50th and 80th percentile; on a GPU the cache is emptied before each call."""
    if CUDA:
        from triton.testing import do_bench

        return list(do_bench(call, quantiles=[0.2, 0.5, 0.8]))
    times = []
    for _ in range(7):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return [sorted(times)[i] for i in (1, 3, 5)]


def minutes_until(end: float) -> float:
    """Of `time.perf_counter`'s clock."""
    return (end - time.perf_counter()) / 60


# ---- A command -----------------------------------------------------------------------------------


def interrupt(*_) -> None:
    """Ctrl-C, once: `timeout` may send it twice, and folders must be removed undisturbed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def print_tables(
    script: str, tables: dict[str, Callable[[float], object]], minutes: float = math.inf
) -> None:
    """Say what runs where, then make each table, given when it should end; one that fails costs no
    other."""
    signal.signal(signal.SIGINT, interrupt)
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} thread(s)"
    found = importlib.util.find_spec("triton")
    triton = importlib.import_module("triton").__version__ if found else "not installed"
    cudnn = torch.backends.cudnn.version()  # which attention there is depends on it
    show(f"# {device}\n")
    show(f"torch {torch.__version__}, cuDNN {cudnn}, triton {triton}; {prdp.load_kernels()[1]}\n")
    given = [f"{name}={x}" for name, x in sorted(os.environ.items()) if name.startswith(SETTINGS)]
    show(f"`{' '.join([*given, 'python', script, *sys.argv[1:]])}`")
    for name, make in tables.items():
        started = time.perf_counter()
        with redirect_stdout(sys.stderr):
            for failure in attempt(make, started + 60 * minutes):
                show(f"\n{name}: {failure}")
        free_memory()
        show(f"\n{name}: {time.perf_counter() - started:.0f} seconds")
