"""A run's folder: written whole or not at all, by one process, gone on with to the bit, or refused
with nothing lost."""

import contextlib
import dataclasses
import io
import json
import math
import os
import pickle
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import prdp
import rewards
from conftest import PROMPTS, ROOT, assert_same_run, checkpoint, contents, edit_json, metrics_of
from conftest import only_sentence, script, small_run, start, tiny_config
from support import report, run_folder
from support.cli import UserError, flag
from support.settings import parse_settings

BRIGHT = "def f(images, prompts):\n    return images.double().mean((1, 2, 3))\n"


@pytest.fixture(scope="module")
def world(tiny_sd, tmp_path_factory) -> Path:
    """A folder with a model, a reward with a module beside it, prompts, and a run of two epochs in
    microbatches of 3, which do not divide its 4 images."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(tiny_sd, folder / "sd")
    (folder / "helper.py").write_text("scale = 1.0\n")
    (folder / "mine.py").write_text("import helper\n" + BRIGHT)
    (folder / "p.txt").write_text("a red circle\na green star\na blue ring\n")
    torch.set_num_threads(1)
    prdp.main([*flags_of(folder), "--epochs", "2", "--out", str(folder / "run")])
    return folder


def flags_of(world: Path) -> list[str]:
    inputs = ["--prompts", str(world / "p.txt"), "--reward", f"{world}/mine.py:f"]
    return small_run(str(world / "sd"), "--seed", "0", "--microbatch", "3", *inputs)


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
    """To the bit: weights, metrics and pictures; a line of metrics that outlived its checkpoint
    leaves no trace."""
    flags = [*flags, "--sample-every", 1]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert cli(*flags, "--epochs", 2, "--out", whole)[0] == 0
    assert cli(*flags, "--epochs", 1, "--out", halves)[0] == 0
    with open(halves / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "reward_mean": 7.0}\n')
    assert cli("--resume", halves, "--epochs", 2)[0] == 0
    assert_same_run(whole, halves)
    assert contents(whole / "samples") == contents(halves / "samples")


KILLER = """
import os, random, signal, sys, time
root, whole, folder, *flags = sys.argv[1:]
sys.path.insert(0, root)
import matplotlib.backends.backend_agg, torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
import prdp
torch.set_num_threads(1)


def launch(*arguments):
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        prdp.main(arguments)
    finally:
        os._exit(sys.exc_info()[0] is not None)


started = time.time()
assert os.waitpid(launch(*flags, "--out", whole), 0)[1] == 0
duration, kills, runs = time.time() - started, 0, 0
random.seed(0)
while kills < 4:
    out, runs, status = os.path.join(folder, str(runs)), runs + 1, 9
    while status:
        fresh = not os.path.exists(os.path.join(out, "checkpoint", "state.pt"))
        pid = launch(*flags, "--out", out) if fresh else launch("--resume", out)
        if kills < 4:
            time.sleep(random.uniform(0, duration))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL), status
        kills += status == signal.SIGKILL
print(kills)
"""


def test_kill_at_4_random_moments(tiny_sd, tmp_path):
    """kill -9 in whatever phase, then --resume (or, where no epoch had begun, once more): the
    weights and metrics of every run are the undisturbed one's."""
    flags = [*small_run(tiny_sd), "--epochs", 2, "--sample-every", 1]
    (tmp_path / "runs").mkdir()
    arguments = ["-c", KILLER, ROOT, tmp_path / "whole", tmp_path / "runs", *flags]
    code, out, errors = script(*arguments, timeout=900)
    assert code == 0, errors[-3000:]
    assert out.split()[-1] == "4"
    for run in (tmp_path / "runs").iterdir():
        assert_same_run(tmp_path / "whole", run)


def test_resume_after_ctrl_c(cli, tmp_path, monkeypatch):
    """Exit code 130, how to go on, and what the interrupted epoch had done is done again."""
    sample, calls, run = prdp.sample_trajectories, [], tmp_path / "a run"

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) in (1, 5):  # the first check; of the next run its epoch 2
            raise KeyboardInterrupt
        return sample(*arguments)

    def interrupted_at_once(*arguments):
        raise KeyboardInterrupt

    load = prdp.load_models
    monkeypatch.setattr(prdp, "sample_trajectories", interrupted)
    code, out, errors = cli("--out", run)
    assert (code, errors) == (130, "") and "--resume" not in out and not run.exists()
    run.mkdir()  # by hand, perhaps with modes of its own, perhaps where a shell stands
    monkeypatch.setattr(prdp, "load_models", interrupted_at_once)
    assert cli("--out", run)[0] == 130 and run.is_dir() and not any(run.iterdir())
    monkeypatch.setattr(prdp, "load_models", load)
    code, out, errors = cli("--out", run)
    assert (code, errors) == (130, "") and f"python prdp.py --resume '{run}'" in out
    assert cli("--resume", run)[0] == 0
    assert cli("--out", tmp_path / "whole")[0] == 0
    assert_same_run(tmp_path / "whole", run)


