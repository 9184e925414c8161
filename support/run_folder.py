"""A run's folder: what is written there whole or not at all, and what a run goes on from."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from support.cli import InputError, in_brief, is_of_a_file, reading
from support.distributed import on_rank_0, rank, share_state
from support.inputs import read_json

# What a run and its continuation may differ in.
MAY_DIFFER = {"resume", "out", "epochs", "save_every", "sample_every", "log_to", "offload"}
VERSION = 4  # of the checkpoint's layout; 3 had "latest", DDPO's rewards, for "program"
OURS = {"config.json", "metrics.jsonl", "checkpoint", "samples", "reward.png", "before_after.png"}
OURS |= {"pipeline", "lora"}
LOSSES = {"prdp": "prdp.py", "ddpo": "baselines/ddpo.py", "ddpo-sf": "baselines/ddpo.py"}


# ---- Files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, for a file or folder that replaces it when it is whole.

    After a crash there is the old one or the new one; of a folder, for a moment neither. What
    cannot be written leaves nothing behind, and is an InputError that names `path`.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        remove(temporary)  # of a run that was killed
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_file():
            with contextlib.suppress(OSError), open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # where a disk can: no crash leaves an empty file
        elif path.is_dir():
            remove(path)
        os.replace(temporary, path)
    except BaseException as error:
        remove(temporary)
        if not is_of_a_file(error):
            raise
        reason = in_brief(error)  # torch, Pillow and safetensors do not say that a disk is full
        if path.parent.is_dir() and shutil.disk_usage(path.parent).free < 2**20:
            reason = os.strerror(28)
        raise InputError(f"{path}: {reason}; what was saved before is intact.") from error


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    if rank() == 0:
        with writing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False))


def digest(parts: Iterable[bytes]) -> str:
    """16 characters that stand for all of them, in order."""
    hashes = b"".join(hashlib.sha256(part).digest() for part in parts)
    return hashlib.sha256(hashes).hexdigest()[:16]


def weights_digest(networks: Iterable[nn.Module]) -> str:
    """Of 64 numbers of every pretrained weight: cheap, and another model has others."""
    named = [named for network in networks for named in network.named_parameters()]
    weights = [p.detach().flatten() for name, p in named if "lora_" not in name]
    return digest(w[:: max(1, len(w) // 64)].float().cpu().numpy().tobytes() for w in weights)


# ---- config.json ---------------------------------------------------------------------------------


def make_record(config, prompts: list[str], files: list[Path], pipe) -> dict:
    """What config.json holds, as JSON gives it back: the program, its settings, and digests of what
    a result depends on beside them."""
    settings = {
        name: "inf" if value == math.inf else value  # which JSON has no number for
        for name, value in vars(config).items()
    }
    digests = {
        "prompts_digest": digest(prompt.encode() for prompt in prompts),
        "reward_digest": digest(file.read_bytes() for file in files),
        "model_digest": weights_digest([pipe.unet, pipe.vae, pipe.text_encoder]),
    }
    return json.loads(json.dumps({"program": config.program, **settings, **digests}))


def as_today(record: dict) -> dict:
    """A record of any age: a reward was one string, DPO and others losses of prdp.py."""
    record = dict(record)
    if isinstance(record.get("reward"), str):
        record["reward"] = next(csv.reader([record["reward"]], skipinitialspace=True))
    loss = record.get("loss", "prdp")
    record.setdefault("program", LOSSES.get(loss, f"--loss {loss}"))
    return record


def read_settings(run: Path, kind: type) -> dict:
    """The settings of a run, for the dataclass `kind`; what it lacks is the default."""
    what = f"--resume {run}: its config.json"
    record = as_today(read_json(run / "config.json", what))
    if record["program"] != kind.program:
        began = record["program"]
        remedy = f"python {began} --resume {run}" if began.endswith(".py") else "a new --out"
        raise InputError(f"--resume {run}: began with {began}; go on with {remedy}.")
    fields = [field for field in dataclasses.fields(kind) if field.name in record]
    with reading(what):
        return {field.name: type(field.default)(record[field.name]) for field in fields}


def require_same(then: dict, now: dict, what: str) -> None:
    """InputError where a run's settings, prompts or weights are others than it began with."""
    then = as_today(then)
    for name in sorted(then.keys() & now.keys() - MAY_DIFFER):
        if now[name] != then[name]:
            change = f"{name} is {now[name]}, and was {then[name]}"
            if name.endswith("_digest"):
                change = f"the {name.removesuffix('_digest')} changed since it began"
            raise InputError(f"{what}: {change}; restore that, or choose a new --out.")


# ---- Checkpoints ---------------------------------------------------------------------------------


def is_used(run: Path) -> bool:
    """Does a folder hold a run that has done an epoch, or anything of ours that no run explains?
    Files of other names do not matter."""
    if not run.is_dir():
        return run.exists()
    ours = {path.name for path in run.iterdir()} & OURS
    if "config.json" not in ours or read_metrics(run):
        return bool(ours)
    try:
        done = (run / "checkpoint" / "state.pt").exists() and read_state(run)["epoch"] > 0
    except InputError:
        return True  # perhaps of use to somebody
    return done or bool(ours - {"config.json", "samples", "checkpoint", "metrics.jsonl"})


