"""Speed of the kernels and of an epoch's network passes, the noise floor of a log-prob, and memory, as markdown tables.

    python kernels/benchmark.py             # one CUDA GPU, about 10 minutes, SD v1.4's networks with random weights
    python kernels/benchmark.py --quick     # anywhere, under a minute, tiny networks

What to expect: the kernels read and write each number once, so memory bounds them: the bytes of `moved` over the copy
rate of the same run. Matrix products bound an epoch: one image and step costs the UNet 1.6 TFLOP, some milliseconds,
and a kernel about 0.1 microseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import itertools
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from any folder

import kernels
import prdp
import rewards

T, K = 50, 10  # of the epoch that times are scaled to
STARTED = time.perf_counter()
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def row(*cells) -> None:
    print(
        "| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |",
        flush=True,
    )


def header(title: str, *columns: str) -> None:
    print(f"\n## {title}\n")
    row(*columns)
    row(*["---"] * len(columns))


def attempt(call: Callable, *args):
    """What `call` returns, or in words why it did not: one failed cell must not cost the others."""
    try:
        return call(*args)
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        traceback.print_exc()
        return f"failed: {type(error).__name__}"


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
    return sum(e.self_device_time_total for e in trace.key_averages() if e.device_type == cuda) / 10


# ---- (a) kernels -------------------------------------------------------------------------------------------


def moved(name: str, numbers: int, itemsize: int) -> int:
    """The fewest bytes a pass can move, for M*D = `numbers`: noise_pred of that itemsize, latents float32."""
    per_number = {
        "forward": 2 * itemsize + 4 + 4,  # read both halves, x_t, x_prev
        "backward": 2 * itemsize
        + 4
        + 4
        + 2 * itemsize,  # read the same, write both halves' gradients
        "sample": 2 * itemsize + 4 + 4 + 4,  # read both halves, x_t, noise; write x_prev
    }
    return numbers * per_number[name]


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


def kernel_table(shapes: list[tuple[int, ...]], copy_numbers: int) -> None:
    rate = copy_rate(copy_numbers)
    print(f"\ncopy rate: {rate:.0f} GB/s, bytes read and written")
    if not CUDA:
        print(
            "torch.compile and Triton are not timed: no CUDA device. Triton's interpreter serves the tests alone."
        )
    header(
        "(a) kernels: ms at the 20 / 50 / 80 percentiles, GB/s at the median, kernels alone by the profiler; largest error relative to eager's largest number",
        "shape", "dtype", "pass", "path", "error", "ms", "GB/s", "% of copy", "kernels us",
    )  # fmt: skip
    versions = {"eager": (kernels.guided_log_prob_ref, kernels.guided_sample_ref)}
    if CUDA:
        from torch._functorch import config

        config.donated_buffer = False  # the backward is timed again and again on one graph
        versions["torch.compile"] = tuple(
            torch.compile(f, dynamic=False) for f in versions["eager"]
        )
    if kernels.path(DEVICE) == "Triton kernels":
        versions["Triton"] = (kernels.guided_log_prob, kernels.guided_sample)
    for shape, dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        torch.compiler.reset()
        coefs = [
            column[torch.arange(shape[0]) % T].to(DEVICE)
            for column in prdp.ddpm_schedule({}, T)[1:]
        ]
        noise_pred = torch.randn(2 * shape[0], *shape[1:], device=DEVICE, dtype=dtype)
        args = (noise_pred, *torch.randn(2, *shape, device=DEVICE), *coefs, 5.0)
        for name in ("forward", "backward", "sample"):
            size, exact = moved(name, math.prod(shape), noise_pred.element_size()), None
            for label, functions in versions.items():
                cells = ["x".join(map(str, shape)), str(dtype).removeprefix("torch."), name, label]
                call = attempt(kernel_pass, name, *functions, args)
                result = call if isinstance(call, str) else attempt(call)
                if isinstance(result, str):
                    row(*cells, result, "", "", "", "")
                    continue
                exact = result if exact is None else exact
                cells.append(f"{((result - exact).abs().max() / exact.abs().max()).item():.0e}")
                del result  # and its memory
                times = milliseconds(call)
                speed = size / times[1] / 1e6
                us = attempt(kernel_microseconds, call) if CUDA else ""
                row(
                    *cells,
                    " / ".join(f"{t:.4g}" for t in times),
                    f"{speed:.0f}",
                    f"{100 * speed / rate:.0f}",
                    us,
                )


# ---- (b) epoch phases --------------------------------------------------------------------------------------


def random_unet(quick: bool) -> nn.Module:
    """SD v1.4's UNet, or a tiny one, with random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    options = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    if quick:
        options = dict(
            sample_size=16, cross_attention_dim=32, attention_head_dim=4, block_out_channels=(16, 32),
            layers_per_block=1, norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
    return UNet2DConditionModel(**options).to(DEVICE).eval()


class Job:
    """A policy of `steps` of the T denoising steps, and the inputs of one microbatch."""

    def __init__(
        self, unet: nn.Module, microbatch: int, autocast: torch.dtype | None, steps: list[int]
    ) -> None:
        size, width, self.images = (
            unet.config.sample_size,
            unet.config.cross_attention_dim,
            microbatch,
        )
        schedule = prdp.Schedule(
            *(column[steps].to(DEVICE) for column in prdp.ddpm_schedule({}, T))
        )
        null_text, *text = torch.randn(
            1 + microbatch, 77, width, generator=torch.Generator().manual_seed(0)
        ).to(DEVICE)
        self.policy = prdp.Policy(unet, schedule, null_text, 5.0, microbatch, autocast)
        self.text, self.shape = torch.stack(text), (unet.config.in_channels, size, size)

    def sample(self) -> prdp.Trajectories:
        generators = prdp.image_generators(0, 1, range(1), self.images)
        return prdp.sample_trajectories(self.policy, self.text, generators, self.shape)


def peer_log_prob(
    job: Job, x_t: Tensor, text: Tensor, step: int, given: Tensor | None = None
) -> tuple:
    """A guided step as such trainers write it: autocast, float32 log-prob, one timestep for the whole batch."""
    timestep, coef_sample, coef_noise, sigma = (column[step] for column in job.policy.schedule)
    both = torch.cat([job.policy.null_text.expand_as(text), text])
    with torch.autocast(DEVICE.type, job.policy.autocast):
        out = job.policy.unet(torch.cat([x_t, x_t]), timestep, encoder_hidden_states=both).sample
    unconditional, conditional = out.float().chunk(2)
    mean = coef_sample * x_t + coef_noise * (unconditional + 5.0 * (conditional - unconditional))
    x_prev = given if given is not None else mean + sigma * torch.randn_like(mean)
    log_prob = (
        -((x_prev.detach() - mean) ** 2) / (2 * sigma**2)
        - sigma.log()
        - 0.5 * math.log(2 * math.pi)
    )
    return x_prev.float(), log_prob.mean((1, 2, 3))


@torch.no_grad()
def peer_sample(job: Job, batch: int) -> tuple[Tensor, Tensor]:
    """Latents (M, steps+1, ...) and log-probs (M, steps), `batch` images at a time."""
    latents, log_probs = [], []
    for text in job.text.split(batch):
        x, scores = [torch.randn(len(text), *job.shape, device=DEVICE)], []
        for step in range(len(job.policy.schedule.sigma)):
            x_prev, log_prob = peer_log_prob(job, x[-1], text, step)
            x.append(x_prev)
            scores.append(log_prob)
        latents.append(torch.stack(x, 1))
        log_probs.append(torch.stack(scores, 1))
    return torch.cat(latents), torch.cat(log_probs)


def peer_backward(job: Job, latents: Tensor, log_probs: Tensor, batch: int) -> None:
    """One timestep at a time, a forward with gradient and a backward, `batch` images at a time."""
    for rows in torch.arange(job.images, device=DEVICE).split(batch):
        for step in range(log_probs.shape[1]):
            x_t, x_prev = latents[rows, step], latents[rows, step + 1]
            log_prob = peer_log_prob(job, x_t, job.text[rows], step, x_prev)[1]
            (log_prob - log_probs[rows, step]).exp().mean().backward()


def seconds(call: Callable) -> tuple[float, float, float | str]:
    """Of a call, the median of three; of the first one, which compiles; and the peak memory in GB."""
    times = []
    for _ in range(4):
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        call()
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[1], times[0], torch.cuda.max_memory_allocated() / 1e9 if CUDA else ""


def count_flops(job: Job) -> tuple[int, int]:
    """Of one guided image-step: forward, and forward with backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as forward, torch.no_grad():
        peer_log_prob(job, torch.randn(1, *job.shape, device=DEVICE), job.text[:1], 0)
    with FlopCounterMode(display=False) as both:
        peer_log_prob(job, torch.randn(1, *job.shape, device=DEVICE), job.text[:1], 0)[
            1
        ].sum().backward()
    job.policy.unet.zero_grad(set_to_none=True)
    return forward.get_total_flops(), both.get_total_flops()


def matmul_rate(size: int, dtype: torch.dtype) -> float:
    """TFLOP/s of a square matrix product of random numbers."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b)[1] / 1e9


def epoch_table(quick: bool, microbatches: list[int], steps: int) -> None:
    unet, dtype = random_unet(quick), torch.bfloat16
    # As `unet`, with the policy's float32 weights and requires_grad, so that one compiled graph serves both.
    reference = copy.deepcopy(unet)
    matmul = matmul_rate(512 if quick else 8192, dtype)
    flops = dict(zip(("forward", "backward"), count_flops(Job(unet, 1, dtype, [0])), strict=True))
    print(
        f"\nUNet of {sum(p.numel() for p in unet.parameters()) / 1e6:.4g} M parameters, float32 weights, bf16 autocast; "
        f"one image and step, guided: {flops['forward'] / 1e12:.4g} TFLOP forward, {flops['backward'] / 1e12:.4g} with "
        f"the backward; matmul rate: {matmul:.4g} TFLOP/s. Peak memory is without an optimizer."
    )
    header(
        f"(b) epoch phases, over {steps} of {T} steps; an image is {T} steps",
        "loop", "microbatch", "phase", "images/s", "TFLOP/s", "% of matmul", "peak GB", "first call s", "on-policy gap",
    )  # fmt: skip

    def measure(
        label: str, microbatch: int, phase: str, call: Callable, images: int, gap: str = ""
    ) -> float:
        """Print a row; the seconds per image."""
        result = attempt(seconds, call)
        unet.zero_grad(set_to_none=True)
        if isinstance(result, str):
            row(label, microbatch, phase, result, "", "", "", "", gap)
            return math.nan
        spent, first, peak = result
        rate = (
            flops["backward" if phase == "backward" else "forward"] * images * steps / spent / 1e12
        )
        row(
            label,
            microbatch,
            phase,
            images * steps / T / spent,
            rate,
            100 * rate / matmul,
            peak,
            first,
            gap,
        )
        return spent / images * T / steps

    def ours(label: str, microbatch: int) -> float:
        """Print the phases of one loop; the seconds per image of an epoch."""
        job = Job(unet, microbatch, dtype, list(range(steps)))
        fixed = job.policy._replace(unet=reference)
        if label == "compiled":
            job.policy = job.policy._replace(unet=torch.compile(unet, dynamic=False))
            fixed = fixed._replace(unet=torch.compile(reference, dynamic=False))
        sample = measure(label, microbatch, "sample", job.sample, microbatch)
        stored = job.sample()
        score = functools.partial(prdp.score_trajectories, job.policy, stored)
        gap = str((score() - stored.log_probs).abs().max().item())
        weights = torch.full_like(stored.log_probs, 1e-3)
        return (
            sample
            + measure(label, microbatch, "reference", lambda: prdp.score_trajectories(fixed, stored), microbatch)
            + measure(label, microbatch, "score", score, microbatch, gap) * (K - 1)
            + measure(
                label, microbatch, "backward", lambda: prdp.backward_trajectories(job.policy, stored, weights), microbatch
            ) * K
        )  # fmt: skip

    peer = Job(unet, 8, dtype, list(range(steps)))
    stored = peer_sample(peer, 8)
    sampled = measure("peer-style", 8, "sample", lambda: peer_sample(peer, 8), 8)
    learned = measure("peer-style", 4, "backward", lambda: peer_backward(peer, *stored, 4), 8)
    epochs = {"peer-style": 2 * sampled + K * learned}
    for label, microbatch in itertools.product(
        ("eager", "compiled") if CUDA else ("eager",), microbatches
    ):
        epochs[f"{label}, microbatch {microbatch}"] = attempt(ours, label, microbatch)
    header(
        f"one K = {K} epoch of T = {T}, network passes alone: sample + reference + {K - 1} score + {K} backward "
        f"(peer-style: sample + reference + {K} backward, which scores as it goes)",
        "loop", "seconds per image", "times as fast as peer-style",
    )  # fmt: skip
    for label, spent in epochs.items():
        row(label, spent, "" if isinstance(spent, str) else epochs["peer-style"] / spent)


# ---- (c) noise floor ---------------------------------------------------------------------------------------


def noise_table(quick: bool, microbatch: int, minutes: float) -> None:
    unet = random_unet(quick)
    weights = [p.detach().clone() for p in unet.parameters()]
    signs = [1e-7 * torch.randn_like(p).sign() for p in weights]
    header(
        f"(c) noise floor: log_prob after each weight moved by a relative 1e-7; {microbatch} images, steps 1, 25 and 50",
        "dtype", "network", "rms", "max", "on-policy gap",
    )  # fmt: skip

    def spread(job: Job) -> tuple[float, float, str]:
        stored = job.sample()
        gap = prdp.score_trajectories(job.policy, stored) - stored.log_probs
        with torch.no_grad():
            torch._foreach_addcmul_(list(unet.parameters()), weights, signs)
        moved = prdp.score_trajectories(job.policy, stored) - stored.log_probs
        return (
            moved.square().mean().sqrt().item(),
            moved.abs().max().item(),
            str(gap.abs().max().item()),
        )

    precisions = [
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        ("fp32", None),
        ("fp32, TF32", None),
    ]
    for (name, autocast), label in itertools.product(
        precisions, ("eager", "compiled") if CUDA else ("eager",)
    ):
        if time.perf_counter() - STARTED > 60 * minutes:
            row(name, label, "skipped: out of time", "", "")
            continue
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = name != "fp32"
        torch.compiler.reset()
        job = Job(unet, microbatch, autocast, [0, T // 2 - 1, T - 1])
        if label == "compiled":
            job.policy = job.policy._replace(unet=torch.compile(unet, dynamic=False))
        result = attempt(spread, job)
        with torch.no_grad():
            torch._foreach_copy_(list(unet.parameters()), weights)
        row(name, label, *((result, "", "") if isinstance(result, str) else result))


# ---- (d) memory --------------------------------------------------------------------------------------------


def random_models(folder: Path) -> tuple[Path, Path]:
    """SD v1.4 and a CLIP ViT-H/14, the size of HPSv2 and PickScore, with random weights: 8.2 GB under `folder`."""
    import diffusers
    from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(
        ROOT / "toy" / "sd" / "tokenizer", model_max_length=77
    )
    with torch.device(DEVICE):
        vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
            )
        )
        clip = CLIPModel(rewards.vit_h_14_config())
    scheduler = diffusers.DDIMScheduler(**prdp.SD_SCHEDULER, clip_sample=False)
    parts = (vae, text_encoder, tokenizer, random_unet(quick=False), scheduler, None, None)
    pipe = diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False)
    pipe.save_pretrained(folder / "sd")
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    return folder / "sd", folder / "clip"


