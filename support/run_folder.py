"""A run's folder: one writer, files whole or not at all, and what a run goes on from."""

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import filelock
import torch
from torch import nn

from support.cli import UserError, reading, resuming
from support.distributed import gather_objects, print0, rank

# What a run and its continuation may differ in; paths, because digests tell what they hold.
MAY_DIFFER = {"resume", "out", "epochs", "save_every", "keep_every", "sample_every", "log_to"}
MAY_DIFFER |= {"microbatch", "gradient_checkpointing", "offload", "model", "prompts", "pairs"}
MAY_DIFFER |= {"reward", "reward_digests"}
OURS = {"config.json", "metrics.jsonl", "checkpoint", "samples", "pipeline", "lora", "epochs"}
OURS |= {"reward.png", "before_after.png", "model_index.json"}  # a model is no place for a run


class Learner(NamedTuple):
    """What learns, and so what a checkpoint holds."""

    weights: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    state: object  # what the program's `train` keeps between epochs, or None


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a lock in `folder` within this block; UserError if another process does. The system
    frees it whatever ends this process; forks do not inherit it."""
    if rank() != 0:
        yield
        return
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder}: is no folder; choose another.")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".prdp.lock", timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise UserError(f"{folder}: another process writes there.") from error
    except (OSError, NotImplementedError):
        print0(f"warning: {folder} cannot be locked; let no other process write there.")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / ".prdp.lock").unlink()
            if made:  # a start that was refused leaves nothing
                folder.rmdir()
        lock.release()


@contextlib.contextmanager
def forgiving(what: str) -> Iterator[None]:
    """What fails here is a warning: it must not cost the run what is safe already."""
    try:
        yield
    except Exception as error:
        print0(f"warning: {what}: {type(error).__name__}: {' '.join(str(error).split())}")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, for a file or folder that replaces it when it is whole. What
    cannot be written leaves nothing behind, and is a UserError that names `path`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        remove(temporary)  # of a run that was killed
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in temporary.rglob("*.safetensors"):  # else for its owner alone
            with contextlib.suppress(OSError):  # of a disk without modes
                file.chmod(temporary.stat().st_mode & 0o666)
        if path.is_dir():
            remove(path)
        os.replace(temporary, path)
    except Exception as error:
        foreign = type(error).__module__.startswith("safetensors")
        if not (foreign or isinstance(error, (OSError, RuntimeError))):
            raise
        reason = getattr(error, "strerror", None) or "cannot be written; is the disk full?"
        raise UserError(f"{path}: {reason}; what was saved before is intact.") from error
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: object, lines: bool = False) -> None:
    """Strict JSON, on rank 0 alone; with `lines` each member of a list in a line of its own."""
    if rank() == 0:
        parts, indent = (content, None) if lines else ([content], 1)
        texts = [json.dumps(part, allow_nan=False, indent=indent) + "\n" for part in parts]
        with writing(path) as temporary:
            temporary.write_text("".join(texts), encoding="utf-8")


def read_json(path: Path, what: str) -> dict:
    with reading(what):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{what}: is no JSON object.")
    return content


def digest(parts: Iterable[bytes]) -> str:
    hashes = [hashlib.sha256(part).digest() for part in parts]
    return hashlib.sha256(b"".join(hashes)).hexdigest()[:16]


def weights_digest(networks: Iterable[nn.Module], adapters: bool = True) -> str:
    """The digest of some numbers of every weight and buffer, the last ones (of added tokens) too:
    cheap, and another model has others."""
    parts = []
    for network in networks:
        for name, x in (*network.named_parameters(), *network.named_buffers()):
            if x.is_floating_point() and (adapters or "lora_" not in name):
                x = x.detach().flatten()
                some = torch.cat([x[:: max(1, len(x) // 64)], x[-64:]])
                parts.append(some.float().cpu().numpy().tobytes())
    return digest(parts)


def model_digest(sd) -> dict[str, str]:
    """What is drawn: by these weights, and by this noise schedule, scale and shape of latents."""
    settings = json.dumps([sd.noise_settings, sd.vae.config.scaling_factor, sd.latent_shape])
    weights = weights_digest([sd.unet, sd.vae, sd.text_encoders], adapters=False)
    return {"model_digest": digest([settings.encode(), weights.encode()])}


def digests(reward, prompts: list[str]) -> dict:
    """What a result depends on beside settings and model: prompts as read, and a reward's terms,
    Python files and weights."""
    return {
        "prompts_digest": digest(prompt.encode() for prompt in prompts),
        "reward_terms": [f"{label}={weight:g}" for label, (weight, _) in reward.components.items()],
        "reward_digest": digest(reward.files.values()),
        "reward_weights_digest": weights_digest(reward.networks),
    }


def require_same(then: dict, now: dict, what: str, remedy: str = "choose a new --out") -> None:
    """UserError where a run's settings, prompts or weights are others than it began with."""
    for name in now:
        if name not in MAY_DIFFER and then.get(name, now[name]) != now[name]:
            change = f"{name} is {now[name]}, and was {then[name]}"
            if name.endswith("_digest"):
                part = name.removesuffix("_digest").replace("_", " ")
                change = f"the {part} changed since it began"
            raise UserError(f"{what}: {change}; restore that, or {remedy}.")


