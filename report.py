"""What a run shows and writes: its folder, a line an epoch, grids, the reward's curve, pictures of
models. Knows nothing of diffusion; of processes, since rank 0 alone shows and writes."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

COLUMNS = (
    "epoch",
    "reward_mean",
    "reward_std",
    "loss",
    "explained",
    "clip_fraction",
    "skipped_fraction",
    "log_ratio_old",
    "log_ratio_ref",
    "grad_norm",
    "images_per_second",
)
# log_ratio_ref at which a step's mean is 4.5 of its sigmas off; toy runs that kept to the prompt
# stayed below 7.
FAR = 10.0


class Samples(NamedTuple):
    """S images for each of P prompts, and their rewards, on the CPU."""

    prompts: list[str]
    images: Tensor  # (P*S, 3, H, W) uint8
    rewards: Tensor  # (P*S,) float32


# ---- Processes -----------------------------------------------------------------------------------


def start_processes() -> torch.device:
    """Join the other processes where torchrun started this one; the device of this one."""
    cuda = torch.cuda.is_available()
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # NCCL's ten minutes are shorter than one process may lag behind another.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))
    return torch.device("cuda" if cuda else "cpu")


def end_processes() -> None:
    """A process that ends while another still works may abort in gloo: they wait for each other."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; only rank 0 prints and writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def own_share(count: int) -> slice:
    """Which of `count` things in a row are this process's."""
    size = count // processes()
    return slice(size * rank(), size * (rank() + 1))


