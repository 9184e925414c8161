"""Speed of an epoch's passes, the noise of a log-prob, the memory of a run, and a run.

    python benchmarks/epoch.py --only epoch   # one table, SD v1.4's size; README.md: how long
    python benchmarks/epoch.py                # all of them, one CUDA GPU, about half an hour
    python benchmarks/epoch.py --quick        # anywhere, under a minute: the toy's networks

Prints markdown tables. Networks of SD v1.4's and HPSv2's size have random weights: nothing is
downloaded.
"""

import argparse
import functools
import itertools
import math
import shutil
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from shared import CUDA, DEVICE, SCHEDULER, TOY, UNET, attempt, free_memory, print_tables
from shared import require, require_minutes, sd_v1_4, table
from torch import Tensor, nn

import prdp
from rewards import vit_h_14_config
from stable_diffusion import StableDiffusion, compiled
from support import report, run_folder
from support.cli import Parser, command
from support.distributed import average_gradients, require_finite
from support.machine import set_precision

T, K = 50, 10  # of the epoch that times are scaled to
DTYPES = ("fp16", "bf16", "tf32", "fp32")
LOOPS = ("peers", "eager", "deterministic", "compiled", "channels-last")


def microbatches(options: argparse.Namespace, dtype: str) -> list[int]:
    """Images a network pass: those given, else what a run has room for on a card of 80 GB."""
    fits = 16 if dtype in ("fp16", "bf16") else 8
    return options.microbatch or [2 if options.quick else fits]


def require_memory(options: argparse.Namespace, dtype: str, images: int, others: float) -> None:
    """Room for what autograd keeps of SD v1.4's UNet, counted without a GPU, beside `others` GB."""
    if CUDA and not options.quick:
        kept = 1.7 + 2.5 * images if dtype in ("fp16", "bf16") else 3.74 * images
        require(others + kept, torch.cuda.mem_get_info()[1] / 1e9, "GB of GPU memory")


# ---- (b) An epoch's phases -----------------------------------------------------------------------


def random_unet(quick: bool) -> nn.Module:
    """SD v1.4's UNet, or the toy's, with random weights."""
    from diffusers import UNet2DConditionModel

    config = UNET
    if quick:
        config = UNet2DConditionModel.load_config(TOY / "sd", subfolder="unet")
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return UNet2DConditionModel.from_config(config).eval()


class Job:
    """The passes of one microbatch through a policy of some of the T denoising steps."""

    passes = {"sample": 1, "score": K, "backward": K}  # an epoch's; pi_ref's is one of the scores

    def __init__(self, unet: nn.Module, images: int, dtype: str, steps: Iterable[int]) -> None:
        self.images, self.batches = images, dict.fromkeys(self.passes, images)
        columns = prdp.ddpm_schedule(SCHEDULER, T)
        schedule = prdp.Schedule(*(column[list(steps)].to(DEVICE) for column in columns))
        width, size = unet.config.cross_attention_dim, unet.config.sample_size
        self.shape = (unet.config.in_channels, size, size)
        embeds = torch.randn(1 + images, 77, width, generator=torch.Generator().manual_seed(0))
        null_embeds, self.prompt_embeds = embeds[0].to(DEVICE), embeds[1:].to(DEVICE)
        cast = set_precision(dtype)
        autocast = functools.partial(torch.autocast, DEVICE.type, cast, enabled=cast is not None)
        self.policy = prdp.Policy(unet, schedule, null_embeds, 5.0, images, autocast)

    def sample(self) -> None:
        generators = prdp.image_generators(0, 1, range(1), self.images)
        embeds, shape = self.prompt_embeds, self.shape
        self.stored = prdp.sample_trajectories(self.policy, embeds, generators, shape)

    def score(self) -> None:
        self.log_probs = prdp.score_trajectories(self.policy, self.stored)

    def backward(self) -> None:
        grad = torch.full_like(self.stored.log_probs, 1e-3)  # none is 0: nothing is skipped
        prdp.backward_trajectories(self.policy, self.stored, grad)

    def gap(self) -> str:
        return str((self.log_probs - self.stored.log_probs).abs().max().item())


