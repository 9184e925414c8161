"""What a run shows: its time, a line an epoch, trackers, grids, curves and pictures of models."""

import contextlib
import itertools
import math
import os
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from support.cli import UserError
from support.distributed import gather, print0, processes, rank
from support.run_folder import forgiving, writing

SECONDS: dict[str, float] = {}  # each `phase` since this was last emptied
WANDB: dict[str, object] = {}  # this process's runs there, by id
NEARLY_ALL = 0.99  # of log-probs clipped; healthy runs of the toy stay below (docs/running.md)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A part of an epoch: its time, without that of phases in it, is counted, a long one said."""
    started = time.perf_counter()
    counted = sum(SECONDS.values())
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    inner = sum(SECONDS.values()) - counted
    spent = time.perf_counter() - started - inner
    SECONDS[name] = SECONDS.get(name, 0.0) + spent
    if spent > 10:
        print0(f"{name}: {duration(spent)}")


def duration(seconds: float) -> str:
    """In the unit a person would use: 40 s, 12 min, 3.5 h, 5 days."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


def introduce(config, sd, kernels: str, prompts: list[str]) -> None:
    """Print what is about to run."""
    millions = sum(p.numel() for p in sd.unet.parameters() if p.requires_grad) / 1e6
    reward = " ".join(config.reward) or "of the caller, or none"
    first = "; ".join(repr(prompt[:80]) for prompt in prompts[:3])
    print0(f"{config.program}: {millions:.3g} M parameters of {config.model} learn")
    print0(f"reward {reward}; to {config.out}")
    print0(f"prompts: {len(prompts)}, the first: {first}")
    print0(f"{processes()} process(es); passes in {config.dtype}; log-probs: {kernels}")
    checkpointing = f"gradient checkpointing {config.gradient_checkpointing}"
    print0(f"microbatch {config.microbatch}, {checkpointing}, offload {config.offload}")

    context = sd.pipe.tokenizer.model_max_length
    tokens = sd.pipe.tokenizer(prompts[:1000]).input_ids
    long = sum(len(ids) > context for ids in tokens)
    if long:
        print0(f"warning: {long} of {len(tokens)} prompts exceed {context} tokens, cut there.")


def forecast(config, seconds: tuple[float, float], start: int) -> None:
    """Print what a run will take, from an image's seconds of a pass without gradient and with."""
    images = config.prompts_per_epoch * config.images_per_prompt / processes()
    passes, backward_passes = config.passes()
    image = passes * seconds[0] + backward_passes * seconds[1]
    epoch = images * image
    left = config.epochs - start + 1
    print0(f"{duration(seconds[0])} to sample an image: an epoch takes about {duration(epoch)}")
    print0(f"to the end of epoch {config.epochs}: about {duration(left * epoch)}")


def epoch_metrics(
    rewards: Tensor, parts: dict[str, Tensor], updates: list[dict[str, Tensor]], **others: Tensor
) -> dict[str, float]:
    """An epoch's metrics over all processes, by the names of docs/running.md: rewards (any shape),
    the parts of a summed reward, means of what each update measured and of others."""
    for name in updates[0]:
        others[name] = torch.stack([update[name] for update in updates])
    if "clip_fraction" in others:  # at the first update theta is theta_old
        others["clip_fraction"] = others["clip_fraction"][1:]
    rewards = gather(rewards.flatten())
    count = len(rewards)
    std = deviation(rewards)
    metrics = {"images": count, "reward_mean": rewards.mean().item()}
    metrics["reward_std"] = std
    metrics["reward_se"] = std / count**0.5
    for name, x in others.items():
        mean = x.double().mean()
        metrics[name] = gather(mean[None]).mean().item()
    for label, part in parts.items():
        metrics[f"reward_mean/{label}"] = gather(part).mean().item()
    return metrics


def as_row(epoch: int, metrics: dict[str, float]) -> dict:
    """A line of metrics.jsonl; null where there is no number."""
    row = dict.fromkeys(("epoch", "images", "reward_mean", "reward_std"), math.nan)
    for name, value in metrics.items():
        row[name] = float(value)  # another `train` may give a tensor, or numpy's
    row["epoch"] = epoch
    for name, seconds in SECONDS.items():
        row[f"seconds_{name}"] = seconds
    seconds = sum(SECONDS.values()) or math.nan
    row["images_per_second"] = row.pop("images") / seconds
    row.setdefault("peak_gb", torch.cuda.max_memory_allocated() / 1e9)  # 0 without a GPU
    row.setdefault("sample_reward", math.nan)
    for name, value in row.items():
        if not math.isfinite(value):
            row[name] = None
    return row


