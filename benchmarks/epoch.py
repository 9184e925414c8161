"""Speed of the kernels and of an epoch's passes, the noise of a log-prob, a run, and memory.

    python kernels/benchmark.py --only epoch   # one table, SD v1.4's size; --help says how long
    python kernels/benchmark.py                # all of them, one CUDA GPU, about half an hour
    python kernels/benchmark.py --quick        # anywhere, under a minute, tiny networks

Prints markdown tables. All networks have random weights, so nothing is downloaded.

What to expect: the kernels read and write each number once, so memory bounds them: the bytes of
`moved` over the copy rate of the same run. Matrix products bound an epoch: one image and step costs
the UNet 1.6 TFLOP, some milliseconds, and a kernel about 0.1 microseconds.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import math
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from any folder

import kernels  # noqa: E402
import prdp  # noqa: E402
import report  # noqa: E402
import rewards  # noqa: E402

T, K = 50, 10  # of the epoch that times are scaled to
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": None, "fp32": None}

ESTIMATES = """one table; on an H200 an estimated 2 minutes (kernels), 9 (epoch; the eager rows
come first and take 2.5), 6 (noise; 1.5), 5 (memory), 3 to 9 (run; bf16 first)"""


# ---- Tables, and cells that may fail -------------------------------------------------------------


def table(title: str, *columns: str) -> Callable:
    """Print a heading; the function that prints a row under it, filled up with empty cells."""

    def row(*cells) -> None:
        cells = [f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells]
        print("| " + " | ".join(cells + [""] * (len(columns) - len(cells))) + " |", flush=True)

    print(f"\n## {title}\n")
    row(*columns)
    row(*["---"] * len(columns))
    return row


class Skipped(Exception):
    """Says what there is too little of."""


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


def require_minutes(end: float, minutes: float) -> None:
    left = (end - time.perf_counter()) / 60
    if left < minutes:
        raise Skipped(f"takes about {minutes:.2g} minutes, {max(left, 0):.2g} are left")


def set_dtype(dtype: str) -> torch.dtype | None:
    """As prdp.py's --dtype; what its Policy calls autocast."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype != "fp32"
    return AUTOCAST[dtype]


def compiled(unet: nn.Module) -> nn.Module:
    """As prdp.py's --compile."""
    importlib.import_module("torch._inductor.config").deterministic = True
    return torch.compile(unet, dynamic=False)


# ---- (a) Kernels ---------------------------------------------------------------------------------


def moved(name: str, numbers: int, itemsize: int) -> int:
    """The fewest bytes a pass can move, for M*D = `numbers`: noise_pred of that itemsize, latents
    float32."""
    read = 2 * itemsize + 4 + 4  # both halves, x_t, and x_prev or noise
    written = {"forward": 0, "backward": 2 * itemsize, "sample": 4}  # gradients of both; x_prev
    return numbers * (read + written[name])


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


def kernel_pass(name: str, score: Callable, sample: Callable, args: tuple) -> Callable:
    """A call that runs one pass, and returns what it computed."""
    if name == "sample":
        return lambda: sample(*args)[0]  # x_prev serves as the noise
    if name == "forward":
        return torch.no_grad()(lambda: score(*args))
    leaf = args[0].detach().requires_grad_()
    log_prob = score(leaf, *args[1:])
    upstream = torch.linspace(-1, 2, len(log_prob), dtype=torch.float64, device=DEVICE)
    return lambda: torch.autograd.grad(log_prob, leaf, upstream, retain_graph=True)[0]