def test_moved_run_with_moved_inputs_goes_on_to_the_bit(world, run, cli, tmp_path):
    """Paths may be others: digests tell what they hold. Other people's files do no harm; settings
    may be given again."""
    for name in ("samples/log.txt", ".DS_Store"):
        (run / name).write_text('[{"rewards": ["a"]}]')
    moved, place = run.rename(tmp_path / "moved"), tmp_path / "new"
    shutil.copytree(world, place)
    again = ["--model", place / "sd", "--prompts", place / "p.txt", "--seed", 0]
    again += ["--reward", f"{place}/mine.py:f", "--offload", "on", "--save-every", 2]
    code, out, errors = cli("--resume", moved, "--epochs", 3, *again)
    assert (code, errors) == (0, "")
    assert "on-policy gap: 0.0e+00" in out and "warning" not in out
    prdp.main([*flags_of(world), "--epochs", "3", "--out", str(tmp_path / "straight")])
    assert_same_run(moved, tmp_path / "straight")


def test_as_a_library(tiny_sd, tmp_path, cli):
    """`run` takes a callable and a list: what a file with the same function and prompts gives,
    whatever a notebook has entered. Such a run goes on from the shell, once it is given both."""
    config = tiny_config(tiny_sd, epochs=1, updates_per_epoch=2, out=str(tmp_path / "library"))

    def brightness(images, prompts):
        assert set(prompts) <= set(PROMPTS)
        return images.double().mean((1, 2, 3))

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        prdp.run(config, reward=brightness, prompts=PROMPTS)
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "r.py").write_text(BRIGHT.replace("def f", "def brightness"))
    files = {"reward": (f"{tmp_path}/r.py:brightness",), "prompts": (str(tmp_path / "p.txt"),)}
    prdp.run(replace(config, out=str(tmp_path / "files"), **files))
    assert_same_run(tmp_path / "library", tmp_path / "files")

    more = replace(config, epochs=2, resume=config.out)
    with pytest.raises(UserError, match="holds no prompt"):
        prdp.run(more, reward=brightness, prompts=[])
    with pytest.raises(UserError, match="prompts changed"):
        prdp.run(more, reward=brightness, prompts=PROMPTS[:2])
    with pytest.raises(UserError, match=r"reward_terms is \['<lambda>=1'\], and was \['brightness"):
        prdp.run(more, reward=lambda images, prompts: [0.0] * len(prompts), prompts=PROMPTS)
    with pytest.raises(UserError, match="must be words; a function is an argument of run"):
        prdp.run(replace(config, reward=len))
    prdp.run(more, reward=brightness, prompts=PROMPTS)
    assert "the reward brightness=1;" in Path(config.out, "pipeline", "README.md").read_text()
    given = ["--prompts", *files["prompts"], "--reward", *files["reward"]]
    assert "--prompts: names no file; a run from Python" in only_sentence(
        cli("--resume", config.out)
    )
    assert "--reward: names no" in only_sentence(cli("--resume", config.out, *given[:2]))
    code, _, errors = cli("--resume", config.out, "--epochs", 3, *given)
    assert code == 0, errors


