"""A run's folder: what is written there whole or not at all, and what a run goes on from."""

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

from support.cli import InputError, is_safetensors, reading
from support.distributed import on_rank_0, rank

# What a run and its continuation may differ in.
MAY_DIFFER = {"resume", "out", "epochs", "save_every", "sample_every", "log_to", "offload"}
VERSION = 4  # of the checkpoint's layout; 3 had "latest", DDPO's rewards, for "program"
OF_LOSS = {"prdp": "prdp.py", "ddpo": "baselines/ddpo.py", "ddpo-sf": "baselines/ddpo.py"}
STARTED = {"config.json", "metrics.jsonl", "checkpoint", "samples"}  # by a start that failed, too
OURS = STARTED | {"reward.png", "before_after.png", "pipeline", "lora"}


# ---- Files ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, for a file or folder that replaces it when it is whole.

    When killed there is the old one or the new one; of a folder, for a moment neither. What
    cannot be written leaves nothing behind, and is an InputError that names `path`.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        remove(temporary)  # of a run that was killed
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_dir():
            remove(path)
        os.replace(temporary, path)
    except BaseException as error:
        remove(temporary)
        if not isinstance(error, (OSError, RuntimeError)) and not is_safetensors(error):
            raise
        reason = getattr(error, "strerror", None) or "cannot be written; is the disk full?"
        raise InputError(f"{path}: {reason}; what was saved before is intact.") from error


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    if rank() == 0:
        with writing(path) as temporary:
            temporary.write_text(text)


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=1, allow_nan=False))


def read_json(path: Path, what: str) -> dict:
    """An object of a JSON file; InputError for anything else."""
    with reading(what):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise InputError(f"{what}: is no JSON object.")
    return content


def digest(parts: Iterable[bytes]) -> str:
    """16 characters that stand for all of them, in order."""
    hashes = b"".join(hashlib.sha256(part).digest() for part in parts)
    return hashlib.sha256(hashes).hexdigest()[:16]