def kernel_cells(
    name: str, functions: tuple, args: tuple, first: list[Tensor], size: int, rate: float
) -> list[str]:
    """Of one pass; first: what the first path returned, if one ran."""
    call = kernel_pass(name, *functions, args)
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
    print(f"\ncopy rate: {rate:.0f} GB/s, bytes read and written")
    versions = {"eager": (kernels.guided_log_prob_ref, kernels.guided_sample_ref)}
    if CUDA:
        twins = (torch.compile(f, dynamic=False) for f in versions["eager"])
        versions["torch.compile"] = tuple(twins)
    else:
        print("no CUDA device: torch.compile and Triton are not timed.")
    if kernels.path(DEVICE) == "Triton kernels":
        versions["Triton"] = (kernels.guided_log_prob, kernels.guided_sample)
    row = table(
        "(a) kernels: ms at the 20 / 50 / 80 percentiles, GB/s at the median, kernels alone by the "
        "profiler; largest difference from the first path, over its largest number",
        "shape", "dtype", "pass", "path", "difference", "ms", "GB/s", "% of copy", "kernels us",
    )  # fmt: skip
    shapes = [(16, 4, 16, 16), (3, 3, 5, 7)] if quick else [(16, 4, 64, 64), (512 * 50, 4, 64, 64)]
    for shape, dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        torch.compiler.reset()
        steps = torch.arange(shape[0]) % T
        coefs = [column[steps].to(DEVICE) for column in prdp.ddpm_schedule({}, T)[1:]]
        noise_pred = torch.randn(2 * shape[0], *shape[1:], device=DEVICE, dtype=dtype)
        args = (noise_pred, *torch.randn(2, *shape, device=DEVICE), *coefs, 5.0)
        for name in ("forward", "backward", "sample"):
            size, first = moved(name, math.prod(shape), noise_pred.element_size()), []
            for label, functions in versions.items():
                head = ["x".join(map(str, shape)), str(dtype).removeprefix("torch."), name, label]
                row(*head, *attempt(kernel_cells, name, functions, args, first, size, rate))


# ---- (b) An epoch's phases -----------------------------------------------------------------------


