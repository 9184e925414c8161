"""What users and the hub give: prompts, pictures, networks, tokenizers, the hub's answers, code."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import prdp
import rewards
from conftest import PROMPTS, ROOT, tiny_config
from support.cli import InputError, in_brief
from support.inputs import as_prompts, load_prompts, load_tokenizer, read_picture

TOY_PICKSCORE = ROOT / "toy" / "pickscore"

# ---- Prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", "\ufeff# comment\r\na cat\r\n\r\n  a dog \r\na cat\r\n".encode()),
        ("a.txt", "a cat\na dog\n".encode("utf-16")),
        ("a.txt", b"\xfe\xff" + "a cat\na dog\n".encode("utf-16-be")),
        ("A.JSON", b'["a cat", {"prompt": "a dog", "image": 3}, {"prompt": "a cat"}]'),
        ("a.jsonl", b'{"prompt": null, "caption": "a cat"}\n\n"a dog"\n'),
        ("a.csv", b'id,Caption,prompt\n1,x,"a cat"\n2,y,a dog\n'.replace(b"Caption", b"note")),
        ("a.csv", b'caption\n"a cat"\n"a dog"\n'),
        ("a.csv", b"Prompt;Category\r\na cat;Animals, small\r\na dog;x\r\n"),
        ("a.tsv", b"Prompts\tCategory\na cat\tx\na dog\ty\n"),
        ("a.tsv", b'Prompts\tCategory\n"a cat"\tx, "y"\na dog\ty\n'),
        ("metadata.jsonl", b'{"file_name": "1.png", "text": "a cat"}\n{"Text": "a dog"}\n'),
        ("a.txt", b"a cat\ra dog\r"),
        ("a.csv", b"prompt,note,more\na cat,x,y\na dog,x\n"),
    ],
)
def test_prompt_files(tmp_path, name, data):
    """Strings and objects, a table's column, byte order marks, UTF-16."""
    (tmp_path / name).write_bytes(data)
    assert load_prompts(tmp_path / name) == ["a cat", "a dog"]


def test_line_separators_inside_json_strings(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"prompt": "a\u2028cat"}\n', encoding="utf-8")
    assert load_prompts(tmp_path / "b.jsonl") == ["a\u2028cat"]


def test_cells_of_a_table_are_whole(tmp_path):
    """Commas, line ends and separators within quotes; a comma without quotes is refused."""
    path = tmp_path / "b.csv"
    path.write_text('id,prompt\n1,"a cat, a dog"\n2,"a\ncat"\n3,a\u2028dog\n', encoding="utf-8")
    assert load_prompts(path) == ["a cat, a dog", "a\ncat", "a\u2028dog"]
    path.write_text('prompt\n"a cat\na dog\n')
    with pytest.raises(InputError, match="unexpected end of data"):
        load_prompts(path)
    path.write_text('prompt\n"' + "a cat\n" * 40_000)
    with pytest.raises(InputError, match="field larger than field limit"):
        load_prompts(path)
    path.write_text("id,prompt\n1,a cat\n2,\n")
    assert load_prompts(path) == ["a cat"]
    rows = {"2,a cat, a dog": "row 3 has more cells than the header", "3": "entry 2 is neither"}
    path.write_text('id,prompt\n1,a cat\n2,"Hello" on a sign\n')
    with pytest.raises(InputError, match=r"near line 2: .*; is a quote not closed"):
        load_prompts(path)
    sign = tmp_path / "parti.tsv"  # where quotes are no quotes
    sign.write_text('Prompt\tCategory\na cat\tx\n"G I G G L E" painted in "thick" colours\ty\n')
    assert load_prompts(sign) == ["a cat", '"G I G G L E" painted in "thick" colours']
    for row, sentence in rows.items():
        path.write_text(f"id,prompt\n1,a cat\n{row}\n")
        with pytest.raises(InputError, match=sentence):
            load_prompts(path)


def test_a_line_that_is_no_json_is_named(tmp_path):
    (tmp_path / "b.jsonl").write_text('"a cat"\n\n{"prompt": \n')
    with pytest.raises(InputError, match=r"b\.jsonl, line 3: "):
        load_prompts(tmp_path / "b.jsonl")


def test_tags_are_no_table(tmp_path):
    (tmp_path / "tags.txt").write_text("movie poster, text, neon\n[photo] 1girl, solo\n3\n")
    assert load_prompts(tmp_path / "tags.txt")[0] == "movie poster, text, neon"


@pytest.mark.parametrize("given", [Path("p.txt"), __file__, {"prompt": ["a cat"]}, {"a", "b"}])
def test_what_is_no_list_of_prompts(given):
    with pytest.raises(InputError, match="must be texts, in a list"):
        as_prompts(given)


