"""Commands and their words: flags, one sentence for what was given wrong, a traceback for a mistake
of ours and of a user's own code, other people's terminals, notebooks and folders."""

import dataclasses
import importlib
import io
import os
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import prdp
from baselines import ddpo
from conftest import ROOT, call, contents, metrics_of, only_sentence, small_run
from support.cli import Parser, UserError, flag
from support.inputs import load_module
from support.settings import resolve

score_pictures = load_module("score_pictures", str(ROOT / "examples/score_pictures.py")).main
FINITE = "is not finite; try, in a new run, a lower --learning-rate or --guidance-scale, a higher"
PICTURE = str(ROOT / "toy" / "before_after.png")
PROGRAMS = (
    "prdp",
    "evaluate",
    "examples/score_pictures",
    *(f"baselines.{x}" for x in ("ddpo", "rwr", "diffusion_dpo")),
)
BAD_INPUT = [
    (["--prompts", "nowhere.txt"], "nowhere.txt: No such file or directory"),
    (["--prompts", "~/nowhere.csv:a"], f"{Path.home()}/nowhere.csv:a: No such file or directory"),
    (["--epochs", "0"], "--epochs 0: must be above 0"),
    (["--seed", "9" * 30], f"--seed {'9' * 30}: too large"),
    (["--clip-range", "nan"], "--clip-range nan: must be above 0"),
    (["--kl-weight", "inf"], "--kl-weight inf: too large"),
    (["--kl-weight", "1e-300"], f"gradient {FINITE}"),
    (["--guidance-scale", "0.5"], "--guidance-scale 0.5: must be at least 1"),
    (["--images-per-prompt", "1"], "--images-per-prompt 1: must be at least 2"),
    (["--epochs", "many"], "invalid int value"),
    (["--loss", "ddpo"], "unrecognized arguments: --loss"),
    (["--local-rank=0"], "unrecognized arguments: --local-rank=0; start it by torchrun"),
    (["--ddpm-steps", "2"], "--ddpm-steps 2: must be at least 3"),
    (["--ddpm-steps", "600"], "--ddpm-steps 600: do not "),
    (["--reward", "beauty"], "no reward 'beauty'; choose from hpsv2"),
    (["--model", ""], "--model: is empty"),
    (["--prompts", ""], "--prompts: is empty"),
    (["--reward", "pickscore=10,hpsv2=2"], "several are words of their own"),
    (["--model", "/nowhere/sd"], "model /nowhere/sd: "),
    (["--out", "{given}/file.txt"], "{given}/file.txt: is no folder; choose another."),
    (["--out", "{given}/file.txt/run"], "{given}/file.txt"),
    (["--out", "{given}/used"], "in use; choose another"),
    (["--resume", "{given}"], "--resume {given}: its config.json: No such file or directory."),
    (["--resume", "{given}/foreign"], "{given}/foreign: its config.json is no run's."),
    (["--reward", "aesthetic", "--reward", "clip=0"], "--reward: given twice; name all after one"),
    (["--reward=aesthetic", "--reward=clip=0"], "--reward: given twice; name all after one"),
    (["--resume", "{given}/used", "--out", "elsewhere"], "not with --preset or --out"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "sentence"), BAD_INPUT)
def test_bad_input_is_one_sentence_and_exit_code_2(cli, tmp_path, flags, sentence):
    given = tmp_path / "given"
    (given / "used").mkdir(parents=True)
    (given / "foreign").mkdir()
    (given / "foreign" / "config.json").write_text('{"lr": 1}')
    (given / "file.txt").write_text("precious")
    (given / "used" / "metrics.jsonl").write_text("precious")
    before = contents(given)
    said = only_sentence(cli(*(flag.format(given=given) for flag in flags)))
    assert said.startswith("prdp.py: ")
    assert sentence.format(given=given) in said
    assert contents(given) == before
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or "finite" in sentence


