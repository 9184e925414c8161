"""Speed of an epoch's passes, the noise of a log-prob, the memory of a run, and a run.

    python benchmarks/epoch.py --only epoch   # one table, SD v1.4's size; README.md: how long
    python benchmarks/epoch.py                # all of them, one CUDA GPU, about half an hour
    python benchmarks/epoch.py --quick        # anywhere, under a minute, tiny networks

Prints markdown tables. All networks have random weights, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from shared import (
    CUDA,
    DEVICE,
    attempt,
    free_memory,
    milliseconds,
    minutes_until,
    print_tables,
    require,
    table,
)
from torch import Tensor, nn

import prdp
import rewards
from stable_diffusion import SD_SCHEDULER, StableDiffusion, compiled
from support import report, run_folder
from support.cli import Parser, command
from support.distributed import gradient_step
from support.settings import set_precision

T, K = 50, 10  # of the epoch that times are scaled to
DTYPES = ("fp16", "bf16", "tf32", "fp32")
LOOPS = ("peers", "eager", "deterministic", "compiled", "channels-last")


# ---- What fits -----------------------------------------------------------------------------------


def microbatches(options: argparse.Namespace, dtype: str) -> list[int]:
    """Images a network pass: those given, else what an 80 GB card holds of a run."""
    fits = 16 if dtype in ("fp16", "bf16") else 8
    return options.microbatch or [2 if options.quick else fits]


def require_memory(options: argparse.Namespace, dtype: str, images: int, others: float) -> None:
    """Room for a backward pass of SD v1.4's UNet beside `others`, in GB. What autograd keeps was
    counted, without a GPU."""
    if CUDA and not options.quick:
        kept = 1.7 + 2.5 * images if dtype in ("fp16", "bf16") else 3.74 * images
        require(others + kept, torch.cuda.mem_get_info()[1] / 1e9, "GB of GPU memory")


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

    passes = {"sample": 1, "score": K, "backward": K}  # an epoch's; pi_ref's is one of the scores

    def __init__(self, unet: nn.Module, images: int, dtype: str, steps: Iterable[int]) -> None:
        self.images, self.seconds = images, {}
        self.batches = dict.fromkeys(self.passes, images)
        columns = prdp.ddpm_schedule({}, T)
        schedule = prdp.Schedule(*(column[list(steps)].to(DEVICE) for column in columns))
        width, size = unet.config.cross_attention_dim, unet.config.sample_size
        self.shape = (unet.config.in_channels, size, size)
        text = torch.randn(1 + images, 77, width, generator=torch.Generator().manual_seed(0))
        null_text, self.text = text[0].to(DEVICE), text[1:].to(DEVICE)
        self.policy = prdp.Policy(unet, schedule, null_text, 5.0, images, set_precision(dtype))

    def sample(self) -> None:
        generators = prdp.image_generators(0, 1, range(1), self.images)
        self.stored = prdp.sample_trajectories(self.policy, self.text, generators, self.shape)

    def score(self) -> None:
        self.log_probs = prdp.score_trajectories(self.policy, self.stored)

    def backward(self) -> None:
        weights = torch.full_like(self.stored.log_probs, 1e-3)  # none is 0: nothing is skipped
        prdp.backward_trajectories(self.policy, self.stored, weights)

    def gap(self) -> str:
        return str((self.log_probs - self.stored.log_probs).abs().max().item())


class PeerJob(Job):
    """As trainers of DDPO's kind learn: no second pass; at each timestep, one for a whole batch of
    `learned` images, a forward with gradient, its log-prob in plain torch, and a backward."""

    passes = {"sample": 2, "backward": K}  # pi_ref scores for as long as pi_theta samples

    def __init__(self, unet, images: int, dtype: str, steps: Iterable[int], learned: int) -> None:
        super().__init__(unet, images, dtype, steps)
        self.batches = {"sample": images, "backward": learned}

    def backward(self) -> None:
        latents, log_probs_old, text = self.stored
        for rows in torch.arange(self.images, device=DEVICE).split(self.batches["backward"]):
            for k in range(log_probs_old.shape[1]):
                steps, x_t, x_prev = (
                    torch.full_like(rows, k),
                    latents[rows, k],
                    latents[rows, k + 1],
                )
                noise_pred = prdp.run_unet(self.policy, x_t, text[rows], steps)
                step = (noise_pred, x_t, x_prev, *self.policy.at(steps))
                log_prob = prdp.guided_log_prob.__wrapped__(*step)
                (log_prob - log_probs_old[rows, k]).exp().mean().backward()


def rows_of_loops(options: argparse.Namespace) -> Iterator[tuple]:
    """(loop, dtype, images, images that a peer learns from at once)."""
    for loop in sorted(options.loops, key=LOOPS.index):  # compiled last: those take minutes each
        if loop == "peers":  # DDPO's code samples 8 images at a time and learns from 4
            dtype = options.dtypes[0]
            yield loop, dtype, 8, 4
            yield from ((f"{loop}, as ours", dtype, n, n) for n in microbatches(options, dtype))
            continue
        for dtype in options.dtypes:
            yield from ((loop, dtype, n, None) for n in microbatches(options, dtype))


def count_flops(unet: nn.Module, dtype: str) -> dict[str, int]:
    """Of one guided image-step: forward, and forward with backward."""
    from torch.utils.flop_counter import FlopCounterMode

    job, flops = PeerJob(unet, 1, dtype, [0], 1), {}
    for phase in job.passes:
        with FlopCounterMode(display=False) as counter:
            getattr(job, phase)()
        flops[phase] = counter.get_total_flops()
    unet.zero_grad(set_to_none=True)
    return {**flops, "score": flops["sample"]}


def matmul_rate(size: int, dtype: str) -> float:
    """TFLOP/s of a square matrix product of random numbers."""
    number = set_precision(dtype) or torch.float32
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


def epoch_table(options: argparse.Namespace, end: float) -> None:
    unet, steps, spent = random_unet(options.quick), options.steps, {}
    flops = count_flops(unet, options.dtypes[0])
    size = 512 if options.quick else 8192
    matmul = {dtype: matmul_rate(size, dtype) for dtype in options.dtypes}
    rates = ", ".join(f"{rate:.4g} in {dtype}" for dtype, rate in matmul.items())
    row = table(
        f"(b) epoch phases, over {steps} of {T} steps; an image is {T} steps; one image and step, "
        f"guided: {flops['sample'] / 1e12:.4g} TFLOP forward, {flops['backward'] / 1e12:.4g} with "
        f"the backward; a matmul's TFLOP/s: {rates}; memory is without an optimizer",
        "loop", "dtype", "microbatch", "phase", "images/s", "TFLOP/s", "% of matmul", "peak GB",
        "first call s", "on-policy gap",
    )  # fmt: skip

    def cells(job: Job, dtype: str, phase: str) -> tuple:
        if phase == "backward":
            require_memory(options, dtype, job.batches[phase], 7)  # weights and gradients
        median, first, peak = seconds(getattr(job, phase))
        job.seconds[phase] = median / job.images * T / steps
        rate = flops[phase] * job.images * steps / median / 1e12
        gap = job.gap() if phase == "score" else ""
        return 1 / job.seconds[phase], rate, 100 * rate / matmul[dtype], peak, first, gap

    def measure(loop: str, dtype: str, images: int, learned: int | None) -> None:
        compiles = loop in ("compiled", "channels-last")
        require(3.5 if compiles else 0.7, minutes_until(end), "minutes")
        torch.backends.cudnn.deterministic = loop == "deterministic"
        channels_last = loop == "channels-last"
        unet.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        job = Job(unet, images, dtype, range(steps))
        if learned:
            job = PeerJob(unet, images, dtype, range(steps), learned)
        if compiles:
            job.policy = job.policy._replace(unet=compiled(unet))
        for phase, batch in job.batches.items():
            row(loop, dtype, batch, phase, *attempt(cells, job, dtype, phase))
            unet.zero_grad(set_to_none=True)
        if job.seconds.keys() == job.passes.keys():
            whole = sum(n * job.seconds[phase] for phase, n in job.passes.items())
            spent[loop, dtype, images] = whole
            row(loop, dtype, images, "epoch", 1 / whole)

    for loop, dtype, images, learned in rows_of_loops(options):
        if failure := attempt(measure, loop, dtype, images, learned):
            row(loop, dtype, images, "epoch", *failure)
        free_memory()
    torch.backends.cudnn.deterministic = False

    row = table(
        f"one K = {K} epoch of T = {T}, network passes alone, nothing skipped: sample + reference "
        f"+ {K - 1} score + {K} backward (peers: sample + reference + {K} backward, which score as "
        "they go)",
        "loop", "dtype", "microbatch", "seconds per image", "hours of 512 images",
        "times as fast as peers", "as a peer at this microbatch",
    )  # fmt: skip
    for (loop, dtype, images), time_of_one in spent.items():
        first = options.dtypes[0]
        peers = ("peers", first, 8), ("peers, as ours", first, images)
        against = [spent[peer] / time_of_one if peer in spent else "" for peer in peers]
        row(loop, dtype, images, time_of_one, 512 * time_of_one / 3600, *against)


# ---- (c) Noise and drift -------------------------------------------------------------------------


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def drifts(options: argparse.Namespace, job: Job, dtype: str, unet: nn.Module) -> list[float]:
    """How far, rms, each of three real updates moves log_probs: Table 4's, of one prompt's images
    with rewards as scattered as HPSv2's."""
    require_memory(options, dtype, job.images, 14)  # weights, gradients and Adam's moments
    config, old = prdp.Config(), job.stored.log_probs
    draws = torch.randn(job.images, generator=torch.Generator().manual_seed(1))
    scores = 0.01 * draws.to(DEVICE)
    decay = {"weight_decay": config.weight_decay, "fused": CUDA}
    optimizer = torch.optim.AdamW(unet.parameters(), config.learning_rate, **decay)
    backward = functools.partial(prdp.backward_trajectories, job.policy, job.stored)
    how = (config.max_grad_norm, job.policy.autocast, math.prod(job.shape))
    found, job.log_probs = [], old
    for _ in range(3):
        log_probs = job.log_probs.clone().requires_grad_()
        loss = prdp.prdp_loss(log_probs, old, old, scores, config.clip_range, config.kl_weight)
        (weights,) = torch.autograd.grad(loss, log_probs)
        gradient_step(optimizer, backward, weights, *how)
        job.score()
        found.append(rms(job.log_probs - log_probs.detach()))
    return found


