"""A run's folder: one writer, files whole or not at all, and what a run goes on from."""

import contextlib
import csv
import dataclasses
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from support.cli import InputError, reading
from support.distributed import on_rank_0, rank, say
from support.inputs import MODULES

# What a run and its continuation may differ in; paths, because digests tell what they hold.
MAY_DIFFER = {"resume", "out", "epochs", "save_every", "keep_every", "sample_every", "log_to"}
MACHINE = {"microbatch", "gradient_checkpointing", "offload"}  # of these the bits may depend
MAY_DIFFER |= MACHINE | {"model", "prompts", "pairs", "reward", "tracker_id"}
VERSION = 4  # of the checkpoint's layout; 3 had "latest", DDPO's rewards, for "program"
OF_LOSS = {"prdp": "prdp.py", "ddpo": "baselines/ddpo.py", "ddpo-sf": "baselines/ddpo.py"}
STARTED = {"config.json", "metrics.jsonl", "checkpoint", "samples"}  # by a start that failed, too
OURS = STARTED | {"reward.png", "before_after.png", "pipeline", "lora", "epochs"}
OURS |= {"model_index.json"}  # of a model, which is no place for a run


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a lock in `folder` within this block; InputError if another process does. The system
    frees it whatever ends this process; forks do not inherit it."""
    if rank() != 0:
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise InputError(f"{folder}: another process writes there.") from error
        except (ImportError, OSError):
            say(f"warning: {folder} cannot be locked; let no other process write there.")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / ".lock").unlink()
                [path.rmdir() for path in made]  # a start that was refused leaves nothing


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, for a file or folder that replaces it when it is whole.

    When killed there is the old one or the new one; of a folder, for a moment neither. What
    cannot be written leaves nothing behind, and is an InputError that names `path`."""
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
        foreign = type(error).__module__.startswith("safetensors")
        if not (foreign or isinstance(error, (OSError, RuntimeError))):
            raise
        reason = getattr(error, "strerror", None) or "cannot be written; is the disk full?"
        raise InputError(f"{path}: {reason}; what was saved before is intact.") from error


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it, if it exists."""
    if path.is_dir() and not path.is_symlink():
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


def digests(models, prompts: list[str]) -> dict:
    """Of what a result depends on beside the settings: prompts as read, a reward's terms, Python
    files and networks, pretrained weights and the configs that go with them."""
    sd, reward = models.sd, models.reward
    beside = sorted({*MODULES.values()} - {*reward.files}) if reward.files else []
    scorers = [scorer for _, scorer in reward.components.values()]
    settings = [described(scorer.tokenizer) for scorer in scorers if hasattr(scorer, "tokenizer")]
    settings += [described(network) for network in reward.networks if hasattr(network, "config")]
    return {
        "prompts_digest": digest(prompt.encode() for prompt in prompts),
        "reward_terms": [f"{c}={weight:g}" for c, (weight, _) in reward.components.items()],
        "reward_digest": digest(Path(file).read_bytes() for file in reward.files),
        "reward_modules_digest": digest(Path(file).read_bytes() for file in beside),
        "reward_weights_digest": weights_digest(reward.networks),
        "model_digest": weights_digest([sd.unet, sd.vae, sd.pipe.text_encoder]),
        "tokenizer_digest": digest([described(sd.pipe.tokenizer)]),
        "reward_configs_digest": digest(settings),
        "model_configs_digest": digest([json.dumps(sd.configs, sort_keys=True).encode()]),
    }


def described(part) -> bytes:
    """A tokenizer, but for how it was last called, or a network's config, but for its place."""
    if hasattr(part, "config"):
        content = part.config.to_dict()
        content = {name: x for name, x in content.items() if "version" not in name}
        content.pop("_name_or_path", None)
    else:
        content = json.loads(part.backend_tokenizer.to_str())
        content |= {"truncation": None, "padding": None, "places": part.model_max_length}
    return json.dumps(content, sort_keys=True, default=str).encode()


def as_today(record: dict) -> dict:
    """A record of any age: once a reward was one string, and DDPO a loss of prdp.py."""
    record = dict(record)
    if isinstance(record.get("reward"), str):
        record["reward"] = next(csv.reader([record["reward"]], skipinitialspace=True))
    if isinstance(record.get("gradient_checkpointing"), bool):
        record["gradient_checkpointing"] = ("off", "on")[record["gradient_checkpointing"]]
    loss = record.get("loss", "prdp")
    record.setdefault("program", OF_LOSS.get(loss, f"--loss {loss}"))
    return record