@pytest.mark.parametrize("program", [name for name in PROGRAMS if "/" not in name])
def test_every_program_checks_what_it_is_given(program, tiny_sd, tmp_path, capsys):
    """Numbers before anything is computed from them, and --out."""
    main = importlib.import_module(program).main
    name = f"{program.replace('.', '/')}.py: "
    file = tmp_path / "file"
    file.write_text("precious")
    flags, number = ["--model", tiny_sd, "--preset", "toy"], "--updates-per-epoch"
    if program == "evaluate":
        flags, number = [tiny_sd], "--samples-per-prompt"
    flags += ["--reward", "incompressibility"]
    said = only_sentence(call(main, [*flags, number, 0], capsys))
    assert said.startswith(f"{name}{number} ") and ": must be " in said
    said = only_sentence(call(main, [*flags, "--out", file], capsys))
    assert said == f"{name}{file}: is no folder; choose another."
    assert contents(tmp_path) == {"file": b"precious"}


def test_a_users_reward_that_fails_shows_where(cli, tmp_path):
    """Exit code 2, its own traceback, and then one sentence; the folder can be used again."""
    lines = ["def helper(images):", "    return images[0] / {}['key']", "", ""]
    lines += ["def f(images, prompts):", "    return helper(images)", ""]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    code, _, errors = cli("--reward", f"{tmp_path}/mine.py:f")
    assert code == 2
    assert errors.startswith("Traceback (most recent call last):\n")
    assert f'File "{tmp_path}/mine.py", line 2, in helper\n    return images[0] / {{}}' in errors
    assert (
        errors.count("Traceback") == 1 and "UserError" not in errors and "CodeError" not in errors
    )
    assert errors.endswith("\nprdp.py: reward f failed: KeyError: 'key'.\n")

    (tmp_path / "mine.py").write_text("import sys\n\nsys.exit(0)\n")
    code, _, errors = cli("--reward", f"{tmp_path}/mine.py:f")
    assert code == 2 and f'File "{tmp_path}/mine.py", line 3, in <module>' in errors
    assert errors.splitlines()[-1].endswith("mine.py:f: cannot be imported: SystemExit: 0.")
    assert cli("--epochs", 1)[0] == 0


def test_settings_from_python_are_checked():
    """Numbers of other kinds are taken; what is none is refused."""
    config = resolve(prdp.Config(epochs=np.int64(3), kl_weight=np.float32(0.5), reward=()))
    assert type(config.epochs) is int and type(config.kl_weight) is float
    for wrong, sentence in (({"epochs": "2"}, "--epochs '2'"), ({"seed": None}, "--seed None")):
        with pytest.raises(UserError, match=f"{sentence}: must be a number"):
            resolve(prdp.Config(**wrong))
    words = {"dtype": "float16", "gradient_checkpointing": True, "offline": "no", "log_to": None}
    for name, wrong in words.items():
        with pytest.raises(UserError, match=rf"{name.replace('_', '-')} {wrong!r}: choose from "):
            resolve(prdp.Config(**{name: wrong}))
    with pytest.raises(UserError, match="--advantage 'grpo': choose from "):
        resolve(ddpo.Config(advantage="grpo"))
    with pytest.raises(TypeError, match="preset"):  # presets are dictionaries
        prdp.Config(preset="toy")
    assert resolve(prdp.Config(**{**prdp.PRESETS["toy"], "epochs": 2})).epochs == 2