def test_settings_of_ones_own(tiny_sd, tmp_path):
    """Of whatever name and kind: they cost no model, though its card has such names; each is a flag
    of a run that goes on, and code that lacks them refuses it."""

    @dataclasses.dataclass
    class Config(prdp.Config):
        name: str = flag("mine", "my own")
        base: str = flag("mine", "my own")
        epoch: int = flag(7, "my own")
        layers: tuple = flag(("up", "down"), "my own, of 50% of the network")
        adam: tuple = flag((0.9, 0.999), "my own")
        most: float = flag(math.inf, "my own")

    settings = vars(tiny_config(tiny_sd, epochs=1, updates_per_epoch=1, out=str(tmp_path / "run")))
    prdp.run(Config(**settings))
    argv = ["--resume", str(tmp_path / "run"), "--layers", "up", "down", "--adam", "0.9", "0.999"]
    config = parse_settings(Config, {"small": {}}, "", argv)
    assert (config.layers, config.adam) == (("up", "down"), (0.9, 0.999))
    with pytest.raises(UserError, match="unknown here, name, base, epoch, layers, adam, most;"):
        prdp.parse_args(["--resume", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(io.StringIO()) as out:
        parse_settings(Config, {"small": {}}, "", ["--help"])
    assert stop.value.code == 0 and "50% of the network (default: up down)" in out.getvalue()
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert "finetuned by prdp.py" in card and "To epoch 1," in card


def test_what_a_run_began_from_is_what_it_is_loaded_beside(run, world, cli, tmp_path):
    """A folder whose weights are others by now is refused; `~` is a home, a text a device."""
    device = torch.device("cpu")
    models = prdp.load_run(os.path.relpath(run), device)
    assert models.policy.unet is not models.reference.unet
    unet = next((world / "sd" / "unet").glob("*.safetensors"))
    weights = load_file(unet)
    save_file({name: x + 1 for name, x in weights.items()}, unet)
    with pytest.raises(UserError, match="the model changed since it began"):
        prdp.load_run(str(run), device)
    save_file(weights, unet)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}),
        ("vae/config.json", {"scaling_factor": 1.0}),
        ("unet/config.json", {"sample_size": [8, 12]}),
    ],
)
def test_what_a_run_began_from_is_more_than_weights(run, world, cli, file, change):
    """Its noise schedule, the scale and shape of its latents decide what is drawn, too."""
    path = world / "sd" / file
    before = path.read_text()
    edit_json(path, **change)
    assert "the model changed since it began" in only_sentence(cli("--resume", run, "--epochs", 3))
    path.write_text(before)


def test_a_run_whose_reward_and_metrics_have_moved(run, world, cli):
    """It is loaded by the new name; what is missing of the metrics costs nothing."""
    moved = shutil.copy(world / "mine.py", world / "moved.py")
    edit_json(run / "config.json", reward=[f"{world}/gone.py:f"])
    with pytest.raises(UserError, match="no such file or folder"):
        prdp.load_run(run, torch.device("cpu"))
    flags = ["--reward", f"{moved}:f"]
    assert prdp.load_run(run, "cpu", flags=flags).reward.components.keys() == {"f"}
    (run / "metrics.jsonl").unlink()
    assert cli("--resume", run, *flags)[::2] == (0, "")
    assert json.loads((run / "pipeline" / "prdp.json").read_text())["epoch"] == 2
    assert not metrics_of(run)


class Statistics:
    """What a `train` of one's own keeps."""

    def __init__(self) -> None:
        self.epochs = 0

    def state_dict(self) -> dict:
        return vars(self)

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def test_a_run_goes_on_under_the_train_that_it_has(run, cli):
    """Neither a state that is not asked for nor one that is not there is passed over."""
    config = prdp.parse_args(["--resume", str(run), "--epochs", "3"])
    with pytest.raises(UserError, match="its `train` was another's; call run with that"):
        prdp.run(config, state=Statistics())
    edit_state(run, lambda state: state.update(state={"epochs": 2}))
    assert "its `train` was another's" in only_sentence(cli("--resume", run, "--epochs", 3))
    statistics = Statistics()
    prdp.run(config, state=statistics)
    assert statistics.epochs == 2 and checkpoint(run)["state"] == {"epochs": 2}


EPOCHS = [[{"reward_mean": 0.5}, {"loss": 1}], [{}, {}], [{"epoch": 0, "sample_reward": 3}] * 2]


@pytest.mark.parametrize("epochs", EPOCHS)
def test_a_train_of_ones_own_yields_what_it_has(tiny_sd, tmp_path, epochs):
    """Whatever numbers, and without a phase that is timed."""
    config = prdp.parse_args([*small_run(tiny_sd), "--out", tmp_path / "run", "--sample-every", 9])
    prdp.run(config, train=lambda *_: epochs)
    rows = run_folder.read_metrics(tmp_path / "run")
    assert [row["reward_mean"] for row in rows] == [row.get("reward_mean") for row in epochs]
    assert [row["images_per_second"] for row in rows] == [None, None]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["sample_reward"] for row in rows] == [row.get("sample_reward") for row in epochs]
    assert checkpoint(tmp_path / "run")["epoch"] == 2


