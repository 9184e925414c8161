"""What a run shows: its time, a line an epoch, trackers, grids, curves and pictures of models."""

import contextlib
import itertools
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from support.cli import UserError
from support.distributed import gather, print0, processes, rank
from support.inputs import read_picture
from support.run_folder import forgiving, writing

SECONDS: dict[str, float] = {}  # each `phase` since this was last emptied


@contextlib.contextmanager
def phase(name: str, total: int = 0) -> Iterator[Callable[[int], object]]:
    """A part of an epoch, whose time is counted, without that of phases in it. Yields a function
    that moves a progress bar of `total` on; without a terminal a long phase prints a line."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # else a thread watches over the bars, and never ends
    hidden = True if rank() or not total else None  # None: unless on a terminal
    started, counted = time.perf_counter(), sum(SECONDS.values())
    with tqdm(total=total, desc=f"{name:>9}", leave=False, disable=hidden) as bar:
        yield bar.update
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    spent = time.perf_counter() - started - (sum(SECONDS.values()) - counted)
    SECONDS[name] = SECONDS.get(name, 0.0) + spent
    if spent > 10 and not sys.stderr.isatty():
        print0(f"{name}: {duration(spent)}")


def duration(seconds: float) -> str:
    """In the unit a person would use: 40 s, 12 min, 3.5 h, 5 days."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


def introduce(config, sd, kernels: str, prompts: list[str]) -> None:
    """Print what is about to run."""
    sizes = [p.numel() for p in sd.unet.parameters()]
    learning = sum(p.numel() for p in sd.unet.parameters() if p.requires_grad)
    print0(f"{config.program}: {learning / 1e6:.3g} M parameters of {config.model} learn")
    print0(f"reward {' '.join(config.reward) or 'of the caller, or none'}; to {config.out}")
    print0(f"{len(prompts)} prompts: {'; '.join(prompts[:3])}; ...")
    print0(f"{processes()} process(es); passes in {config.dtype}; log-probs: {kernels}")
    plan = f"gradient checkpointing {config.gradient_checkpointing}, offload {config.offload}"
    print0(f"microbatch {config.microbatch}, {plan}")

    some = prompts[:1000]
    context = sd.pipe.tokenizer.model_max_length
    long = sum(len(ids) > context for ids in sd.pipe.tokenizer(some).input_ids)
    if long:
        print0(f"warning: {long} of {len(some)} prompts exceed {context} tokens, cut there.")
    if not torch.cuda.is_available() and sum(sizes) > 1e8:
        version = f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU"
        print0(f"warning: on the CPU, which may take months: {version}.")


def forecast(config, seconds: tuple[float, float], start: int) -> None:
    """Print what a run will take, from an image's seconds of a pass through T steps, without
    gradient and with."""
    images = config.prompts_per_epoch * config.images_per_prompt / processes()
    passes, backward_passes = config.passes()
    epoch = images * (passes * seconds[0] + backward_passes * seconds[1])
    epochs = config.epochs - start + 1
    whole = f"an epoch takes about {duration(epoch)}, {epochs} epochs from {start} on"
    print0(f"{duration(seconds[0])} to sample an image: {whole} {duration(epochs * epoch)}")


def epoch_metrics(
    rewards: Tensor, parts: dict[str, Tensor], updates: list[dict[str, Tensor]], **others: Tensor
) -> dict[str, float]:
    """An epoch's metrics over all processes, by the names of docs/running.md: rewards (any shape),
    the parts of a summed reward, means of what each update measured and of others."""
    for name in updates[0]:
        others[name] = torch.stack([update[name] for update in updates])
    rewards = gather(rewards.flatten())
    std = deviation(rewards)
    metrics = {"images": len(rewards), "reward_mean": rewards.mean().item(), "reward_std": std}
    metrics["reward_se"] = std / len(rewards) ** 0.5
    for name, x in others.items():
        metrics[name] = gather(x.double().mean()[None]).mean().item()
    for label, part in parts.items():
        metrics[f"reward_mean/{label}"] = gather(part).mean().item()
    return metrics