def test_import_needs_torch_alone_and_does_nothing(tmp_path):
    hidden = ["numpy", "diffusers", "transformers", "triton", "PIL", "matplotlib", "peft"]
    hidden += ["safetensors", "huggingface_hub"]
    code = (
        f"import sys; sys.modules |= dict.fromkeys({hidden}); sys.path.insert(0, {str(ROOT)!r})\n"
        "import prdp\nprint('silent')"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "silent\n", done.stderr
    assert not list(tmp_path.iterdir())


def test_hugging_faces_package_kernels_can_be_imported(tmp_path):
    """Beside our folder of that name, from it and from elsewhere; transformers asks for it."""
    for name in ("kernels", "kernels-0.18.2.dist-info"):
        (tmp_path / "site" / name).mkdir(parents=True)
    (tmp_path / "site" / "kernels" / "__init__.py").write_text("mine = False\n")
    metadata = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n"
    (tmp_path / "site" / "kernels-0.18.2.dist-info" / "METADATA").write_text(metadata)
    code = (
        "import kernels, importlib.metadata, prdp\n"
        "assert kernels.mine is False and importlib.metadata.version('kernels') == '0.18.2'\n"
        "print(prdp.machine.load_kernels()[1])"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path / 'site'}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "eager (no CUDA device)\n", done.stderr


@pytest.mark.parametrize(
    ("main", "place", "flags"),
    [
        (prdp.main, "prdp.as_prompts", []),
        (prdp.main, "stable_diffusion.load_network", []),
        (prdp.main, "support.run_folder.begin", []),
        (ddpo.main, "baselines.ddpo.ddpo_loss", []),
        (score_pictures, "rewards.checked", [PICTURE, "--reward", "compressibility"]),
        (evaluate.main, "evaluate.draw", ["{sd}", "--reward", "compressibility", "--out", "{out}"]),
    ],
)
def test_a_mistake_of_ours_keeps_its_traceback(main, place, flags, tiny_sd, tmp_path, monkeypatch):
    """Wherever it happens: only what reading a file or the hub can raise becomes a sentence."""

    def mistake(*_, **__):
        raise TypeError("a mistake of ours")

    monkeypatch.setattr(place, mistake)
    out = str(tmp_path / "out")
    flags = [flag.format(sd=tiny_sd, out=out) for flag in flags]
    flags = flags or [*small_run(tiny_sd), "--out", out]
    with pytest.raises(TypeError, match="a mistake of ours"):
        main(flags)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory: try a smaller --microba"),
        (RuntimeError("CUDA error: out of memory\nCompile with"), "out of memory: try a smaller"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "out of memory: try a smaller",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), "out of memory: try a smal"),
        (MemoryError(), "out of memory: try a smaller --microbatch"),
    ],
)
def test_what_the_machine_cannot_do_is_a_sentence(cli, monkeypatch, error, sentence):
    def fail(*_):
        raise error

    monkeypatch.setattr(prdp, "backward_trajectories", fail)
    assert only_sentence(cli("--epochs", 1)).startswith(f"prdp.py: {sentence}")


def test_a_reward_without_room_ends_the_run_before_its_first_epoch(cli, tmp_path):
    """It may have scored one picture alone; beside what training holds it is tried on a microbatch,
    and no smaller one of those would help."""
    file = tmp_path / "judge.py"
    file.write_text(
        "def judge(images, prompts):\n"
        "    if len(images) > 1:\n"
        "        raise RuntimeError('CUDA error: out of memory')\n"
        "    return [0.5]\n"
    )
    sentence = only_sentence(cli("--reward", f"{file}:judge"))
    assert sentence.startswith("prdp.py: reward judge failed: out of memory; try --offload on (")
    assert "smaller reward" in sentence and "--microbatch" not in sentence
    assert not (tmp_path / "run" / "config.json").exists()


# ---- Help ----------------------------------------------------------------------------------------


def test_help_survives_a_per_cent_sign_in_a_path(tmp_path):
    """As in the folder of a clone, which is part of defaults."""

    @dataclasses.dataclass
    class Settings:
        prompts: tuple = flag(("/100%/%s/p.txt",), "what to draw")
        model: str = flag("/50 % of/%(prog)s", "a folder")

    parser = Parser(description="x")
    parser.add_fields(dataclasses.fields(Settings), {"prompts": ("/a%d/b.txt", "/c.txt")})
    text = parser.format_help()
    assert "(default: /a%d/b.txt /c.txt)" in text and "(default: /50 % of/%(prog)s)" in text