def random_unet(quick: bool) -> nn.Module:
    """SD v1.4's UNet, or a tiny one, with random weights."""
    from diffusers import UNet2DConditionModel

    options = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    if quick:
        options = dict(
            sample_size=16, cross_attention_dim=32, attention_head_dim=4, layers_per_block=1,
            block_out_channels=(16, 32), norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return UNet2DConditionModel(**options).eval()


class Job:
    """The passes of one microbatch through a policy of some of the T denoising steps."""

    epoch = {"sample": 1, "score": K, "backward": K}  # passes; pi_ref's is one of the scores

    def __init__(self, unet: nn.Module, images: int, dtype: str, steps: Iterable[int]) -> None:
        self.images, self.seconds = images, {}
        self.batches = dict.fromkeys(self.epoch, images)
        columns = prdp.ddpm_schedule({}, T)
        schedule = prdp.Schedule(*(column[list(steps)].to(DEVICE) for column in columns))
        width, size = unet.config.cross_attention_dim, unet.config.sample_size
        self.shape = (unet.config.in_channels, size, size)
        text = torch.randn(1 + images, 77, width, generator=torch.Generator().manual_seed(0))
        null_text, self.text = text[0].to(DEVICE), text[1:].to(DEVICE)
        self.policy = prdp.Policy(unet, schedule, null_text, 5.0, images, set_dtype(dtype))

    def sample(self) -> None:
        noise = prdp.image_generators(0, 1, range(1), self.images)
        self.stored = prdp.sample_trajectories(self.policy, self.text, noise, self.shape)

    def score(self) -> None:
        self.log_probs = prdp.score_trajectories(self.policy, self.stored)

    def backward(self) -> None:
        weights = torch.full_like(self.stored.log_probs, 1e-3)  # none is 0: nothing is skipped
        prdp.backward_trajectories(self.policy, self.stored, weights)

    def gap(self) -> str:
        return str((self.log_probs - self.stored.log_probs).abs().max().item())


class PeerJob(Job):
    """The same as trainers of DDPO's kind write it: one timestep for a whole batch, the log-prob in
    float32, at each step a forward with gradient and a backward, of `learned` images at a time."""

    epoch = {"sample": 2, "backward": K}  # pi_ref scores for as long as pi_theta samples

    def __init__(self, unet: nn.Module, images: int, learned: int, steps: Iterable[int]) -> None:
        super().__init__(unet, images, "bf16", steps)
        self.batches = {"sample": images, "backward": learned}

    def log_prob(self, x_t: Tensor, text: Tensor, step: int, given: Tensor | None = None) -> tuple:
        schedule, autocast = self.policy.schedule, self.policy.autocast
        timestep, coef_sample, coef_noise, sigma = (column[step] for column in schedule)
        both = torch.cat([self.policy.null_text.expand_as(text), text])
        with torch.autocast(DEVICE.type, autocast):
            out = self.policy.unet(torch.cat([x_t, x_t]), timestep, encoder_hidden_states=both)
        unconditional, conditional = out.sample.float().chunk(2)
        guided = unconditional + 5.0 * (conditional - unconditional)
        mean = coef_sample * x_t + coef_noise * guided
        x_prev = mean + sigma * torch.randn_like(mean) if given is None else given
        squared = (x_prev.detach() - mean) ** 2
        log_prob = -squared / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
        return x_prev.float(), log_prob.mean((1, 2, 3))

    @torch.no_grad()
    def sample(self) -> None:
        latents, log_probs = [torch.randn(self.images, *self.shape, device=DEVICE)], []
        for step in range(len(self.policy.schedule.sigma)):
            x_prev, log_prob = self.log_prob(latents[-1], self.text, step)
            latents.append(x_prev)
            log_probs.append(log_prob)
        self.stored = prdp.Trajectories(torch.stack(latents, 1), torch.stack(log_probs, 1), None)

    def backward(self) -> None:
        latents, log_probs, _ = self.stored
        for rows in torch.arange(self.images, device=DEVICE).split(self.batches["backward"]):
            for step in range(log_probs.shape[1]):
                x_t, x_prev = latents[rows, step], latents[rows, step + 1]
                log_prob = self.log_prob(x_t, self.text[rows], step, x_prev)[1]
                (log_prob - log_probs[rows, step]).exp().mean().backward()


PEERS = ("peer-style", "peer at our microbatch")


def count_flops(unet: nn.Module) -> dict[str, int]:
    """Of one guided image-step: forward, and forward with backward."""
    from torch.utils.flop_counter import FlopCounterMode

    job, flops = PeerJob(unet, 1, 1, [0]), {}
    for phase in job.epoch:
        with FlopCounterMode(display=False) as counter:
            getattr(job, phase)()
        flops[phase] = counter.get_total_flops()
    unet.zero_grad(set_to_none=True)
    return {**flops, "score": flops["sample"]}


def matmul_rate(size: int, dtype: str) -> float:
    """TFLOP/s of a square matrix product of random numbers."""
    number = set_dtype(dtype) or torch.float32
    a, b = (torch.randn(size, size, device=DEVICE, dtype=number) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b)[1] / 1e9


def seconds(call: Callable) -> tuple[float, float, float | str]:
    """Of a call, the median of three; of the first one, which compiles; and peak memory in GB."""
    times = []
    for _ in range(4):
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        call()
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else ""
    return sorted(times[1:])[1], times[0], peak


def epoch_table(
    quick: bool, end: float, microbatches: list[int], steps: int, dtypes: list[str]
) -> None:
    unet, spent = random_unet(quick), {}
    flops = count_flops(unet)
    matmul = {
        dtype: matmul_rate(512 if quick else 8192, dtype)
        for dtype in dict.fromkeys([*dtypes, "bf16"])
    }
    rates = ", ".join(f"{rate:.4g} in {dtype}" for dtype, rate in matmul.items())
    row = table(
        f"(b) epoch phases, over {steps} of {T} steps; an image is {T} steps; one image and step, "
        f"guided: {flops['sample'] / 1e12:.4g} TFLOP forward, {flops['backward'] / 1e12:.4g} with "
        f"the backward; a matmul's TFLOP/s: {rates}; memory is without an optimizer",
        "loop", "dtype", "microbatch", "phase", "images/s", "TFLOP/s", "% of matmul", "peak GB",
        "first call s", "on-policy gap",
    )  # fmt: skip

    def cells(job: Job, dtype: str, phase: str) -> tuple:
        median, first, peak = seconds(getattr(job, phase))
        job.seconds[phase] = median / job.images * T / steps
        rate = flops[phase] * job.images * steps / median / 1e12
        gap = job.gap() if phase == "score" else ""
        return 1 / job.seconds[phase], rate, 100 * rate / matmul[dtype], peak, first, gap

    def measure(label: str, dtype: str, microbatch: int) -> None:
        require_minutes(end, 3.5 if label == "compiled" else 0.7)
        torch.backends.cudnn.deterministic = "deterministic" in label
        job = Job(unet, microbatch, dtype, range(steps))
        if label in PEERS:  # DDPO's code samples 8 images at a time and learns from 4
            learned = 4 if label == "peer-style" else microbatch
            job = PeerJob(unet, microbatch, learned, range(steps))
        if label == "compiled":
            job.policy = job.policy._replace(unet=compiled(unet))
        for phase, batch in job.batches.items():
            row(label, dtype, batch, phase, *attempt(cells, job, dtype, phase))
            unet.zero_grad(set_to_none=True)
        if job.seconds.keys() == job.epoch.keys():
            passes = job.epoch.items()
            whole = spent[label, dtype, microbatch] = sum(n * job.seconds[p] for p, n in passes)
            row(label, dtype, microbatch, "epoch", 1 / whole)

    sixteen = [dtype for dtype in dtypes if dtype != "fp32"]
    loops = [("peer-style", ["bf16"], [8]), ("peer at our microbatch", ["bf16"], microbatches),
             ("eager", dtypes, microbatches)]  # fmt: skip
    if CUDA:  # compiled last: these take minutes each
        loops += [("eager, deterministic cuDNN", sixteen, microbatches),
                  ("compiled", dtypes, microbatches)]  # fmt: skip
    for label, some, batches in loops:
        for dtype, microbatch in itertools.product(some, batches):
            if failure := attempt(measure, label, dtype, microbatch):
                row(label, dtype, microbatch, "epoch", *failure)
            free_memory()
    torch.backends.cudnn.deterministic = False

    row = table(
        f"one K = {K} epoch of T = {T}, network passes alone, nothing skipped: sample + reference "
        f"+ {K - 1} score + {K} backward (peers: sample + reference + {K} backward, which score as "
        "they go)",
        "loop", "dtype", "microbatch", "seconds per image", "hours of 512 images",
        "times as fast as peer-style", "as the peer at this microbatch",
    )  # fmt: skip
    for (label, dtype, microbatch), time_of_one in spent.items():
        peers = zip(PEERS, ("bf16", "bf16"), (8, microbatch), strict=True)
        against = [spent[peer] / time_of_one if peer in spent else "" for peer in peers]
        row(label, dtype, microbatch, time_of_one, 512 * time_of_one / 3600, *against)


# ---- (c) Noise and drift -------------------------------------------------------------------------


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def drifts(job: Job, unet: nn.Module) -> list[float]:
    """How far, rms, each of three real updates moves log_probs: Table 4's, of one prompt's images
    with rewards as scattered as HPSv2's."""
    config, old = prdp.Config(), job.stored.log_probs
    draws = torch.randn(job.images, generator=torch.Generator().manual_seed(1))
    scores, parameters = 0.01 * draws.to(DEVICE), list(unet.parameters())
    decay = config.weight_decay
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=decay, fused=CUDA)
    found, log_probs = [], old
    for _ in range(3):
        leaf = log_probs.clone().requires_grad_()
        loss = prdp.prdp_loss(leaf, old, old, scores, config.clip_range, config.kl_weight)
        (weights,) = torch.autograd.grad(loss, leaf)
        prdp.backward_trajectories(job.policy, job.stored, weights)
        norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        prdp.require_finite("the gradient", norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        job.score()
        found.append(rms(job.log_probs - log_probs))
        log_probs = job.log_probs
    return found


def noise_table(quick: bool, end: float, images: int, dtypes: list[str]) -> None:
    unet = random_unet(quick)
    parameters = list(unet.parameters())
    weights = [p.detach().clone() for p in parameters]
    signs = [1e-7 * torch.randn_like(p).sign() for p in weights]
    row = table(
        "(c) noise floor: log_prob after each weight moved by a relative 1e-7; drift: rms of its "
        f"change by the first and by the third real update; {images} images, steps 1, 25 and 50",
        "dtype", "network", "noise rms", "noise max", "drift 1", "drift 3", "drift 3 / noise",
        "on-policy gap",
    )  # fmt: skip

    @torch.no_grad()
    def restore() -> None:
        torch._foreach_copy_(parameters, weights)
        unet.zero_grad(set_to_none=True)

    def cells(label: str, dtype: str) -> list:
        require_minutes(end, 1.2 if label == "compiled" else 0.6)
        job = Job(unet, images, dtype, [0, T // 2 - 1, T - 1])
        if label == "compiled":
            job.policy = job.policy._replace(unet=compiled(unet))
        job.sample()
        job.score()
        gap = job.gap()
        with torch.no_grad():
            torch._foreach_addcmul_(parameters, weights, signs)
        job.score()
        noise = job.log_probs - job.stored.log_probs
        restore()
        drift = []
        if label == "eager":  # compiled, a backward takes minutes
            drift = list(attempt(drifts, job, unet))
        if len(drift) == 3:
            drift[1:] = [drift[2], drift[2] / max(rms(noise), 1e-30)]
        return [rms(noise), noise.abs().max().item(), *drift, *[""] * (3 - len(drift)), gap]

    for label, dtype in itertools.product(("eager", "compiled") if CUDA else ("eager",), dtypes):
        row(dtype, label, *attempt(cells, label, dtype))
        restore()
        free_memory()


# ---- (d) Memory, (e) a run -----------------------------------------------------------------------

PHASES = ("sample", "reference", "reward", "score", "update")


def random_models(folder: Path, quick: bool) -> None:
    """In `folder`, sd/, SD v1.4, and clip/, a ViT-H/14 as HPSv2 and PickScore are, or tiny ones,
    with random weights: 8.2 GB."""
    import diffusers
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    width = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)
    text = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12)  # fmt: skip
    reward = rewards.vit_h_14_config()
    if quick:
        width = dict(block_out_channels=(8,) * 4, norm_num_groups=4, sample_size=128)
        text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                    num_attention_heads=2)  # fmt: skip
        reward = CLIPConfig(text_config=text, vision_config=text, projection_dim=16)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    with torch.device(DEVICE):
        vae = diffusers.AutoencoderKL(**width, down_block_types=down, up_block_types=up)
        text_encoder = CLIPTextModel(CLIPTextConfig(**text))
        clip = CLIPModel(reward)
    toys = ROOT / "toy" / "sd" / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(toys, model_max_length=77)
    scheduler = diffusers.DDIMScheduler(**prdp.SD_SCHEDULER, clip_sample=False)
    parts = (vae, text_encoder, tokenizer, random_unet(quick), scheduler, None, None)
    pipe = diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False)
    pipe.save_pretrained(folder / "sd")
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")


