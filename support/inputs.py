"""What users and the hub give: prompts, pictures, networks, tokenizers, code."""

import codecs
import contextlib
import csv
import importlib.util
import io
import json
import logging
import os
import re
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from support.cli import InputError, reading


FIELDS = ("prompt", "prompts", "caption", "text")  # of tables and records, the first that is there


def load_prompts(path: str | Path) -> list[str]:
    """Prompts of a .txt (a line each; blank and # lines skipped), .csv or .tsv (a column named as
    in FIELDS), .json or .jsonl file (strings, or objects with such a field), in order, repeats
    dropped; InputError if it is none."""
    what, kind = f"--prompts {path}", Path(path).suffix.lower()
    if kind not in (".txt", "", ".csv", ".tsv", ".json", ".jsonl"):
        raise InputError(f"{what}: must be .txt, .csv, .tsv, .json or .jsonl.")
    with reading(what):
        data = Path(path).read_bytes()
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16" if wide else "utf-8-sig")
    if "\0" in text or text.startswith("version https://git-lfs"):
        raise InputError(f"{what}: is no text, or a Git LFS pointer in place of one.")
    lines = re.split(r"\r\n?|\n", text)  # not splitlines(): JSON may hold other separators
    separator = max(",;\t", key=lines[0].count)
    header = [cell.strip(' "').lower() for cell in lines[0].split(separator)]
    if kind in (".txt", ""):
        if set(header) & set(FIELDS[:3]) and all(cell.isidentifier() for cell in header):
            raise InputError(f"{what}: begins as a table does; name it .csv, or take that away.")
        for part in (lines[0], text):
            with contextlib.suppress(ValueError):
                if isinstance(json.loads(part), (dict, list)):
                    raise InputError(f"{what}: holds JSON; name it .json, or .jsonl if by lines.")
        records = [line for line in lines if not line.lstrip().startswith("#")]
    elif kind == ".jsonl":
        records = []
        for number, line in enumerate(lines, 1):
            with reading(f"{what}, line {number}"):
                records += [json.loads(line)] if line.strip() else []
    elif kind == ".json":
        with reading(what):
            records = json.loads(text)
        if not isinstance(records, list):
            raise InputError(f"{what}: must be a list of prompts.")
    else:
        if not set(header) & set(FIELDS):
            raise InputError(f"{what}: its first line names no column {', '.join(FIELDS)}.")
        with reading(what):
            records = table_rows(what, text, separator)
    return as_prompts(records, what)


def table_rows(what: str, text: str, separator: str) -> list[dict]:
    """The rows below a table's header; InputError for quotes or cells that do not fit."""
    form = {"delimiter": separator, "strict": True}
    table = csv.DictReader(io.StringIO(text, newline=""), **form)
    try:
        rows = list(table)
    except csv.Error as error:
        if separator != "\t":
            why = f"near line {table.line_num}: {error}; is a quote not closed?"
            raise InputError(f"{what}, {why}") from error
        form["quoting"] = csv.QUOTE_NONE  # its quotes are text, as in PartiPrompts
        rows = list(csv.DictReader(io.StringIO(text, newline=""), **form))
    for number, row in enumerate(rows, 2):
        if None in row:
            remedy = f"quote what holds a {separator!r}"
            raise InputError(f"{what}: row {number} has more cells than the header; {remedy}.")
    return rows


def as_prompts(records: Iterable, what: str = "prompts") -> list[str]:
    """The text of each, stripped, blanks and repeats dropped; InputError for what is no prompt."""
    alone = isinstance(records, str)
    file = isinstance(records, os.PathLike) or (alone and os.path.isfile(records))
    if file or hasattr(records, "items") or isinstance(records, (set, frozenset)):
        raise InputError(f"{what}: must be texts, in a list; load_prompts reads a file.")
    texts = []
    for number, text in enumerate([records] if alone else records, 1):
        if isinstance(text, dict):
            fields = {str(name).strip().lower(): x for name, x in text.items()}
            text = next((fields[name] for name in FIELDS if fields.get(name) is not None), None)
        if not isinstance(text, str):
            wanted = f"neither a string nor has a `{'`, `'.join(FIELDS)}`"
            raise InputError(f"{what}: entry {number} is {wanted}.")
        texts.append(text.strip())
    with reading(what):
        "".join(texts).encode()  # half a surrogate pair is no character
    prompts = list(dict.fromkeys(filter(None, texts)))
    if not prompts:
        raise InputError(f"{what}: holds no prompt.")
    return prompts


