"""What users and the hub give: prompts, networks, tokenizers, code."""

import codecs
import contextlib
import csv
import importlib.util
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from support.cli import CodeError, UserError, out_of_memory, reading

OURS = str(Path(__file__).resolve().parents[1])
csv.field_size_limit(2**31 - 1)  # a cell may hold a picture
COLUMNS = ("prompt", "prompts", "caption", "text")  # of tables and records: the first that exists


def load_prompts(*paths: str | Path) -> list[str]:
    """Prompts of .txt (a line each; blank and # lines skipped), .csv, .tsv, .json or .jsonl files
    (strings, or records with one of COLUMNS; FILE:COLUMN names another), in order, each once."""
    if not paths:
        raise UserError("--prompts: names no file; a run from Python is given its own again.")
    return list(dict.fromkeys(prompt for path in paths for prompt in read_prompts(str(path))))


def read_prompts(path: str) -> list[str]:
    file, _, column = path.rpartition(":")
    if os.path.exists(path) or not os.path.exists(file):
        file, column = path, ""
    what, kind = f"--prompts {path}", Path(file).suffix.lower()
    with reading(what):
        data = Path(file).read_bytes()  # once: of a pipe there is no second time
    if kind not in (".txt", "", ".csv", ".tsv", ".json", ".jsonl"):
        raise UserError(f"{what}: must be .txt, .csv, .tsv, .json or .jsonl.")
    if column and kind in (".txt", ""):
        raise UserError(f"{what}: a text file has no columns; name the file alone.")
    wide = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    with reading(f"{what}: save it as UTF-8"):
        text = data.decode("utf-16" if wide else "utf-8").replace("\ufeff", "")  # also of cat's
    text = io.StringIO(text, None).read()
    records, lines = [], text.split("\n")
    if kind == ".json":
        with reading(f"{what}: if it has an object a line, name it .jsonl"):
            records = json.loads(text)
    elif kind == ".jsonl":
        for number, line in enumerate(lines, 1):
            with reading(f"{what}, line {number}"):
                records.append(json.loads(line.strip() or '""'))  # a blank one is no prompt
    elif kind in (".csv", ".tsv"):
        text = re.sub(r"\A\n*(sep=.\n)?", "", text)  # which Excel writes
        header = text.split("\n", 1)[0]
        form = {"delimiter": "\t" if kind == ".tsv" else ",", "strict": True}
        if kind == ".csv":
            form["skipinitialspace"] = True  # id, "a cat, asleep"
            with contextlib.suppress(csv.Error):  # which means one column
                form["delimiter"] = csv.Sniffer().sniff(header, delimiters=",;\t|").delimiter
        table = csv.DictReader(io.StringIO(text), **form)
        try:
            records = list(table)
        except csv.Error as error:
            if kind == ".csv":
                why = f"line {table.reader.line_num}: {error}; is a quote not closed?"
                raise UserError(f"{what}, {why}") from error
            form["quoting"] = csv.QUOTE_NONE  # its quotes are text, as in PartiPrompts
            records = list(csv.DictReader(io.StringIO(text), **form))
        names = [str(name).strip().lower() for name in table.fieldnames or ()]
        for name in {column.lower()} if column else COLUMNS:
            if names.count(name) > 1:
                raise UserError(f"{what}: has more than one column {name!r}.")
        for number, row in enumerate(records, 2):
            if None in row:
                remedy = f"quote what holds a {form['delimiter']!r}"
                raise UserError(f"{what}: row {number} has more cells than the header; {remedy}.")
    else:
        records = [line for line in lines if not line.lstrip().startswith("#")]
    return as_prompts(records, what, (column.lower(),) if column else COLUMNS)


def as_prompts(records: Iterable, what: str = "prompts", columns: tuple = COLUMNS) -> list[str]:
    """The text of each, stripped, blanks and repeats dropped; UserError for what is no prompt."""
    # A text or path, a number, or a table or set, whose order is not that of prompts.
    unordered = isinstance(records, (str, set, frozenset, Mapping))
    if unordered or hasattr(records, "columns") or not isinstance(records, Iterable):
        kind = "a list of texts or records (pandas: orient='records'); load_prompts reads files"
        raise UserError(f"{what}: must be {kind}.")
    texts = []
    for number, text in enumerate(records, 1):
        if isinstance(text, dict):
            fields = {str(name).strip().lower(): value for name, value in text.items()}
            columns = [name for name in columns if name in fields][:1] or columns  # one for all
            text = fields.get(columns[0])
        if not isinstance(text, str):
            lacks = f"neither a text nor has one in a column {' or '.join(columns)}"
            raise UserError(f"{what}: entry {number} is {lacks}; FILE:COLUMN names another.")
        texts.append(text.strip())
    if "\0" in "".join(texts):
        raise UserError(f"{what}: holds NUL characters; save it as UTF-8.")
    with reading(what):
        "".join(texts).encode()  # half a surrogate pair is no character
    prompts = list(dict.fromkeys(filter(None, texts)))
    if not prompts:
        raise UserError(f"{what}: holds no prompt.")
    return prompts


