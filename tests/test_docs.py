"""What README and docs show is there and runs: links, commands, tables, Python, fields."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import evaluate
import prdp
import rewards
from baselines import ddpo
from conftest import ROOT
from support.settings import parse_settings

SHAPES = str(ROOT / "prompts" / "shapes.txt")
README, RUNNING, PAPER = (
    (ROOT / name).read_text() for name in ("README.md", "docs/running.md", "docs/paper.md")
)
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]
PROGRAMS = {"prdp.py": prdp, "baselines/ddpo.py": ddpo, "evaluate.py": evaluate}


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Files, headings, and of code the line on which the function of that name begins."""
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, place = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if file.suffix == ".py" and place:
            function = re.match(r"`(\w+)`", text)[1]
            begins = file.read_text().split(f"\ndef {function}(")[0].count("\n") + 2
            assert place == f"L{begins}", f"{function} begins on line {begins}"
        elif place:
            assert place in anchors(file), target


def source_of(file: str, name: str) -> str:
    """A function or class of a file."""
    text = (ROOT / file).read_text()
    for node in ast.walk(ast.parse(text)):
        if getattr(node, "name", None) == name:
            return "\n".join(text.split("\n")[node.lineno - 1 : node.end_lineno])
    raise AssertionError(f"{file} has no {name}")


def numbers(text: str) -> set[int]:
    """Of the equations that a text names: "Eq. 2", "Eqs. 5 to 9, 13 and 15"."""
    found = set()
    for listed in re.findall(r"Eqs?\. (\d+(?:(?:, | and | to )\d+)*)", text):
        for part in re.split(", | and ", listed):
            first, _, last = part.partition(" to ")
            found |= set(range(int(first), int(last or first) + 1))
    return found


def test_the_page_beside_the_paper_is_the_code():
    """Every function, test and line of code that docs/paper.md shows is in the source; every
    equation has a place there, and one of prdp.py unless it is a step without code."""
    shown, source = 0, ""
    for found in re.finditer(r"`([\w/.]+\.py): (\w+)`|```python\n(.*?)```", PAPER, re.DOTALL):
        file, name, block = found.groups()
        if block is None:
            source = source_of(file, name)
        else:
            assert block.rstrip("\n") in source, block
            shown += 1
    assert shown >= 14

    headings = re.findall(r"^#+ (.*)$", PAPER, re.MULTILINE)
    assert numbers("\n".join(headings)) >= set(range(1, 22))
    without = numbers("\n".join(x for x in headings if "without code" in x))
    cited = numbers((ROOT / "prdp.py").read_text())
    assert set(range(1, 22)) - without <= cited


def test_the_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 150 and max(map(len, README.splitlines())) <= 120
    assert len(README.split()) <= 1500


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def arguments_of(program: str, argv: list[str]) -> object:
    module = PROGRAMS[program]
    if module is evaluate:
        return evaluate.parse_args(argv)
    return parse_settings(module.Config, argv)


def test_commands_are_parsed(tmp_path, monkeypatch):
    """Flags that are gone, or were never there, do not stay in the text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text("")
    found = []
    for page in PAGES:
        for block in blocks(page.read_text(), "bash"):
            found += re.findall(
                r"(?:python|\d) (prdp|evaluate|baselines/ddpo)\.py ([^&#|\n]*)", block
            )
    assert {name for name, _ in found} == {"prdp", "evaluate"} and len(found) >= 8
    for name, arguments in found:
        if "--resume" not in arguments:
            arguments_of(f"{name}.py", shlex.split(arguments))


def commands(row: str) -> list[list[str]]:
    """The arguments of each `python ...` of a table row, with files for $UNSEEN."""
    found = re.findall(r"`python ((?:prdp|evaluate|baselines/ddpo)\.py[^`]*)`", row)
    return [shlex.split(command.replace("$UNSEEN", SHAPES)) for command in found]


ROWS = [row for row in PAPER.split("\n") if row.startswith("| ") and commands(row)]


def at_tiny_size(argv: list[str], tiny_sd: str) -> list[str]:
    """The same command, of a model, a reward and sizes that take a second."""
    program, *argv = argv
    if program == "evaluate.py":
        small = ["--samples-per-prompt", "2", "--max-prompts", "2"]
        if "--reward" in argv:
            small += ["--reward", "incompressibility=1", "compressibility=0"]
        return [*argv, *small]
    reward = ["--reward", "incompressibility=2", "compressibility=1"]
    small = ["--model", tiny_sd, *reward, "--prompts", SHAPES, "--ddpm-steps", "2"]
    small += ["--epochs", "1", "--prompts-per-epoch", "4", "--microbatch", "8"]
    if arguments_of(program, argv).images_per_prompt > 1:
        small += ["--images-per-prompt", "2"]
    if program == "prdp.py":
        small += ["--updates-per-epoch", "1"]
    return [*argv, *small]


def test_the_table_covers_the_paper():
    names = " ".join(row.split("|")[1] for row in ROWS)
    experiments = ["Table 1", "Table 2", "Table 3", "Figs. 6, 7", "Fig. 9", "Fig. 10", "Table 5"]
    assert all(experiment in names for experiment in experiments)


def test_every_row_of_the_table_runs(tiny_sd, tmp_path, monkeypatch, capsys):
    """In the order of the table: a later row may name an earlier one's runs."""
    monkeypatch.chdir(tmp_path)
    for row in ROWS:
        for argv in commands(row):
            try:
                PROGRAMS[argv[0]].main(at_tiny_size(argv, tiny_sd))
            except SystemExit as stop:
                raise AssertionError(f"{argv}: {capsys.readouterr().err}") from stop
    assert "compressibility" in capsys.readouterr().out


def test_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (reward,), (library, *_) = blocks(README, "python"), blocks(RUNNING, "python")
    names = {}
    exec(reward, names)
    assert names["brightness"](torch.full((1, 3, 2, 2), 255).byte(), ["a"]).item() == 1
    small = '"--epochs", "1", "--updates-per-epoch", "1", "--ddpm-steps", "2"'
    exec(library.replace('"--epochs", "2"', small), {})
    assert "of the caller" in capsys.readouterr().out
    assert (tmp_path / "runs" / "from_python" / "pipeline").is_dir()


def test_every_field_and_reward_is_defined(cli, tmp_path):
    """Fields of metrics.jsonl, and the built-in rewards, are those of the tables."""
    table = RUNNING.split("| field of")[1].split("\n\n")[0]
    defined = set()
    for cell in re.findall(r"^\|([^|]*)\|", table, re.MULTILINE):
        first, *others = re.findall(r"`(\w+)", cell) or [""]
        stem = first.split("_")[0]
        defined |= {first, *(stem + x if x.startswith("_") else x for x in others)} - {""}
    assert cli("--epochs", "1")[0] == 0
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {name.split("/")[0] for name in json.loads(line)} == defined

    listed = re.findall(r"^\| (`.*?) \|", RUNNING.split("### Rewards")[1], re.MULTILINE)
    assert set(re.findall(r"`([\w.]+)`", " ".join(listed))) >= set(rewards.LOADERS)