def noise_table(options: argparse.Namespace, end: float) -> None:
    unet = random_unet(options.quick)
    parameters = list(unet.parameters())
    weights = [p.detach().clone() for p in parameters]
    signs = [1e-7 * torch.randn_like(p).sign() for p in weights]
    row = table(
        "(c) noise floor: log_prob after each weight moved by a relative 1e-7; drift: rms of its "
        "change by the first and by the third real update; one microbatch, steps 1, 25 and 50",
        "dtype", "network", "microbatch", "noise rms", "noise max", "drift 1", "drift 3",
        "drift 3 / noise", "on-policy gap",
    )  # fmt: skip

    @torch.no_grad()
    def restore() -> None:
        torch._foreach_copy_(parameters, weights)
        unet.zero_grad(set_to_none=True)

    def cells(network: str, dtype: str, images: int) -> list:
        require(1.2 if network == "compiled" else 0.6, minutes_until(end), "minutes")
        job = Job(unet, images, dtype, [0, T // 2 - 1, T - 1])
        if network == "compiled":
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
        if network == "eager":  # compiled, a backward takes minutes
            drift = list(attempt(drifts, options, job, dtype, unet))
        if len(drift) == 3:
            drift[1:] = [drift[2], drift[2] / max(rms(noise), 1e-30)]
        return [rms(noise), noise.abs().max().item(), *drift, *[""] * (3 - len(drift)), gap]

    networks = ("eager", "compiled") if CUDA else ("eager",)
    for network, dtype in itertools.product(networks, options.dtypes):
        images = microbatches(options, dtype)[0]
        row(dtype, network, images, *attempt(cells, network, dtype, images))
        restore()
        free_memory()


# ---- Runs ----------------------------------------------------------------------------------------

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
    toys = prdp.HERE / "toy" / "sd" / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(toys, model_max_length=77)
    scheduler = diffusers.DDIMScheduler(**SD_SCHEDULER, clip_sample=False)
    parts = (vae, text_encoder, tokenizer, random_unet(quick), scheduler, None, None)
    pipe = diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False)
    pipe.save_pretrained(folder / "sd")
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")


@contextmanager
def folder_of_models(
    options: argparse.Namespace, gigabytes: float, end: float, minutes: float
) -> Iterator[Path]:
    """With room for what is written there; made only if there is time to use it."""
    with tempfile.TemporaryDirectory() as name:
        require(minutes, minutes_until(end), "minutes")
        if not options.quick:
            free = shutil.disk_usage(name).free / 1e9
            require(gigabytes, free, f"GB of {name}, which TMPDIR moves")
        random_models(Path(name), options.quick)
        yield Path(name)


def run(folder: Path, *functions: tuple, **settings) -> tuple[list[dict], dict, dict]:
    """`prdp.run` of the models in `folder` with K = 2; a setting of True is a flag. Returns its
    metrics; name -> seconds of all phases of its epochs, and of all calls of `functions`, each
    (owner, name there); and phase -> peak GB, "held" the most that the allocator held."""
    shutil.rmtree(folder / "run", ignore_errors=True)  # of the row before
    free_memory()
    argv = ["--model", str(folder / "sd"), "--reward", f"pickscore:{folder / 'clip'}",
            "--prompts", str(prdp.HERE / "prompts" / "animals.txt"), "--updates-per-epoch", "2",
            "--out", str(folder / "run")]  # fmt: skip
    for name, value in settings.items():
        argv += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    spent, peaks = {}, {}

    @contextmanager
    def phase(name: str, total: int = 0) -> Iterator[Callable]:
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        with report.phase(name, total) as done:
            yield done
        if CUDA:
            sizes = {name: torch.cuda.max_memory_allocated()}
            sizes["held"] = torch.cuda.max_memory_reserved()
            peaks.update({key: max(x / 1e9, peaks.get(key, 0.0)) for key, x in sizes.items()})

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - started

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(prdp, "phase", phase))
        for owner, name in functions:
            function = clock(name)(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, function))
        prdp.run(prdp.parse_args(argv))
    metrics = run_folder.read_metrics(folder / "run")
    spent |= {name: sum(row[f"seconds_{name}"] for row in metrics) for name in PHASES}
    return metrics, spent, peaks