@contextmanager
def watched(*functions: tuple) -> Iterator[dict[str, tuple[float, float, float]]]:
    """Within this block: name -> seconds in all, peak GB, GB that the allocator held; of the phases
    that `prdp.train` times, and of calls of `functions`, each (module, name there)."""
    phases = {}

    @contextmanager
    def watch(name: str) -> Iterator[None]:
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        yield
        if CUDA:
            torch.cuda.synchronize()
        total, peak, held = phases.get(name, (0.0, 0.0, 0.0))
        if CUDA:
            peak = max(peak, torch.cuda.max_memory_allocated() / 1e9)
            held = max(held, torch.cuda.max_memory_reserved() / 1e9)
        phases[name] = (total + time.perf_counter() - started, peak, held)

    class Stopwatch(report.Stopwatch):
        @contextmanager
        def __call__(self, name: str) -> Iterator[None]:
            with watch(name), super().__call__(name):
                yield

    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))  # what a run says, apart from the tables
        stack.enter_context(mock.patch.object(report, "Stopwatch", Stopwatch))
        for module, name in functions:
            function = watch(name)(getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, function))
        yield phases


def run(folder: Path, **settings) -> None:
    """`prdp.run` of the models in `folder` with K = 2; a setting of True is a flag."""
    free_memory()
    argv = ["--model", str(folder / "sd"), "--reward", f'"pickscore:{folder / "clip"}"',
            "--prompts", str(ROOT / "prompts" / "animals.txt"), "--updates-per-epoch", "2",
            "--out", str(folder / "run")]  # fmt: skip
    for name, value in settings.items():
        argv += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    prdp.run(prdp.parse_args(argv))


