"""A run's folder: written whole or not at all, by one process, gone on with to the bit, or refused
with nothing lost."""

import contextlib
import importlib
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save

import prdp
from conftest import PROMPTS, ROOT, assert_same_run, checkpoint, contents, edit_json, metrics_of
from conftest import only_sentence, script, small_run, start, tiny_config
from support import report, run_folder
from support.cli import InputError

BRIGHT = "def f(images, prompts):\n    return images.double().mean((1, 2, 3))\n"


@pytest.fixture(scope="module")
def world(tiny_sd, tmp_path_factory) -> Path:
    """A folder with a model, a reward with a module beside it, prompts, and a run of two epochs in
    microbatches of 3, which do not divide its 4 images."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(tiny_sd, folder / "sd")
    (folder / "helper.py").write_text("from package.core import scale\n")
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").touch()
    (folder / "package" / "core.py").write_text("scale = 1.0\n")
    (folder / "mine.py").write_text("import helper\n" + BRIGHT)
    (folder / "p.txt").write_text("a red circle\na green star\na blue ring\n")
    torch.set_num_threads(1)
    prdp.main([*flags_of(folder), "--epochs", "2", "--out", str(folder / "run")])
    return folder


def flags_of(world: Path) -> list[str]:
    sizes = ["--preset", "toy", "--updates-per-epoch", "2", "--prompts-per-epoch", "2"]
    sizes += ["--images-per-prompt", "2", "--microbatch", "3", "--ddpm-steps", "3"]
    inputs = ["--model", str(world / "sd"), "--prompts", str(world / "p.txt")]
    return [*sizes, *inputs, "--reward", f"{world}/mine.py:f"]


@pytest.fixture
def run(world, tmp_path) -> Path:
    """A copy of the world's run, to be damaged."""
    return Path(shutil.copytree(world / "run", tmp_path / "copy"))


# ---- Going on ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], id="prdp"),
        pytest.param(["--lora-rank", 2, "--microbatch", 4], id="lora"),
        pytest.param(["--offline", "--dtype", "bf16"], id="offline"),
    ],
)
def test_resume_equals_the_uninterrupted_run(cli, tmp_path, flags):
    """To the bit: weights, metrics and pictures; a line of metrics that outlived its checkpoint,
    torn, leaves no trace."""
    flags = [*flags, "--sample-every", 1]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert cli(*flags, "--epochs", 2, "--out", whole)[0] == 0
    assert cli(*flags, "--epochs", 1, "--out", halves)[0] == 0
    with open(halves / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "reward_me')
    assert cli("--resume", halves, "--epochs", 2)[0] == 0
    assert_same_run(whole, halves)
    assert contents(whole / "samples") == contents(halves / "samples")


KILLER = """
import os, random, signal, sys, time
root, whole, folder, *flags = sys.argv[1:]
sys.path.insert(0, root)
import torch
torch.set_num_threads(1)
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from matplotlib.figure import Figure
import matplotlib.backends.backend_agg
import prdp


def launch(arguments):
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = 1
    try:
        prdp.main(arguments)
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        os._exit(code)


started = time.time()
assert os.waitpid(launch([*flags, "--out", whole]), 0)[1] == 0
duration, kills, runs = time.time() - started, 0, 0
random.seed(0)
while kills < 20:
    out = os.path.join(folder, str(runs))
    while True:
        fresh = not os.path.exists(os.path.join(out, "checkpoint", "state.pt"))
        pid = launch([*flags, "--out", out] if fresh else ["--resume", out])
        if kills < 20:
            time.sleep(random.uniform(0, duration))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        else:
            assert os.WEXITSTATUS(status) == 0, status
            break
    runs += 1
print(kills, runs)
"""


def test_kill_at_20_random_moments(tiny_sd, tmp_path):
    """kill -9 in whatever phase, then --resume (or, where no epoch had begun, once more): the
    weights and metrics of every run are the undisturbed one's."""
    flags = [*small_run(tiny_sd), "--epochs", 2, "--sample-every", 1]
    (tmp_path / "runs").mkdir()
    arguments = ["-c", KILLER, ROOT, tmp_path / "whole", tmp_path / "runs", *flags]
    code, out, errors = script(*arguments, timeout=900)
    assert code == 0, errors[-3000:]
    kills, runs = map(int, out.split()[-2:])
    assert kills == 20
    assert runs >= 1
    for run in range(runs):
        assert_same_run(tmp_path / "whole", tmp_path / "runs" / str(run))


def test_resume_after_ctrl_c(cli, tmp_path, monkeypatch):
    """Exit code 130, how to go on, and what the interrupted epoch had done is done again."""
    sample, calls, run = prdp.sample_trajectories, [], tmp_path / "a run"

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) in (1, 5):  # the first check; of the next run its epoch 2
            raise KeyboardInterrupt
        return sample(*arguments)

    monkeypatch.setattr(prdp, "sample_trajectories", interrupted)
    code, out, errors = cli("--out", run)
    assert (code, errors) == (130, "") and "--resume" not in out and not run.exists()
    code, out, errors = cli("--out", run)
    assert code == 130 and errors == ""
    assert f"python prdp.py --resume '{run}'" in out
    assert cli("--resume", run)[0] == 0
    assert cli("--out", tmp_path / "whole")[0] == 0
    assert_same_run(tmp_path / "whole", run)