def peaks_of_a_run(flags: list[str], cap: float, folder: Path) -> dict[str, float]:
    """GB of peak memory in each phase of two epochs of prdp.py, and what the allocator held: of a GPU of `cap` bytes."""
    peaks: dict[str, float] = {}
    timed, save_checkpoint = prdp.timed, prdp.save_checkpoint

    @contextlib.contextmanager
    def watched(seconds: dict[str, float], name: str):
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        with timed(seconds, name):
            yield
        peak, held = (
            (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
            if CUDA
            else (0, 0)
        )
        for key, size in ((name, peak), ("held", held)):
            peaks[key] = max(peaks.get(key, 0.0), size / 1e9)

    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / torch.cuda.mem_get_info()[1]))
    config = prdp.parse_args([*flags, "--out", str(folder)])
    prompts = prdp.load_prompts(config.prompts[0])
    with contextlib.redirect_stdout(sys.stderr):
        models = prdp.load_models(config, DEVICE)
        rest = 0  # what Table 4's N*B = 512 images and T = 50 steps keep on the GPU, pictures in the reward phase alone
        if min(models.latent_shape[1:]) >= 64:
            rest = 512 * (
                4 * (51 * math.prod(models.latent_shape) + models.policy.null_text.numel())
                + 3 * 512**2
            )
        ballast = torch.empty(rest, dtype=torch.uint8, device=DEVICE)
        learning = [p for p in models.pipe.unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            learning, lr=config.learning_rate, weight_decay=config.weight_decay
        )
        prdp.timed, prdp.save_checkpoint = watched, lambda *_: None  # no 10 GB on the disk
        try:
            prdp.show(config, models, 0, prompts)
            prdp.train(config, models, optimizer, prompts, 1)
        finally:
            prdp.timed, prdp.save_checkpoint = timed, save_checkpoint
    del ballast
    return peaks


