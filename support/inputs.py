"""Reading what users and the hub give: prompts, networks, tokenizers, checkpoints of tensors."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from support.cli import InputError, reading


def load_prompts(path: str | Path) -> list[str]:
    """Prompts of a .txt (a line each; blank and # lines skipped), .json or .jsonl file (strings, or
    objects with a "prompt" or "caption"), in order, repeats dropped; InputError if it is none."""
    kind = Path(path).suffix.lower()
    with reading(f"--prompts {path}"):
        text = Path(path).read_text(encoding="utf-8-sig")
        lines = text.split("\n")  # not splitlines(): JSON strings may hold other separators
        if kind == ".json":
            records = json.loads(text)
        elif kind == ".jsonl":
            records = [json.loads(line) for line in lines if line.strip()]
        else:
            records = [line for line in lines if not line.lstrip().startswith("#")]
    if kind not in (".txt", ".json", ".jsonl", "") or not isinstance(records, list):
        raise InputError(f"--prompts {path}: must be .txt, .json or .jsonl, a list of prompts.")
    return as_prompts(records, f"--prompts {path}")


def as_prompts(records: Iterable, what: str = "prompts") -> list[str]:
    """The text of each, stripped, blanks and repeats dropped; InputError for what is no prompt."""
    texts = [records] if isinstance(records, str) else list(records)
    texts = [r.get("prompt") or r.get("caption") if isinstance(r, dict) else r for r in texts]
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise InputError(f"{what}: entry {number} is neither a string nor has a prompt.")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:  # which no tokenizer takes
        raise InputError(f"{what}: holds half a surrogate pair, which is no character.") from error
    prompts = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not prompts:
        raise InputError(f"{what}: holds no prompt.")
    return prompts


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers and diffusers say nothing of loading: what matters is an InputError here.
    Downloads keep their bars."""
    from huggingface_hub.utils import enable_progress_bars

    logs = [importlib.import_module(f"{name}.utils.logging") for name in ("transformers", "diffusers")]
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity(log.CRITICAL)
        log.disable_progress_bar()
    enable_progress_bars()
    try:
        yield
    finally:
        for log, (verbosity, bars) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


def load_network(what: str, kind: type, folder: str, **options) -> torch.nn.Module:
    """A diffusers or transformers network, frozen, in float32 whatever the file's; InputError where
    it cannot be read, lacks a weight, or has one of another shape or that is no number."""
    options |= {"dtype": torch.float32, "output_loading_info": True}
    place = Path(folder, options.get("subfolder", ""))
    if any(place.glob("*.fp16.*")) and not any(place.glob("*model.*")):
        remedy = "load it with variant='fp16', then save_pretrained it"
        raise InputError(f"{what}: is there as its fp16 variant alone; {remedy}.")
    with reading(what):
        network, found = kind.from_pretrained(folder, ignore_mismatched_sizes=True, **options)
    bad = {*found["missing_keys"], *(mismatch[0] for mismatch in found["mismatched_keys"])}
    weights = network.named_parameters()
    bad |= {name for name, p in weights if p.is_meta or not p.isfinite().all()}
    if bad:
        raise InputError(
            f"{what}: {len(bad)} weights are missing, misshapen or not finite ({min(bad)})."
        )
    return network.eval().requires_grad_(False)


def load_tokenizer(what: str, name: str, **options):
    """A CLIPTokenizer; InputError where it has no vocabulary, which transformers lets pass."""
    from transformers import CLIPTokenizer

    with reading(f"{what}: its tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(name, **options)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(
            f"{what}: the tokenizer of {name} has no vocabulary here; fetch it by "
            f"`hf download {name}`, or put tokenizer.json beside the weights."
        )
    return tokenizer


def load_tensors(what: str, path: str) -> dict[str, Tensor]:
    """A checkpoint file's tensors, by the safe loader; InputError for a damaged or unsafe file."""
    with reading(f"{what}: {path}"):
        state = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise InputError(f"{what}: {path} is no checkpoint of tensors.")
    return state


def read_json(path: Path, what: str) -> dict:
    """An object of a JSON file; InputError for anything else."""
    with reading(what):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise InputError(f"{what}: is no JSON object.")
    return content


def load_images(paths: list[str]) -> dict[str, Tensor]:
    """RGB pictures of files and folders: path -> (1, 3, H, W) uint8."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    files = {}  # whether it was named, and not merely found in a folder
    for path in map(Path, paths):
        found = sorted(path.iterdir()) if path.is_dir() else [path]
        files |= dict.fromkeys(found, not path.is_dir())
    pictures = {}
    for file, named in files.items():
        try:
            pixels = np.array(Image.open(file).convert("RGB"))
        except (UnidentifiedImageError, IsADirectoryError):
            if named:
                raise InputError(f"--images {file}: is no picture.") from None
        except OSError as error:
            why = error.strerror or error
            raise InputError(f"--images {file}: cannot be read ({why}).") from error
        else:
            pictures[str(file)] = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if not pictures:
        raise InputError(f"--images {' '.join(paths)}: no pictures there.")
    return pictures