def test_resume_with_the_same_settings_and_with_harmless_others(finished, cli):
    assert cli("--resume", finished, "--seed", 3, "--kl-weight", "3e-5")[0] == 0
    assert cli("--resume", finished, "--offload", "on", "--save-every", 2)[0] == 0


def test_moved_run_with_moved_inputs_and_foreign_files_goes_on_to_the_bit(world, run, tmp_path):
    """Paths may be others: digests tell what they hold. Other people's files, and lines that are no
    metrics, do no harm."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    junk = ["", "{torn", '{"epoch": 7}']
    (run / "metrics.jsonl").write_text("\n".join([*lines, *junk]))
    for name in ("epoch_note.json", "log.txt"):
        (run / "samples" / name).write_text('[{"rewards": ["a"]}]')
    (run / ".DS_Store").touch()
    run.rename(tmp_path / "moved")
    for name in ("sd", "p.txt", "mine.py", "helper.py", "package"):
        place = tmp_path / f"new_{name}" if name in ("sd", "p.txt") else tmp_path / "new" / name
        place.parent.mkdir(exist_ok=True)
        (shutil.copytree if (world / name).is_dir() else shutil.copy)(world / name, place)

    again = ["--seed", 0, "--microbatch", 3, "--model", tmp_path / "new_sd"]
    again += ["--prompts", tmp_path / "new_p.txt", "--reward", f"{tmp_path}/new/mine.py:f"]
    code, out, errors = script(
        ROOT / "prdp.py", "--resume", tmp_path / "moved", "--epochs", 3, *again
    )
    assert code == 0, errors
    assert "on-policy gap: 0.0e+00" in out
    prdp.main([*flags_of(world), "--epochs", "3", "--out", str(tmp_path / "straight")])
    assert_same_run(tmp_path / "moved", tmp_path / "straight")


def test_lost_metrics_cost_only_themselves(run, cli):
    (run / "metrics.jsonl").write_text("lost\n")
    code, _, errors = cli("--resume", run, "--epochs", 4)
    assert code == 0, errors
    assert [row["epoch"] for row in run_folder.read_metrics(run)] == [3, 4]


def test_older_runs_go_on(run, cli):
    """Of a checkpoint and a config.json as they once were: one string of rewards, a preset, a loss,
    absent settings; and a run of DDPO's names the program that goes on with it."""
    state = checkpoint(run)
    old = json.loads((run / "config.json").read_text())
    for name in ("program", "keep_every", "reward_modules_digest", "model_configs_digest"):
        del old[name]
    old |= {"preset": "toy", "loss": "prdp", "advantage": "per-prompt"}
    old["reward"] = f'"{old["reward"][0]}"'
    (run / "config.json").write_text(json.dumps(old))
    torch.save({**state, "version": 3, "record": old, "latest": {}}, run / "checkpoint/state.pt")
    code, _, errors = cli("--resume", run, "--epochs", 3)
    assert code == 0, errors

    edit_json(run / "config.json", program=None, loss="ddpo")
    said = only_sentence(cli("--resume", run))
    assert "began with baselines/ddpo.py; go on with python baselines/ddpo.py --resume" in said
    edit_json(run / "config.json", loss="dpo")
    assert "began with --loss dpo; go on with a new --out" in only_sentence(cli("--resume", run))


