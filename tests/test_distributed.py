"""Several processes: the same images and steps as one, uneven work, failures, going on."""

from pathlib import Path

import pytest
import torch

import prdp
from baselines import ddpo
from conftest import ROOT, call, checkpoint, metrics_of, script, small_run
from support import distributed

BRIGHT = "def f(images, prompts):\n    return images.double().mean((1, 2, 3))\n"


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("prdp.py", ["--updates-per-epoch", 1]),
        ("baselines/ddpo.py", ["--lora-rank", 2, "--images-per-prompt", 8]),
    ],
)
def test_two_processes_equal_one(tiny_sd, tmp_path, capsys, program, flags):
    """They draw the same images to the bit, and take the same steps to rounding; DDPO's statistics
    of a prompt and the adapters' start are the same in both. What one process began two go on
    with, in smaller microbatches if need be."""
    # Of sizes in whole bytes a rounded pixel may change a difference by half.
    (tmp_path / "r.py").write_text(BRIGHT)
    flags = [*small_run(tiny_sd), "--learning-rate", "1e-5", *flags]
    flags += ["--reward", f"{tmp_path}/r.py:f"]
    one, two = tmp_path / "one", tmp_path / "two"
    main = prdp.main if program == "prdp.py" else ddpo.main
    assert call(main, [*flags, "--out", one], capsys)[0] == 0
    code, out, errors = script(ROOT / program, *flags, "--out", two, processes=2)
    assert code == 0, errors
    assert out.count("2 process") == out.count("on-policy gap") == 1  # rank 0 alone prints
    name = Path("samples") / "epoch_0000.png"
    assert (one / name).read_bytes() == (two / name).read_bytes()
    # Differences of numbers of size 1 are compared on that scale, kl_nats as a sum of T*C*H*W ones.
    scales = {"log_ratio_old": 1, "log_ratio_ref": 1, "kl_nats": 3 * 4 * 8 * 8}
    # DDPO's loss is a mean of advantages of size 1, around 0, times how far two updates went apart.
    scales |= {"loss": 100}
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            close = {"rel": 1e-5 if a["epoch"] == 1 else 2e-2, "abs": 1e-6 * scales.get(name, 0)}
            assert b[name] == pytest.approx(a[name], **close), name
    ours, theirs = checkpoint(one), checkpoint(two)
    for name, weight in ours["unet"].items():
        torch.testing.assert_close(theirs["unet"][name], weight, rtol=0, atol=2e-7)
    if program == "prdp.py":
        return
    latest = [state["program"]["latest"] for state in (ours, theirs)]
    assert latest[0].keys() == latest[1].keys() and latest[0]
    for prompt, rewards in latest[0].items():
        assert latest[1][prompt] == pytest.approx(rewards, abs=0.02)
    code, _, errors = script(ROOT / program, "--resume", one, "--epochs", 3, processes=2)
    assert code == 0, errors
    assert [row["epoch"] for row in metrics_of(one)] == [1, 2, 3]


TWO_FACED = """
import os
calls = []
def tied(images, prompts):
    return [0.0 if os.environ["RANK"] == "1" else float(i) for i in range(len(prompts))]
def fails(images, prompts):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        return [float("nan")] * len(prompts)
    return [float(i) for i in range(len(prompts))]
"""


def test_processes_may_skip_different_entries(tiny_sd, tmp_path):
    """All rewards of one process tie, so that it has nothing to run: the other does not wait for
    it."""
    (tmp_path / "r.py").write_text(TWO_FACED)
    flags = ["--epochs", 1, "--reward", f"{tmp_path}/r.py:tied", "--out", tmp_path / "run"]
    code, _, errors = script(ROOT / "prdp.py", *small_run(tiny_sd), *flags, processes=2)
    assert code == 0, errors
    assert metrics_of(tmp_path / "run")[0]["skipped_fraction"] >= 0.5


def test_failure_of_one_process_stops_all(tiny_sd, tmp_path):
    """With the failing one's own sentence; the last checkpoint is there."""
    (tmp_path / "r.py").write_text(TWO_FACED)
    flags = ["--epochs", 50, "--reward", f"{tmp_path}/r.py:fails", "--out", tmp_path / "run"]
    code, _, errors = script(ROOT / "prdp.py", *small_run(tiny_sd), *flags, processes=2)
    assert code != 0
    assert "prdp.py (process 1): " in errors
    assert "reward fails returned nan for the prompt" in errors
    assert checkpoint(tmp_path / "run")["epoch"] == 1


def test_a_process_that_is_shown_one_gpu_takes_it(monkeypatch):
    """As `srun --gpus-per-task=1` has it: LOCAL_RANK is then no GPU's number."""
    taken = []
    for name in distributed.TORCHRUN:
        monkeypatch.setenv(name, "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **options: None)
    assert distributed.start_processes() == torch.device("cuda") and taken == [0]
