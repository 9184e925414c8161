"""The benchmarks' commands, with --quick."""

import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def start(script: str, *flags: str, **variables: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, FOLDER / script, *flags], env=environment, **pipes)


def tables_of(script: str, *flags: str) -> dict[str, list[dict[str, str]]]:
    """What a command prints: each table's letter, and its rows by their columns' names."""
    process = start(script, "--quick", *flags)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "failed:" not in out and "| skipped:" not in out, out + errors
    tables = {}
    for part in out.split("\n## ")[1:]:
        lines = [line.strip("| ").split("|") for line in part.split("\n") if line.startswith("|")]
        names, _, *rows = [[cell.strip() for cell in line] for line in lines]
        tables[part[:3]] = [dict(zip(names, row, strict=False)) for row in rows]
    return tables


def test_kernel_speed_times_each_pass():
    (rows,) = tables_of("kernel_speed.py").values()
    assert {row["pass"] for row in rows} == {"forward", "backward", "sample"}
    assert all(float(row["ms"]) > 0 for row in rows)


def test_epoch_prints_its_tables():
    tables = tables_of("epoch.py", "--dtypes", "fp32", "--loops", "eager", "peers")
    assert tables.keys() == {"(b)", "(c)", "(d)", "(e)"}
    for name in ("(b)", "(c)"):
        gaps = {row.get("on-policy gap", "") for row in tables[name]}
        assert gaps - {""} == {"0.0"}
    epochs = [row for row in tables["(b)"] if row["pass"] == "epoch"]
    loops = ["peers", "peers, our batch", "eager"]  # in this order, whatever that of the flags
    assert [row["loop"] for row in epochs] == loops
    assert float(epochs[0]["times as fast as peers"]) == 1
    assert len(tables["(d)"]) == 4 and len(tables["(e)"]) == 1


def test_an_unknown_loop_is_refused():
    process = start("epoch.py", "--quick", "--loops", "eager", "mine")
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and out == ""
    assert errors.count("\n") == 1 and "--loops" in errors and "'mine'" in errors


def test_ctrl_c_leaves_no_temporary_files(tmp_path):
    process = start("epoch.py", "--quick", "--only", "memory", TMPDIR=str(tmp_path))
    end = time.monotonic() + 60
    while not any(tmp_path.glob("*/run/config.json")) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # as `timeout` does
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, out + errors
    assert not list(tmp_path.glob("tmp*"))  # PyTorch's own cache may be there


@functools.cache
def planned(*flags: str) -> dict[str, list[str]]:
    """What plan.py prints, by card: microbatch, checkpointing, offload; GB; hours; days."""
    process = start("plan.py", *flags)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    return {card: cells for card, *cells in rows}


def test_a_card_is_planned_where_there_is_none():
    """An H200 as its rate was measured: 25,600 image-steps of 1.606 TFLOP, 11 passes without
    gradient and 8 of 10 with, each of 3.07; and a card by its size, with any flags."""
    rows = planned()
    plan, _, hours, days = rows["H200"]
    assert plan == "32, off, off" and rows["T4"][0].startswith("none: takes ")
    expected = 25_600 * 1.606 * (11 + 8 * 3.07) / 226 / 3600
    assert float(hours) == pytest.approx(expected, rel=0.05)
    assert float(days) == pytest.approx(100 * expected / 24, rel=0.05)
    model = "stabilityai/stable-diffusion-xl-base-1.0"
    assert planned("--gb", "141", "--model", model)["H200"][0] == "4, off, on"
    for flags in (("--gb", "nan"), ("--gb", "-3"), ("--model", "a/b")):
        process = start("plan.py", *flags)
        said = process.communicate()[1]
        assert process.returncode == 2 and said.startswith("benchmarks/plan.py: "), said
    plan, gigabytes, *_ = planned("--gb", "12", "--lora-rank", "8")["any of 12 GB"]
    assert plan == "8, on, on" and float(gigabytes) < 12
    named = ["--microbatch", "32", "--gradient-checkpointing", "off", "--offload", "off"]
    assert planned("--gb", "8", *named)["any of 8 GB"][0] == "32, off, off: does not fit"


def test_the_table_of_cards_is_what_it_prints():
    page = (FOLDER.parent / "docs" / "running.md").read_text()
    lines = page.split("| card |")[1].split("\n\n")[0].splitlines()[2:]
    full, adapters = planned(), planned("--lora-rank", "8")
    for line in lines:
        card, *cells, _ = [cell.strip() for cell in line.strip("| ").split("|")]
        plan, *others = full.pop(card)
        assert cells[:3] == ([plan, *others[1:]] if others else ["none", "", ""])
        plan, _, *times = adapters.pop(card)
        assert cells[3:] == [plan, *times]
    assert full.keys() == adapters.keys() == {"card", "---"}


PYTHON = """#!/bin/sh
echo "$@"
case "$*" in
  '-m pytest'*) exit 3;;
  *kernel_speed*) exec sleep 60;;
esac
"""


@pytest.mark.parametrize("quick", [(), ("--quick",)])
def test_gpu_day_writes_each_step_whatever_becomes_of_others(tmp_path, quick):
    """With a Python that says its arguments: one step fails, another takes too long."""
    python = tmp_path / "python"
    python.write_text(PYTHON.replace("60", "60" if quick else "0"))
    python.chmod(0o755)
    script = (FOLDER / "gpu_day.sh").read_text().replace("step kernels 60", "step kernels 5")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu_day.sh").write_text(script)
    environment = os.environ | {"PYTHON": str(python)}
    for part in "12":
        command = ["bash", tmp_path / "benchmarks" / "gpu_day.sh", part, tmp_path / "out", *quick]
        subprocess.run(command, env=environment, check=True, timeout=60, capture_output=True)
    codes = dict(re.findall(r"(\w+): exit code (\d+)", (tmp_path / "out/steps.txt").read_text()))
    assert codes.pop("tests") == "3" and codes.pop("kernels") == ("124" if quick else "0")
    codes.pop("machine")
    ours = {"toy", "toy_compiled", "peers_eager", "tf32", "noise", "compiled"}
    assert codes == dict.fromkeys(ours, "0")
    printed = (tmp_path / "out" / "compiled.txt").read_text()
    assert "--only epoch --dtypes fp16 --loops compiled" in printed
    assert ("--quick" in printed) == bool(quick)