def test_as_a_library(tiny_sd, tmp_path, cli, capsys):
    """`run` takes a callable and a list: what a file with the same function and prompts gives. Such
    a run goes on from the shell, once it is given both."""
    config = tiny_config(tiny_sd, epochs=1, updates_per_epoch=2, out=str(tmp_path / "library"))

    def brightness(images, prompts):
        assert set(prompts) <= set(PROMPTS)
        return images.double().mean((1, 2, 3))

    prdp.run(config, reward=brightness, prompts=PROMPTS)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "r.py").write_text(BRIGHT.replace("def f", "def brightness"))
    files = {"reward": (f"{tmp_path}/r.py:brightness",), "prompts": (str(tmp_path / "p.txt"),)}
    prdp.run(replace(config, out=str(tmp_path / "files"), **files))
    assert_same_run(tmp_path / "library", tmp_path / "files")

    more = replace(config, epochs=2, resume=config.out)
    with pytest.raises(InputError, match="prompts changed"):
        prdp.run(more, reward=brightness, prompts=PROMPTS[:2])
    prdp.run(more, reward=brightness, prompts=PROMPTS)
    assert "the reward brightness=1;" in Path(config.out, "pipeline", "README.md").read_text()
    capsys.readouterr()
    with pytest.raises(InputError, match=r"reward_terms is .*other=1.*, and was .*brightness=1"):

        def other(images, prompts):
            return [0.0] * len(prompts)

        prdp.run(more, reward=other, prompts=PROMPTS)
    capsys.readouterr()
    (tmp_path / "r.py").write_text(BRIGHT)  # its name in the file may be another
    given = ["--prompts", tmp_path / "p.txt", "--reward", f"{tmp_path}/r.py:f"]
    said = only_sentence(cli("--resume", config.out))
    assert "--prompts" in said and "holds no prompt" in said
    assert "--reward" in only_sentence(cli("--resume", config.out, *given[:2]))
    code, _, errors = cli("--resume", config.out, "--epochs", 3, *given)
    assert code == 0, errors


@torch.no_grad()
def test_a_reward_in_words_from_python_is_a_setting(tiny_sd, tmp_path, cli):
    """It is recorded, and another is refused at resume. A notebook may have set no_grad."""
    config = tiny_config(tiny_sd, epochs=1, updates_per_epoch=1, out=str(tmp_path / "run"))
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    with pytest.raises(InputError, match=r"is given so: run\(config, reward=FUNCTION\)"):
        prdp.run(replace(config, reward=len))
    prdp.run(replace(config, prompts=str(tmp_path / "p.txt")), "compressibility=0.5")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["reward"] == ["compressibility=0.5"]
    assert record["prompts"] == [str(tmp_path / "p.txt")]
    said = only_sentence(
        cli("--resume", config.out, "--epochs", 2, "--reward", "incompressibility")
    )
    assert "reward_terms is ['incompressibility=1'], and was ['compressibility=0.5']" in said