def in_cells(spent: dict[str, float], peaks: dict[str, float], names: Iterable[str]) -> list[str]:
    """Seconds, and peak GB where there are any."""
    peak = {name: f", {x:.3g} GB" for name, x in peaks.items()}
    return [f"{spent[name]:.3g} s{peak.get(name, '')}" for name in names]


# ---- (d) Memory ----------------------------------------------------------------------------------


def memory_table(options: argparse.Namespace, end: float) -> None:
    cap, dtype = 23 * 2**30, options.dtypes[0]  # of a card's 24 GiB CUDA itself takes some
    size = options.microbatch[0] if options.microbatch else 2 if options.quick else 8
    row = table(
        f"(d) memory: each phase's seconds and peak GB, and the most GB that the allocator, capped "
        f"at {cap / 1e9:.1f}, held; runs of two epochs, K = 2, T = 2, with gradient checkpointing, "
        "a reward of HPSv2's size, and the room of 512 trajectories of 50 steps",
        "learns", "dtype", "microbatch", "offload", *PHASES, "held GB",
    )  # fmt: skip

    def skip(*args) -> None:
        """No 10 GB on the disk."""

    def cells(folder: Path, rank: int, offload: str) -> list:
        require(0.6, minutes_until(end), "minutes")
        room = 0
        if CUDA:  # latents and text, float32; and pictures, uint8
            room = 512 * (4 * (51 * 4 * 64 * 64 + 77 * 768) + 3 * 512 * 512)
        ballast = torch.empty(room, dtype=torch.uint8, device=DEVICE)
        with (
            mock.patch.object(run_folder, "save_state", skip),
            mock.patch.object(StableDiffusion, "save", skip),
        ):
            _, spent, peaks = run(
                folder, lora_rank=rank, dtype=dtype, offload=offload, gradient_checkpointing=True,
                microbatch=size, prompts_per_epoch=1, images_per_prompt=size, epochs=2,
                ddpm_steps=2, clip_range="inf",
            )  # fmt: skip
        del ballast
        return [*in_cells(spent, peaks, PHASES), peaks.get("held", "")]

    with folder_of_models(options, 9, end, 1.5) as folder:
        if CUDA:
            share = min(1.0, cap / torch.cuda.mem_get_info()[1])
            torch.cuda.set_per_process_memory_fraction(share)
        for offload, rank in itertools.product(("on", "off"), (0, 8)):
            learns = f"LoRA of rank {rank}" if rank else "the full UNet"
            row(learns, dtype, size, offload, *attempt(cells, folder, rank, offload))
        if CUDA:
            torch.cuda.set_per_process_memory_fraction(1.0)