def read_settings(run: Path, kind: type) -> dict:
    """The settings of a run, for the dataclass `kind`; what it lacks is the default."""
    what = f"--resume {run}: its config.json"
    if not (run / "config.json").is_file():
        raise InputError(f"{what}: No such file or directory; name the folder of a run.")
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
    then, same = as_today(then), set(MAY_DIFFER)
    if then.get("reward") == []:  # of a caller, who may have written it into a file
        kept = "reward_terms" if now.get("reward") == [] else ""
        same |= {name for name in then if name.startswith("reward") and name != kept}
    for name in now:
        if name not in same and then.get(name, now[name]) != now[name]:
            change = f"{name} is {now[name]}, and was {then[name]}"
            if name.endswith("_digest"):
                what_changed = name.removesuffix("_digest").replace("_", " ")
                change = f"the {what_changed} changed since it began"
            raise InputError(f"{what}: {change}; restore that, or choose a new --out.")


def open_run(config) -> dict:
    """The last checkpoint of a run that goes on, epoch 0 of a new one; InputError where --out is in
    use, or the checkpoint is not this run's.

    Neither other people's files are a use, nor what a start leaves that failed before its first
    epoch ended: empty metrics."""
    out, what = Path(config.out), f"--resume {config.out}"
    if not config.resume:
        sizes = on_rank_0(lambda: {path.name: path.lstat().st_size for path in out.iterdir()})
        used = OURS & sizes.keys()
        if used and not (used <= STARTED and sizes.get("metrics.jsonl") == 0):
            raise InputError(f"--out {out}: in use; choose another, or go on with {what}.")
        return {"epoch": 0}
    saved = read_state(out)
    require_same(saved["record"], as_today(read_json(out / "config.json", what)), what)
    if saved["epoch"] > config.epochs:
        raise InputError(f"--epochs {config.epochs}: the run has done {saved['epoch']}.")
    return saved


def begin(config, digests: dict, saved: dict, learning: tuple) -> tuple[dict, list[dict]]:
    """All has been read: compare, load, and only then write. Returns what config.json holds, and
    the rows of metrics.jsonl so far. learning: the weights by name, their optimizer, and the
    program's own state or None."""
    out, what = Path(config.out), f"--resume {config.out}"
    settings = {name: "inf" if x == math.inf else x for name, x in vars(config).items()}
    record = json.loads(json.dumps({"program": config.program, **settings, **digests}))
    record["tracker_id"] = saved.get("record", {}).get("tracker_id") or secrets.token_hex(4)
    if config.resume:
        require_same(saved["record"], record, what)
        then = as_today(saved["record"])
        if any(then.get(name, record[name]) != record[name] for name in MACHINE):
            say("warning: another microbatch, checkpointing or offload: digits may differ now.")
    epoch, (weights, optimizer, program) = saved["epoch"], learning
    if epoch:
        shapes = {name: weight.shape for name, weight in weights.items()}
        if {name: x.shape for name, x in saved["unet"].items()} != shapes:
            raise InputError(f"{what}: its checkpoint is of a network with other weights.")
        if program is None and "program" in saved:
            raise InputError(f"{what}: its checkpoint is of a run with --pairs.")
        optimizer.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(saved["unet"][name])
        if program is not None:
            program.load_state_dict(saved.get("program", {"latest": saved.get("latest", {})}))
    saved.clear()  # and its memory
    rows = [row for row in read_metrics(out) if row["epoch"] <= epoch]
    write_metrics(out, rows)
    write_json(out / "config.json", record)
    if not epoch:  # a folder with metrics always has a checkpoint
        save_state(out, record, 0, {})
    return record, rows


def end_epoch(config, record: dict, rows: list[dict], learning: tuple, sd) -> None:
    """The metrics, every --keep-every epochs a model, then every --save-every the checkpoint, from
    which a run goes on as if all before it had been done."""
    epoch, (weights, optimizer, program) = rows[-1]["epoch"], learning
    if rank() == 0 and not Path(config.out, "config.json").exists():
        raise InputError(f"{config.out}: has gone; go on with --resume from where it is now.")
    write_metrics(Path(config.out), rows)
    if config.keep_every and epoch % config.keep_every == 0:
        sd.save(Path(config.out, "epochs", f"{epoch:04d}"), record, epoch, merge=False)
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
    try:  # mapped, where weights are copied to a GPU: several processes share the memory
        options = {"weights_only": True, "mmap": torch.cuda.is_available()}
        state = torch.load(path, map_location="cpu", **options)
        version, *_ = (state[name] for name in ("version", "record", "epoch"))
    except FileNotFoundError as error:
        raise InputError(f"{what}: has no checkpoint to go on from.") from error
    except Exception as error:  # of many kinds
        raise InputError(f"{what}: {path} is damaged, or no checkpoint of a run.") from error
    if version not in (3, VERSION):
        raise InputError(f"{what}: its checkpoint is of version {version}, and this is {VERSION}.")
    return state


def read_metrics(run: Path) -> list[dict]:
    """The rows of metrics.jsonl, without a line that is torn."""
    path, rows = run / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def write_metrics(run: Path, rows: list[dict]) -> None:
    """metrics.jsonl, a row a line; strict JSON."""
    write_text(run / "metrics.jsonl", "".join(json.dumps(r, allow_nan=False) + "\n" for r in rows))
