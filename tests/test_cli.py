"""Commands and their words: flags, one sentence for what was given wrong, a traceback for a mistake
of ours, other people's terminals, notebooks and folders."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

import evaluate
import prdp
import rewards
from baselines import ddpo
from conftest import ROOT, contents, metrics_of, only_sentence, small_run

FINITE = "is not finite; try, in a new run, a lower --learning-rate or --guidance-scale, a higher"
BAD_INPUT = [
    (["--prompts", "nowhere.txt"], "nowhere.txt: No such file or directory"),
    (["--prompts", "~/nowhere.txt"], f"{Path.home()}/nowhere.txt: No such file or directory"),
    (["--epochs", "0"], "--epochs 0: must be above 0"),
    (["--seed", "-1"], "--seed -1: must be at least 0"),
    (["--seed", "9" * 30, "--lora-rank", "2"], "--seed 999"),
    (["--clip-range", "nan"], "--clip-range nan: must be above 0"),
    (["--kl-weight", "inf"], "--kl-weight inf: too large"),
    (["--kl-weight", "1e-300"], f"the gradient {FINITE}"),
    (["--guidance-scale", "0.5"], "--guidance-scale 0.5: must be at least 1"),
    (["--guidance-scale", "0"], "--guidance-scale 0.0: must be at least 1"),
    (["--images-per-prompt", "1"], "--images-per-prompt 1: must be at least 2"),
    (["--epochs", "many"], "invalid int value"),
    (["--epoch", "3"], "unrecognized arguments: --epoch"),
    (["--loss", "ddpo"], "unrecognized arguments: --loss"),
    (["--ddpm-steps", "600"], "--ddpm-steps 600: must span 1000 timesteps; 50 does"),
    (["--reward", "beauty"], "no reward 'beauty'; choose from hpsv2"),
    (["--model", ""], "--model: is empty"),
    (["--prompts", ""], "--prompts: is empty"),
    (["--reward", "pickscore=10,hpsv2=2"], "--reward pickscore=10 hpsv2=2"),
    (["--model", "/nowhere/sd"], "--model /nowhere/sd: "),
    (["--out", "{given}/file.txt"], "file.txt: File exists"),
    (["--out", "{given}/used"], "in use; choose another"),
    (["--resume", "{given}"], "its config.json: No such file or directory"),
    (["--resume", "{given}/used", "--out", "elsewhere"], "not with --preset or --out"),
]


@pytest.mark.parametrize(("flags", "sentence"), BAD_INPUT)
def test_bad_input_is_one_sentence_and_exit_code_2(cli, tmp_path, flags, sentence):
    given = tmp_path / "given"
    (given / "used").mkdir(parents=True)
    (given / "file.txt").write_text("precious")
    (given / "used" / "metrics.jsonl").write_text("precious")
    before = contents(given)
    said = only_sentence(cli(*(flag.format(given=given) for flag in flags)))
    assert said.startswith("prdp.py: ")
    assert sentence in said
    assert contents(given) == before
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or "finite" in sentence


def test_import_needs_torch_alone_and_does_nothing(tmp_path):
    hidden = ["numpy", "diffusers", "transformers", "triton", "PIL", "matplotlib", "tqdm", "peft"]
    hidden += ["safetensors", "huggingface_hub"]
    code = (
        f"import sys; sys.modules |= dict.fromkeys({hidden}); sys.path.insert(0, {str(ROOT)!r})\n"
        "import prdp\nprint('silent')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
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
        "print(prdp.load_kernels()[1])"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path / 'site'}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "eager (no CUDA device)\n", done.stderr


def plant(*_, **__):
    raise TypeError("a mistake of ours")


@pytest.mark.parametrize(
    ("main", "where", "name", "arguments"),
    [
        (prdp.main, prdp, "ddpm_schedule", ["--preset", "toy", "--out", "{out}"]),
        (prdp.main, prdp, "as_prompts", ["--preset", "toy", "--out", "{out}"]),
        (prdp.main, "support.run_folder", "begin", ["{tiny}"]),
        (prdp.main, "stable_diffusion", "load_network", ["{tiny}"]),
        (ddpo.main, ddpo, "ddpo_loss", ["{tiny}"]),
        (rewards.main, rewards, "checked", ["--reward", "compressibility", "--images", "{png}"]),
        (
            evaluate.main,
            evaluate,
            "draw",
            ["{sd}", "--reward", "compressibility", "--out", "{out}"],
        ),
    ],
)
def test_a_mistake_of_ours_keeps_its_traceback(
    main, where, name, arguments, tiny_sd, tmp_path, monkeypatch
):
    """Wherever it happens: only what reading a file or the hub can raise becomes a sentence."""
    tiny = [*small_run(tiny_sd), "--out", str(tmp_path / "out")]
    given = {"out": tmp_path / "out", "sd": tiny_sd, "png": ROOT / "toy" / "reward.png"}
    argv = tiny if arguments == ["{tiny}"] else [a.format(**given) for a in arguments]
    target = f"{where}.{name}" if isinstance(where, str) else (where, name)
    monkeypatch.setattr(*([target] if isinstance(target, str) else target), plant)
    with pytest.raises(TypeError, match="a mistake of ours"):
        main(argv)


def fail_to_compile() -> None:
    def broken_backend(*_):
        raise ValueError("no such chip")

    torch.compile(torch.sin, backend=broken_backend)(torch.ones(1))


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def run_out_of_cpu_memory() -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 4 TB")


@pytest.mark.parametrize(
    ("fail", "sentence"),
    [
        (run_out_of_memory, "out of GPU memory: try a smaller --microbatch"),
        (run_out_of_cpu_memory, "out of memory: try a smaller --microbatch"),
        (fail_to_compile, "--compile: failed (backend='"),
    ],
)
def test_what_the_machine_cannot_do_is_a_sentence(cli, monkeypatch, fail, sentence):
    monkeypatch.setattr(prdp, "backward_trajectories", lambda *_: fail())
    said = only_sentence(cli("--epochs", 1))
    assert said.startswith(f"prdp.py: {sentence}")


def test_preset_is_no_setting():
    """`Config(preset=...)` is refused, and not ignored; presets are dictionaries."""
    with pytest.raises(TypeError, match="preset"):
        prdp.Config(preset="toy")
    config = prdp.Config(**{**prdp.PRESETS["toy"], "epochs": 2})
    assert config.resolved().epochs == 2


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
    programs = ("ddpo", "rwr", "diffusion_dpo")
    names = ["prdp.py", "evaluate.py", "rewards.py", *(f"baselines/{name}.py" for name in programs)]
    done = subprocess.run(
        [sys.executable, "-OO", "-c", HELP, *(str(ROOT / name) for name in names)],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "K, gradient updates (default: 4)" in done.stdout  # DDPO's, not PRDP's 10
    assert done.stdout.count("usage: ") == done.stdout.count("  --reward ") == len(names)


def test_another_launchers_variables_are_said(cli, monkeypatch):
    """WORLD_SIZE as Slurm's scripts set it, without torchrun: one process, and a warning."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    code, out, errors = cli("--epochs", 1)
    assert code == 0, errors
    assert "warning: WORLD_SIZE is set, but not by torchrun" in out
    assert "1 process(es)" in out