def in_cells(phases: dict, names: Iterable[str]) -> list[str]:
    """Seconds, and on a GPU peak GB."""
    found = [phases[name] for name in names]
    return [f"{spent:.3g} s" + f", {peak:.3g} GB" * CUDA for spent, peak, _ in found]


@contextmanager
def folder_of_models(quick: bool, gigabytes: float, end: float, minutes: float) -> Iterator[Path]:
    """With room for what is written there; made only if there is time to use it."""
    with tempfile.TemporaryDirectory() as name:
        require_minutes(end, minutes)
        free = shutil.disk_usage(name).free / 1e9
        if free < gigabytes and not quick:
            raise Skipped(f"writes {gigabytes} GB, {free:.3g} are free in {name}; set TMPDIR")
        random_models(Path(name), quick)
        yield Path(name)


def memory_table(quick: bool, end: float) -> None:
    cap, size, dtype = 24 * 2**30, 8, "bf16"
    if quick:
        size, dtype = 2, "fp32"  # which a CPU is fast at
    row = table(
        "(d) memory: each phase's seconds and peak GB, and the most GB that the allocator, capped "
        f"at {cap / 1e9:.1f}, held; runs of two epochs, K = 2, T = 2, with gradient checkpointing, "
        "a reward of HPSv2's size, and the room of 512 trajectories of 50 steps",
        "learns", "dtype", "microbatch", "offload", *PHASES, "held GB",
    )  # fmt: skip

    def skip(*args) -> None:
        """No 10 GB on the disk."""

    def cells(folder: Path, rank: int, offload: str) -> list:
        require_minutes(end, 0.6)
        room = 0
        if CUDA:  # latents and text, float32; and pictures, uint8
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap / torch.cuda.mem_get_info()[1]))
            room = 512 * (4 * (51 * 4 * 64 * 64 + 77 * 768) + 3 * 512 * 512)
        ballast = torch.empty(room, dtype=torch.uint8, device=DEVICE)
        unsaved = mock.patch.multiple(report, save_state=skip, save_pipeline=skip)
        with watched() as phases, unsaved:
            run(
                folder, lora_rank=rank, dtype=dtype, offload=offload, gradient_checkpointing=True,
                microbatch=size, prompts_per_epoch=1, images_per_prompt=size, epochs=2,
                ddpm_steps=2, clip_range="inf",
            )  # fmt: skip
        del ballast
        return [*in_cells(phases, PHASES), max(held for _, _, held in phases.values())]

    with folder_of_models(quick, 9, end, 1.5) as folder:
        for offload, rank in itertools.product(("on", "off"), (0, 8)):
            learns = f"LoRA of rank {rank}" if rank else "the full UNet"
            row(learns, dtype, size, offload, *attempt(cells, folder, rank, offload))
            shutil.rmtree(folder / "run", ignore_errors=True)
    if CUDA:
        torch.cuda.set_per_process_memory_fraction(1.0)