def gather(x: Tensor) -> Tensor:
    """(M, ...) tensors of all processes as one, in their order."""
    if processes() == 1:
        return x
    x = x.to("cuda" if dist.get_backend() == "nccl" else "cpu").contiguous()
    parts = [torch.empty_like(x) for _ in range(processes())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def share(content):
    """Rank 0's, in every process: only there need its folder be."""
    box = [content]
    if processes() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def on_rank_0(read: Callable):
    """What `read` returns on rank 0, in every process."""
    return share(read() if rank() == 0 else None)


def merge(content: dict) -> dict:
    """The dicts of all processes as one."""
    parts = [content]
    if processes() > 1:
        parts = [None] * processes()
        dist.all_gather_object(parts, content)
    return {key: value for part in parts for key, value in part.items()}


def say(text: str) -> None:
    """Print, at once, on rank 0."""
    if rank() == 0:
        print(text, flush=True)


# ---- Files ---------------------------------------------------------------------------------------


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, for a file or folder to take its place whole or not at all.

    After a crash there is the old file or the new one; of a folder, for a moment neither. What
    cannot be written leaves nothing behind, and is an OSError that names `path`.
    """
    temporary = path.with_name(path.name + ".tmp")
    remove(temporary)  # of a run that was killed
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in [temporary, *temporary.rglob("*")]:
            if file.is_file():
                file.chmod(0o666 & ~umask())  # safetensors' are for their owner alone
                flush(file)
        if path.is_dir():
            remove(path)
        os.replace(temporary, path)
    except BaseException as error:
        remove(temporary)
        if not isinstance(error, Exception):
            raise
        # torch, Pillow and safetensors each report a full disk by an exception of their own.
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        reason = os.strerror(number) if isinstance(error, OSError) else " ".join(str(error).split())
        if path.parent.is_dir() and shutil.disk_usage(path.parent).free < 2**20:
            reason = os.strerror(errno.ENOSPC)
        raise OSError(number, reason, str(path)) from error


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def umask() -> int:
    """What new files are kept from others; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def flush(path: Path) -> None:
    """To the disk, so that no crash of the machine can leave a renamed but empty file."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_json(path: Path, content: object) -> None:
    if rank() == 0:
        with writing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False))


def digest(parts: Iterable[bytes]) -> str:
    """16 characters that stand for all of them, in order."""
    hashes = b"".join(hashlib.sha256(part).digest() for part in parts)
    return hashlib.sha256(hashes).hexdigest()[:16]


def weights_digest(pipe) -> str:
    """Of 64 numbers of every pretrained weight: cheap, and another model has others."""
    networks = (pipe.unet, pipe.vae, pipe.text_encoder)
    named = [named for network in networks for named in network.named_parameters()]
    weights = [p.detach().flatten() for name, p in named if "lora_" not in name]
    return digest(w[:: max(1, len(w) // 64)].float().cpu().numpy().tobytes() for w in weights)


# ---- The run folder ------------------------------------------------------------------------------

VERSION = 3  # of the checkpoint's layout


def is_used(run: Path) -> bool:
    """Does a folder hold more than a start that failed before its first epoch was over?"""
    if not run.is_dir():
        return run.exists()
    names = {path.name for path in run.iterdir()}
    if "config.json" not in names or read_metrics(run):
        return bool(names)
    try:
        done = read_state(run)["epoch"] if "state.pt" in os.listdir(run / "checkpoint") else 0
    except (ValueError, OSError):
        return True  # perhaps of use to somebody
    return done > 0 or bool(names - {"config.json", "samples", "checkpoint", "metrics.jsonl"})


def start_run(run: Path, record: dict, epoch: int, before: Samples) -> None:
    """The files of a run that goes on with `epoch`; of epoch 1 a checkpoint without weights too, so
    that a folder with metrics always has one."""
    if rank() != 0:
        return
    write_json(run / "config.json", record)
    if epoch == 1:
        save_state(run, record, 0, {})
    write_metrics(run, [row for row in read_metrics(run) if row["epoch"] < epoch])
    save_grid(run, 0, before)


def make_record(settings: dict, prompts: list[str], files: list[Path], pipe) -> dict:
    """What config.json holds, as JSON gives it back: the settings, and digests of what a result
    depends on beside them: prompts as read, the reward's Python files, pretrained weights."""
    record = {
        **settings,
        "prompts_digest": digest(prompt.encode() for prompt in prompts),
        "reward_digest": digest(file.read_bytes() for file in files),
        "model_digest": weights_digest(pipe),
    }
    # JSON has no infinity.
    record |= {name: "inf" for name, value in settings.items() if value == math.inf}
    return json.loads(json.dumps(record))


def save_pipeline(run: Path, pipe) -> None:
    """pipeline/, as diffusers' from_pretrained reads it: the learned UNet, the scheduler, and every
    other part copied as it came. Of adapters, which become part of the UNet, lora/ too."""
    if rank() != 0:
        return
    if hasattr(pipe.unet, "peft_config"):
        save_adapters(run, pipe)
    source, learned = Path(pipe.config._name_or_path), ("unet", "scheduler")
    index = json.loads((source / "model_index.json").read_text())
    with writing(run / "pipeline") as folder:
        for name in index.keys() - set(learned):
            for file in (source / name).rglob("*"):
                if file.is_file():
                    copy = folder / file.relative_to(source)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copy)  # not its permissions: it may be read-only
        for name in learned:
            part = getattr(pipe, name)
            part.save_pretrained(folder / name)
            index[name] = ["diffusers", type(part).__name__]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def save_adapters(run: Path, pipe) -> None:
    """lora/, for diffusers' `load_lora_weights`; then they are made part of the UNet."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    adapters = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    with writing(run / "lora") as folder:
        pipe.save_lora_weights(folder, unet_lora_layers=adapters)
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()


def save_state(run: Path, record: dict, epoch: int, state: dict) -> None:
    """checkpoint/state.pt, after a whole epoch."""
    if rank() == 0:
        with writing(run / "checkpoint" / "state.pt") as temporary:
            torch.save({"version": VERSION, "record": record, "epoch": epoch, **state}, temporary)


def load_state(run: Path, harmless: set[str]) -> dict:
    """What `save_state` saved, on the CPU; ValueError if it does not fit the run's config.json.

    Only rank 0 needs the folder: the others are sent its tensors, one by one.
    """

    def read() -> dict:
        state = read_state(run)
        require_same(state["record"], json.loads((run / "config.json").read_text()), harmless)
        return state

    leaves, structure = tree_flatten(read()) if rank() == 0 else ([], None)
    if processes() == 1:
        return tree_unflatten(leaves, structure)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    shapes = [x.to("meta") if torch.is_tensor(x) else x for x in leaves]
    shapes, structure = share((shapes, structure))
    for i, shape in enumerate(shapes):
        if torch.is_tensor(shape):
            sent = leaves[i].to(device) if leaves else torch.empty_like(shape, device=device)
            dist.broadcast(sent, 0)
            shapes[i] = sent.cpu()
    return tree_unflatten(shapes, structure)


def read_state(run: Path) -> dict:
    """state.pt, whole, on the CPU; ValueError for none, a damaged or a foreign one."""
    path = run / "checkpoint" / "state.pt"
    if not path.is_file():
        raise ValueError("has no checkpoint to go on from")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds
        raise ValueError(f"{path} is damaged or cannot be read") from error
    layout = {"version": int, "record": dict, "epoch": int}
    if isinstance(state, dict) and state.get("epoch") != 0:
        layout |= {"unet": dict, "optimizer": dict, "latest": dict}
    if not isinstance(state, dict) or any(type(state.get(n)) is not k for n, k in layout.items()):
        raise ValueError(f"{path} is no checkpoint of a run")
    if state["version"] != VERSION:
        raise ValueError(f"its checkpoint is of version {state['version']}, and this is {VERSION}")
    return state


def restore(state: dict, weights: dict[str, Tensor], optimizer) -> dict:
    """Put a state's weights and moments, if it has any, in place, and return the last rewards;
    ValueError unless there is one for each weight, of its shape."""
    if state["epoch"] == 0:
        return {}
    saved, moments = state["unet"], state["optimizer"].get("state", {})
    if saved.keys() != weights.keys() or len(moments) != len(weights):
        raise ValueError("its checkpoint is of a network with other weights")
    for (name, weight), moment in zip(weights.items(), moments.values(), strict=True):
        tensors = saved[name], moment["exp_avg"], moment["exp_avg_sq"]
        if any(tensor.shape != weight.shape for tensor in tensors):
            raise ValueError(f"its checkpoint has another shape of {name}")
    optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved[name])
    return state["latest"]


def require_same(then: dict, now: dict, harmless: set[str]) -> None:
    """Refuse to go on with other settings, prompts or weights than a run began with."""
    for name in sorted(then.keys() - harmless):
        if now.get(name) != then[name]:
            change = f"{name} is {now.get(name)}, and was {then[name]}"
            if name.endswith("_digest"):
                change = f"the {name.removesuffix('_digest')} changed since it began"
            raise ValueError(f"{change}; restore that, or choose a new --out")


# ---- Progress ------------------------------------------------------------------------------------


def progress(label: str, total: int):
    """A progress bar on the terminal of rank 0, nothing elsewhere."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # else a thread watches over the bars, and never ends
    hidden = True if rank() else None  # None: unless on a terminal
    return tqdm(total=total, desc=f"{label:>9}", unit="", leave=False, disable=hidden)


