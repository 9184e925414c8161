"""What a run shows: a line per epoch, sample grids, the reward curve, pictures of two models side by side, and the
paper's evaluation protocol (Sec. 4.1). Knows nothing of diffusion: prdp.py draws the images."""

from __future__ import annotations

import json
import os
import signal
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from prompts import load_prompts
from rewards import InputError

COLUMNS = (
    "epoch", "reward_mean", "reward_std", "loss", "clip_fraction", "skipped_fraction", "log_ratio_old",
    "log_ratio_ref", "grad_norm", "images_per_second",
)  # fmt: skip
# log_ratio_ref at which a step's mean is 4.5 of its sigmas off; toy runs that kept to the prompt stayed below 7.
FAR = 10.0


def write_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write under another name, flush to the disk, rename: after a crash there is the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def hold(folder: Path) -> BinaryIO:
    """Make a folder, and keep other processes out of it for as long as this one lives, however it ends."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder}: another process is running there; wait for it, or stop it.") from None
    return file


STOP: list[int] = []  # the signal that asked this run to stop


def stop_when_asked() -> None:
    """From now on Ctrl-C and SIGTERM end the run at the next update of a progress bar; a second one, at once."""

    def note(number: int, frame) -> None:
        STOP.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)


def progress(label: str, total: int):
    """A progress bar on a terminal, nothing elsewhere. Its update is where a signal takes effect: between two
    microbatches, never within an optimizer step or a write."""
    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # else every such class starts a thread, which never ends

        def update(self, n: int = 1) -> None:
            if STOP:
                raise SystemExit(128 + STOP[0])
            super().update(n)

    hidden = os.environ.get("RANK", "0") != "0" or None  # one bar for all processes; None: on a terminal only
    return Bar(total=total, desc=f"{label:>9}", unit="", leave=False, disable=hidden, dynamic_ncols=True)


@contextmanager
def timed(seconds: dict[str, float], name: str):
    """Add the block's wall-clock time to seconds[name]."""
    started = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


class Samples(NamedTuple):
    """S images for each of P prompts, and their rewards, on the CPU."""

    prompts: list[str]
    images: Tensor  # (P*S, 3, H, W) uint8
    rewards: Tensor  # (P*S,) float32


Draw = Callable[[list[str], Sequence[int], int], Samples]  # (a file's prompts, indices of some, S) -> their samples


def mean_and_error(rewards: Tensor) -> dict[str, float]:
    """Mean of (P, S) rewards, and its standard error over the P prompts; of one prompt, over its S images."""
    rows = (rewards.mean(1) if len(rewards) > 1 else rewards[0]).double()
    return {"mean": rows.mean().item(), "standard_error": (rows.std() / len(rows) ** 0.5).item()}


def evaluate(
    loaders: dict[str, Callable[[], Draw]], files: list[str], samples: int, chunk: int, out: Path, settings: dict
):
    """The paper's protocol: rewards of `samples` images of every prompt of the files, the same seeds for every model.

    loaders: "finetuned", and "base" to compare it with; each loads a model and gives the function that draws from it,
    `chunk` prompts at a time. out/evaluation.json holds the settings, every reward, and the table that is printed too:
    a row per file, with means, standard errors over prompts, paired difference and win rate (ties count half). It is
    replaced after every chunk, and goes on from there when called again with the same settings. out/evaluation.png
    shows 2 images for each of 8 prompts. Raises InputError if the file there was made with other settings.
    """
    from tqdm import tqdm

    path = out / "evaluation.json"
    settings = {name: value for name, value in settings.items() if name not in ("evaluate", "out", "offload")}
    record = {"settings": settings, "rewards": {}}
    if path.is_file():
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"{path}: damaged; move it away to begin again.") from error
    if other := [name for name in settings if record["settings"].get(name) != settings[name]]:
        raise InputError(f"--out {out}: holds an evaluation with another {other[0]}; choose another folder.")
    prompts, shown = {file: load_prompts(file) for file in files}, {}
    for name, load in loaders.items():
        draw, pictures = load(), []
        for file in files:
            rewards = record["rewards"].setdefault(name, {}).setdefault(file, {})
            todo = [n for n, prompt in enumerate(prompts[file]) if prompt not in rewards]
            bar = tqdm(range(0, len(todo), chunk), f"{name}, {Path(file).name}", leave=False, disable=None)
            for start in bar:
                drawn = draw(prompts[file], todo[start : start + chunk], samples)
                rewards |= dict(zip(drawn.prompts, drawn.rewards.view(-1, samples).tolist(), strict=True))
                write_file(path, lambda file: file.write(json.dumps(record).encode()))
            spread = range(0, len(prompts[file]), -(-len(prompts[file]) * len(files) // 8))
            pictures.append(draw(prompts[file], spread, 2))
        del draw  # and its model, before the next is loaded
        every = [prompt for drawn in pictures for prompt in drawn.prompts]
        shown[name] = Samples(every, *(torch.cat(parts) for parts in list(zip(*pictures, strict=True))[1:]))

    record["table"] = {}
    for file in files:
        by_model = {name: torch.tensor([record["rewards"][name][file][p] for p in prompts[file]]) for name in loaders}
        row = {name: mean_and_error(rewards) for name, rewards in by_model.items()}
        if "base" in by_model:
            rise = by_model["finetuned"] - by_model["base"]
            row |= {"difference": mean_and_error(rise), "win rate": (rise.sign().mean().item() + 1) / 2}
        if not record["table"]:
            print("  ".join([f"{'prompts':>24}", f"{'images':>7}", *(f"{name:>17}" for name in row)]))
        cells = [
            f"{v['mean']:.4f} +- {v['standard_error']:.4f}" if isinstance(v, dict) else f"{v:.1%}" for v in row.values()
        ]
        cells = [f"{len(prompts[file]) * samples:>7}", *(f"{cell:>17}" for cell in cells)]
        print("  ".join([f"{Path(file).name:>24}", *cells]))
        record["table"][file] = row
    write_file(path, lambda file: file.write(json.dumps(record).encode()))
    plot_pairs(out / "evaluation.png", shown)
    print(f"see {out / 'evaluation.png'}")


@cache
def open_log(kind: str, run: str) -> Callable[[dict[str, float]], object]:
    """The function that sends an epoch's metrics to --log-to: "none", "tensorboard" or "wandb"."""
    if kind == "wandb":
        import wandb

        return wandb.init(project="prdp", name=run, dir=run).log
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run)

        def send(metrics: dict[str, float]) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, metrics["epoch"])
            writer.flush()

        return send
    return lambda metrics: None