def test_many_prompts_take_seconds(tmp_path):
    path = tmp_path / "many.json"
    path.write_text(json.dumps([f"a cat number {n}" for n in range(800_000)]))
    started = time.perf_counter()
    assert len(load_prompts(path)) == 800_000
    assert time.perf_counter() - started < 30


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:123\nsize 9\n"


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("empty.txt", b"# nothing\n\n", "holds no prompt"),
        ("broken.jsonl", b'"a cat"\n{"prompt": \n', "Expecting value"),
        ("number.json", b'["a", 3]', "entry 2 is neither a string nor has a `prompt`"),
        (
            "latin.txt",
            "caf\xe9".encode("latin-1"),
            "can't decode byte 0xe9 in position 3: unexpected end of data; save it as UTF-8",
        ),
        ("object.json", b'{"prompt": "a cat"}', "a list of prompts"),
        ("half.json", b'["a", "\\ud800"]', "surrogates not allowed"),
        ("wide.txt", "a cat\na dog\n".encode("utf-16-le"), "is no text, or a Git LFS pointer"),
        ("lfs.txt", LFS.encode(), "is no text, or a Git LFS pointer"),
        ("lfs.csv", LFS.encode(), "is no text, or a Git LFS pointer"),
        ("table.txt", b'id,prompt\n1,"a cat, red"\n', "name it .csv"),
        (
            "table.csv",
            b"id,words\n1,a cat\n",
            "first line names no column prompt, prompts, caption",
        ),
        ("table.csv", b"id;prompt\n1;a cat;x\n", "quote what holds a ';'"),
        ("a.parquet", b"PAR1\xff\xfe", "must be .txt, .csv, .tsv, .json or .jsonl"),
        ("lines.txt", b'{"prompt": "a cat"}\n{"prompt": "a dog"}\n', "holds JSON; name it .json"),
        ("list.txt", b'[\n"a cat",\n"a dog"\n]\n', "holds JSON; name it .json"),
        ("a.txt/", b"", "directory"),
    ],
)
def test_what_is_no_prompt_file(tmp_path, name, data, sentence):
    path = tmp_path / name.rstrip("/")
    path.mkdir() if name.endswith("/") else path.write_bytes(data)
    with pytest.raises(InputError, match=f"--prompts {path}[:,] ") as error:
        load_prompts(path)
    assert sentence in str(error.value)


def test_prompts_from_python():
    """One string is one prompt; whatever holds strings is a list of them."""
    assert as_prompts("a red circle") == ["a red circle"]
    for kind in (tuple, np.array, iter):
        assert as_prompts(kind(["a", "b", "a"])) == ["a", "b"]
    for records in ([], ["  "], [3], [None]):
        with pytest.raises(InputError):
            as_prompts(records)


def test_no_prompts_are_not_the_presets(tiny_sd, tmp_path):
    """What is given is used, or refused: an empty list, a reward that counts as false."""
    config = tiny_config(tiny_sd, out=str(tmp_path / "run"), epochs=1, updates_per_epoch=1)
    with pytest.raises(InputError, match="holds no prompt"):
        prdp.run(config, prompts=[])

    class Scores(dict):
        calls = 0

        def __call__(self, images, prompts):
            Scores.calls += 1
            return images.float().mean((1, 2, 3))

    prdp.run(config, reward=Scores(), prompts="a red circle")
    assert Scores.calls >= 3
    assert json.loads((tmp_path / "run" / "config.json").read_text())["reward"] == []


# ---- Pictures ------------------------------------------------------------------------------------


def test_pictures_of_16_bits_and_floats_are_scaled(tmp_path):
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    files = {
        "16.png": Image.fromarray((65535 * ramp).round().astype("uint16")),
        "32.tif": Image.fromarray((65535 * ramp).round().astype("int32")),
        "dark.tif": Image.fromarray((255 * ramp).round().astype("int32")),
        "float.tif": Image.fromarray(ramp.astype("float32")),
        "8.png": Image.fromarray((255 * ramp).round().astype("uint8")),
    }
    for name, image in files.items():
        image.save(tmp_path / name)
        pixels = read_picture(tmp_path / name, "--images")
        assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.uint8
        assert np.abs(pixels[0].numpy() - 255 * ramp).max() <= 1, name


def test_pictures_are_the_right_way_up(tmp_path):
    pixels = np.arange(2 * 3 * 3, dtype="uint8").reshape(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert read_picture(tmp_path / "a.png", "").shape == (3, 3, 2)


def damaged_pictures(folder: Path) -> list[Path]:
    """Every kind that Pillow reads by itself, cut or with a byte changed."""
    whole, files = (
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), "uint8")),
        [],
    )
    generator = np.random.default_rng(1)
    for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp"):
        whole.save(folder / f"whole.{kind}")
        data = bytearray((folder / f"whole.{kind}").read_bytes())
        for n in range(25):
            changed = data[: generator.integers(1, len(data))] if n % 2 else bytearray(data)
            for _ in range(3):
                changed[generator.integers(len(changed))] = generator.integers(256)
            files.append(folder / f"{n}.{kind}")
            files[-1].write_bytes(changed)
    return files