class Notebook(io.StringIO):
    """A stdout that is no file, as Jupyter's."""


def test_a_stdout_that_is_no_file(tiny_sd, tmp_path):
    """And diffusers' and transformers' logging is as before afterwards."""
    libraries = (diffusers, transformers)
    before = [library.utils.logging.get_verbosity() for library in libraries]
    with redirect_stdout(Notebook()) as out:
        flags = [*small_run(tiny_sd), "--epochs", "1", "--out", str(tmp_path / "run")]
        prdp.main(flags)
        evaluate.main([str(tmp_path / "run"), "--samples-per-prompt", "1", "--max-prompts", "2"])
        picture = str(ROOT / "toy" / "reward.png")
        rewards.main(["--reward", "compressibility", "--images", picture])
    assert "before_after.png" in out.getvalue() and "evaluation.png" in out.getvalue()
    assert [library.utils.logging.get_verbosity() for library in libraries] == before
    assert all(library.utils.logging.is_progress_bar_enabled() for library in libraries)


def test_pictures_need_no_back_end_and_no_style(tiny_sd, tmp_path):
    """Of a notebook's variable, and of a user's matplotlibrc."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nsavefig.format: pdf\nnonsense: 1\n")
    backend = "module://matplotlib_inline.backend_inline"  # not installed here
    env = {**os.environ, "MPLBACKEND": backend, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "prdp.py"), *small_run(tiny_sd), "--epochs", "1"]
    done = subprocess.run(
        [*command, "--out", "run"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_ascii_terminal_and_letters_that_no_font_has(tiny_sd, tmp_path):
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    (tmp_path / "p.txt").write_text("\u4e00\u53ea\u732b \U0001f600\na $x_{$ dog\n", "utf-8")
    command = [sys.executable, str(ROOT / "prdp.py"), *small_run(tiny_sd), "--epochs", "1"]
    command += ["--out", "f\u00fcnf", "--prompts", "p.txt"]
    env = {**plain, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert (tmp_path / "f\u00fcnf" / "pipeline").is_dir()


def test_reader_that_leaves():
    """As in `python prdp.py ... | head -1`."""
    code = (
        "from support.cli import command\nwith command('x'):\n    while True: print(1, flush=True)"
    )
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", code], **options) as writer:
        writer.stdout.readline()
        writer.stdout.close()
        assert writer.stderr.read() == b""
    assert writer.returncode == 2


def test_full_stdout(capsys, monkeypatch):
    """Of a shell's redirection to a disk that is full."""
    monkeypatch.setattr("builtins.print", full)
    monkeypatch.setattr(sys.stderr, "write", lambda text: None)
    picture = str(ROOT / "toy" / "reward.png")
    with pytest.raises(SystemExit) as stop:
        rewards.main(["--reward", "compressibility", "--images", picture])
    assert stop.value.code == 2


def full(*arguments, file=None, **_):
    if file is None:
        raise OSError(28, "No space left on device")


def test_paths_may_be_objects_and_begin_at_home(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("a cat\n")
    argv = [*small_run(tiny_sd), "--epochs", "1", "--prompts", "~/p.txt", "--out", "~/run"]
    config = replace(prdp.parse_args(argv), out=Path("~/run"), updates_per_epoch=1)
    prdp.run(config)
    assert len(metrics_of(tmp_path / "run")) == 1


def test_pip_says_that_it_is_no_package(tmp_path):
    """Not by installing what would hide other people's modules."""
    text = (ROOT / "pyproject.toml").read_text()
    assert "PYTHONPATH" in text and "[build-system]" in text


def test_no_gpu_is_seen_unless_asked_for():
    """Backward passes on one do not repeat their bits, which tests of runs ask for."""
    asked = "gpu" in sys.argv
    assert asked or (os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available())