class PeerJob(Job):
    """As trainers of DDPO's kind learn: no second pass; at each timestep, one for a whole batch, a
    forward with gradient, its log-prob in plain torch, and a backward."""

    passes = {"sample": 2, "backward": K}  # pi_ref scores for as long as pi_theta samples

    def backward(self) -> None:
        policy = self.policy
        latents, log_probs_old, prompt_embeds = self.stored
        for rows in torch.arange(self.images, device=DEVICE).split(self.batches["backward"]):
            for k in range(log_probs_old.shape[1]):
                steps = torch.full_like(rows, k)
                x_t, x_prev = latents[rows, k], latents[rows, k + 1]
                with policy.autocast():
                    noise_pred = prdp.run_unet(policy, x_t, prompt_embeds[rows], steps)
                *coefs, sigma = policy.coefficients(steps)
                mean = prdp.guided_mean(noise_pred, x_t, *coefs, policy.guidance_scale)
                log_prob = prdp.gaussian_log_prob(x_prev, mean, sigma)
                (log_prob - log_probs_old[rows, k]).exp().mean().backward()


def jobs(options: argparse.Namespace) -> Iterator[tuple]:
    """(loop, dtype, images, images learned from at once); last those that take minutes each."""
    if "peers" in options.loops:
        dtype = options.dtypes[0]
        yield "peers", dtype, 8, 4  # as DDPO's code: 8 are sampled at a time
        yield from (("peers, our batch", dtype, n, n) for n in microbatches(options, dtype))
    ours = [loop for loop in LOOPS[1:] if loop in options.loops]
    for loop, dtype in itertools.product(ours, options.dtypes):
        yield from ((loop, dtype, n, n) for n in microbatches(options, dtype))


def seconds(call: Callable) -> tuple[float, float, float | str]:
    """Of a call, the median of three; of the first one, which compiles; and peak memory in GB."""

    def whole() -> None:
        call()
        if CUDA:
            torch.cuda.synchronize()

    setup = torch.cuda.reset_peak_memory_stats if CUDA else "pass"
    first, *times = timeit.repeat(whole, setup, number=1, repeat=4)
    peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else ""
    return statistics.median(times), first, peak


def epoch_table(options: argparse.Namespace, end: float) -> None:
    unet, steps, spent = random_unet(options.quick), options.steps, {}
    row = table(
        f"(b) passes over {steps} of {T} steps, scaled to {T}; memory is without an optimizer; an "
        f"epoch of K = {K}, network passes alone, nothing skipped: sample + reference + {K - 1} "
        f"score + {K} backward (peers: no score)",
        "loop", "dtype", "microbatch", "pass", "seconds an image", "peak GB", "first call s",
        "on-policy gap", "hours of 512 images", "times as fast as peers",
    )  # fmt: skip

    def cells(job: Job, dtype: str, name: str) -> tuple:
        if name == "backward":
            require_memory(options, dtype, job.batches[name], 7)  # weights and gradients
        median, first, peak = seconds(getattr(job, name))
        gap = job.gap() if name == "score" else ""
        return median / job.images * T / steps, peak, first, gap

    def measure(loop: str, dtype: str, images: int, learned: int) -> None:
        compiles, channels_last = loop in LOOPS[3:], loop == "channels-last"
        require_minutes(3.5 if compiles else 0.7, end)
        torch.backends.cudnn.deterministic = loop == "deterministic"
        unet.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        kind = PeerJob if loop.startswith("peers") else Job
        job = kind(unet, images, dtype, range(steps))
        job.batches["backward"] = learned
        if compiles:
            job.policy = job.policy._replace(unet=compiled(unet))
        whole = 0.0
        for name, count in job.passes.items():
            found = list(attempt(cells, job, dtype, name))
            row(loop, dtype, job.batches[name], name, *found)
            unet.zero_grad(set_to_none=True)
            whole += count * found[0] if len(found) > 1 else math.nan
        spent.setdefault(loop, whole)
        against = spent["peers"] / whole if "peers" in spent else ""
        if math.isfinite(whole):
            row(loop, dtype, images, "epoch", whole, *[""] * 3, 512 * whole / 3600, against)

    for loop, dtype, images, learned in jobs(options):
        if failure := attempt(measure, loop, dtype, images, learned):
            row(loop, dtype, images, "epoch", *failure)
        free_memory()
    torch.backends.cudnn.deterministic = False