def show_epoch(config, rows: list[dict], start: int, track: Callable) -> None:
    """Six columns on the screen; the tracker and metrics.jsonl have all."""
    row = rows[-1]
    line = "{:>5} {:>20}" + "  {:>13}" * len(config.columns) + "  {:>7}"
    if (row["epoch"] - start) % 20 == 0:
        print0(line.format("epoch", "reward_mean +- se", *config.columns, "seconds"))
    cells = []
    for name in ("reward_se", *config.columns):
        value = row.get(name)
        cells.append("-" if value is None else f"{value:.3g}")
    mean = row["reward_mean"]
    mean = "-" if mean is None else f"{mean:.4f} +- {cells[0]}"
    seconds = sum(x for name, x in row.items() if name.startswith("seconds_"))
    print0(line.format(row["epoch"], mean, *cells[1:], f"{seconds:.1f}"))
    if row["reward_std"] == 0 or row.get("skipped_fraction") == 1:
        print0("warning: all images of a prompt have the same reward: nothing to learn from.")
    if (row.get("clip_fraction") or 0) > NEARLY_ALL:
        print0(
            "warning: nearly all log-probs leave --clip-range; raise it or lower --learning-rate."
        )
    numbers = {name: x for name, x in row.items() if x is not None}
    with forgiving(f"--log-to {config.log_to}: epoch {row['epoch']} was not sent"):
        track(row["epoch"], numbers)
    with forgiving("reward.png"):
        plot_rewards(Path(config.out, "reward.png"), rows)


def open_tracker(config, record: dict, start: int) -> Callable:
    """The function (epoch, numbers, picture or None) that sends to --log-to; or UserError."""
    if rank() != 0 or config.log_to == "none":
        return lambda epoch, numbers, picture=None: None
    try:
        if config.log_to == "wandb":
            return wandb_tracker(config, record)
        return tensorboard_tracker(config, start)
    except Exception as error:
        what = f"--log-to {config.log_to}: cannot be opened"
        raise UserError(f"{what} ({type(error).__name__}: {error}).") from error


def wandb_tracker(config, record: dict) -> Callable:
    import wandb

    project = os.environ.get("WANDB_PROJECT", "prdp")
    same = {"id": record["tracker_id"], "resume": "allow", "config": record}
    same["reinit"] = "create_new"  # beside other runs of this process
    if earlier := WANDB.pop(same["id"], None):
        earlier.finish()  # else it could not be gone on with
    run = wandb.init(project=project, name=Path(config.out).name, dir=config.out, **same)
    WANDB[same["id"]] = run

    def track(epoch: int, numbers: dict[str, float], picture: Path | None = None) -> None:
        pictures = {"samples": wandb.Image(str(picture))} if picture else {}
        run.log(numbers | pictures, step=epoch)

    return track


def tensorboard_tracker(config, start: int) -> Callable:
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(config.out, purge_step=start)

    def track(epoch: int, numbers: dict[str, float], picture: Path | None = None) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, epoch)
        if picture:
            pixels = np.array(Image.open(picture))
            writer.add_image("samples", pixels, epoch, dataformats="HWC")
        writer.flush()

    return track


class Samples(NamedTuple):
    """S images for each of P prompts, and their rewards, on the CPU."""

    prompts: list[str]
    images: Tensor  # (P*S, 3, H, W) uint8
    rewards: Tensor  # (P*S,)


def mean_and_error(rewards: Tensor) -> tuple[float, float]:
    """Mean of rewards (P, S), and its standard error over prompts; of one prompt, over images."""
    if len(rewards) == 1:
        rewards = rewards.T
    rows = rewards.mean(1).double()
    return rows.mean().item(), deviation(rows) / len(rows) ** 0.5


def deviation(x: Tensor) -> float:
    """The standard deviation of numbers (M,); NaN of a single one, 0 of equal ones."""
    if len(x) < 2:
        return math.nan
    return x.std().item() * (x.min() != x.max()).item()  # their mean may be rounded