@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures_are_pictures_or_refused(tmp_path, monkeypatch):
    for file in damaged_pictures(tmp_path):
        try:
            assert read_picture(file, "--images").dtype == torch.uint8
        except InputError as error:
            assert str(error).startswith(f"--images {file}: ")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match="bomb"):
        read_picture(tmp_path / "whole.png", "--images")


# ---- Tokenizers, the hub -------------------------------------------------------------------------


def test_no_vocabulary_is_refused(tmp_path):
    """transformers makes a tokenizer of two tokens where none is; every prompt would be one."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TOY_PICKSCORE / name, tmp_path)
    with pytest.raises(InputError, match="has no vocabulary here; fetch it by `hf download"):
        rewards.load_reward(f"pickscore:{tmp_path}", "cpu")
    shutil.copy(TOY_PICKSCORE / "tokenizer_config.json", tmp_path)
    with pytest.raises(InputError, match="has no vocabulary here"):
        load_tokenizer("--reward hpsv2", str(tmp_path))
    with pytest.raises(InputError, match=f"the tokenizer of {rewards.TOKENIZER}"):
        load_tokenizer("--reward hpsv2", rewards.TOKENIZER)  # not cached, no network
    shutil.copy(TOY_PICKSCORE / "tokenizer.json", tmp_path)
    assert rewards.load_reward(f"pickscore:{tmp_path}", "cpu").networks


class Hub(BaseHTTPRequestHandler):
    """Answers with the status that a model's name ends with."""

    def do_GET(self):
        self.send_response(int(self.path.split("/")[2][-3:]))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


ASK = """
import sys; sys.path.insert(0, {root!r})
import prdp
for model in {models}:
    try:
        prdp.main(["--model", model, "--reward", "incompressibility", "--out", {out!r}])
    except SystemExit as stop:
        assert stop.code == 2
"""


def ask(tmp_path, models: list[str], **environment: str) -> list[str]:
    """What a run says whose model is on the hub."""
    code = ASK.format(root=str(ROOT), models=models, out=str(tmp_path / "run"))
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    env |= {"HF_HOME": str(tmp_path / "cache"), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()
    return [line for line in done.stderr.splitlines() if line.startswith("prdp.py: ")]


def test_the_hubs_answer_is_in_the_sentence(tmp_path):
    answers = {"a/m401": "the hub answers 401; check the name", "a/m403": "the hub answers 403; "}
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        said = ask(tmp_path, list(answers), HF_ENDPOINT=endpoint)
    finally:
        server.shutdown()
        server.server_close()
    for line, (model, sentence) in zip(said, answers.items(), strict=True):
        assert line.startswith(f"prdp.py: --model {model}: {sentence}")


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (404, "the hub answers 404; check the name, accept its licence on its page, log in"),
        (429, "the hub answers 429; try later"),
        (520, "the hub answers 520; try later"),
    ],
)
def test_an_answer_counts_however_deep_in_an_error(status, sentence):
    try:
        try:
            error = RuntimeError("many words")
            error.response = SimpleNamespace(status_code=status)
            raise error
        except RuntimeError as cause:
            raise OSError("Can't load the model, or many other words") from cause
    except OSError as outer:
        assert in_brief(outer).startswith(sentence)


def test_a_proxy_of_a_kind_that_is_not_installed(tmp_path):
    (said,) = ask(tmp_path, ["a/model"], ALL_PROXY="socks5://127.0.0.1:9")
    assert "'socksio' package is not installed" in said


def test_no_network(cli):
    code, _, errors = cli("--model", "someone/model")
    assert code == 2
    assert errors == "prdp.py: --model someone/model: not cached, and the hub is out of reach.\n"


# ---- Code of users -------------------------------------------------------------------------------

RESTLESS = """
import os, random, torch
os.environ["KEY_OF_A_SERVICE"] = "secret"
calls = []

def f(images, prompts):
    if calls:
        assert os.path.basename(os.getcwd()) == "elsewhere", os.getcwd()
    assert os.environ["KEY_OF_A_SERVICE"] == "secret"
    assert not torch.is_grad_enabled()
    calls.append(1)
    os.makedirs("elsewhere", exist_ok=True)
    os.chdir("elsewhere" if len(calls) == 1 else ".")
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(len(calls))
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    os.environ |= {"MPLBACKEND": "nonsense", "RANK": "7", "WORLD_SIZE": "9", "HOME": "/nowhere"}
    return images.double().mean((1, 2, 3))
"""