def as_row(epoch: int, metrics: dict[str, float]) -> dict:
    """A line of metrics.jsonl; null where there is no number."""
    row = {"epoch": epoch, **metrics}
    for name, seconds in SECONDS.items():
        row[f"seconds_{name}"] = seconds
    row["images_per_second"] = row.pop("images") / sum(SECONDS.values())
    row["peak_gb"] = 0.0
    if torch.cuda.is_available():
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def show_epoch(config, rows: list[dict], start: int, track: Callable) -> None:
    """Six columns on the screen; the tracker and metrics.jsonl have all."""
    row = rows[-1]
    if (row["epoch"] - start) % 20 == 0:
        print0("epoch    reward_mean +- se  clip_fraction  log_ratio_ref  grad_norm  seconds")
    cells = []
    for name in ("reward_se", "clip_fraction", "log_ratio_ref", "grad_norm"):
        cells.append("-" if row.get(name) is None else f"{row[name]:.3g}")
    mean = "-" if row["reward_mean"] is None else f"{row['reward_mean']:.4f} +- {cells[0]}"
    seconds = sum(x for name, x in row.items() if name.startswith("seconds_"))
    line = "{:>5} {:>20}  {:>13}  {:>13}  {:>9}  {:>7.1f}"
    print0(line.format(row["epoch"], mean, *cells[1:], seconds))
    if row["reward_std"] == 0:
        print0("warning: every image has the same reward; there is nothing to learn from.")
    track(row["epoch"], {name: x for name, x in row.items() if x is not None})
    with forgiving("reward.png"):
        plot_rewards(Path(config.out, "reward.png"), rows)


def open_tracker(config, record: dict, start: int) -> Callable:
    """The function (epoch, numbers, picture or None) that sends to --log-to; UserError where that
    cannot be opened. What fails later is a warning."""
    if rank() != 0 or config.log_to == "none":
        return lambda epoch, numbers, picture=None: None
    what = f"--log-to {config.log_to}"
    try:
        send = wandb_tracker(config, record) if config.log_to == "wandb" else None
        send = send or tensorboard_tracker(config, start)
    except Exception as error:
        raise UserError(f"{what}: cannot be opened ({type(error).__name__}: {error}).") from error

    def track(epoch: int, numbers: dict[str, float], picture: Path | None = None) -> None:
        with forgiving(f"{what}: epoch {epoch} was not sent"):
            send(epoch, numbers, picture)

    return track


def wandb_tracker(config, record: dict) -> Callable:
    import wandb

    project = os.environ.get("WANDB_PROJECT", "prdp")
    same = {"id": record["tracker_id"], "resume": "allow", "config": record}
    run = wandb.init(project=project, name=Path(config.out).name, dir=config.out, **same)

    def send(epoch: int, numbers: dict[str, float], picture: Path | None) -> None:
        run.log(numbers | ({"samples": wandb.Image(str(picture))} if picture else {}), step=epoch)

    return send


def tensorboard_tracker(config, start: int) -> Callable:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(config.out, purge_step=start)

    def send(epoch: int, numbers: dict[str, float], picture: Path | None) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, epoch)
        if picture:
            writer.add_image("samples", read_picture(picture, "--log-to tensorboard"), epoch)
        writer.flush()

    return send


class Samples(NamedTuple):
    """S images for each of P prompts, and their rewards, on the CPU."""

    prompts: list[str]
    images: Tensor  # (P*S, 3, H, W) uint8
    rewards: Tensor  # (P*S,)


def mean_and_error(rewards: Tensor) -> tuple[float, float]:
    """Mean of rewards (P, S), and its standard error over prompts; of one prompt, over images."""
    rows = (rewards.mean(1) if len(rewards) > 1 else rewards[0]).double()
    return rows.mean().item(), deviation(rows) / len(rows) ** 0.5


