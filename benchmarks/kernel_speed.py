"""Speed of the Triton kernels beside prdp.py's plain torch and torch.compile: a markdown table.

    python benchmarks/kernel_speed.py          # one CUDA GPU
    python benchmarks/kernel_speed.py --quick  # anywhere, seconds: small shapes

The kernels read and write each number once, so memory bounds them: the bytes of `moved` over the
copy rate of the same run.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable

import torch
from shared import CUDA, DEVICE, attempt, milliseconds, print_tables, show, table
from torch import Tensor
from torch._functorch import config as functorch_config

import prdp
from support.cli import Parser, command

T = 50


def moved(name: str, numbers: int, itemsize: int) -> int:
    """The fewest bytes a pass can move, for M*D = `numbers`: noise_pred of that itemsize, latents
    float32."""
    read = 2 * itemsize + 4 + 4  # both halves, x_t, and x_prev or noise
    written = {"forward": 0, "backward": 2 * itemsize, "sample": 4}  # gradients of both; x_prev
    return numbers * (read + written[name])


def kernel_microseconds(call: Callable) -> float:
    """Time inside GPU kernels, by the profiler: without launches, which a busy GPU hides."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for _ in range(10):
            call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    events = [e for e in trace.key_averages() if e.device_type == cuda]
    # An annotation, as torch.compile makes one a call, spans kernels that are counted themselves.
    return sum(e.self_device_time_total for e in events if not e.is_user_annotation) / 10


def copy_rate(numbers: int) -> float:
    """GB/s of a plain copy, counting what it reads and what it writes."""
    source = torch.randn(numbers, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source))[1] / 1e6


def one_pass(name: str, score: Callable, sample: Callable, args: tuple) -> Callable:
    """A call that runs one pass, and returns what it computed."""
    if name == "sample":
        return lambda: sample(*args)[0]  # x_prev serves as the noise
    if name == "forward":
        return torch.no_grad()(lambda: score(*args))
    leaf = args[0].detach().requires_grad_()
    log_prob = score(leaf, *args[1:])
    upstream = torch.linspace(-1, 2, len(log_prob), dtype=torch.float64, device=DEVICE)
    return lambda: torch.autograd.grad(log_prob, leaf, upstream, retain_graph=True)[0]


def cells(
    name: str, functions: tuple, args: tuple, first: list[Tensor], size: int, rate: float
) -> list[str]:
    """Of one pass; first: what the first path returned, if one ran."""
    call = one_pass(name, *functions, args)
    result = call()
    first.append(result)
    error = ((result - first[0]).abs().max() / first[0].abs().max()).item()
    del result, first[1:]  # and their memory
    times = milliseconds(call)
    speed = size / times[1] / 1e6
    spread = " / ".join(f"{t:.4g}" for t in times)
    kernel_time = attempt(lambda: [kernel_microseconds(call)]) if CUDA else []
    return [f"{error:.0e}", spread, f"{speed:.0f}", f"{100 * speed / rate:.0f}", *kernel_time]


@functorch_config.patch(donated_buffer=False)  # a backward is timed again and again on one graph
def kernel_table(quick: bool) -> None:
    rate = copy_rate(2**22 if quick else 2**30)
    show(f"\ncopy rate: {rate:.0f} GB/s, bytes read and written")
    # What prdp.py wraps: its plain torch, on a GPU too.
    paths = {"eager": (prdp.guided_log_prob.__wrapped__, prdp.guided_sample.__wrapped__)}
    if CUDA:
        paths["torch.compile"] = tuple(torch.compile(f, dynamic=False) for f in paths["eager"])
    else:
        show("no CUDA device: torch.compile and Triton are not timed.")
    if kernels := prdp.load_kernels()[0]:
        paths["Triton"] = (kernels.guided_log_prob, kernels.guided_sample)
    row = table(
        "(a) kernels: ms at the 20 / 50 / 80 percentiles, GB/s at the median, kernels alone by the "
        "profiler; largest difference from the first path, over its largest number",
        "shape", "dtype", "pass", "path", "difference", "ms", "GB/s", "% of copy", "kernels us",
    )  # fmt: skip
    shapes = [(16, 4, 16, 16), (3, 3, 5, 7)] if quick else [(16, 4, 64, 64), (512 * T, 4, 64, 64)]
    for shape, dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        torch.compiler.reset()
        steps = torch.arange(shape[0]) % T
        coefs = [column[steps].to(DEVICE) for column in prdp.ddpm_schedule({}, T)[1:]]
        noise_pred = torch.randn(2 * shape[0], *shape[1:], device=DEVICE, dtype=dtype)
        args = (noise_pred, *torch.randn(2, *shape, device=DEVICE), *coefs, 5.0)
        for name in ("forward", "backward", "sample"):
            size, first = moved(name, math.prod(shape), noise_pred.element_size()), []
            for label, functions in paths.items():
                head = ["x".join(map(str, shape)), str(dtype).removeprefix("torch."), name, label]
                row(*head, *attempt(cells, name, functions, args, first, size, rate))


def main() -> None:
    script = "benchmarks/kernel_speed.py"
    with command(script):
        parser = Parser(description=__doc__)
        parser.add_argument("--quick", action="store_true", help="small shapes")
        options = parser.parse_args(sys.argv[1:])
        print_tables(script, {"kernels": lambda end: kernel_table(options.quick)})


if __name__ == "__main__":
    main()