def read_picture(path: str | Path, what: str) -> Tensor:
    """A picture file's pixels, (3, H, W) uint8, RGB, the right way up; 16 bits scaled to 8."""
    import numpy as np
    from PIL import Image, ImageOps

    path = Path(path).expanduser()
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode[0] in "IF":  # one channel of 16 or 32 bits, or of floats
            values = np.asarray(image, dtype=float)
            tops = [1.0] * (image.mode == "F") + [255.0] * (";16" not in image.mode) + [65535.0]
            top = next((top for top in tops if values.max() <= top), values.max())
            image = Image.fromarray((255 * values.clip(0) / top).round().astype("uint8"))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # Pillow's are of many kinds
        why = getattr(error, "strerror", None) or f"no picture that can be read ({error})"
        raise InputError(f"{what} {path}: {why}.") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries say nothing of loading: what matters is an InputError here. Downloads keep their
    bars."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as bars

    before, shown = logging.root.manager.disable, bars.is_progress_bar_enabled()
    logging.disable()
    bars.disable_progress_bar()
    enable_progress_bars()
    try:
        yield
    finally:
        logging.disable(before)
        if shown:
            bars.enable_progress_bar()


def load_network(what: str, kind: type, folder: str, **options) -> nn.Module:
    """A diffusers or transformers network, frozen, in float32 whatever the file's; InputError where
    it cannot be read, lacks a weight, or has one of another shape or that is no number."""
    options |= {"dtype": torch.float32, "output_loading_info": True}
    files = Path(folder, options.get("subfolder", "")).glob("*")
    weights = [file.name for file in files if file.suffix in (".safetensors", ".bin")]
    if weights and all(".fp16." in name for name in weights):
        remedy = "load it with variant='fp16', then save_pretrained it"
        raise InputError(f"{what}: is there as its fp16 variant alone; {remedy}.")
    with reading(what):
        network, found = kind.from_pretrained(folder, ignore_mismatched_sizes=True, **options)
    bad = {*found["missing_keys"], *(mismatch[0] for mismatch in found["mismatched_keys"])}
    weights = network.named_parameters()
    bad |= {name for name, p in weights if p.is_meta or not p.isfinite().all()}
    if bad:
        why = f"{len(bad)} weights are missing, misshapen or not finite ({min(bad)})"
        raise InputError(f"{what}: {why}.")
    return network.eval().requires_grad_(False)


def load_tokenizer(what: str, name: str, **options):
    """A CLIPTokenizer; InputError where it has no vocabulary, which transformers lets pass."""
    from transformers import CLIPTokenizer

    with reading(f"{what}: its tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(name, **options)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        remedy = f"fetch it by `hf download {name}`, or put its files beside the weights"
        raise InputError(f"{what}: the tokenizer of {name} has no vocabulary here; {remedy}.")
    return tokenizer


def load_tensors(what: str, path: str) -> dict[str, Tensor]:
    """A checkpoint file's tensors, by the safe loader; InputError for a damaged or unsafe file."""
    with reading(f"{what}: {path}"):
        state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if state is None or not all(torch.is_tensor(value) for value in state.values()):
        raise InputError(f"{what}: {path} is no checkpoint of tensors.")
    return state


def load_module(name: str, file: str):
    """A Python file as the module of that name."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_function(what: str, file: str, function: str) -> Callable:
    """`function` of a Python file, which can import the modules beside it."""
    folder, name = os.path.split(file)
    if folder not in sys.path:
        sys.path.append(folder)  # last: none of them hides another module
    name = name.removesuffix(".py")  # by which its worker processes find it, if it is free
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or found.origin != file or name in sys.modules:
        name = f"reward_file {file}"
    with running(f"{what}: cannot be imported"):
        module = load_module(name, file)
    found = getattr(module, function, None)
    if not callable(found):
        raise InputError(f"{what}: the file has no function {function!r}.")
    return found


cudnn = torch.backends.cudnn
PROCESS = [  # what of PyTorch in this process a user's code may change
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, torch.set_default_device),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (lambda: cudnn.deterministic, lambda then: setattr(cudnn, "deterministic", then)),
    (lambda: cudnn.allow_tf32, lambda then: setattr(cudnn, "allow_tf32", then)),
]
INSTALLED = (*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("stdlib"))
MODULES: dict[str, str] = {}  # that users' code has loaded, by name: their files
RUNNING: list[str] = []  # users' code that runs now, and may itself load a reward


@contextlib.contextmanager
def running(what: str) -> Iterator[None]:
    """Run a user's code: how PyTorch computes is as before afterwards.

    What it raises is an InputError that says where, SystemExit too, which would end the run as if
    all were well; running out of memory is no fault of that code."""
    before, known = [get() for get, _ in PROCESS], set(sys.modules)
    RUNNING.append(what)
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(last.filename)}, line {last.lineno}"
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{what}: {told} ({where}).") from error
    finally:
        RUNNING.pop()
        for name in sys.modules.keys() - known:
            file = getattr(sys.modules[name], "__file__", None)
            if file and not file.startswith(INSTALLED):
                MODULES[name] = file
        for (get, restore), value in zip(PROCESS, before, strict=True):
            if get() != value:
                restore(value)