# ---- (c) Noise and drift -------------------------------------------------------------------------


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def drifts(job: Job, unet: nn.Module, noise: float) -> tuple[float, float, float]:
    """How far, rms, the first and the third real update move log_probs, Table 4's, of one prompt's
    images with rewards as scattered as HPSv2's; and the latter over the noise."""
    config, old = prdp.Config(), job.stored.log_probs
    scores = 0.01 * torch.randn(job.images, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    parameters = list(unet.parameters())
    options = {"weight_decay": config.weight_decay, "fused": CUDA}
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, **options)
    moved, job.log_probs = [], old
    for _ in range(3):
        log_probs = job.log_probs.clone().requires_grad_()
        loss = prdp.prdp_loss(log_probs, old, old, scores, config.clip_range, config.kl_weight)
        (grad_log_probs,) = torch.autograd.grad(loss, log_probs)

        optimizer.zero_grad()  # Alg. 1, line 11
        prdp.backward_trajectories(job.policy, job.stored, grad_log_probs)
        average_gradients(parameters)
        grad_norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        require_finite("the gradient", grad_norm)
        optimizer.step()
        job.score()
        moved.append(rms(job.log_probs - log_probs.detach()))
    return moved[0], moved[2], moved[2] / max(noise, 1e-30)


def noise_table(options: argparse.Namespace, end: float) -> None:
    unet = random_unet(options.quick)
    parameters = list(unet.parameters())
    weights = [p.detach().clone() for p in parameters]
    signs = [1e-7 * torch.randn_like(p).sign() for p in weights]
    row = table(
        "(c) noise: change of log_prob when each weight moves by a relative 1e-7; drift: rms of "
        "its change by the first and by the third real update; one microbatch, steps 1, 25 and 50",
        "dtype", "microbatch", "on-policy gap", "noise rms", "noise max", "drift 1", "drift 3",
        "drift 3 / noise",
    )  # fmt: skip

    @torch.no_grad()
    def restore() -> None:
        torch._foreach_copy_(parameters, weights)
        unet.zero_grad(set_to_none=True)

    def cells(dtype: str, images: int) -> list:
        require_minutes(0.6, end)
        require_memory(options, dtype, images, 21)  # weights, three times; gradients; moments
        job = Job(unet, images, dtype, [0, T // 2 - 1, T - 1])
        job.sample()
        job.score()
        gap = job.gap()
        with torch.no_grad():
            torch._foreach_addcmul_(parameters, weights, signs)
        job.score()
        noise = job.log_probs - job.stored.log_probs
        restore()
        drift = attempt(drifts, job, unet, rms(noise))
        return [gap, rms(noise), noise.abs().max().item(), *drift]

    for dtype in options.dtypes:
        images = microbatches(options, dtype)[0]
        row(dtype, images, *attempt(cells, dtype, images))
        restore()
        free_memory()


# ---- (d) Memory, (e) a run -----------------------------------------------------------------------

PHASES = ("sample", "reference", "reward", "score", "update")


def random_models(folder: Path) -> None:
    """In `folder`, sd/, SD v1.4, and clip/, a ViT-H/14 as HPSv2 and PickScore are, with random
    weights: 8.2 GB."""
    from transformers import CLIPModel

    torch.manual_seed(0)
    with torch.device(DEVICE):
        pipe = sd_v1_4()
        clip = CLIPModel(vit_h_14_config())
    pipe.save_pretrained(folder / "sd")
    clip.save_pretrained(folder / "clip")
    pipe.tokenizer.save_pretrained(folder / "clip")


@contextmanager
def folder_of_models(
    options: argparse.Namespace, gigabytes: float, end: float, minutes: float
) -> Iterator[Path]:
    """With room for what is written there; made only if there is time to use it."""
    require_minutes(minutes, end)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.quick:
            (folder / "sd").symlink_to(TOY / "sd")
            (folder / "clip").symlink_to(TOY / "pickscore")
        else:
            free = shutil.disk_usage(folder).free / 1e9
            require(gigabytes, free, f"GB of {folder}, which TMPDIR moves")
            random_models(folder)
        yield folder


def run(folder: Path, functions: list[tuple], flags: str) -> list[str]:
    """`prdp.run` of the models in `folder` with K = 2. Returns seconds of all calls of `functions`,
    each (owner, name there), and of its epochs' phases, these with peak GB on a GPU."""
    shutil.rmtree(folder / "run", ignore_errors=True)  # of the row before
    free_memory()
    paths = {"model": folder / "sd", "reward": f"pickscore:{folder / 'clip'}"}
    paths |= {"prompts": prdp.ROOT / "prompts" / "animals.txt", "out": folder / "run"}
    argv = [*f"--updates-per-epoch 2 {flags}".split(), *(f"--{k}={v}" for k, v in paths.items())]
    spent, peaks = dict.fromkeys([name for _, name in functions], 0.0), {}

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        spent[name] += time.perf_counter() - started

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        with report.phase(name):
            yield
        if CUDA:
            peaks[name] = max(torch.cuda.max_memory_allocated() / 1e9, peaks.get(name, 0.0))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(prdp, "phase", phase))
        for owner, name in functions:
            clocked = clock(name)(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, clocked))
        prdp.run(prdp.parse_args(argv))
    metrics = run_folder.read_metrics(folder / "run")
    spent |= {name: sum(row[f"seconds_{name}"] for row in metrics) for name in PHASES}
    peak = {name: f", {size:.3g} GB" for name, size in peaks.items()}
    return [f"{x:.3g} s{peak.get(name, '')}" for name, x in spent.items()]