def open_run(config) -> dict:
    """The last checkpoint of a run that goes on, of a new one epoch 0; InputError where --out is in
    use or --resume cannot be read."""
    out = Path(config.out)
    if not config.resume:
        if on_rank_0(lambda: is_used(out)):
            remedy = f"choose another, or go on with --resume {out}"
            raise InputError(f"--out {out}: in use; {remedy}.")
        return {"epoch": 0}
    saved = load_state(out)
    if saved["epoch"] > config.epochs:
        raise InputError(f"--epochs {config.epochs}: the run has done {saved['epoch']}.")
    return saved


def begin(config, record: dict, saved: dict, learning: tuple) -> list[dict]:
    """All has been read: compare, load, and only then write; the rows of epochs that stand.

    learning: the weights by name, their optimizer, and the program's own state or None.
    """
    out, what = Path(config.out), f"--resume {config.out}"
    if config.resume:
        require_same(saved["record"], record, what)
    if saved["epoch"]:
        restore(saved, *learning, what)
    rows = [row for row in read_metrics(out) if row["epoch"] <= saved["epoch"]]
    write_json(out / "config.json", record)
    if not saved["epoch"]:  # a folder with metrics always has a checkpoint
        save_state(out, record, 0, {})
    write_metrics(out, rows)
    return rows


def end_epoch(config, record: dict, rows: list[dict], learning: tuple) -> None:
    """The metrics, then every --save-every epochs the checkpoint."""
    epoch, (weights, optimizer, program) = rows[-1]["epoch"], learning
    write_metrics(Path(config.out), rows)
    if epoch % config.save_every == 0 or epoch == config.epochs:
        state = {"unet": weights, "optimizer": optimizer.state_dict()}
        if program is not None:
            state["program"] = program.state_dict()
        save_state(Path(config.out), record, epoch, state)


def save_state(run: Path, record: dict, epoch: int, state: dict) -> None:
    """checkpoint/state.pt, after a whole epoch."""
    if rank() == 0:
        with writing(run / "checkpoint" / "state.pt") as temporary:
            torch.save({"version": VERSION, "record": record, "epoch": epoch, **state}, temporary)


def load_state(run: Path) -> dict:
    """What `save_state` saved, on the CPU, in every process; InputError unless it fits the run's
    config.json. Only rank 0 needs the folder."""

    def read() -> dict:
        state, what = read_state(run), f"--resume {run}"
        record = read_json(run / "config.json", what)
        require_same(state["record"], as_today(record), what)
        return state

    return share_state(read() if rank() == 0 else None)


def read_state(run: Path) -> dict:
    """state.pt, whole, on the CPU; InputError for none, a damaged or a foreign one."""
    path = run / "checkpoint" / "state.pt"
    if not path.is_file():
        raise InputError(f"--resume {run}: has no checkpoint to go on from.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds
        raise InputError(f"--resume {run}: {path} is damaged or cannot be read.") from error
    layout = {"version": int, "record": dict, "epoch": int}
    if isinstance(state, dict) and state.get("epoch") != 0:
        layout |= {"unet": dict, "optimizer": dict}
    if not isinstance(state, dict) or any(type(state.get(n)) is not k for n, k in layout.items()):
        raise InputError(f"--resume {run}: {path} is no checkpoint of a run.")
    if state["version"] not in (3, VERSION):
        version = f"of version {state['version']}, and this is {VERSION}"
        raise InputError(f"--resume {run}: its checkpoint is {version}.")
    return state


def restore(state: dict, weights: dict[str, Tensor], optimizer, program, what: str) -> None:
    """Put a state's weights, moments and the program's own state in place; InputError unless there
    is one for each weight, of its shape."""
    shapes = {name: weight.shape for name, weight in weights.items()}
    moments = [moment["exp_avg"].shape for moment in state["optimizer"]["state"].values()]
    saved = {name: weight.shape for name, weight in state["unet"].items()}
    if saved != shapes or moments != list(shapes.values()):
        raise InputError(f"{what}: its checkpoint is of a network with other weights.")
    optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state["unet"][name])
    if program is not None:
        program.load_state_dict(state.get("program", {"latest": state.get("latest", {})}))


# ---- metrics.jsonl -------------------------------------------------------------------------------


def read_metrics(run: Path) -> list[dict]:
    """The rows of metrics.jsonl, epochs rising, without lines that are none (torn or foreign)."""
    path, rows = run / "metrics.jsonl", []
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    for line in lines:
        try:
            row = json.loads(line)
            numbers = [row[name] + 0.0 for name in ("epoch", "reward_mean")]
        except (ValueError, TypeError, KeyError):
            continue
        if numbers[0] > (rows[-1]["epoch"] if rows else 0):
            rows.append(row)
    return rows


def write_metrics(run: Path, rows: list[dict]) -> None:
    """metrics.jsonl, whole, a row a line; strict JSON."""
    if rank() == 0:
        with writing(run / "metrics.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