def gpu_memory() -> float:
    """Bytes; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    return float(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def duration(seconds: float) -> str:
    """In the unit a person would use: 40 s, 12 min, 3.5 h, 5 days."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


class Stopwatch:
    """`with timed("sample"):` adds the block's wall-clock time to seconds["sample"].

    A long block prints a line where there is no terminal for a progress bar.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        except Exception as error:
            error.add_note(f"{self.label}, {name}")  # where it happened
            raise
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent = time.perf_counter() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        if spent > 10 and not sys.stderr.isatty():
            say(f"{self.label}, {name}: {duration(spent)}")


def introduce(settings: dict, learning: list[Tensor], log_probs: str, prompts: int) -> None:
    """What is about to run."""
    millions = sum(p.numel() for p in learning) / 1e6
    symbols = {"E": "epochs", "K": "updates_per_epoch", "N": "prompts_per_epoch"}
    symbols |= {"B": "images_per_prompt", "T": "ddpm_steps", "clip range": "clip_range"}
    values = ", ".join(f"{symbol} {settings[name]}" for symbol, name in symbols.items())
    say(f"{settings['loss']} on {settings['model']}: {millions:.1f} M parameters; {values}")
    say(f"{processes()} process(es); passes in {settings['dtype']}; log-probs: {log_probs}")
    say(f"reward {settings['reward'] or 'of the caller'}; {prompts} prompts; to {settings['out']}")


def forecast(image: float, epoch: float, epochs: int) -> str:
    """What a run will take, from the seconds of its parts."""
    whole = f"an epoch takes about {duration(epoch)}, {epochs} epochs {duration(epochs * epoch)}"
    return f"{duration(image)} to sample an image: {whole}"


# ---- Epochs --------------------------------------------------------------------------------------


def epoch_metrics(
    epoch: int,
    rewards: Tensor,  # (M,)
    parts: dict[str, Tensor],  # of a summed reward, each (M,)
    others: dict[str, Tensor],
    updates: list[dict[str, Tensor]],
    seconds: dict[str, float],
) -> dict[str, float]:
    """A line of metrics.jsonl, over all processes; the README defines its fields."""
    means = {name: torch.stack([update[name] for update in updates]) for name in updates[0]}
    means |= others
    means = {name: gather(x.double().mean()[None]).mean().item() for name, x in means.items()}
    parts = {f"reward_mean/{label}": gather(part).mean().item() for label, part in parts.items()}
    rewards = gather(rewards)
    std = deviation(rewards)
    cuda = torch.cuda.is_available()
    return {
        "epoch": epoch,
        "reward_mean": rewards.mean().item(),
        "reward_std": std,
        "reward_se": std / len(rewards) ** 0.5,
        **parts,
        **means,
        **{f"seconds_{name}": value for name, value in seconds.items()},
        "images_per_second": len(rewards) / sum(seconds.values()),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0,
    }


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
                if value is not None:
                    writer.add_scalar(name, value, metrics["epoch"])
            writer.flush()

        return send
    return lambda metrics: None


def read_metrics(run: Path) -> list[dict]:
    """The rows of metrics.jsonl, epochs rising, without lines that are none (torn or foreign)."""
    path, rows = run / "metrics.jsonl", []
    if not path.is_file():
        return rows
    for line in path.read_text(errors="replace").split("\n"):
        try:
            row = json.loads(line)
            numbers = [row[name] + 0.0 for name in ("epoch", "reward_mean", "log_ratio_ref")]
        except (ValueError, TypeError, KeyError):
            continue
        if numbers[0] > (rows[-1]["epoch"] if rows else 0):
            rows.append(row)
    return rows


def write_metrics(run: Path, rows: list[dict]) -> None:
    """metrics.jsonl, whole, a row a line; strict JSON."""
    with writing(run / "metrics.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def log_epoch(run: Path, metrics: dict[str, float], header: bool, log_to: str) -> None:
    """A line on the screen, a line in metrics.jsonl, reward.png drawn again, and `log_to` told.

    Warns, once a run, when the reward has risen and the distance to the reference passes FAR.
    """
    if rank() != 0:
        return
    metrics = {
        name: value if math.isfinite(value) else None  # NaN is no JSON
        for name, value in metrics.items()
    }
    parts = [name for name in metrics if name.startswith("reward_mean/")]
    columns = [*COLUMNS[:3], *(parts if len(parts) > 1 else []), *COLUMNS[3:]]
    if header:
        print("  ".join(f"{name:>9}" for name in columns))
    cells = []
    for name in columns:
        text = "-" if metrics[name] is None else f"{metrics[name]:.4g}"
        cells.append(f"{text:>{max(9, len(name))}}")
    print("  ".join(cells), flush=True)

    rows = [*read_metrics(run), metrics]
    write_metrics(run, rows)
    if metrics["reward_std"] == 0:
        print("warning: every image has the same reward; there is nothing to learn from.")
    far = [is_far(row, rows[0]) for row in rows]
    if far[-1] and sum(far) == 1:
        print(
            f"warning: the reward rises, and log_ratio_ref is {metrics['log_ratio_ref']:.1f} nats "
            "per dimension: look in samples/ for over-optimisation (Sec. 4.4). Against it: a "
            "higher --kl-weight, a lower --learning-rate, fewer epochs, a second reward that reads "
            "the prompt."
        )
    open_log(log_to, str(run))(metrics)
    plot_rewards(run)


def is_far(row: dict, first: dict) -> bool:
    return row["log_ratio_ref"] > FAR and row["reward_mean"] > first["reward_mean"]


# ---- Pictures ------------------------------------------------------------------------------------


def deviation(x: Tensor) -> float:
    """Of numbers (M,); NaN of a single one."""
    return x.std().item() if len(x) > 1 else math.nan


def mean_and_error(rewards: Tensor) -> tuple[float, float]:
    """Mean of rewards (P, S), and its standard error over prompts; of one prompt, over images."""
    rows = (rewards.mean(1) if len(rewards) > 1 else rewards[0]).double()
    return rows.mean().item(), deviation(rows) / len(rows) ** 0.5


def save_grid(run: Path, epoch: int, samples: Samples) -> None:
    """samples/epoch_NNNN.png, a row of at most 8 images a prompt; .json beside it, every reward."""
    from PIL import Image

    if rank() != 0:
        return
    path = run / "samples" / f"epoch_{epoch:04d}"

    images, rewards = (x.unflatten(0, (len(samples.prompts), -1)) for x in samples[1:])
    grid = (
        images[:8, :8].permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    )  # (rows*H, columns*W, 3)
    with writing(path.with_suffix(".png")) as temporary:
        Image.fromarray(grid.numpy()).save(temporary, "png")
    table = [
        {"prompt": prompt, "rewards": row}
        for prompt, row in zip(samples.prompts, rewards.tolist(), strict=True)
    ]
    write_json(path.with_suffix(".json"), table)


def read_grids(run: Path) -> dict[int, float]:
    """Epoch -> mean reward, of every samples/epoch_NNNN.json that save_grid wrote."""
    means = {}
    for path in sorted((run / "samples").glob("epoch_*.json")):
        try:
            rewards = [r for row in json.loads(path.read_text()) for r in row["rewards"]]
            means[int(path.stem.removeprefix("epoch_"))] = sum(rewards) / len(rewards)
        except (ValueError, TypeError, KeyError, ZeroDivisionError):
            continue  # not ours
    return means


def save_figure(figure, path: Path) -> None:
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def plot_rewards(run: Path) -> None:
    """reward.png: mean and deviation of each epoch's rewards, and means over the fixed samples."""
    from matplotlib.figure import Figure

    rows = read_metrics(run)
    epochs = [row["epoch"] for row in rows]
    mean = torch.tensor([row["reward_mean"] for row in rows])
    std = torch.tensor([row["reward_std"] or 0.0 for row in rows])

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(epochs, mean - std, mean + std, alpha=0.15, lw=0)
    axes.plot(epochs, mean, label="training images: mean, standard deviation")
    grids = read_grids(run)
    axes.plot(
        grids.keys(), grids.values(), "o", color="C1", label="the same prompts and seeds: mean"
    )
    axes.set(xlabel="epoch", ylabel="reward")
    axes.legend(frameon=False)
    save_figure(figure, run / "reward.png")