def test_a_run_that_is_moved_away_stops(cli, tmp_path):
    """It does not begin another folder of the old name; from the new one it goes on."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    (tmp_path / "mover.py").write_text(
        "import os\ncalls = []\n"
        "def f(images, prompts):\n"
        "    calls.append(1)\n"
        f"    if len(calls) == 3 and os.path.exists({str(run)!r}):\n"
        f"        os.rename({str(run)!r}, {str(moved)!r})\n"
        "    return images.double().mean((1, 2, 3))\n"
    )
    said = only_sentence(cli("--reward", f"{tmp_path}/mover.py:f"))
    assert said == f"prdp.py: {run}: has gone; go on with --resume from where it is now."
    assert not run.exists() and len(metrics_of(moved)) == 1
    assert cli("--resume", moved)[::2] == (0, "")


def test_start_or_go_on_in_one_line(tiny_sd, tmp_path):
    """docs/running.md's line for machines that may be taken away."""
    out, python = tmp_path / "run", f"{sys.executable} {ROOT / 'prdp.py'}"
    new = " ".join([python, *small_run(tiny_sd), "--epochs 1", "--out", str(out)])
    line = f"{python} --resume {out} --epochs 1 || {new}"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        done = subprocess.run(line, shell=True, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
    assert len(metrics_of(out)) == 1


# ---- What is refused, and left as it is ----------------------------------------------------------


def edit_state(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        state = checkpoint(run)
        change(state)
        torch.save(state, run / "checkpoint" / "state.pt")

    return damage


def state_is(content: object) -> Callable[[Path], None]:
    return lambda run: torch.save(content, run / "checkpoint" / "state.pt")


def misshape(state: dict) -> None:
    state["unet"]["conv_in.bias"] = torch.zeros(3, 3)


CHANGED = "restore that, or choose a new --out"
FOREIGN = CUT = "{run}/checkpoint/state.pt is damaged, or no checkpoint of a run"
OTHER = "its checkpoint is of a network with other weights"
RUNS = {
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoint"), "has no checkpoint to go on"),
    "cut checkpoint": (lambda run: os.truncate(run / "checkpoint/state.pt", 5000), CUT),
    "empty checkpoint": (lambda run: os.truncate(run / "checkpoint/state.pt", 0), CUT),
    "list": (state_is([1]), FOREIGN),
    "no keys": (state_is({}), FOREIGN),
    "no epoch": (edit_state(lambda state: state.pop("epoch")), FOREIGN),
    "shape of a weight": (edit_state(misshape), OTHER),
    "a weight less": (edit_state(lambda state: state["unet"].popitem()), OTHER),
    "version": (
        edit_state(lambda state: state.update(version=0)),
        "its checkpoint is of version 0, and this is 4",
    ),
    "another run's": (
        edit_state(lambda state: state["record"].update(seed=5)),
        f"seed is 0, and was 5; {CHANGED}",
    ),
    "edited setting": (
        lambda run: edit_json(run / "config.json", kl_weight=1.0),
        f"kl_weight is 1.0, and was 3e-05; {CHANGED}",
    ),
    "config garbage": (lambda run: (run / "config.json").write_text("{"), "its config.json: "),
}


@pytest.mark.parametrize(("damage", "sentence"), RUNS.values(), ids=RUNS)
def test_damaged_run_is_refused_and_left_as_it_is(damage, sentence, run, cli):
    damage(run)
    before = contents(run)
    said = only_sentence(cli("--resume", run, "--epochs", 3))
    assert said.startswith(f"prdp.py: --resume {run}: {sentence.format(run=run)}")
    assert contents(run) == before


SCHEDULER = "sd/scheduler/scheduler_config.json"


def swap_two_words(data: bytes) -> bytes:
    fields = json.loads(data)
    words = fields["model"]["vocab"]
    words["red</w>"], words["blue</w>"] = words["blue</w>"], words["red</w>"]
    return json.dumps(fields).encode()


CHANGES = [
    ("p.txt", lambda text: text + b"a new one\n", "prompts"),
    ("mine.py", lambda text: text.replace(b"return ", b"return -"), "reward"),
    ("helper.py", lambda text: text + b"scale = 2.0\n", "reward modules"),
    ("sd/vae/diffusion_pytorch_model.safetensors", lambda data: data[:-4] + b"\0\0\x80?", "model"),
    ("sd/vae/config.json", lambda text: text.replace(b"0.18215", b"0.2"), "model configs"),
    (SCHEDULER, lambda text: text.replace(b'"epsilon"', b'"v_prediction"'), "model configs"),
    ("package/core.py", lambda text: text.replace(b"1.0", b"2.00"), "reward modules"),
    ("sd/tokenizer/tokenizer.json", swap_two_words, "tokenizer"),
]


@pytest.mark.parametrize(("file", "change", "what"), CHANGES, ids=[c[0] for c in CHANGES])
def test_inputs_that_changed_are_refused_by_name(file, change, what, world, run, cli):
    before, original = contents(run), (world / file).read_bytes()
    assert change(original) != original
    (world / file).write_bytes(change(original))
    try:
        said = only_sentence(cli("--resume", run, "--epochs", 3))
    finally:
        (world / file).write_bytes(original)
    assert said == f"prdp.py: --resume {run}: the {what} changed since it began; {CHANGED}."
    assert contents(run) == before


def test_a_changed_network_or_tokenizer_of_a_reward_is_refused(cli, tmp_path):
    folder = Path(shutil.copytree(ROOT / "toy" / "pickscore", tmp_path / "pick"))
    assert cli("--reward", f"pickscore:{folder}", "--epochs", 1)[0] == 0
    weights = load_file(folder / "model.safetensors")
    weights["text_projection.weight"] *= 1.01
    changes = {
        "tokenizer.json": swap_two_words((folder / "tokenizer.json").read_bytes()),
        "config.json": (folder / "config.json").read_bytes().replace(b"quick_gelu", b"gelu"),
        "model.safetensors": save(weights, {"format": "pt"}),
    }
    for name, data in changes.items():
        before = (folder / name).read_bytes()
        assert data != before
        (folder / name).write_bytes(data)
        said = only_sentence(cli("--resume", tmp_path / "run", "--epochs", 2))
        what = "weights" if name == "model.safetensors" else "configs"
        assert f"the reward {what} changed since it began" in said
        (folder / name).write_bytes(before)
    assert cli("--resume", tmp_path / "run", "--epochs", 2)[::2] == (0, "")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--seed", 1], "--seed 1: the run began with 0."),
        (["--clip-range", "inf"], "--clip-range inf: the run began with 0.001."),
        (["--epochs", 1], "--epochs 1: the run has done 2."),
        (["--out", "x"], "--resume {run}: not with --preset or --out; the run has its own."),
        (["--preset", "toy"], "--resume {run}: not with --preset or --out; the run has its own."),
    ],
)
def test_run_goes_on_under_its_own_settings(flags, sentence, run, cli):
    before = contents(run)
    assert only_sentence(cli("--resume", run, *flags)) == f"prdp.py: {sentence.format(run=run)}"
    assert contents(run) == before