# ---- (e) A run -----------------------------------------------------------------------------------


def run_table(options: argparse.Namespace, end: float) -> None:
    begin = ("load_models", "check_on_policy", "draw_samples")
    functions = [*((prdp, name) for name in begin), (run_folder, "save_state")]
    functions += [(StableDiffusion, "save")]
    columns = (*begin, *PHASES, "save_state", "save")
    images, steps = (2, 2) if options.quick else (8, T)
    row = table(
        "(e) a run of one epoch, from loading to the saved pipeline: seconds in all, and phases' "
        f"peak GB; N = 2, B = {images}, T = {steps}, K = 2",
        "dtype", "microbatch", *columns, "checkpoint GB", "skipped %", "whole s",
    )  # fmt: skip

    def cells(folder: Path, dtype: str, size: int) -> list:
        require({"tf32": 4.5, "fp32": 8.5}.get(dtype, 3), minutes_until(end), "minutes")
        require_memory(options, dtype, size, 24)  # Adam's, reference, reward, VAE and text too
        started = time.perf_counter()
        metrics, spent, peaks = run(
            folder, *functions, dtype=dtype, epochs=1, prompts_per_epoch=2,
            images_per_prompt=images, ddpm_steps=steps, microbatch=size,
        )  # fmt: skip
        whole = time.perf_counter() - started
        gigabytes = (folder / "run" / "checkpoint" / "state.pt").stat().st_size / 1e9
        skipped = 100 * metrics[0]["skipped_fraction"]
        return [*in_cells(spent, peaks, columns), gigabytes, skipped, whole]

    with folder_of_models(options, 24, end, 3.5) as folder:
        for dtype in options.dtypes:
            size = min(microbatches(options, dtype)[0], 2 * images)
            row(dtype, size, *attempt(cells, folder, dtype, size))