def plot_rewards(path: Path, rows: list[dict]) -> None:
    """reward.png: mean and deviation of each epoch's rewards; of a sum each part's mean."""
    rows = [row for row in rows if row["reward_mean"] is not None]
    if rank() or not rows:
        return
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in rows]
    mean = torch.tensor([row["reward_mean"] for row in rows])
    std = torch.tensor([row["reward_std"] or 0.0 for row in rows])
    names = [name for name in rows[-1] if name.startswith("reward_mean")]
    if len(names) == 2:  # its only part
        names.pop()
    figure = Figure(figsize=(6, 4 * len(names)), layout="constrained")
    figure.suptitle("training images of each epoch: mean, standard deviation")
    figure.subplots(len(names))
    for axes, name in zip(figure.axes, names, strict=True):
        values = [row[name] for row in rows]
        axes.plot(epochs, values, ".-")
        axes.set(xlabel="epoch", ylabel=name)
    figure.axes[0].fill_between(epochs, mean - std, mean + std, alpha=0.15)
    samples = [row.get("sample_reward") for row in rows]
    figure.axes[0].plot(epochs, samples, "o", label="sample_reward: fixed prompts and noise")
    figure.axes[0].legend()
    with writing(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_images(path: Path, models: dict[str, Samples], shots: int = 2) -> None:
    """`shots` images of each of 8 prompts, rewards below: a column a prompt, rows of each model."""
    from matplotlib import get_data_path  # its font has the letters of most alphabets
    from PIL import Image, ImageDraw, ImageFont

    if rank() != 0:
        return
    prompts, images, _ = next(iter(models.values()))
    per_prompt = len(images) // len(prompts)
    shots = min(shots, per_prompt)
    rows = list(itertools.product(range(shots), models))
    brief = dict(max_lines=4, placeholder=" ...")
    titles = [textwrap.fill(prompt, 20, **brief) for prompt in prompts[:8]]

    # Sizes in pixels: small pictures are shown larger.
    zoom = -(-128 // images.shape[-1])
    height = zoom * images.shape[-2]
    width = zoom * images.shape[-1]
    font_file = f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    font = ImageFont.truetype(font_file, max(12, width // 14))
    line = font.size + 4
    left = 8 * font.size
    most = max(title.count("\n") for title in titles)
    top = line * (1 + most) + 8
    column = width + width // 16
    row = height + 2 * line
    size = (left + len(titles) * column, top + len(rows) * row)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)

    for n, title in enumerate(titles):
        x = left + n * column
        draw.text((x, 4), title, "black", font)
        for r, (shot, name) in enumerate(rows):
            y = top + r * row
            middle = y + height // 2 - line
            if n == 0:
                label = textwrap.fill(name, 14)
                draw.text((4, middle), label, "black", font)
            number = n * per_prompt + shot
            samples = models[name]
            pixels = samples.images[number].permute(1, 2, 0)
            picture = Image.fromarray(pixels.numpy())
            picture = picture.resize((width, height), Image.Resampling.NEAREST)
            page.paste(picture, (x, y))
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


def try_samples(config, row: dict, draw: Callable, models, prompts: list[str]) -> Samples | None:
    """Every --sample-every epochs the policy's fixed samples, their mean reward in `row`; None, and
    a warning, where that fails."""
    if row["epoch"] % config.sample_every:
        return None
    with forgiving("sample_reward"):
        samples = draw(config, models, models.policy, prompts)
        mean = samples.rewards.mean().item()
        row["sample_reward"] = mean if math.isfinite(mean) else None
        return samples


def show_samples(config, epoch: int, before: Samples, samples: Samples, track: Callable) -> None:
    """The picture, and how far the mean reward rose, with the error of the paired difference."""
    save_samples(config, epoch, samples, track)
    difference = samples.rewards - before.rewards
    rise, error = mean_and_error(difference[None])
    if math.isnan(error):  # of rewards that are none, or of a single image
        return
    was = before.rewards.mean()
    now = samples.rewards.mean()
    means = f"{was:.4f} -> {now:.4f}"
    count = f"sample_reward, of {len(difference)} images on fixed prompts and seeds"
    print0(f"{count}: {means}, {rise:+.4f} +- {error:.4f}")
    if len(difference) >= 16 and rise < -3 * error:
        print0("warning: that is clearly below the pretrained model; lower --learning-rate.")


def finish(config, epoch: int, before: Samples, after: Samples | None, track: Callable) -> None:
    """Show a finished run's last samples, if they could be drawn, and before_after.png."""
    if after is None:
        return
    show_samples(config, epoch, before, after, track)
    path = Path(config.out, "before_after.png")
    with forgiving(str(path)):
        draw_images(path, {"base": before, "finetuned": after})
    print0(f"pictures: {path}; model: {path.with_name('pipeline')}")