def test_another_reward_is_refused(run, cli):
    said = only_sentence(cli("--resume", run, "--reward", "incompressibility"))
    assert "reward_terms is ['incompressibility=1'], and was ['f=1']" in said


def test_folder_is_used_again_only_after_a_start_that_failed(run, cli, tmp_path):
    failing = tmp_path / "failing.py"
    text = "calls = []\ndef f(images, prompts):\n    calls.append(1)\n    assert len(calls) != 2\n"
    failing.write_text(text + "    return [float(i) for i in range(len(images))]\n")
    said = only_sentence(cli("--reward", f"{failing}:f"))
    assert said == "prdp.py: reward f failed: AssertionError: (failing.py, line 4)."
    assert (tmp_path / "run" / "checkpoint" / "state.pt").is_file()
    assert cli("--seed", 4, "--epochs", 1)[0] == 0

    for used in (run, tmp_path / "run"):
        before = contents(used)
        assert "in use; choose another" in only_sentence(cli("--out", used))
        assert contents(used) == before
    shutil.rmtree(run / "pipeline")
    for name in ("metrics.jsonl", "reward.png", "before_after.png"):
        (run / name).unlink()  # but its checkpoint is of epoch 2
    assert "in use; choose another" in only_sentence(cli("--out", run))


def test_other_peoples_files_do_not_make_a_folder_used(cli, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("log.txt", "slurm-1.out", ".DS_Store", ".gitkeep"):
        (tmp_path / "run" / name).touch()
    assert cli("--epochs", 1)[0] == 0


def test_reward_that_is_not_finite_stops_the_run_before_any_update(cli, tmp_path):
    """In the second epoch, naming reward and prompt; the first epoch's checkpoint stays, and the
    run can go on from it."""
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n"
        "calls, bad = [], Path(__file__).with_name('bad')\n"
        "def r(images, prompts):\n"
        "    calls.append(1)\n"
        "    broken = len(calls) == 3 and bad.exists()\n"
        "    return [float('nan') if broken else float(i) for i in range(len(prompts))]\n"
    )
    (tmp_path / "bad").touch()
    said = only_sentence(cli("--reward", f"{tmp_path}/mine.py:r"))
    assert "reward r returned nan for the prompt 'a" in said
    run = tmp_path / "run"
    assert checkpoint(run)["epoch"] == len(metrics_of(run)) == 1
    (tmp_path / "bad").unlink()
    assert cli("--resume", run)[0] == 0
    assert checkpoint(run)["epoch"] == 2