def log_epoch(run: Path, metrics: dict[str, float], header: bool, log_to: str) -> None:
    """A line on the screen, a line in metrics.jsonl, reward.png drawn again, and the metrics sent to `log_to`.

    Warns, once a run, when the reward has risen and the distance to the reference passes FAR.
    """
    parts = [name for name in metrics if name.startswith("reward_mean/")]
    columns = [*COLUMNS[:3], *(parts if len(parts) > 1 else []), *COLUMNS[3:]]
    if header:
        print("  ".join(f"{name:>9}" for name in columns))
    print("  ".join(f"{metrics[name]:>{max(9, len(name))}.4g}" for name in columns), flush=True)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics) + "\n")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    far = [row["log_ratio_ref"] > FAR and row["reward_mean"] > rows[0]["reward_mean"] for row in rows]
    if far[-1] and sum(far) == 1:
        print(
            f"warning: the reward rises, and log_ratio_ref is {metrics['log_ratio_ref']:.1f} nats per dimension: look "
            "in samples/ for over-optimisation (Sec. 4.4). Against it: a higher --kl-weight, a lower "
            "--learning-rate, fewer epochs, a second reward that reads the prompt."
        )
    open_log(log_to, str(run))(metrics)
    plot_rewards(run)


def save_grid(path: Path, samples: Samples) -> None:
    """path.png, a row of images for each of the first 8 prompts, and path.json with every reward."""
    from PIL import Image

    images, rewards = (x.unflatten(0, (len(samples.prompts), -1)) for x in samples[1:])
    grid = images[:8, :8].permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (rows*H, columns*W, 3)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(grid.numpy()).save(path.with_suffix(".png"))
    table = [{"prompt": p, "rewards": r} for p, r in zip(samples.prompts, rewards.tolist(), strict=True)]
    path.with_suffix(".json").write_text(json.dumps(table, indent=1))


def plot_rewards(run: Path) -> None:
    """reward.png: mean and standard deviation of each epoch's rewards, and the mean over the fixed samples."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epochs, mean, std = (torch.tensor([row[k] for row in rows]) for k in ("epoch", "reward_mean", "reward_std"))
    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    axes.fill_between(epochs, mean - std, mean + std, alpha=0.15, lw=0)
    axes.plot(epochs, mean, label="training images: mean, standard deviation")
    for path in sorted((run / "samples").glob("*.json")):
        rewards = [reward for row in json.loads(path.read_text()) for reward in row["rewards"]]
        label = "the same prompts and seeds: mean" if path.stem == "epoch_0000" else None
        axes.plot(int(path.stem.removeprefix("epoch_")), sum(rewards) / len(rewards), "o", color="C1", label=label)
    axes.set(xlabel="epoch", ylabel="reward")
    axes.legend(frameon=False)
    figure.savefig(run / "reward.png", dpi=120)


def plot_pairs(path: Path, shown: dict[str, Samples]) -> None:
    """2 images for each of the first 8 prompts, a row for each model, the same seed in a column, rewards below."""
    from matplotlib.figure import Figure

    prompts = next(iter(shown.values())).prompts
    columns, shots = min(8, len(prompts)), min(2, len(next(iter(shown.values())).images) // len(prompts))
    figure = Figure(figsize=(1.5 * columns + 0.5, 1.9 * shots * len(shown)), layout="constrained")
    for i, half in enumerate(figure.subfigures(shots, 1, squeeze=False)[:, 0]):
        axes = half.subplots(len(shown), columns, squeeze=False)
        for row, (name, samples) in enumerate(shown.items()):
            for n, axis in enumerate(axes[row]):
                m = n * (len(samples.images) // len(prompts)) + i
                axis.imshow(samples.images[m].permute(1, 2, 0).numpy(), interpolation="nearest")
                axis.set(xticks=[], yticks=[], ylabel=name if n == 0 else None)
                axis.set_xlabel(f"{samples.rewards[m]:.4g}", fontsize=9, labelpad=2)
        for axis, prompt in zip(axes[0], prompts, strict=False):
            lines = textwrap.wrap(prompt, 20, max_lines=4, placeholder=" ...")
            axis.set_title("\n".join(lines), fontsize=8, parse_math=False)
    figure.savefig(path, dpi=120)


def compare(run: Path, before: Samples, after: Samples) -> None:
    """A finished run's before_after.png and last reward.png, and the rise of the mean reward on the fixed samples."""
    plot_rewards(run)
    plot_pairs(run / "before_after.png", {"base": before, "finetuned": after})
    rise, error = mean_and_error((after.rewards - before.rewards).unsqueeze(0)).values()
    print(
        f"mean reward of {len(before.rewards)} images on fixed prompts and seeds: {before.rewards.mean():.4f} -> "
        f"{after.rewards.mean():.4f}, {rise:+.4f} +- {error:.4f} (standard error of the paired difference)\n"
        f"see {run / 'before_after.png'}"
    )
