"""The benchmarks' commands, with --quick."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