# ---- One writer ----------------------------------------------------------------------------------


def test_two_runs_into_one_folder(tiny_sd, run, cli, tmp_path):
    """The second is refused from the first second on, a resume too, and leaves nothing; what is
    killed frees the folder."""
    out = tmp_path / "run"
    with start(ROOT / "prdp.py", *small_run(tiny_sd), "--epochs", 500, "--out", out) as first:
        try:
            while not (out / ".lock").exists():
                time.sleep(0.05)
            assert "another process writes there" in only_sentence(cli("--epochs", 1))
            while not (out / "metrics.jsonl").exists():
                time.sleep(0.05)
            said = only_sentence(cli("--resume", out, "--epochs", 500))
            assert said == f"prdp.py: {out}: another process writes there."
        finally:
            first.kill()
    code, _, errors = cli("--resume", out, "--epochs", run_folder.read_state(out)["epoch"] + 1)
    assert code == 0, errors
    assert not (out / ".lock").exists()


def test_refused_start_leaves_nothing(cli, tmp_path):
    out = tmp_path / "a" / "b" / "run"
    only_sentence(cli("--out", out, "--model", "/nowhere"))
    assert not (tmp_path / "a").exists()


def test_disk_without_locks(cli, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    code, out, _ = cli("--epochs", 1)
    assert code == 0 and out.count("cannot be locked") == 1


# ---- Full disks, links, modes --------------------------------------------------------------------


@contextlib.contextmanager
def small_files(size: int):
    """The system refuses to write files beyond `size` bytes: so a full disk needs no disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("module", "function", "file"),
    [
        (run_folder, "save_state", "checkpoint/state.pt"),
        (run_folder, "write_metrics", "metrics.jsonl"),
        (report, "draw_images", "samples/epoch_0003.png"),
        (prdp.StableDiffusion, "save", "pipeline"),
    ],
)
def test_what_cannot_be_written_leaves_what_was(module, function, file, run, cli, monkeypatch):
    writes, before = getattr(module, function), contents(run)

    def on_full_disk(*arguments):
        if function == "write_metrics" and len(arguments[1]) < 3:
            return writes(*arguments)  # of the epochs before
        if function == "draw_images" and "0003" not in str(arguments[0]):
            return writes(*arguments)
        with small_files(100):
            return writes(*arguments)

    monkeypatch.setattr(module, function, on_full_disk)
    said = only_sentence(cli("--resume", run, "--epochs", 3))
    assert said.startswith(f"prdp.py: {run / file}: ")
    assert said.endswith("; what was saved before is intact.")
    after = contents(run)
    assert not [name for name in after if ".tmp" in name]
    assert before.keys() <= after.keys()
    kept = [name for name in before if name.startswith(("pipeline", "checkpoint"))]
    written = function in ("draw_images", "save")  # the checkpoint of epoch 3 is
    changed = ["checkpoint/state.pt"] if written else []
    assert [name for name in kept if after[name] != before[name]] == changed
    monkeypatch.undo()
    assert cli("--resume", run)[0] == 0
    assert [row["epoch"] for row in run_folder.read_metrics(run)] == [1, 2, 3]


def test_full_disk(cli, tmp_path):
    """A file system with room for what a run writes at first, and not for its checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        said = only_sentence(cli("--out", disk / "run"))
        assert said.startswith(f"prdp.py: {disk}/run/checkpoint/state.pt: ")
        assert said.endswith("; what was saved before is intact.")
        assert not [name for name in contents(disk) if ".tmp" in name]
        assert len(run_folder.read_metrics(disk / "run")) == 1
        subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], check=True)
        code, _, errors = cli("--resume", disk / "run")
        assert code == 0, errors
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_folder_that_cannot_be_made(cli, monkeypatch, tmp_path):
    def forbidden(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    assert "Permission denied" in only_sentence(cli())


def test_disk_without_modes(cli, monkeypatch):
    """As object stores and vfat: nothing here needs what they refuse."""

    def refused(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    for name in ("chmod", "fchmod", "fsync"):
        monkeypatch.setattr(os, name, refused)
    code, _, errors = cli("--epochs", 1, "--lora-rank", 2)
    assert code == 0, errors


def test_links_are_replaced_not_followed(finished, cli, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (finished / "pipeline").rename(elsewhere)
    (finished / "pipeline").symlink_to(elsewhere)
    before = contents(elsewhere)
    code, _, errors = cli("--resume", finished, "--epochs", 2)
    assert code == 0, errors
    assert contents(elsewhere) == before
    assert not (finished / "pipeline").is_symlink()


@pytest.mark.parametrize("name", ["file", "folder"])
def test_writing_is_whole_or_not_at_all(tmp_path, name):
    """What fails leaves the old one and no remains, whatever kind of error a library raises; a
    mistake of ours stays what it is."""
    path = tmp_path / name
    for content in ("old", "new"):
        with run_folder.writing(path) as temporary:
            file = temporary
            if name == "folder":
                temporary.mkdir()
                file = temporary / "weights"
            file.write_text(content)
    before = contents(tmp_path)
    assert list(before.values()) == [b"new"]
    for error, kind in (
        (RuntimeError("[enforce fail]: unexpected pos"), InputError),
        (OSError(28, "No space left"), InputError),
        (TypeError("ours"), TypeError),
    ):
        with pytest.raises(kind), run_folder.writing(path) as temporary:
            temporary.write_text("half")
            raise error
        assert contents(tmp_path) == before


def test_kept_pipelines(cli, tmp_path):
    """--keep-every: a model of each such epoch, as far as it had come, beside the last one."""
    assert cli("--keep-every", 1)[0] == 0
    run = tmp_path / "run"
    models = [run / "epochs" / "0001" / "pipeline", run / "epochs" / "0002" / "pipeline"]
    weights = [
        torch.cat(
            [p.flatten() for p in StableDiffusionPipeline.from_pretrained(m).unet.parameters()]
        )
        for m in (*models, run / "pipeline")
    ]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert math.isfinite(json.loads((models[0] / "prdp.json").read_text())["kl_weight"])


def test_a_kept_model_is_there_before_its_checkpoint(cli, tmp_path, monkeypatch):
    """So that none is missing where a run is killed in between."""
    save = run_folder.save_state

    def killed(run, record, epoch, state):
        if epoch == 1:
            raise KeyboardInterrupt
        save(run, record, epoch, state)

    monkeypatch.setattr(run_folder, "save_state", killed)
    assert cli("--keep-every", 1)[0] == 130
    assert (tmp_path / "run" / "epochs" / "0001" / "pipeline").is_dir()


def test_only_modules_that_a_reward_imports_count(cli, tmp_path, monkeypatch):
    """Not the script beside it that began the run, nor what another reward of the folder needs; a
    folder's name may hold a "=", and the reward moves on to one without."""
    place, other = tmp_path / "lr=1e-4,b=3", tmp_path / "other"
    place.mkdir()
    (place / "bright.py").write_text(
        "try:\n    import wandb.sdk\nexcept ImportError:\n    pass\n"
        "def f(images, prompts):\n    return images.float().mean((1, 2, 3))\n"
    )
    (place / "script.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(place)
    importlib.import_module("script")
    assert cli("--reward", f"{place}/bright.py:f", "--epochs", 1)[0] == 0
    (place / "script.py").write_text("x = 2\n")
    (place / "wandb").mkdir()  # as wandb leaves one, without a module in it
    run = tmp_path / "run"
    assert cli("--resume", run, "--epochs", 2)[::2] == (0, "")
    place.rename(other)
    again = ["--resume", run, "--epochs", 3, "--reward", f"{other}/bright.py:f"]
    assert cli(*again)[::2] == (0, "")


def test_a_models_folder_is_no_place_for_a_run(cli, tiny_sd, tmp_path):
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    assert "in use; choose another" in only_sentence(cli("--model", model, "--out", model))
    assert "--out: is empty" in only_sentence(cli("--out", ""))