def quiet_libraries() -> None:
    """Have diffusers and transformers load without warnings and bars; downloads keep theirs."""
    import huggingface_hub
    import transformers

    transformers.utils.logging.set_verbosity_error()  # before diffusers imports it
    import diffusers

    warnings.filterwarnings("ignore", "`local_dir_use_symlinks`")
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        huggingface_hub.utils.enable_progress_bars()


def load_network(what: str, kind: type, folder: str | Path | None, **options) -> nn.Module:
    """A diffusers or transformers network, frozen, in float32; UserError where it cannot be read,
    lacks a weight, or has one of another shape or that is no number."""
    quiet_libraries()
    options |= {"dtype": torch.float32, "output_loading_info": True}
    with reading(what):
        network, info = kind.from_pretrained(folder, ignore_mismatched_sizes=True, **options)
    if hasattr(network, "peft_config") or any("lora" in x for x in info["unexpected_keys"]):
        raise UserError(f"{what}: has adapters beside its weights; merge them, and save it.")
    bad = {*info["missing_keys"], *(mismatch[0] for mismatch in info["mismatched_keys"])}
    weights = network.named_parameters()
    bad |= {name for name, p in weights if p.is_meta or not p.isfinite().all()}
    if bad:
        wrong = "weights are missing, misshapen or not finite"
        raise UserError(f"{what}: {len(bad)} {wrong} ({min(bad)}).")
    return network.eval().requires_grad_(False)


def load_tokenizer(what: str, name: str, rows: int, **options):
    """A CLIPTokenizer for a text encoder with `rows` embeddings; UserError where it has no
    vocabulary, which transformers lets pass, or more tokens than that."""
    from transformers import CLIPTokenizer

    with reading(f"{what}: its tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(name, **options)
    tokens = max(tokenizer.get_vocab().values(), default=0) + 1
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        remedy = "put its files beside the weights, or, of a hub id, `hf download` it"
        raise UserError(f"{what}: the tokenizer of {name} has no vocabulary here; {remedy}.")
    if tokens > rows:
        why = f"its tokenizer has {tokens} tokens, and its text encoder {rows}"
        raise UserError(f"{what}: {why}; they are of two models.")
    return tokenizer


def load_tensors(what: str, path: str, repository: str, file: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint, a file of the hub where path is empty, by the safe loader."""
    from huggingface_hub import hf_hub_download

    with reading(f"{what}: {path or file}"):
        path = path or hf_hub_download(repository, file)
        state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if state is None or not all(torch.is_tensor(value) for value in state.values()):
        raise UserError(f"{what}: {path} is no checkpoint of tensors.")
    return state


def load_module(name: str, file: str):
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


USERS_FOLDER: list[str] = []  # on sys.path: where the last file of a user's was


def load_function(file: str, function: str, loaded: dict) -> Callable:
    """`function` of a Python file, which can import the modules beside it."""
    folder, name = os.path.split(file.removesuffix(".py"))
    if folder not in USERS_FOLDER:
        for before in USERS_FOLDER:  # its modules must not be taken for this one's
            sys.path[:] = [path for path in sys.path if path != before]
            beside = {Path(name).stem for name in os.listdir(folder)}
            for module in [m for m in sys.modules if m.partition(".")[0] in beside]:
                origin = getattr(sys.modules[module], "__file__", None) or ""
                if Path(origin).is_relative_to(before) and before != OURS:
                    del sys.modules[module]
        USERS_FOLDER[:] = [folder]
        sys.path.append(folder)  # last: no module of it hides another

    # Worker processes find the module by its name, if that is free.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin != file:
        name = f"reward_file {file}"
    what = f"--reward {file}:{function}"
    with users_code(f"{what}: cannot be imported"):
        module = loaded[file] = loaded.get(file) or load_module(name, file)
    scorer = getattr(module, function, None)
    if not callable(scorer) or isinstance(scorer, type):
        raise UserError(f"{what}: the file has no function or instance {function!r}.")
    return scorer


@contextlib.contextmanager
def users_code(what: str) -> Iterator[None]:
    """Run a user's code: what it raises is a CodeError, SystemExit too, but for running out of
    memory; grad mode and default dtype are as before afterwards."""
    dtype, gradient = torch.get_default_dtype(), torch.is_grad_enabled()
    device = torch.get_default_device()
    try:
        yield
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:
        if out_of_memory(error):
            remedy = "--offload on (of networks in FUNCTION.networks), or a smaller reward"
            raise torch.OutOfMemoryError(f"{what}: out of memory; try {remedy}.") from error
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise CodeError(f"{what}: {told}.") from error
    finally:
        if torch.get_default_device() != device:
            torch.set_default_device(None)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradient)