def memory_table(options: argparse.Namespace, end: float) -> None:
    cap, dtype = 24.7e9, options.dtypes[0]  # of a card's 25.8 GB (24 GiB) CUDA takes some
    size = (options.microbatch or [2 if options.quick else 8])[0]
    room = 512 * (4 * (51 * 4 * 64 * 64 + 77 * 768) + 3 * 512 * 512)  # latents, embeds; pictures
    row = table(
        f"(d) memory: each phase's seconds and peak GB, where the allocator has {cap / 1e9:.1f}; "
        "runs of two epochs, K = 2, T = 3, with gradient checkpointing, a reward of HPSv2's size, "
        "and the room of 512 trajectories of 50 steps",
        "learns", "dtype", "microbatch", "offload", *PHASES,
    )  # fmt: skip
    flags = f"--epochs 2 --prompts-per-epoch 1 --images-per-prompt {size} --microbatch {size} "
    flags += f"--ddpm-steps 3 --clip-range inf --gradient-checkpointing --dtype {dtype}"

    def cells(folder: Path, rank: int, offload: str) -> list[str]:
        require_minutes(0.6, end)
        ballast = torch.empty(room if CUDA else 0, dtype=torch.uint8, device=DEVICE)
        with ExitStack() as stack:
            for owner, name in ((run_folder, "save_checkpoint"), (StableDiffusion, "save")):
                stack.enter_context(mock.patch.object(owner, name, lambda *_: None))  # of 10 GB
            found = run(folder, [], f"{flags} --lora-rank {rank} --offload {offload}")
        del ballast
        return found

    with folder_of_models(options, 9, end, 1.5) as folder:
        if CUDA:
            share = min(1.0, cap / torch.cuda.mem_get_info()[1])
            torch.cuda.set_per_process_memory_fraction(share)
        rows = list(itertools.product(("on", "off"), (0, 8)))
        for offload, rank in rows[: options.rows]:
            learns = f"LoRA of rank {rank}" if rank else "the full UNet"
            row(learns, dtype, size, offload, *attempt(cells, folder, rank, offload))
        if CUDA:
            torch.cuda.set_per_process_memory_fraction(1.0)