def plot_pairs(path: Path, shown: dict[str, Samples]) -> None:
    """2 images for each of the first 8 prompts, a row a model, one seed a column, rewards below."""
    from matplotlib.figure import Figure

    if rank() != 0:
        return
    first = next(iter(shown.values()))
    per_prompt = len(first.images) // len(first.prompts)
    columns = min(8, len(first.prompts))
    shots = min(2, per_prompt)
    size = (1.5 * columns + 0.5, 1.9 * shots * len(shown))
    figure = Figure(figsize=size, layout="constrained")
    for shot, part in enumerate(figure.subfigures(shots, 1, squeeze=False)[:, 0]):
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
    save_figure(figure, path)


def compare(run: Path, before: Samples, after: Samples) -> None:
    """A finished run's before_after.png and last reward.png, and how far the mean reward rose."""
    if rank() != 0:
        return
    plot_rewards(run)
    plot_pairs(run / "before_after.png", {"base": before, "finetuned": after})
    rise, error = mean_and_error((after.rewards - before.rewards).unsqueeze(0))
    print(
        f"mean reward of {len(before.rewards)} images on fixed prompts and seeds: "
        f"{before.rewards.mean():.4f} -> {after.rewards.mean():.4f}, {rise:+.4f} +- {error:.4f} "
        f"(standard error of the paired difference)\nsee {run / 'before_after.png'}"
    )