def test_weights_of_other_kinds_are_told_apart():
    """A judge's adapters and statistics, a token that was added last; adapters of the policy are
    what it learns, and do not count."""

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_A = torch.nn.Parameter(torch.zeros(2))
            self.norm = torch.nn.BatchNorm1d(2)
            self.tokens = torch.nn.Embedding.from_pretrained(torch.zeros(49_409, 8))

    network = Network()
    for adapters in (True, False):
        found = [run_folder.weights_digest([network], adapters)]
        for weight in (network.norm.running_mean, network.tokens.weight[-1], network.lora_A.data):
            weight += 1
            found.append(run_folder.weights_digest([network], adapters))
        assert len(set(found)) == 3 + adapters


def test_a_reward_file_is_known_as_it_was_run(tmp_path):
    """Not as it is when config.json is written."""
    file = tmp_path / "mine.py"
    text = "def score(images, prompts): return [1.0] * len(prompts)\n"
    file.write_text(text)
    reward = rewards.load_reward(f"{file}:score", "cpu")
    file.write_text(text.replace("1.0", "2.0"))
    found = run_folder.digests(reward, ["a"])
    assert found["reward_digest"] == run_folder.digest([text.encode()])


def test_functions_of_one_name_are_told_apart_by_their_files(tmp_path):
    """That they have changed places is seen."""
    digests = []
    for name, sign in (("a", ""), ("b", "-")):
        text = f"def score(images, prompts): return [{sign}1.0] * len(prompts)\n"
        (tmp_path / f"{name}.py").write_text(text)
    for order in ("ab", "ba"):
        words = [f"{tmp_path}/{order[n]}.py:score={1 - n}" for n in (0, 1)]
        found = run_folder.digests(rewards.load_reward(words, "cpu"), ["a"])
        assert found["reward_terms"] == ["score=1", "score-2=0"]
        digests.append(found["reward_digest"])
    assert digests[0] != digests[1]


def test_what_could_not_be_read_again_is_not_saved(tiny_sd, tmp_path):
    """A number of numpy's in an optimizer ends a run in its first epoch, not when it goes on."""

    def train(config, models, optimizer, prompts, start):
        optimizer.param_groups[0]["lr"] = np.float64(1e-4)
        return prdp.train(config, models, optimizer, prompts, start)

    config = prdp.parse_args([*small_run(tiny_sd), "--out", tmp_path / "run"])
    with pytest.raises(pickle.UnpicklingError, match="numpy"):
        prdp.run(config, train=train)
    assert checkpoint(tmp_path / "run")["epoch"] == 0


