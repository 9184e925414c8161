"""What the README shows is what runs: every command of its table of experiments, at tiny size, and
its Python."""

import re
import shlex

import torch

import evaluate
import prdp
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
SHAPES = str(ROOT / "prompts" / "shapes.txt")


def commands(row: str) -> list[list[str]]:
    """The arguments of each `python ...` of a table row, with files for $UNSEEN."""
    found = re.findall(r"`python ((?:prdp|evaluate)\.py[^`]*)`", row)
    return [shlex.split(command.replace("$UNSEEN", SHAPES)) for command in found]


ROWS = [row for row in README.split("\n") if "| not run |" in row and commands(row)]


def at_tiny_size(argv: list[str], tiny_sd: str) -> list[str]:
    """The same command, of a model, a reward and sizes that take a second."""
    if argv[0] == "evaluate.py":
        small = ["--samples-per-prompt", "2", "--max-prompts", "2"]
        if "--reward" in argv:
            small += ["--reward", "incompressibility=1,compressibility=0"]
        return [*argv[1:], *small]
    reward = "incompressibility=2,compressibility=1"
    small = ["--model", tiny_sd, "--reward", reward, "--prompts", SHAPES, "--ddpm-steps", "2"]
    small += ["--epochs", "1", "--prompts-per-epoch", "4", "--microbatch", "8"]
    config = prdp.parse_args(argv[1:])
    if config.images_per_prompt > 1:
        small += ["--images-per-prompt", "2"]
    if config.loss == "prdp":
        small += ["--updates-per-epoch", "1"]
    return [*argv[1:], *small]


def test_the_table_covers_the_paper():
    names = " ".join(row.split("|")[1] for row in ROWS)
    for experiment in (
        "Table 1",
        "Table 2",
        "Table 3",
        "Figs. 6, 7",
        "Fig. 9",
        "Fig. 10",
        "Table 5",
    ):
        assert experiment in names


def test_every_row_of_the_table_runs(tiny_sd, tmp_path, monkeypatch, capsys):
    """In the order of the table: a later row may name an earlier one's runs."""
    monkeypatch.chdir(tmp_path)
    for row in ROWS:
        for argv in commands(row):
            small = at_tiny_size(argv, tiny_sd)
            main = evaluate.main if argv[0] == "evaluate.py" else prdp.main
            try:
                main(small)
            except SystemExit as stop:
                raise AssertionError(f"{argv}: {capsys.readouterr().err}") from stop
    assert "compressibility" in capsys.readouterr().out


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_commands_outside_of_the_table_are_parsed():
    """Flags that are gone, or were never there, do not stay in the text."""
    lines = [line for block in blocks("bash") for line in block.split("\n")]
    found = re.findall(r"(?:python |8 )(prdp|evaluate)\.py ([^&#\n]*)", "\n".join(lines))
    assert len(found) >= 4
    for command, arguments in found:
        {"prdp": prdp, "evaluate": evaluate}[command].parse_args(shlex.split(arguments))


def test_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reward, library, _ = blocks("python")
    names = {}
    exec(reward, names)
    assert names["redness"](torch.tensor([[[[255]], [[0]], [[0]]]]).byte(), ["a"]).item() == 1
    exec(
        library.replace(
            '"--epochs", "2"', '"--epochs", "1", "--updates-per-epoch", "1", "--ddpm-steps", "2"'
        ),
        {},
    )
    assert "of the caller" in capsys.readouterr().out
    assert (tmp_path / "runs" / "bright" / "pipeline").is_dir()