def deviation(x: Tensor) -> float:
    """The standard deviation of numbers (M,); NaN of a single one."""
    return x.std().item() if len(x) > 1 else math.nan


def plot_rewards(path: Path, rows: list[dict]) -> None:
    """reward.png: mean and deviation of each epoch's rewards."""
    rows = [row for row in rows if row["reward_mean"] is not None]
    if rank() != 0 or not rows:
        return
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which matplotlib may not know here
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in rows]
    mean = torch.tensor([row["reward_mean"] for row in rows])
    std = torch.tensor([row["reward_std"] or 0.0 for row in rows])
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(epochs, mean - std, mean + std, alpha=0.15, lw=0)
    axes.plot(epochs, mean, marker="." if len(rows) < 40 else None)
    axes.set_title("training images of each epoch: mean, standard deviation")
    axes.set(xlabel="epoch", ylabel="reward")
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def draw_images(path: Path, models: dict[str, Samples], shots: int = 2) -> None:
    """At most `shots` images for each of the first 8 prompts: a column a prompt, a row a model and
    seed, each image's reward below it."""
    from PIL import Image, ImageDraw, ImageFont

    if rank() != 0:
        return
    prompts, images, _ = next(iter(models.values()))
    per_prompt = len(images) // len(prompts)
    rows = [*itertools.product(range(min(shots, per_prompt)), models.items())]
    titles = [textwrap.fill(p, 20, max_lines=4, placeholder=" ...") for p in prompts[:8]]

    # Sizes in pixels: small pictures are shown larger.
    zoom = -(-128 // images.shape[-1])
    height = zoom * images.shape[-2]
    width = zoom * images.shape[-1]
    font = ImageFont.load_default(size=max(12, width // 14))
    line = font.size + 4
    left = 8 * font.size
    top = line * (1 + max(title.count("\n") for title in titles)) + 8
    column = width + width // 16
    row = height + 2 * line
    page = Image.new("RGB", (left + len(titles) * column, top + len(rows) * row), "white")
    draw = ImageDraw.Draw(page)

    for n, title in enumerate(titles):
        x = left + n * column
        draw.text((x, 4), title, "black", font)
        for r, (shot, (name, samples)) in enumerate(rows):
            y = top + r * row
            draw.text((4, y + height // 2 - line), textwrap.fill(name, 14), "black", font)
            number = n * per_prompt + shot
            pixels = Image.fromarray(samples.images[number].permute(1, 2, 0).numpy())
            page.paste(pixels.resize((width, height), Image.Resampling.NEAREST), (x, y))
            reward = samples.rewards[number]
            if not reward.isnan():
                draw.text((x, y + height), f"{reward:.4g}", "black", font)
    with writing(path) as temporary:
        page.save(temporary, "png")


def save_samples(config, epoch: int, samples: Samples, track: Callable) -> None:
    """samples/epoch_NNNN.png."""
    path = Path(config.out, "samples", f"epoch_{epoch:04d}.png")
    with forgiving(str(path)):
        draw_images(path, {f"epoch {epoch}": samples}, 8)
        track(epoch, {}, path)


def compare(config, before: Samples, after: Samples, track: Callable) -> None:
    """Show a finished run's last samples, before_after.png, and how far the mean reward rose."""
    save_samples(config, config.epochs, after, track)
    path = Path(config.out, "before_after.png")
    with forgiving(str(path)):
        draw_images(path, {"base": before, "finetuned": after})
    if not after.rewards.isnan().all():
        rise, error = mean_and_error((after.rewards - before.rewards).unsqueeze(0))
        means = f"{before.rewards.mean():.4f} -> {after.rewards.mean():.4f}"
        count = f"mean reward of {len(before.rewards)} images on fixed prompts and seeds"
        print0(f"{count}: {means}, {rise:+.4f} +- {error:.4f}")
        print0("(standard error of the paired difference)")
    print0(f"see {path}")
