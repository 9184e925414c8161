"""What a run shows: progress, a line an epoch, trackers, grids, curves and pictures of models."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from support.cli import during
from support.distributed import gather, processes, rank, say
from support.run_folder import write_json, writing

# ---- Time ----------------------------------------------------------------------------------------

SECONDS: dict[str, float] = {}  # of each phase since `timing` began


@contextlib.contextmanager
def timing() -> Iterator[dict[str, float]]:
    """The wall-clock seconds of each `phase` of this block, by name."""
    SECONDS.clear()
    yield SECONDS


@contextlib.contextmanager
def phase(name: str, total: int = 0) -> Iterator[Callable[[int], object]]:
    """A part of an epoch: its time is counted, without that of phases in it; errors name it. Yields
    a function that moves a progress bar of `total` on; without a terminal a long phase prints a
    line."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # else a thread watches over the bars, and never ends
    hidden = True if rank() or not total else None  # None: unless on a terminal
    started, counted = time.perf_counter(), sum(SECONDS.values())
    with during(name), tqdm(total=total, desc=f"{name:>9}", leave=False, disable=hidden) as bar:
        yield bar.update
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    spent = time.perf_counter() - started - (sum(SECONDS.values()) - counted)
    SECONDS[name] = SECONDS.get(name, 0.0) + spent
    if spent > 10 and not sys.stderr.isatty():
        say(f"{name}: {duration(spent)}")


def duration(seconds: float) -> str:
    """In the unit a person would use: 40 s, 12 min, 3.5 h, 5 days."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


def introduce(config, learned: dict[str, Tensor], log_probs: str, prompts: list[str], tokenizer) -> None:
    """What is about to run."""
    millions = sum(p.numel() for p in learned.values()) / 1e6
    symbols = {"E": "epochs", "K": "updates_per_epoch", "N": "prompts_per_epoch"}
    symbols |= {"B": "images_per_prompt", "T": "ddpm_steps", "clip range": "clip_range"}
    values = [f"{symbol} {getattr(config, name)}" for symbol, name in symbols.items()]
    say(f"{config.program} on {config.model}: {millions:.1f} M parameters; {', '.join(values)}")
    say(f"{processes()} process(es); passes in {config.dtype}; log-probs: {log_probs}")
    reward = " ".join(config.reward) or "of the caller"
    say(f"reward {reward}; {len(prompts)} prompts; to {config.out}")
    context, some = tokenizer.model_max_length, prompts[:1000]
    if long := sum(len(ids) > context for ids in tokenizer(some).input_ids):
        say(f"warning: {long} of {len(some)} prompts exceed {context} tokens; the ends go unread.")


def forecast(config, seconds: float, start: int) -> None:
    """What a run will take, from the seconds of a pass through T steps of an image."""
    images = config.prompts_per_epoch * config.images_per_prompt
    epoch, epochs = seconds * config.passes() * images / processes(), config.epochs - start + 1
    whole = f"an epoch takes about {duration(epoch)}, {epochs} epochs {duration(epochs * epoch)}"
    say(f"{duration(seconds)} to sample an image: {whole}")


# ---- Epochs --------------------------------------------------------------------------------------


def epoch_metrics(
    rewards: Tensor,  # (M,)
    parts: dict[str, Tensor],  # of a summed reward, each (M,)
    updates: list[dict[str, Tensor]],  # what each update measured
    others: dict[str, Tensor],
) -> dict[str, float]:
    """Means over an epoch and all processes, by the names of docs/running.md."""
    means = {name: torch.stack([update[name] for update in updates]) for name in updates[0]}
    means |= others
    parts = {f"reward_mean/{label}": gather(part).mean().item() for label, part in parts.items()}
    rewards = gather(rewards)
    std = deviation(rewards)
    return {
        "images": len(rewards),
        "reward_mean": rewards.mean().item(),
        "reward_std": std,
        "reward_se": std / len(rewards) ** 0.5,
        **parts,
        **{name: gather(x.double().mean()[None]).mean().item() for name, x in means.items()},
    }


def as_row(epoch: int, metrics: dict[str, float], seconds: dict[str, float]) -> dict:
    """A line of metrics.jsonl; null where there is no number."""
    images = metrics.pop("images")
    row = {"epoch": epoch, **metrics, **{f"seconds_{name}": x for name, x in seconds.items()}}
    row["images_per_second"] = images / sum(seconds.values())
    row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def show_epoch(config, rows: list[dict], start: int) -> None:
    """Six columns on the screen; all are in metrics.jsonl."""
    if rank() != 0:
        return
    row = rows[-1]
    if (row["epoch"] - start) % 20 == 0:
        print("epoch    reward_mean +- se  clip_fraction  log_ratio_ref  grad_norm  seconds")
    numbers = [row.get(name) for name in ("clip_fraction", "log_ratio_ref", "grad_norm")]
    clipped, distance, norm = ("-" if x is None else f"{x:.3g}" for x in numbers)
    error = row["reward_se"]
    reward = f"{row['reward_mean']:.4f} +- {'-' if error is None else f'{error:.4f}'}"
    seconds = sum(x for name, x in row.items() if name.startswith("seconds_"))
    line = f"{row['epoch']:>5} {reward:>20}  {clipped:>13}  {distance:>13}  {norm:>9}"
    print(f"{line}  {seconds:>7.1f}", flush=True)
    if row["reward_std"] == 0:
        print("warning: every image has the same reward; there is nothing to learn from.")
    open_tracker(config.log_to, config.out)(row)
    plot_rewards(Path(config.out), rows)


@functools.cache
def open_tracker(kind: str, run: str) -> Callable[[dict], object]:
    """The function that sends an epoch's metrics to --log-to: "none", "tensorboard" or "wandb"."""
    if kind == "wandb" and rank() == 0:
        import wandb

        return wandb.init(project="prdp", name=run, dir=run).log
    if kind == "tensorboard" and rank() == 0:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run)

        def send(metrics: dict[str, float | None]) -> None:
            for name, value in metrics.items():
                if value is not None:
                    writer.add_scalar(name, value, metrics["epoch"])
            writer.flush()

        return send
    return lambda metrics: None


