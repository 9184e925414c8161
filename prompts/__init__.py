"""The prompt files beside this one, and their reader."""

from __future__ import annotations

import json
from pathlib import Path

from rewards import InputError


def load_prompts(path: str | Path) -> list[str]:
    """Prompts of a .txt (a line each; blank and # lines skipped), .json or .jsonl file (strings, or objects with a
    "prompt" or "caption" field), in their order, repeats dropped. InputError if they cannot be read."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"--prompts {path}: no such file.")
    try:
        text, kind = file.read_text(encoding="utf-8-sig"), file.suffix.lower()
        if kind == ".json":
            records = json.loads(text)
        elif kind == ".jsonl":  # not splitlines(): JSON strings may hold other line separators
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
        elif kind in (".txt", ""):
            records = [line for line in text.split("\n") if not line.lstrip().startswith("#")]
        else:
            raise InputError(f"--prompts {path}: must be .txt, .json or .jsonl.")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"--prompts {path}: cannot be read as {file.suffix or 'text'}: {error}.") from error
    if not isinstance(records, list):
        raise InputError(f"--prompts {path}: must hold a list of prompts.")
    prompts = [r.get("prompt", r.get("caption")) if isinstance(r, dict) else r for r in records]
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise InputError(f'--prompts {path}: entry {number} is neither a string nor an object with a "prompt".')
    prompts = list(dict.fromkeys(p.strip() for p in prompts if p.strip()))
    if not prompts:
        raise InputError(f"--prompts {path}: holds no prompt.")
    return prompts
