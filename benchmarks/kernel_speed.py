"""Speed of the Triton kernels beside prdp.py's plain torch and torch.compile: a markdown table.

    python benchmarks/kernel_speed.py          # one CUDA GPU
    python benchmarks/kernel_speed.py --quick  # anywhere, in seconds: small shapes

The kernels read and write each number once, so memory bounds them: the bytes of `moved` over the
copy rate of the same run.
"""

import itertools
import statistics
import sys
import timeit
from collections.abc import Callable
from unittest import mock

import torch
from shared import CUDA, DEVICE, SCHEDULER, attempt, print_tables, show, table
from torch._functorch import config as functorch_config

import prdp
from support import machine
from support.cli import Parser, command

T = 50


def moved(name: str, numbers: int, itemsize: int) -> int:
    """The fewest bytes a pass can move, for M*D = `numbers`: noise_pred of that itemsize, latents
    float32."""
    read = 2 * itemsize + 4 + 4  # both halves, x_t, and x_prev or noise
    written = {"forward": 0, "backward": 2 * itemsize, "sample": 4}  # gradients of both; x_prev
    return numbers * (read + written[name])


def milliseconds(call: Callable) -> float:
    """The median; on a GPU the cache is emptied before each call."""
    if CUDA:
        from triton.testing import do_bench

        return do_bench(call, return_mode="median")
    return 1e3 * statistics.median(timeit.repeat(call, number=1, repeat=7))


def copy_rate(numbers: int) -> float:
    """GB/s of a plain copy, counting what it reads and what it writes."""
    source = torch.randn(numbers, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6


def one_pass(name: str, score: Callable, sample: Callable, args: tuple) -> Callable:
    if name == "sample":
        return lambda: sample(*args)  # x_prev serves as the noise
    if name == "forward":
        return torch.no_grad()(lambda: score(*args))
    leaf = args[0].detach().requires_grad_()
    log_prob = score(leaf, *args[1:])
    upstream = torch.linspace(-1, 2, len(log_prob), dtype=torch.float64, device=DEVICE)
    return lambda: torch.autograd.grad(log_prob, leaf, upstream, retain_graph=True)


@mock.patch.object(machine, "kernels_for", lambda noise_pred: None)  # plain torch, on a GPU too
@functorch_config.patch(donated_buffer=False)  # a backward is timed again and again on one graph
def kernel_table(quick: bool) -> None:
    rate = copy_rate(2**22 if quick else 2**30)
    paths = {"eager": (prdp.guided_log_prob, prdp.guided_sample)}
    if CUDA:
        paths["torch.compile"] = tuple(torch.compile(f, dynamic=False) for f in paths["eager"])
    if kernels := machine.load_kernels()[0]:
        paths["Triton"] = (kernels.guided_log_prob, kernels.guided_sample)
    else:
        show("\nno Triton kernels here: only plain torch is timed.")
    row = table(
        f"(a) kernels: the median of each pass; a plain copy reads and writes {rate:.0f} GB/s",
        "shape", "dtype", "pass", "path", "ms", "GB/s", "% of copy",
    )  # fmt: skip

    def cells(name: str, functions: tuple, args: tuple) -> tuple:
        time = milliseconds(one_pass(name, *functions, args))
        speed = moved(name, args[1].numel(), args[0].element_size()) / time / 1e6
        return time, speed, 100 * speed / rate

    shapes = [(16, 4, 16, 16), (3, 3, 5, 7)] if quick else [(16, 4, 64, 64), (512 * T, 4, 64, 64)]
    for shape, dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        torch.compiler.reset()
        steps = torch.arange(shape[0]) % T
        coefs = [column[steps].to(DEVICE) for column in prdp.ddpm_schedule(SCHEDULER, T)[1:]]
        noise_pred = torch.randn(2 * shape[0], *shape[1:], device=DEVICE, dtype=dtype)
        args = (noise_pred, *torch.randn(2, *shape, device=DEVICE), *coefs, 5.0)
        for name, path in itertools.product(("forward", "backward", "sample"), paths):
            head = ["x".join(map(str, shape)), str(dtype).removeprefix("torch."), name, path]
            row(*head, *attempt(cells, name, paths[path], args))


def main() -> None:
    script = "benchmarks/kernel_speed.py"
    with command(script):
        parser = Parser(description=__doc__)
        parser.add_argument("--quick", action="store_true", help="small shapes")
        quick = parser.parse_args(sys.argv[1:]).quick
        print_tables(script, {"kernels": lambda end: kernel_table(quick)})


if __name__ == "__main__":
    main()
