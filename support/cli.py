"""What every command shares: flags made from a dataclass, and errors as one sentence."""

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
import textwrap
import traceback
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """What the user or the machine gave cannot be used; the message names it and the remedy."""


class CodeError(UserError):
    """A user's own code failed; its cause is what that code raised."""


def out_of_memory(error: BaseException) -> bool:
    """Whether no memory is left, in PyTorch's words, cuBLAS's or the driver's."""
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def flag(default, text: str = "", *choices: str, **options):
    """A dataclass field that is a flag too, if it has a text. `least` is its smallest value, else
    above 0; `resolve` gives the value that acts; `group` begins a heading of --help."""
    options |= {"help": text, "choices": choices or None}
    return dataclasses.field(default=default, metadata=options)


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def resuming(program: str, run: object) -> str:
    """The command that goes on with a run."""
    return f"python {program} --resume {shlex.quote(str(run))}"


class Parser(argparse.ArgumentParser):
    """One whose errors are UserErrors, and whose descriptions keep their lines."""

    def __init__(self, **options) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=form, allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        remedy = "see --help"
        if "--local-rank" in message:
            remedy = "start it by torchrun"
        elif "are required" in message:
            remedy = "name it first, for a flag of several values takes all that follow"
        raise UserError(f"{message}; {remedy}.")

    def parse_known_args(self, args=None, namespace=None):
        """A flag given twice has its last value; a list is refused, for both may be meant."""
        words = [str(word) for word in (sys.argv[1:] if args is None else args)]
        flags = [word.partition("=")[0] for word in words]
        for action in self._actions:
            if action.nargs == "+" and sum(map(flags.count, action.option_strings)) > 1:
                self.error(f"{action.option_strings[0]}: given twice; name all after one")
        return super().parse_known_args(words, namespace)

    def add_fields(self, fields: Iterable[dataclasses.Field], preset: dict | None = None) -> None:
        """A flag for each field that `flag` gave a text, with a preset's default in its help. What
        the command line does not name stays absent."""
        group = self
        for field in fields:
            options = {"type": type(field.default), **field.metadata}
            for name in ("least", "resolve"):
                options.pop(name, None)
            if "group" in options:
                group = self.add_argument_group(options.pop("group"))
            default = (preset or {}).get(field.name, field.default)
            if isinstance(default, tuple):
                first = (*default, "")[0]  # an empty one is of texts
                options |= {"type": type(first), "nargs": "+"}
                default = " ".join(map(str, default))
            if default not in (False, ""):
                options["help"] += f" (default: {default})"
            options["help"] = options["help"].replace("%", "%%")
            if type(default) is bool:
                options = {"action": argparse.BooleanOptionalAction, "help": options["help"]}
            if field.metadata["help"]:
                group.add_argument(option(field.name), default=argparse.SUPPRESS, **options)


@contextlib.contextmanager
def command(name: str) -> Iterator[None]:
    """Run a command: a foreseen error ends it with one sentence and exit code 2, Ctrl-C with 130. A
    mistake of ours keeps its traceback, and so does one in a user's own code."""
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which matplotlib may not know here
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has no such method
            stream.reconfigure(errors="backslashreplace")  # for letters that a terminal lacks
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        sentence = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        if isinstance(error, (MemoryError, RuntimeError)) and error.__cause__ is None:
            smaller = "a smaller --microbatch, --gradient-checkpointing, --offload on"
            sentence = f"out of memory: try {smaller}, --lora-rank 8 or fewer images an epoch."
        elif isinstance(error, OSError):
            sentence = f"{error.filename or 'output'}: {error.strerror or sentence}."
        if isinstance(error, CodeError):
            traceback.print_exception(error.__cause__)
        process = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"{name}{process}: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what a missing, damaged or foreign file or the hub raises into a UserError. Errors of
    other kinds, as a TypeError, are ours."""
    try:
        yield
    except Exception as error:
        kinds = (OSError, ValueError, EOFError, RuntimeError, ImportError)
        libraries = ("safetensors", "http", "huggingface_hub", "_pickle")
        foreign = isinstance(error, kinds) or type(error).__module__.startswith(libraries)
        if out_of_memory(error) or not foreign:
            raise
        reason = getattr(error, "strerror", None) or str(error)
        reason = textwrap.shorten(reason, 300, placeholder=" ...").rstrip(".")
        link = error
        while link:  # the errors that led to this one
            status = getattr(getattr(link, "response", None), "status_code", 0)
            kind = type(link).__name__
            if status >= 400:
                remedy = "check the name, accept its licence on its page, log in by `hf auth login`"
                reason = f"the hub answers {status}; {remedy}"
                break
            if kind in ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError"):
                reason = "not cached, and the hub is out of reach"
            elif kind in ("SafetensorError", "EOFError", "UnpicklingError"):
                reason = "a file of weights is damaged, cut short, or holds more than weights"
            link = link.__cause__ or link.__context__
        raise UserError(f"{what}: {reason}.") from error