def weights_digest(networks: Iterable[nn.Module]) -> str:
    """Of 64 numbers of every pretrained weight: cheap, and another model has others."""
    named = [named for network in networks for named in network.named_parameters()]
    weights = [p.detach().flatten() for name, p in named if "lora_" not in name]
    return digest(w[:: max(1, len(w) // 64)].float().cpu().numpy().tobytes() for w in weights)


# ---- config.json: program, settings, digests of what a result depends on beside them -------------


def digests(prompts: list[str], reward: list, pipe) -> dict[str, str]:
    """Of prompts as read, the Python files of the reward's components, pretrained weights."""
    files = dict.fromkeys(c.source for c in reward if c.source.endswith(".py"))
    return {
        "prompts_digest": digest(prompt.encode() for prompt in prompts),
        "reward_digest": digest(Path(file).read_bytes() for file in files),
        "model_digest": weights_digest([pipe.unet, pipe.vae, pipe.text_encoder]),
    }


def as_today(record: dict) -> dict:
    """A record of any age: once a reward was one string, and DDPO a loss of prdp.py."""
    record = dict(record)
    if isinstance(record.get("reward"), str):
        record["reward"] = next(csv.reader([record["reward"]], skipinitialspace=True))
    loss = record.get("loss", "prdp")
    record.setdefault("program", OF_LOSS.get(loss, f"--loss {loss}"))
    return record


def read_settings(run: Path, kind: type) -> dict:
    """The settings of a run, for the dataclass `kind`; what it lacks is the default."""
    what = f"--resume {run}: its config.json"
    record = as_today(read_json(run / "config.json", what))
    if record["program"] != kind.program:
        remedy = "a new --out"
        if record["program"].endswith(".py"):
            remedy = f"python {record['program']} --resume {run}"
        raise InputError(f"--resume {run}: began with {record['program']}; go on with {remedy}.")
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


# ---- A run's epochs ------------------------------------------------------------------------------


def open_run(config) -> dict:
    """The last checkpoint of a run that goes on, epoch 0 of a new one; InputError where --out is in
    use, or the checkpoint is not this run's."""
    out, what = Path(config.out), f"--resume {config.out}"
    if not config.resume:
        if on_rank_0(lambda: is_used(out)):
            raise InputError(f"--out {out}: in use; choose another, or go on with {what}.")
        return {"epoch": 0}
    saved = read_state(out)
    require_same(saved["record"], as_today(read_json(out / "config.json", what)), what)
    if saved["epoch"] > config.epochs:
        raise InputError(f"--epochs {config.epochs}: the run has done {saved['epoch']}.")
    return saved


def is_used(run: Path) -> bool:
    """Does a folder hold a run that has done an epoch, or what no failed start explains? Files of
    other names do not matter."""
    if not run.is_dir():
        return run.exists()
    ours = {path.name for path in run.iterdir()} & OURS
    if "config.json" not in ours or not ours <= STARTED or read_metrics(run):
        return bool(ours)
    try:
        return "checkpoint" in ours and read_state(run)["epoch"] > 0
    except InputError:
        return True  # perhaps of use to somebody


def begin(config, digests: dict, saved: dict, learning: tuple) -> tuple[dict, list[dict]]:
    """All has been read: compare, load, and only then write. Returns what config.json holds, and
    the rows of metrics.jsonl so far. learning: the weights by name, their optimizer, and the
    program's own state or None."""
    out, what = Path(config.out), f"--resume {config.out}"
    settings = {name: "inf" if x == math.inf else x for name, x in vars(config).items()}
    record = json.loads(json.dumps({"program": config.program, **settings, **digests}))
    if config.resume:
        require_same(saved["record"], record, what)
    if saved["epoch"]:
        restore(saved, *learning, what)
    rows = [row for row in read_metrics(out) if row["epoch"] <= saved["epoch"]]
    write_json(out / "config.json", record)
    if not saved["epoch"]:  # a folder with metrics always has a checkpoint
        save_state(out, record, 0, {})
    write_metrics(out, rows)
    return record, rows


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


def read_state(run: Path) -> dict:
    """state.pt, whole, on the CPU; InputError for none, a damaged or a foreign one."""
    path, what = run / "checkpoint" / "state.pt", f"--resume {run}"
    if not path.is_file():
        raise InputError(f"{what}: has no checkpoint to go on from.")
    try:  # mapped, where weights are copied to a GPU: several processes share the memory
        options = {"weights_only": True, "mmap": torch.cuda.is_available()}
        state = torch.load(path, map_location="cpu", **options)
    except Exception as error:  # of many kinds
        raise InputError(f"{what}: {path} is damaged or cannot be read.") from error
    if not isinstance(state, dict) or not {"version", "record", "epoch"} <= state.keys():
        raise InputError(f"{what}: {path} is no checkpoint of a run.")
    if state["version"] not in (3, VERSION):
        version = f"of version {state['version']}, and this is {VERSION}"
        raise InputError(f"{what}: its checkpoint is {version}.")
    return state


def restore(state: dict, weights: dict[str, Tensor], optimizer, program, what: str) -> None:
    """Put a state's weights, moments and the program's own state in place; InputError unless there
    is one for each weight, of its shape."""
    shapes = {name: weight.shape for name, weight in weights.items()}
    saved = {name: weight.shape for name, weight in state.get("unet", {}).items()}
    moments = state.get("optimizer", {}).get("state", {}).values()
    if saved != shapes or [x["exp_avg"].shape for x in moments] != list(shapes.values()):
        raise InputError(f"{what}: its checkpoint is of a network with other weights.")
    optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state["unet"][name])
    if program is not None:
        program.load_state_dict(state.get("program", {"latest": state.get("latest", {})}))


def read_metrics(run: Path) -> list[dict]:
    """The rows of metrics.jsonl, epochs rising, without lines that are none (torn or foreign)."""
    path, rows = run / "metrics.jsonl", []
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            last = rows[-1]["epoch"] if rows else 0
            if row["epoch"] > last and isinstance(row["reward_mean"], (int, float)):
                rows.append(row)
    return rows


def write_metrics(run: Path, rows: list[dict]) -> None:
    """metrics.jsonl, a row a line; strict JSON."""
    write_text(run / "metrics.jsonl", "".join(json.dumps(r, allow_nan=False) + "\n" for r in rows))