# ---- Main ----------------------------------------------------------------------------------------

TABLES = {"epoch": epoch_table, "noise": noise_table, "memory": memory_table, "run": run_table}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny networks: a minute on a CPU")
    parser.add_argument("--only", choices=TABLES, help="one table")
    text = "of epoch; peers: as DDPO's trainers; deterministic: cuDNN's kernels; channels-last: "
    text += "compiled too (default: all on a GPU, else the first two)"
    parser.add_argument("--loops", nargs="+", choices=LOOPS, help=text)
    text = "images a network pass; epoch takes several (default: 16 in 16 bits, else 8; memory 8)"
    parser.add_argument("--microbatch", type=int, nargs="+", help=text)
    parser.add_argument("--steps", type=int, help="that epoch times (default: 2; --quick 1)")
    text = "in this order; peers and memory take the first (default: fp16 bf16 tf32 fp32; on a CPU "
    text += "without tf32)"
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help=text)
    text = "a table begins no row that would take it past these (default: 9; with --quick no limit)"
    parser.add_argument("--minutes", type=float, help=text)

    options = parser.parse_args(argv)
    options.loops = options.loops or LOOPS[: None if CUDA else 2]
    options.steps = options.steps or (1 if options.quick else 2)
    options.dtypes = options.dtypes or [dtype for dtype in DTYPES if dtype != "tf32" or CUDA]
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