def run_table(quick: bool, end: float, dtypes: list[str]) -> None:
    begin = ("load_models", "check_on_policy", "draw_samples")
    finish = ("save_state", "save_pipeline")
    functions = [*((prdp, name) for name in begin), *((report, name) for name in finish)]
    columns = (*begin, *PHASES, *finish)
    images, steps = (2, 2) if quick else (8, T)
    row = table(
        "(e) a run of one epoch, from loading to the saved pipeline: seconds in all and peak GB; "
        f"N = 2, B = {images}, T = {steps}, K = 2, a microbatch of {2 * images}",
        "dtype", *columns, "checkpoint GB", "skipped %", "whole s",
    )  # fmt: skip

    def cells(folder: Path, dtype: str) -> list:
        require_minutes(end, {"tf32": 4.5, "fp32": 8.5}.get(dtype, 3))
        started = time.perf_counter()
        with watched(*functions) as phases:
            run(
                folder, dtype=dtype, epochs=1, prompts_per_epoch=2, images_per_prompt=images,
                ddpm_steps=steps, microbatch=2 * images,
            )  # fmt: skip
        gigabytes = (folder / "run" / "checkpoint" / "state.pt").stat().st_size / 1e9
        skipped = 100 * report.read_metrics(folder / "run")[0]["skipped_fraction"]
        return [*in_cells(phases, columns), gigabytes, skipped, time.perf_counter() - started]

    with folder_of_models(quick, 24, end, 3.5) as folder:
        for dtype in dtypes:
            row(dtype, *attempt(cells, folder, dtype))
            shutil.rmtree(folder / "run", ignore_errors=True)