def open_run(config) -> dict:
    """The last checkpoint of a run that goes on, epoch 0 of a new one; UserError where --out is in
    use: not by other people's files, nor by a start that failed in its first epoch."""
    out = Path(config.out)
    if config.resume:
        saved = read_state(out)
        if saved["epoch"] > config.epochs:
            raise UserError(f"--epochs {config.epochs}: the run has done {saved['epoch']}.")
        return saved
    sizes = {path.name: path.lstat().st_size for path in out.glob("*")}
    sizes = gather_objects(sizes)[0]  # by now others may see what rank 0 writes
    failed = sizes.get("metrics.jsonl") == 0 and "reward.png" not in sizes  # in its first epoch
    if OURS & sizes.keys() and not failed:
        again = f"{resuming(config.program, out)} (more epochs: --epochs)"
        raise UserError(f"--out {out}: in use; choose another, or go on with: {again}.")
    return {"epoch": 0}


def restore(config, saved: dict, learner: Learner, models, prompts: list[str]) -> dict:
    """Compare a run with what it began as, and load its checkpoint; nothing is written. Returns
    what config.json is to hold."""
    what, sd, reward = f"--resume {config.out}", models.sd, models.reward
    settings = {name: "inf" if x == math.inf else x for name, x in vars(config).items()}
    record = {"program": config.program, **settings, **digests(reward, prompts), **model_digest(sd)}
    record = json.loads(json.dumps(record))
    then = dict(saved.get("record", record))
    require_same(then, record, what)
    record["tracker_id"] = then.get("tracker_id", secrets.token_hex(4))

    # A user's own reward may be mended and gone on with: config.json has the digest of each.
    files = record.pop("reward_digest")
    record["reward_digests"] = [*then.get("reward_digests", [files])]
    if record["reward_digests"][-1] != files:
        record["reward_digests"].append(files)
        changed = ", ".join(reward.files) or "the reward"
        print0(f"warning: {changed}: changed since the run began.")
    if not saved["epoch"]:
        return record

    weights, optimizer, state = learner
    shapes = {name: weight.shape for name, weight in weights.items()}
    if {name: x.shape for name, x in saved["unet"].items()} != shapes:
        raise UserError(f"{what}: its checkpoint is of a network with other weights.")
    if (state is None) != ("state" not in saved):
        raise UserError(f"{what}: its `train` was another's; call run with that, and its state.")
    sd.unet.load_state_dict(saved["unet"], strict=False)
    optimizer.load_state_dict(saved["optimizer"])
    if state is not None:
        state.load_state_dict(saved["state"])
    del saved["unet"], saved["optimizer"]  # and their memory
    return record


def begin(config, record: dict, start: int) -> list[dict]:
    """Write config.json, and the metrics of the epochs before `start`, which are returned."""
    out = Path(config.out)
    rows = [row for row in read_metrics(out) if row["epoch"] < start]
    write_json(out / "metrics.jsonl", rows, lines=True)
    write_json(out / "config.json", record)
    if start == 1:  # a folder with metrics always has a checkpoint
        save_checkpoint(out, record, 0, {})
    return rows


def save_checkpoint(run: Path, record: dict, epoch: int, state: dict) -> None:
    if rank() == 0:
        with writing(run / "checkpoint" / "state.pt") as temporary:
            torch.save({"record": record, "epoch": epoch, **state}, temporary)
            # What could not be read again ends here; no tensor is read.
            torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)


def save_epoch(config, record: dict, rows: list[dict], learner: Learner, sd) -> None:
    """The metrics, every --save-every epochs the checkpoint, from which a run goes on as if all
    before it had been done, then every --keep-every a model."""
    out, epoch = Path(config.out), rows[-1]["epoch"]
    if rank() == 0 and not (out / "config.json").exists():
        raise UserError(f"{out}: has gone; go on with --resume from where it is now.")
    write_json(out / "metrics.jsonl", rows, lines=True)
    if epoch % config.save_every == 0 or epoch == config.epochs:
        state = {"unet": learner.weights, "optimizer": learner.optimizer.state_dict()}
        if learner.state is not None:
            state["state"] = learner.state.state_dict()
        save_checkpoint(out, record, epoch, state)
    if config.keep_every and epoch % config.keep_every == 0:
        with forgiving(f"the model of epoch {epoch}"):
            sd.save(out / "epochs" / f"{epoch:04d}", record, epoch, merge=False)


def read_state(run: Path) -> dict:
    """state.pt, whole, on the CPU; UserError for none, a damaged or a foreign one."""
    path, what = run / "checkpoint" / "state.pt", f"--resume {run}"
    if not path.is_file():
        raise UserError(f"{what}: has no checkpoint to go on from.")
    try:  # mapped, where weights are copied to a GPU: several processes share the memory
        mapped = torch.cuda.is_available()
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        return {**state, "record": state["record"], "epoch": state["epoch"]}
    except Exception as error:  # of many kinds
        raise UserError(f"{what}: {path} is damaged, or no checkpoint of a run.") from error


def read_metrics(run: Path) -> list[dict]:
    """The rows of metrics.jsonl; UserError where it is not ours."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    with reading(str(path)):
        lines = path.read_text(encoding="utf-8").strip().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        what = f"{path}: take line {number} away"
        with reading(what):
            rows.append(json.loads(line))
        if not isinstance(rows[-1], dict) or type(rows[-1].get("epoch")) is not int:
            raise UserError(f"{what}: it is no epoch's.")
    return rows