def test_what_a_reward_does_to_the_process_changes_no_run(cli, tmp_path, monkeypatch):
    """Neither its directory and variables, which are as it left them at its next call, nor gradient
    mode, default dtype and threads; a relative --out stays where it was."""
    (tmp_path / "calm.py").write_text(
        "def f(images, prompts):\n    return images.double().mean((1, 2, 3))\n"
    )
    (tmp_path / "restless.py").write_text(RESTLESS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    found = []
    for name in ("calm", "restless"):
        code, _, errors = cli("--reward", f"{name}.py:f", "--out", name)
        assert code == 0, errors
        found.append((tmp_path / name / "metrics.jsonl").read_text())
    keep = [[{k: v for k, v in json.loads(line).items() if not k.startswith(("seconds", "images"))}
             for line in text.splitlines()] for text in found]  # fmt: skip
    assert keep[0] == keep[1]
    assert torch.get_default_dtype() == torch.float32


WORKERS = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

def brightness(pixels):
    return float(pixels.mean())

def f(images, prompts):
    pixels = [image.numpy() for image in images]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context) as pool:
        return list(pool.map(brightness, pixels))
"""


def test_modules_of_a_reward_are_read_anew(tmp_path):
    (tmp_path / "near.py").write_text("value = 1.0\n")
    (tmp_path / "mine.py").write_text("import near\ndef f(i, prompts): return [near.value]\n")
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for value in (1.0, 20.0):
        (tmp_path / "near.py").write_text(f"value = {value}\n")
        assert rewards.load_reward(f"{tmp_path}/mine.py:f", "cpu")(images, ["a"]).item() == value
    with pytest.raises(InputError, match="must be words or a function, not dict"):
        rewards.load_reward({"incompressibility": 2}, "cpu")


def test_modules_of_a_reward_that_loads_another_count(cli, tmp_path):
    """At its first call: its own helper is still known, and a change of it refused."""
    (tmp_path / "scale.py").write_text("factor = 1.0\n")
    (tmp_path / "mine.py").write_text(
        "import scale, rewards\nfound = []\n"
        "def f(images, prompts):\n"
        "    if not found:\n"
        "        found.append(rewards.load_reward('compressibility', 'cpu'))\n"
        "    return scale.factor * found[0](images, prompts)\n"
    )
    assert cli("--reward", f"{tmp_path}/mine.py:f", "--epochs", 1)[::2] == (0, "")
    (tmp_path / "scale.py").write_text("factor = -5.0\n")
    code, _, errors = cli("--resume", tmp_path / "run", "--epochs", 2)
    assert code == 2 and "the reward modules changed since it began" in errors


def test_networks_that_cannot_be_loaded_are_a_sentence():
    class Judge:
        @property
        def networks(self):
            raise OSError("no file named model.safetensors")

        def __call__(self, images, prompts):
            return [0.0] * len(prompts)

    with pytest.raises(InputError, match="reward Judge: its networks: OSError: no file named"):
        rewards.load_reward(Judge(), "cpu")


def test_rewards_may_have_worker_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "with_workers.py").write_text(WORKERS)
    reward = rewards.load_reward(f"{tmp_path}/with_workers.py:f", "cpu")
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    assert reward(images, PROMPTS).tolist() == pytest.approx(
        images.float().mean((1, 2, 3)).tolist()
    )


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        ("[1.0] * len(p), {}", "returned a tuple; return the scores alone"),
        ("{'score': 1.0}", "failed: returned a dict; return the scores alone."),
        ("None", "failed: returned a NoneType; return the scores alone."),
        ("[math.nan] * len(p)", "returned nan for the prompt"),
    ],
)
def test_what_is_no_scores(tmp_path, returned, sentence):
    (tmp_path / "odd.py").write_text(f"import math\ndef f(i, p):\n    return {returned}\n")
    with pytest.raises(InputError, match="reward f ") as error:
        rewards.load_reward(f"{tmp_path}/odd.py:f", "cpu")(torch.zeros(3, 3, 8, 8).byte(), PROMPTS)
    assert sentence in str(error.value)


def test_sparse_scores_and_tuples_of_numbers():
    images = torch.zeros(3, 3, 8, 8).byte()
    for scores in (torch.tensor([1.0, 0.0, 2.0]).to_sparse(), (1.0, 0.0, 2.0)):
        reward = rewards.load_reward(lambda i, p, scores=scores: scores, "cpu")
        assert reward(images, PROMPTS).tolist() == [1.0, 0.0, 2.0]
    assert math.isfinite(reward.parts["<lambda>"].sum())