# ---- Main ----------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny networks: a minute on a CPU")
    names = ("kernels", "epoch", "noise", "memory", "run")
    parser.add_argument("--only", choices=names, help=ESTIMATES)
    text = "images per network pass of epoch and noise (default: 16)"
    parser.add_argument("--microbatch", type=int, nargs="+", help=text)
    text = "denoising steps that epoch times (default: 2; with --quick 1)"
    parser.add_argument("--steps", type=int, help=text)
    text = "of epoch, noise and run, in this order (default: all that the device has)"
    parser.add_argument("--dtypes", nargs="+", choices=AUTOCAST, help=text)
    text = "a table begins no row that would take it past these (default: 9; with --quick no limit)"
    parser.add_argument("--minutes", type=float, help=text)
    options = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

    quick = options.quick
    minutes = options.minutes or (math.inf if quick else 9.0)
    steps = options.steps or (1 if quick else 2)
    microbatches = options.microbatch or [2 if quick else 16]
    dtypes = options.dtypes or [dtype for dtype in AUTOCAST if dtype != "tf32" or CUDA]
    tables = {
        "kernels": lambda end: kernel_table(quick),
        "epoch": lambda end: epoch_table(quick, end, microbatches, steps, dtypes),
        "noise": lambda end: noise_table(quick, end, microbatches[0], dtypes),
        "memory": lambda end: memory_table(quick, end),
        "run": lambda end: run_table(quick, end, dtypes),
    }
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} thread(s)"
    triton = getattr(kernels.log_prob.triton, "__version__", "not installed")
    print(f"# {device}\n")
    cudnn = torch.backends.cudnn.version()  # which attention there is depends on it
    versions = f"torch {torch.__version__}, cuDNN {cudnn}, triton {triton}"
    print(f"{versions}, kernels: {kernels.path(DEVICE)}\n")
    print(f"`python kernels/benchmark.py {' '.join(sys.argv[1:])}`")
    for name, make in tables.items():
        if options.only in (None, name):
            started = time.perf_counter()
            for failure in attempt(make, started + 60 * minutes):
                print(f"\n{name}: {failure}")
            free_memory()
            print(f"\n{name}: {time.perf_counter() - started:.0f} seconds", flush=True)


if __name__ == "__main__":
    main()