def test_a_run_that_is_moved_away_stops(cli, tmp_path):
    """It does not begin another folder of the old name; from the new one it goes on."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    (tmp_path / "mover.py").write_text(
        "import os\ncalls = []\n"
        "def f(images, prompts):\n"
        "    calls.append(1)\n"
        f"    if len(calls) == 5 and os.path.exists({str(run)!r}):\n"  # in epoch 2
        f"        os.rename({str(run)!r}, {str(moved)!r})\n"
        "    return images.double().mean((1, 2, 3))\n"
    )
    said = only_sentence(cli("--reward", f"{tmp_path}/mover.py:f"))
    assert said == f"prdp.py: {run}: has gone; go on with --resume from where it is now."
    assert not run.exists() and len(metrics_of(moved)) == 1
    assert cli("--resume", moved)[::2] == (0, "")


# ---- What is refused, and left as it is ----------------------------------------------------------


def edit_state(run: Path, change: Callable[[dict], object]) -> None:
    state = checkpoint(run)
    change(state)
    torch.save(state, run / STATE)


BAD_SHAPE = {"conv_in.bias": torch.zeros(3, 3)}
STATE = "checkpoint/state.pt"
CHANGED = "restore that, or choose a new --out"
FOREIGN = f"--resume {{run}}: {{run}}/{STATE} is damaged, or no checkpoint of a run"
OTHER = "--resume {run}: its checkpoint is of a network with other weights"
BEGAN = (
    "--resume {run}: began with baselines/ddpo.py; go on with: python baselines/ddpo.py --resume"
)
EDITED = f"--resume {{run}}: kl_weight is 1.0, and was 3e-05; {CHANGED}"
RUNS = {
    "no checkpoint": (lambda run: (run / STATE).unlink(), "--resume {run}: has no checkpoint"),
    "cut checkpoint": (lambda run: os.truncate(run / STATE, 5000), FOREIGN),
    "empty checkpoint": (lambda run: os.truncate(run / STATE, 0), FOREIGN),
    "list": (lambda run: torch.save([1], run / STATE), FOREIGN),
    "no epoch": (lambda run: edit_state(run, lambda state: state.pop("epoch")), FOREIGN),
    "shape": (lambda run: edit_state(run, lambda state: state["unet"].update(BAD_SHAPE)), OTHER),
    "a weight less": (lambda run: edit_state(run, lambda state: state["unet"].popitem()), OTHER),
    "edited setting": (lambda run: edit_json(run / "config.json", kl_weight=1.0), EDITED),
    "program": (lambda run: edit_json(run / "config.json", program="baselines/ddpo.py"), BEGAN),
    "garbage": (lambda run: (run / "config.json").write_text("{"), "--resume {run}: its config"),
    "metrics cut off": (
        lambda run: (run / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo'),
        "{run}/metrics.jsonl: take line 2 away: Unterminated string",
    ),
    "metrics": (
        lambda run: (run / "metrics.jsonl").write_text("7\n"),
        "{run}/metrics.jsonl: take line 1 away",
    ),
    "a note": (
        lambda run: (run / "metrics.jsonl").write_text('{"epoch": "note"}\n'),
        "{run}/metrics.jsonl: take line 1 away: it is no epoch's.",
    ),
}


@pytest.mark.parametrize(("damage", "sentence"), RUNS.values(), ids=RUNS)
def test_damaged_run_is_refused_and_left_as_it_is(damage, sentence, run, cli):
    damage(run)
    before = contents(run)
    said = only_sentence(cli("--resume", run, "--epochs", 3))
    assert said.startswith(f"prdp.py: {sentence.format(run=run)}")
    assert contents(run) == before


def scale(file: Path, weight: str) -> None:
    """One weight of a network is another."""
    weights = load_file(file)
    weights[weight] *= 1.01
    save_file(weights, file, {"format": "pt"})


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("what", "file", "change"),
    [
        ("prompts", "p.txt", lambda file: file.write_text("a new one\n" + file.read_text())),
        ("model", f"sd/unet/{WEIGHTS}", lambda file: scale(file, "conv_in.weight")),
        ("model", f"sd/vae/{WEIGHTS}", lambda file: scale(file, "decoder.conv_in.weight")),
    ],
)
def test_inputs_that_changed_are_refused_by_name(what, file, change, world, run, cli):
    before, original = contents(run), (world / file).read_bytes()
    change(world / file)
    try:
        said = only_sentence(cli("--resume", run, "--epochs", 3))
    finally:
        (world / file).write_bytes(original)
    assert said == f"prdp.py: --resume {run}: the {what} changed since it began; {CHANGED}."
    assert contents(run) == before


def test_changed_weights_of_a_reward_are_refused(cli, tmp_path):
    folder = Path(shutil.copytree(ROOT / "toy" / "pickscore", tmp_path / "pick"))
    assert cli("--reward", f"pickscore:{folder}", "--epochs", 1)[0] == 0
    scale(folder / "model.safetensors", "text_projection.weight")
    said = only_sentence(cli("--resume", tmp_path / "run", "--epochs", 2))
    assert f"the reward weights changed since it began; {CHANGED}." in said


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--seed", 1], f"--resume {{run}}: seed is 1, and was 0; {CHANGED}."),
        (["--clip-range", "inf"], f"--resume {{run}}: clip_range is inf, and was 0.01; {CHANGED}."),
        (["--epochs", 1], "--epochs 1: the run has done 2."),
        (["--out", "x"], "--resume {run}: not with --preset or --out; the run has its own."),
        (["--preset", "toy"], "--resume {run}: not with --preset or --out; the run has its own."),
        (
            ["--reward", "compressibility"],
            f"--resume {{run}}: reward_terms is ['compressibility=1'], and was ['f=1']; {CHANGED}.",
        ),
    ],
)
def test_run_goes_on_under_its_own_settings(flags, sentence, run, cli):
    before = contents(run)
    assert only_sentence(cli("--resume", run, *flags)) == f"prdp.py: {sentence.format(run=run)}"
    assert contents(run) == before


def test_folder_is_used_again_only_after_a_start_that_failed(run, cli, tiny_sd, tmp_path):
    """Other people's files do not make it used, nor a lock that a killed start has left."""
    (tmp_path / "run").mkdir()
    for name in ("log.txt", ".DS_Store", ".prdp.lock"):
        (tmp_path / "run" / name).touch()
    failing = tmp_path / "failing.py"
    text = "calls = []\ndef f(images, prompts):\n    calls.append(1)\n    assert len(calls) != 4\n"
    failing.write_text(text + "    return [float(i) for i in range(len(images))]\n")
    code, _, errors = cli("--reward", f"{failing}:f")
    assert code == 2 and "reward f failed: AssertionError" in errors
    assert (tmp_path / "run" / STATE).is_file()
    assert cli("--seed", 4, "--epochs", 1)[0] == 0

    shutil.rmtree(run / "pipeline")
    for name in ("metrics.jsonl", "reward.png", "before_after.png"):
        (run / name).unlink()  # but its checkpoint is of epoch 2
    model = Path(shutil.copytree(tiny_sd, tmp_path / "model"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "reward.png").write_text("somebody's own")
    emptied = Path(shutil.copytree(tmp_path / "run", tmp_path / "emptied"))
    (emptied / "metrics.jsonl").write_text("")
    for used in (run, tmp_path / "run", model, pictures, emptied):
        before = contents(used)
        assert "in use; choose another" in only_sentence(cli("--out", used))
        assert contents(used) == before


def test_a_reward_that_failed_is_mended_and_gone_on_with(cli, tmp_path):
    """NaN stops a run before it learns from it, with the prompt; the checkpoint of the epoch before
    stays. A file that changed is named, once, and config.json has both digests; of the modules that
    it imports nothing is kept."""
    mine, helper, run = tmp_path / "mine.py", tmp_path / "helper.py", tmp_path / "run"
    text = "import helper\ncalls = []\ndef f(images, prompts):\n    calls.append(1)\n"
    text += (
        "    return [float('nan') if len(calls) == BAD else float(i) for i in range(len(images))]"
    )
    bad, mended = text.replace("BAD", "5"), text.replace("BAD", "None")
    mine.write_text(bad)
    helper.write_text("scale = 1\n")
    said = only_sentence(cli("--reward", f"{mine}:f"))
    assert "reward f returned nan for the prompt 'a" in said
    assert checkpoint(run)["epoch"] == len(metrics_of(run)) == 1

    mine.write_text(mended)
    helper.write_text("scale = 20\n")
    for epoch in (2, 3):
        code, out, errors = cli("--resume", run, "--epochs", epoch)
        assert (code, errors) == (0, "")
        assert out.count(f"warning: {mine}: changed since the run began") == (epoch == 2)
        record = json.loads((run / "config.json").read_text())
        assert record["reward_digests"] == [run_folder.digest([x.encode()]) for x in (bad, mended)]
        assert checkpoint(run)["record"] == record


# ---- One writer ----------------------------------------------------------------------------------


def test_two_runs_into_one_folder(tiny_sd, cli, tmp_path):
    """The second is refused from the first second on, a resume too, and leaves nothing; what is
    killed frees the folder."""
    out = tmp_path / "run"
    with start(ROOT / "prdp.py", *small_run(tiny_sd), "--epochs", 500, "--out", out) as first:
        try:
            for file, flags in ((".prdp.lock", ["--out", out]), (STATE, ["--resume", out])):
                while not (out / file).exists():
                    time.sleep(0.05)
                said = only_sentence(cli(*flags, "--epochs", 500))
                assert said == f"prdp.py: {out}: another process writes there."
        finally:
            first.kill()
    code, _, errors = cli("--resume", out, "--epochs", run_folder.read_state(out)["epoch"] + 1)
    assert code == 0, errors
    assert not (out / ".prdp.lock").exists()


FORKS = """
import os, time
from pathlib import Path
calls = []

def f(images, prompts):
    calls.append(1)
    if len(calls) == 2:  # the first is before the folder is locked
        worker = os.fork()
        if worker == 0:
            for stream in (1, 2):  # else who reads them waits
                os.close(stream)
            time.sleep(600)
            os._exit(0)
        with open(Path(__file__).with_name("workers"), "a") as file:
            print(worker, file=file)
    return images.double().mean((1, 2, 3))
"""


def test_a_worker_of_a_reward_does_not_hold_the_folder(tiny_sd, cli, tmp_path):
    """One that outlives its run, killed or ended."""
    (tmp_path / "forks.py").write_text(FORKS)
    out, workers = tmp_path / "run", tmp_path / "workers"
    flags = small_run(tiny_sd, "--epochs", 500, "--reward", f"{tmp_path}/forks.py:f")
    try:
        with start(ROOT / "prdp.py", *flags, "--out", out) as first:
            while not (out / STATE).exists() and first.poll() is None:
                time.sleep(0.05)
            first.kill()
        for _ in range(2):
            epoch = run_folder.read_state(out)["epoch"]
            code, _, errors = cli("--resume", out, "--epochs", epoch + 1)
            assert code == 0, errors
        pids = [int(line) for line in workers.read_text().split()]
        assert len(pids) == 3
        for pid in pids:
            os.kill(pid, 0)  # is there yet
    finally:
        for line in workers.read_text().split():
            os.kill(int(line), signal.SIGKILL)


def test_refused_start_leaves_nothing(cli, tmp_path):
    out = tmp_path / "a" / "run"
    only_sentence(cli("--out", out, "--model", "/nowhere"))
    assert not (tmp_path / "a").exists()
    only_sentence(cli("--out", out, "--ddpm-steps", 600))
    assert not out.exists()


@pytest.mark.parametrize(
    "error", [OSError(37, "No locks"), OSError(38, "x"), NotImplementedError()]
)
def test_disk_without_locks(cli, monkeypatch, error):
    """Of a network, or of a system that has none: a warning."""

    def unsupported(*_, **__):
        raise error

    missing = isinstance(error, NotImplementedError)
    with monkeypatch.context() as patch:
        patch.setattr(*(filelock.FileLock, "acquire") if missing else ["fcntl.flock"], unsupported)
        code, out, errors = cli("--epochs", 1)
    assert (code, errors) == (0, "") and out.count("cannot be locked") == 1


# ---- The order of trust: metrics, checkpoint, and then what may fail -----------------------------


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """The system refuses to write files beyond 100 bytes: so a full disk needs no disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill_disk(monkeypatch, module: object, name: str, where: str = "") -> None:
    """While a function writes a path that has `where` in it."""
    function = getattr(module, name)

    def writes(*arguments, **options):
        full = any(where in str(argument) for argument in arguments[:2])
        with full_disk() if full else contextlib.nullcontext():
            return function(*arguments, **options)

    monkeypatch.setattr(module, name, writes)


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("epochs", "the model of epoch 3"),  # a file where a folder should be
        ("samples", "{run}/samples/epoch_0003.png"),
        ("matplotlib.figure", "reward.png"),  # cannot be imported
        ((report, "plot_rewards"), "reward.png"),  # a full disk
        ((report, "draw_images"), "{run}/before_after.png"),
        ((prdp.StableDiffusion, "save", "epochs"), "the model of epoch 4"),
    ],
)
def test_nothing_after_a_checkpoint_costs_the_epoch(broken, named, run, cli, monkeypatch):
    """What fails is a warning; the run goes on, and ends with its model."""
    if isinstance(broken, tuple):
        fill_disk(monkeypatch, *broken)
    elif "." in broken:
        monkeypatch.setitem(sys.modules, broken, None)
    else:
        shutil.rmtree(run / broken, ignore_errors=True)
        (run / broken).touch()
    flags = ["--epochs", 4, "--keep-every", 1, "--sample-every", 1]
    code, out, errors = cli("--resume", run, *flags)
    assert (code, errors) == (0, "")
    assert f"warning: {named.format(run=run)}: " in out
    assert checkpoint(run)["epoch"] == len(metrics_of(run)) == 4
    assert json.loads((run / "pipeline" / "prdp.json").read_text())["epoch"] == 4
    assert not [name for name in contents(run) if ".tmp" in name]


@pytest.mark.parametrize("step", [(prdp.StableDiffusion, "save"), (report, "show_epoch")])
def test_an_epoch_is_safe_before_anything_is_shown(step, cli, tmp_path, monkeypatch):
    """Killed at a later step of epoch 1, a run has that epoch."""

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(*step, killed)
    assert cli("--keep-every", 1)[0] == 130
    assert checkpoint(tmp_path / "run")["epoch"] == len(metrics_of(tmp_path / "run")) == 1


def test_a_name_that_no_encoding_has(cli, tmp_path):
    """Prompts and a reward whose names are no UTF-8 serve; a run's folder cannot be."""
    place = tmp_path / "f\udcfcnf"
    place.mkdir()
    (place / "gr\udcf6\udcdfe.py").write_text(BRIGHT)
    (place / "p\udcfc.txt").write_text("a red circle\n")
    given = ["--reward", f"{place}/gr\udcf6\udcdfe.py:f", "--prompts", place / "p\udcfc.txt"]
    assert "--out" in only_sentence(cli("--out", place / "run"))
    run = tmp_path / "run"
    for epoch, flags in ((1, ["--out", run, *given]), (2, ["--resume", run])):
        code, _, errors = cli(*flags, "--epochs", epoch, "--keep-every", 1)
        assert (code, errors) == (0, "")
        assert checkpoint(run)["epoch"] == epoch
        assert StableDiffusionPipeline.from_pretrained(run / "pipeline")
        assert (run / "epochs" / f"000{epoch}" / "pipeline").is_dir()


# ---- Full disks, links, modes --------------------------------------------------------------------


@pytest.mark.parametrize("file", [STATE, "metrics.jsonl", "pipeline"])
def test_what_cannot_be_written_leaves_what_was(file, run, cli, monkeypatch):
    before = contents(run)
    if file == "pipeline":
        fill_disk(monkeypatch, prdp.StableDiffusion, "save")
    else:
        name = "save_checkpoint" if file == STATE else "write_json"
        fill_disk(monkeypatch, run_folder, name, "'epoch': 3" if file != STATE else "")
    said = only_sentence(cli("--resume", run, "--epochs", 3))
    assert said.startswith(f"prdp.py: {run / file}: ")
    assert said.endswith("; what was saved before is intact.")
    after = contents(run)
    assert not [name for name in after if ".tmp" in name]
    assert before.keys() <= after.keys()
    kept = [name for name in before if name.startswith(("pipeline", "checkpoint"))]
    changed = [STATE] if file == "pipeline" else []
    assert [name for name in kept if after[name] != before[name]] == changed
    monkeypatch.undo()
    assert cli("--resume", run)[0] == 0
    assert [row["epoch"] for row in run_folder.read_metrics(run)] == [1, 2, 3]


def test_disk_without_modes(cli, monkeypatch):
    """As object stores and vfat: nothing here needs what they refuse."""

    def refused(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    for name in ("chmod", "fchmod", "fsync"):
        monkeypatch.setattr(os, name, refused)
    code, _, errors = cli("--epochs", 1, "--lora-rank", 2)
    assert code == 0, errors


def test_links_are_replaced_not_followed(finished, cli, tmp_path):
    elsewhere = (finished / "pipeline").rename(tmp_path / "elsewhere")
    (finished / "pipeline").symlink_to(elsewhere)
    before = contents(elsewhere)
    code, _, errors = cli("--resume", finished, "--epochs", 2)
    assert code == 0, errors
    assert contents(elsewhere) == before
    assert not (finished / "pipeline").is_symlink()


@pytest.mark.parametrize("name", ["file", "folder/file"])
def test_writing_is_whole_or_not_at_all(tmp_path, name):
    """Also a folder; what fails leaves the old one and no remains, whatever kind of error a library
    raises; a mistake of ours stays what it is."""

    def write(text: str, error: Exception | None = None) -> None:
        with run_folder.writing(tmp_path / Path(name).parts[0]) as temporary:
            file = temporary.joinpath(*Path(name).parts[1:])
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
            if error:
                raise error

    for text in ("old", "new"):
        write(text)
    mistake, enforce = TypeError("ours"), RuntimeError("[enforce fail]: unexpected pos")
    for error in (enforce, OSError(28, "No space left"), mistake):
        with pytest.raises(TypeError if error is mistake else UserError):
            write("half", error)
        assert contents(tmp_path) == {name: b"new"}


def test_kept_pipelines(cli, tmp_path):
    """--keep-every: a model of each such epoch, as far as it had come, beside the last one."""
    assert cli("--keep-every", 1)[0] == 0
    weights = []
    for place in ("epochs/0001", "epochs/0002", "."):
        model = tmp_path / "run" / place / "pipeline"
        unet = StableDiffusionPipeline.from_pretrained(model).unet
        weights.append(torch.cat([p.flatten() for p in unet.parameters()]))
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