# ---- Pictures ------------------------------------------------------------------------------------


class Samples(NamedTuple):
    """S images for each of P prompts, and their rewards, on the CPU."""

    prompts: list[str]
    images: Tensor  # (P*S, 3, H, W) uint8
    rewards: Tensor  # (P*S,) float32


def deviation(x: Tensor) -> float:
    """Of numbers (M,); NaN of a single one."""
    return x.std().item() if len(x) > 1 else math.nan


def mean_and_error(rewards: Tensor) -> tuple[float, float]:
    """Mean of rewards (P, S), and its standard error over prompts; of one prompt, over images."""
    rows = (rewards.mean(1) if len(rewards) > 1 else rewards[0]).double()
    return rows.mean().item(), deviation(rows) / len(rows) ** 0.5


def save_grid(config, epoch: int, samples: Samples) -> None:
    """samples/epoch_NNNN.png, a row of at most 8 images a prompt; .json beside it, every reward."""
    from PIL import Image

    if rank() != 0:
        return
    path = Path(config.out, "samples", f"epoch_{epoch:04d}")
    images, rewards = (x.unflatten(0, (len(samples.prompts), -1)) for x in samples[1:])
    grid = images[:8, :8].permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (rows*H, cols*W, 3)
    with writing(path.with_suffix(".png")) as temporary:
        Image.fromarray(grid.numpy()).save(temporary, "png")
    pairs = zip(samples.prompts, rewards.tolist(), strict=True)
    table = [{"prompt": prompt, "rewards": row} for prompt, row in pairs]
    write_json(path.with_suffix(".json"), table)


def read_grids(run: Path) -> dict[int, float]:
    """Epoch -> mean reward, of every samples/epoch_NNNN.json that save_grid wrote."""
    means = {}
    for path in sorted((run / "samples").glob("epoch_*.json")):
        with contextlib.suppress(ValueError, TypeError, KeyError, ZeroDivisionError):  # not ours
            rewards = [r for row in json.loads(path.read_text()) for r in row["rewards"]]
            means[int(path.stem.removeprefix("epoch_"))] = sum(rewards) / len(rewards)
    return means


@contextlib.contextmanager
def figure(path: Path, width: float, height: float) -> Iterator:
    """A matplotlib figure, saved when the block ends, whatever back end or style is set."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn
        with writing(path) as temporary:
            drawn.savefig(temporary, dpi=120, format="png")


def plot_rewards(run: Path, rows: list[dict]) -> None:
    """reward.png: mean and deviation of each epoch's rewards, and means over the fixed samples."""
    if rank() != 0:
        return
    epochs = [row["epoch"] for row in rows]
    mean = torch.tensor([row["reward_mean"] for row in rows])
    std = torch.tensor([row["reward_std"] or 0.0 for row in rows])
    grids = read_grids(run)
    with figure(run / "reward.png", 6, 4) as drawn:
        axes = drawn.subplots()
        axes.fill_between(epochs, mean - std, mean + std, alpha=0.15, lw=0)
        axes.plot(epochs, mean, label="training images: mean, standard deviation")
        label = "the same prompts and seeds: mean"
        axes.plot(grids.keys(), grids.values(), "o", color="C1", label=label)
        axes.set(xlabel="epoch", ylabel="reward")
        axes.legend(frameon=False)


def plot_pairs(path: Path, shown: dict[str, Samples]) -> None:
    """2 images for each of the first 8 prompts, a row a model, one seed a column, rewards below."""
    if rank() != 0:
        return
    first = next(iter(shown.values()))
    per_prompt = len(first.images) // len(first.prompts)
    columns, shots = min(8, len(first.prompts)), min(2, per_prompt)
    with figure(path, 1.5 * columns + 0.5, 1.9 * shots * len(shown)) as drawn:
        for shot, part in enumerate(drawn.subfigures(shots, 1, squeeze=False)[:, 0]):
            axes = part.subplots(len(shown), columns, squeeze=False)
            for row, (name, samples) in zip(axes, shown.items(), strict=True):
                row[0].set_ylabel(name)
                for column, axis in enumerate(row):
                    image = column * per_prompt + shot
                    pixels = samples.images[image].permute(1, 2, 0).numpy()
                    axis.imshow(pixels, interpolation="nearest")
                    axis.set(xticks=[], yticks=[])
                    axis.set_xlabel(f"{samples.rewards[image]:.4g}", fontsize=9, labelpad=2)
            for axis, prompt in zip(axes[0], first.prompts, strict=False):
                lines = textwrap.wrap(prompt, 20, max_lines=4, placeholder=" ...")
                axis.set_title("\n".join(lines), fontsize=8, parse_math=False)


def compare(config, rows: list[dict], before: Samples, after: Samples) -> None:
    """A finished run's pictures, and how far the mean reward rose."""
    path = Path(config.out, "before_after.png")
    plot_rewards(Path(config.out), rows)
    plot_pairs(path, {"base": before, "finetuned": after})
    rise, error = mean_and_error((after.rewards - before.rewards).unsqueeze(0))
    say(
        f"mean reward of {len(before.rewards)} images on fixed prompts and seeds: "
        f"{before.rewards.mean():.4f} -> {after.rewards.mean():.4f}, {rise:+.4f} +- {error:.4f} "
        f"(standard error of the paired difference)\nsee {path}"
    )