def memory_table(quick: bool, minutes: float) -> None:
    cap = 24 * 2**30
    phases = ("sample", "reference", "reward", "score", "update", "held")
    header(
        f"(d) memory in GB: each phase's peak, and the most that the allocator, capped at {cap / 1e9:.1f}, held; prdp.py "
        "with gradient checkpointing, AdamW, a reward of HPSv2's size, and the room of 512 trajectories of 50 steps",
        "learns", "dtype", "microbatch", "offload", *phases,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        sd, clip = (
            (ROOT / "toy" / "sd", ROOT / "toy" / "pickscore")
            if quick
            else random_models(Path(name))
        )
        size = 2 if quick else 8
        settings = [("0", "bf16", size, "on"), ("0", "bf16", size, "off"), ("8", "bf16", size, "on"),
                    ("8", "bf16", size, "off"), ("0", "fp32", size // 2, "on"), ("8", "fp32", size // 2, "on")]  # fmt: skip
        for number, (rank, dtype, microbatch, offload) in enumerate(settings):
            cells = [
                "the full UNet" if rank == "0" else f"LoRA of rank {rank}",
                dtype,
                microbatch,
                offload,
            ]
            if time.perf_counter() - STARTED > 60 * minutes:
                row(*cells, "skipped: out of time", *[""] * 5)
                continue
            flags = [
                "--model",
                str(sd),
                "--reward",
                f"pickscore:{clip}",
                "--lora-rank",
                rank,
                "--dtype",
                dtype,
            ]
            flags += [
                "--prompts",
                str(ROOT / "prompts" / "shapes.txt"),
                "--images-per-prompt",
                str(2 * size),
            ]
            flags += [
                "--microbatch",
                str(microbatch),
                "--offload",
                offload,
                "--gradient-checkpointing",
            ]
            flags += [
                "--prompts-per-epoch",
                "1",
                "--epochs",
                "2",
                "--updates-per-epoch",
                "2",
                "--ddpm-steps",
                "2",
            ]
            flags += ["--clip-range", "inf"]
            (folder := Path(name) / str(number)).mkdir()
            peaks = attempt(peaks_of_a_run, flags, cap, folder)
            row(
                *cells,
                *(
                    [peaks] + [""] * 5
                    if isinstance(peaks, str)
                    else (peaks[phase] for phase in phases)
                ),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a tiny UNet and small kernels: a minute on a CPU"
    )
    parser.add_argument("--only", choices=("kernels", "epoch", "noise", "memory"), help="one table")
    parser.add_argument(
        "--microbatch", type=int, nargs="+", help="images per network pass (default: 16)"
    )
    parser.add_argument("--steps", type=int, default=2, help="denoising steps to time (default: 2)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="start no row of (d) after these, nor of (c) 2 before (default: 8)",
    )
    options = parser.parse_args()
    microbatches = options.microbatch or [2 if options.quick else 16]
    triton = getattr(kernels.log_prob.triton, "__version__", "not installed")
    print(
        f"# {torch.cuda.get_device_name() if CUDA else 'CPU, ' + str(torch.get_num_threads()) + ' thread(s)'}"
    )
    print(f"\ntorch {torch.__version__}, triton {triton}, kernels: {kernels.path(DEVICE)}")
    print(f"\n`python kernels/benchmark.py {' '.join(sys.argv[1:])}`")
    shapes = (
        [(16, 4, 16, 16), (3, 3, 5, 7)]
        if options.quick
        else [(512 * 50, 4, 64, 64), (16, 4, 64, 64)]
    )
    tables = {
        "kernels": lambda: kernel_table(shapes, 2**22 if options.quick else 2**30),
        "epoch": lambda: epoch_table(options.quick, microbatches, options.steps),
        "noise": lambda: noise_table(options.quick, microbatches[0], options.minutes - 2),
        "memory": lambda: memory_table(options.quick, options.minutes),
    }
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name, table in tables.items():
        if options.only in (None, name) and isinstance(failure := attempt(table), str):
            print(f"\n{name}: {failure}")
    print(f"\n{time.perf_counter() - STARTED:.0f} seconds")


if __name__ == "__main__":
    main()