def test_a_flag_that_is_on_can_be_switched_off():
    @dataclasses.dataclass
    class Settings:
        ema: bool = flag(True, "average weights")
        slow: bool = flag(False, "do not")

    parser = Parser(description="x")
    parser.add_fields(dataclasses.fields(Settings))
    assert vars(parser.parse_args([])) == {}
    assert vars(parser.parse_args(["--no-ema", "--slow"])) == {"ema": False, "slow": True}
    with pytest.raises(UserError, match="unrecognized arguments: False"):
        parser.parse_args(["--ema", "False"])


HELP = """
import runpy, sys
for command in sys.argv[1:]:
    sys.argv = [command, "--help"]
    try:
        runpy.run_path(command, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, command
"""


def test_help_needs_no_torchrun_and_no_docstrings(tmp_path):
    """Of other launchers some variables are set; and Python may leave docstrings out."""
    env = {**os.environ, "WORLD_SIZE": "4", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    env["PYTHONPATH"] = str(ROOT)
    names = [str(ROOT / f"{program.replace('.', '/')}.py") for program in PROGRAMS]
    done = subprocess.run(
        [sys.executable, "-OO", "-c", HELP, *names],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "K, gradient updates (default: 4)" in done.stdout  # DDPO's, not PRDP's 10
    assert done.stdout.count("usage: ") == done.stdout.count("  --reward ") == len(names)


@pytest.mark.parametrize("main", [evaluate.main, score_pictures])
def test_what_a_list_has_taken_is_asked_for(capsys, main):
    said = only_sentence(call(main, ["--reward", "compressibility", "runs/toy"], capsys))
    assert "are required: " in said and "name it first, for a flag of several values takes" in said


# ---- Other people's terminals, notebooks, folders ------------------------------------------------


def test_a_stdout_that_is_no_file(tiny_sd, tmp_path):
    """As Jupyter's."""
    run = str(tmp_path / "run")
    with redirect_stdout(io.StringIO()) as out:
        prdp.main([*small_run(tiny_sd), "--epochs", "1", "--out", run])
        evaluate.main([run, "--samples-per-prompt", "1", "--max-prompts", "2"])
        score_pictures([PICTURE, "--reward", "compressibility"])
    assert "before_after.png" in out.getvalue() and "evaluation.png" in out.getvalue()


def test_other_peoples_settings(tiny_sd, tmp_path):
    """A notebook's back end and a user's matplotlibrc; a terminal of ASCII, letters that no font
    has. Nothing is said about any of it."""
    (tmp_path / "matplotlibrc").write_text("savefig.format: pdf\n")
    (tmp_path / "p.txt").write_text("\u4e00\u53ea\u732b \U0001f600\na $x_{$ dog\n", "utf-8")
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    backend = "module://matplotlib_inline.backend_inline"  # not installed here
    env |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": backend}
    command = [sys.executable, str(ROOT / "prdp.py"), *small_run(tiny_sd), "--epochs", "1"]
    command += ["--out", "run", "--prompts", "p.txt"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout and "first: '\\u4e00" in done.stdout
    assert (tmp_path / "run" / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert done.stderr == ""


def test_paths_may_be_objects_and_begin_at_home(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("a cat\n")
    argv = [*small_run(tiny_sd), "--epochs", "1", "--prompts", "~/p.txt", "--out", "~/run"]
    config = replace(prdp.parse_args(argv), out=Path("~/run"), updates_per_epoch=1)
    prdp.run(config)
    assert len(metrics_of(tmp_path / "run")) == 1


def test_this_is_no_package():
    """Nothing to install, which would hide other people's `rewards` and `evaluate`."""
    assert not {"[project]", "[build-system]"} & {*(ROOT / "pyproject.toml").read_text().split()}


def test_no_gpu_is_seen_unless_asked_for():
    """Backward passes on one do not repeat their bits, which tests of runs ask for."""
    asked = "gpu" in sys.argv
    assert asked or (os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available())