def run_table(options: argparse.Namespace, end: float) -> None:
    names = ("load_models", "check_on_policy", "draw_samples", "run")
    functions = [(run_folder, "save_checkpoint"), (StableDiffusion, "save")]
    functions += [(prdp, name) for name in names]
    images, steps = (2, 3) if options.quick else (8, T)
    row = table(
        "(e) a run of one epoch, from loading to the saved pipeline: seconds in all, and phases' "
        f"peak GB; N = 2, B = {images}, T = {steps}, K = 2",
        "dtype", "microbatch", *(name for _, name in functions), *PHASES, "skipped %",
    )  # fmt: skip
    flags = f"--epochs 1 --prompts-per-epoch 2 --images-per-prompt {images} --ddpm-steps {steps}"

    def cells(folder: Path, dtype: str, size: int) -> list:
        require_minutes({"tf32": 4.5, "fp32": 8.5}.get(dtype, 3), end)
        require_memory(options, dtype, size, 24)  # moments, reference, reward, VAE and text too
        found = run(folder, functions, f"{flags} --dtype {dtype} --microbatch {size}")
        (metrics,) = run_folder.read_metrics(folder / "run")
        return [*found, 100 * metrics["skipped_fraction"]]

    with folder_of_models(options, 24, end, 3.5) as folder:
        for dtype in options.dtypes:
            size = min(microbatches(options, dtype)[0], 2 * images)
            row(dtype, size, *attempt(cells, folder, dtype, size))


# ---- Main ----------------------------------------------------------------------------------------

TABLES = {"epoch": epoch_table, "noise": noise_table, "memory": memory_table, "run": run_table}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="the toy's networks, on a CPU too")
    add("--only", choices=TABLES, help="one table")
    text = "of epoch: peers as DDPO's trainers do, deterministic cuDNN, channels-last compiled too"
    add("--loops", nargs="+", choices=LOOPS, help=f"{text} (default: all; on a CPU the first two)")
    text = "images a network pass, of epoch several (default: 16 in 16 bits, else 8; memory: 8)"
    add("--microbatch", type=int, nargs="+", help=text)
    add("--rows", type=int, help="of memory: so many, the first the full UNet with offload on")
    add("--steps", type=int, help="that epoch times (default: 2; --quick: 1)")
    text = "in this order; peers and memory take the first (default: all; on a CPU bf16, fp32)"
    add("--dtypes", nargs="+", choices=DTYPES, help=text)
    text = "a table begins no row that would take it past these (default: 9; --quick: no limit)"
    add("--minutes", type=float, help=text)

    options = parser.parse_args(argv)
    options.loops = options.loops or LOOPS[: None if CUDA else 2]
    options.steps = options.steps or (1 if options.quick else 2)
    options.dtypes = options.dtypes or (DTYPES if CUDA else ("bf16", "fp32"))
    options.minutes = options.minutes or (math.inf if options.quick else 9.0)
    return options


def main() -> None:
    script = "benchmarks/epoch.py"
    with command(script):
        options = parse(sys.argv[1:])
        chosen = [options.only] if options.only else TABLES
        tables = {name: functools.partial(TABLES[name], options) for name in chosen}
        print_tables(script, tables, options.minutes)


if __name__ == "__main__":
    main()
