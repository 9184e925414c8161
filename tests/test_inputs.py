"""What users and the hub give: prompts, pictures, networks, tokenizers, the hub's answers, code."""

import csv
import os
import shutil
from collections import UserList
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rewards
from baselines.pairs import read_picture
from conftest import PROMPTS, ROOT, metrics_of, only_sentence
from support.cli import UserError
from support.inputs import as_prompts, load_prompts, load_tokenizer

TOY_PICKSCORE = ROOT / "toy" / "pickscore"

# ---- Prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", "\ufeff# comment\r\na cat\r\n\r\n  a dog \r\na cat\r\n".encode()),
        ("a.txt", "a cat\na dog\n".encode("utf-16")),
        ("a.csv", b'\n\nid, prompt\n1, "a cat"\n2, a dog\n'),
        ("a.txt", b"\xfe\xff" + "a cat\na dog\n".encode("utf-16-be")),
        ("a.txt", b"a cat\ra dog\r"),
        ("a.txt", "\ufeffa cat\n\ufeff# comment\n\ufeffa dog\n".encode()),  # as cat joins files
        ("A.JSON", b'["a cat", {"prompt": "a dog", "image": 3}, {"prompt": "a cat"}]'),
        ("a.jsonl", b'{"image": null, "caption": "a cat"}\n\n"a dog"\n'),
        ("metadata.jsonl", b'{"file_name": "1.png", "text": "a cat"}\n{"Text": "a dog"}\n'),
        ("a.csv", b'id,note,prompt\n1,x,"a cat"\n2,y,a dog\n'),
        ("a.csv", b"prompt,note,more\na cat,x,y\na dog,x\n"),
        ("a.csv", b"Prompt;Category\r\na cat;Animals, small\r\na dog;x\r\n"),
        ("a.csv", b"id\tcaption\n1,2\ta cat\n3\ta dog\n"),
        ("a.csv", b'"my, id"|text\n1|a cat\n2|a dog\n'),
        ("a.tsv", b'Prompts\tCategory\n"a cat"\tx, "y"\na dog\ty\n'),
        ("a.tsv", b"image\tprompt\n" + b"A" * 200_000 + b"\ta cat\nB\ta dog\n"),
        ("a.csv", b"image,prompt\n" + b"A" * 200_000 + b",a cat\nB,a dog\n"),
    ],
)
def test_prompt_files(tmp_path, name, data):
    """Strings and objects, a table's column, separators, byte order marks, UTF-16."""
    (tmp_path / name).write_bytes(data)
    assert load_prompts(tmp_path / name) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("single.csv", "id,'note',prompt\n1,x,'a cat'\n", ["'a cat'"]),  # no quotes but "
        ("lines.csv", 'id,prompt\n1,"a\ncat"\n2,a\u2028dog\n3,\n', ["a\ncat", "a\u2028dog"]),
        ("commas.tsv", "prompt\na cat, red, tall\n", ["a cat, red, tall"]),
        ("header.tsv", "what, or who\tprompt\nx\ta cat, red\n", ["a cat, red"]),
        ("excel.csv", "sep=;\nid;prompt\n1;a cat, red\n", ["a cat, red"]),
        ("parti.tsv", 'Prompt\tNote\na\tx\n"G I" in "red"\ty\n', ["a", '"G I" in "red"']),
        ("tags.txt", "poster, text\n[photo] 1girl\n", ["poster, text", "[photo] 1girl"]),
        ("u2028.jsonl", '{"prompt": "a\u2028cat"}\n', ["a\u2028cat"]),
    ],
)  # fmt: skip
def test_prompts_are_whole(tmp_path, name, text, prompts):
    """Separators within quotes are none, nor what other kinds of file have for one."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert load_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize("text", ["t{}", "a {}", "a, {}", "a; {}", "a | {}"])
def test_a_table_of_one_column(tmp_path, text):
    """csv.Sniffer would find a separator in a whole file."""
    prompts, quote = [text.format(n) for n in range(100)], '"' if "," in text else ""
    table = "".join(f"{quote}{prompt}{quote}\n" for prompt in prompts)
    assert csv.Sniffer().sniff("prompt\n" + table).delimiter in text
    (tmp_path / "a.csv").write_text("prompt\n" + table)
    assert load_prompts(tmp_path / "a.csv") == prompts


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "id,prompt,Words\n1,x,a cat\n"),
        ("a.tsv", "prompt\tWords\nx\ta cat\n"),
        ("a.json", '[{"Words": "a cat", "prompt": "x"}]'),
        ("a.jsonl", '{"words": "a cat", "prompt": "x"}\n'),
        ("a:b.csv", "prompt,words\nx,a cat\n"),
        ("a:b/c.csv", "prompt,words\nx,a cat\n"),
    ],
)
def test_a_column_of_ones_own(tmp_path, name, text):
    """FILE:COLUMN, of whatever case; also of a path that has a colon, which alone is a path."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert load_prompts(f"{path}:words") == load_prompts(f"{path}:WORDS") == ["a cat"]
    assert load_prompts(path) == ["x"]
    with pytest.raises(UserError, match=f"--prompts {path}:no: entry 1 .* in a column no; FILE:"):
        load_prompts(f"{path}:no")
    (tmp_path / "a.txt").write_text("a cat\n")
    with pytest.raises(UserError, match="a text file has no columns; name the file alone"):
        load_prompts(f"{tmp_path}/a.txt:words")


COLUMN = "is neither a text nor has one in a column prompt"


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("empty.txt", b"# nothing\n\n", "holds no prompt"),
        ("empty.csv", b"", "holds no prompt"),
        ("broken.jsonl", b'"a cat"\n\n{"prompt": \n', "line 3: Expecting value"),
        ("one.json", b"3", "must be a list of texts"),
        ("coco.json", b'{"annotations": [{"caption": "a cat"}]}', "a list of texts or records"),
        ("pandas.json", b'{"prompt": {"0": "a cat"}}', "or records (pandas: orient='records')"),
        ("lines.json", b'{"prompt": "a"}\n{"prompt": "b"}', "name it .jsonl: Extra data: line 2"),
        ("utf16.txt", "a cat\n".encode("utf-16-le"), "holds NUL characters; save it as UTF-8"),
        ("twice.csv", b"prompt,Prompt\na,b\n", "has more than one column 'prompt'"),
        ("number.json", b'["a", 3]', f"entry 2 {COLUMN} or prompts or caption or text; FILE:COL"),
        (
            "null.jsonl",
            b'{"prompt": "a"}\n{"prompt": null, "text": "b"}',
            f"entry 2 {COLUMN}; FILE",
        ),
        ("row.csv", b"text,prompt\nocr,a cat\nocr\n", f"entry 2 {COLUMN}; FILE:COLUMN names"),
        ("half.json", b'["a", "\\ud800"]', "surrogates not allowed"),
        (
            "latin.txt",
            "caf\xe9".encode("latin-1"),
            "UTF-8: 'utf-8' codec can't decode byte 0xe9 in position 3",
        ),
        ("words.csv", b"id,words\n1,a cat\n", f"entry 1 {COLUMN} or"),
        ("short.csv", b"id,prompt\n1,a cat\n3\n", f"entry 2 {COLUMN};"),
        ("comma.csv", b"prompt\na cat, a dog\n", "row 2 has more cells than the header; quote"),
        ("more.csv", b"id;prompt\n1;a cat;x\n", "row 2 has more cells than the header; quote what"),
        ("open.csv", b'prompt\n"a cat\na dog\n', "unexpected end of data; is a quote not closed?"),
        ("sign.csv", b'id,prompt\n1,"Hello" on a sign\n', "line 2: ',' expected after '\"'"),
        ("long.csv", b'prompt\n"' + b"a cat\n" * 40_000, "end of data; is a quote not closed?"),
        ("a.parquet", b"PAR1\xff\xfe", "must be .txt, .csv, .tsv, .json or .jsonl"),
        ("a.txt/", b"", "directory"),
        ("missing.csv:words", None, "No such file or directory"),
        ("missing-2024:11.txt", None, "No such file or directory"),
    ],
)
def test_what_is_no_prompt_file(tmp_path, name, data, sentence):
    path = tmp_path / name.rstrip("/")
    if data is not None:
        path.mkdir() if name.endswith("/") else path.write_bytes(data)
    with pytest.raises(UserError, match=f"--prompts {path}[:,] ") as error:
        load_prompts(path)
    assert sentence in str(error.value)


def test_prompts_of_a_pipe():
    """As `--prompts <(head file)` gives them; it can be read once."""
    reader, writer = os.pipe()
    os.write(writer, b"a cat\r\na dog\n")
    os.close(writer)
    assert load_prompts(f"/dev/fd/{reader}") == ["a cat", "a dog"]
    os.close(reader)


class Column(UserList):
    """In the manner of pandas' Series; its DataFrame has `columns`."""

    def items(self):
        return enumerate(self)


def test_prompts_from_python():
    """Whatever holds strings in an order is a list of prompts; a lone string may be a path."""
    for kind in (tuple, np.array, iter, Column):
        assert as_prompts(kind(["a", "b", "a"])) == ["a", "b"]
    table = Column(["a cat"])
    table.columns = ["prompt"]
    fields = {"prompt": ["a cat"]}
    for records in ("p.txt", Path("p.txt"), __file__, fields, table, {"a", "b"}, None):
        with pytest.raises(UserError, match="must be a list of texts or records"):
            as_prompts(records)
    for records in ([], ["  "], [3], [None]):
        with pytest.raises(UserError):
            as_prompts(records)


# ---- Pictures ------------------------------------------------------------------------------------


def test_pictures_of_16_bits_and_floats_are_refused(tmp_path):
    """No scale is guessed."""
    for name, kind in (("16.png", "uint16"), ("32.tif", "int32"), ("float.tif", "float32")):
        Image.fromarray(np.zeros((8, 8), kind)).save(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: .*16 or 32 bits a channel: save it with 8"):
            read_picture(tmp_path / name, "--images")


def test_transparent_pictures_are_refused(tmp_path):
    """Which colour was seen behind them is not known; those that hide nothing are read."""
    pixels = np.full((8, 8, 4), 255, "uint8")
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png", "--images") == 255).all()
    pixels[0, 0, 3] = 254
    pictures = Image.fromarray(pixels), Image.fromarray(pixels).convert("LA")
    for picture in (*pictures, Image.fromarray(pixels).quantize()):
        picture.save(tmp_path / "a.png")
        with pytest.raises(UserError, match="it is transparent: save it on a background"):
            read_picture(tmp_path / "a.png", "--images")


def test_pictures_are_the_right_way_up(tmp_path):
    pixels = np.arange(2 * 3 * 3, dtype="uint8").reshape(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert read_picture(tmp_path / "a.png", "").shape == (3, 3, 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp"])
def test_damaged_pictures_are_pictures_or_refused(kind, tmp_path, monkeypatch):
    """Cut, or with three bytes changed; and what is too large."""
    generator, file = np.random.default_rng(1), tmp_path / f"a.{kind}"
    Image.fromarray(generator.integers(0, 256, (9, 9, 3), "uint8")).save(file)
    whole = file.read_bytes()
    for n in range(25):
        changed = bytearray(whole[: generator.integers(1, len(whole))] if n % 2 else whole)
        for _ in range(3):
            changed[generator.integers(len(changed))] = generator.integers(256)
        file.write_bytes(changed)
        try:
            assert read_picture(file, "--images").dtype == torch.uint8
        except UserError as error:
            assert str(error).startswith(f"--images {file}: ")
    file.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match="bomb"):
        read_picture(file, "--images")


# ---- Tokenizers, the hub -------------------------------------------------------------------------


def test_tokenizers_that_do_not_fit_are_refused(tmp_path):
    """transformers makes one of two tokens where none is: every prompt would be one. More tokens
    than embeddings would end a run at whatever prompt has one of them."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TOY_PICKSCORE / name, tmp_path)
    with pytest.raises(UserError, match="has no vocabulary here; put its files beside the weights"):
        rewards.load_reward(f"pickscore:{tmp_path}", "cpu")
    shutil.copy(TOY_PICKSCORE / "tokenizer_config.json", tmp_path)
    with pytest.raises(UserError, match="has no vocabulary here"):
        load_tokenizer("--reward hpsv2", str(tmp_path), 10**5)
    with pytest.raises(UserError, match=f"the tokenizer of {rewards.TOKENIZER}"):
        load_tokenizer("--reward hpsv2", rewards.TOKENIZER, 10**5)  # not cached, no network
    shutil.copy(TOY_PICKSCORE / "tokenizer.json", tmp_path)
    assert rewards.load_reward(f"pickscore:{tmp_path}", "cpu").networks
    tokens = len(load_tokenizer("--reward hpsv2", str(tmp_path), 10**5))
    with pytest.raises(UserError, match=f"has {tokens} tokens, and its text encoder {tokens - 1};"):
        load_tokenizer("--reward hpsv2", str(tmp_path), tokens - 1)


class Hub(BaseHTTPRequestHandler):
    """Lets nobody in."""

    def do_HEAD(self):
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@pytest.fixture
def ask(tmp_path) -> Callable[..., str]:
    """ask(**environment): what a run says whose model is on the hub."""

    def run(**environment: str) -> str:
        env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
        env |= {"HF_HOME": str(tmp_path / "cache"), **environment}
        command = [
            sys.executable,
            ROOT / "prdp.py",
            "--model",
            "a/model",
            "--out",
            tmp_path / "run",
        ]
        command += ["--reward", "incompressibility"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert not (tmp_path / "run").exists()
        return done.stderr.splitlines()[-1]

    return run


def test_the_hubs_answer_is_in_the_sentence(ask):
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said = ask(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert "model a/model: " in said and "the hub answers 401; check the name, accept its" in said


def test_a_proxy_of_a_kind_that_is_not_installed(ask):
    said = ask(ALL_PROXY="socks5://127.0.0.1:9")
    assert "'socksio' package is not installed" in said


def test_no_network(cli):
    said = only_sentence(cli("--model", "a/model"))
    assert "model a/model: " in said and said.endswith("not cached, and the hub is out of reach.")


# ---- Code of users -------------------------------------------------------------------------------

CALM = "def f(images, prompts):\n    return images.double().mean((1, 2, 3))\n"
RESTLESS = """
import os, torch
torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")

def f(images, prompts):
    assert not torch.is_grad_enabled()
    torch.set_default_device("meta")
    with torch.backends.cudnn.flags(enabled=False):  # reads TF32's older switches
        pass
    os.chdir("/")
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    return images.double().mean((1, 2, 3))
"""


def test_what_a_reward_does_to_the_process_changes_no_run(cli, tmp_path, monkeypatch):
    """Gradient mode, default dtype and device are put back, when it is imported too; paths are
    absolute, and noise has generators of its own."""
    (tmp_path / "calm.py").write_text(CALM)
    (tmp_path / "restless.py").write_text(RESTLESS)
    found = []
    for name in ("calm", "restless"):
        monkeypatch.chdir(tmp_path)
        code, _, errors = cli("--reward", f"{name}.py:f", "--out", name)
        assert code == 0, errors
        found.append(metrics_of(tmp_path / name))
    assert found[0] == found[1] and len(found[0]) == 2
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert torch.get_default_device() == torch.device("cpu")


def test_a_file_imports_the_modules_beside_it(tmp_path):
    """Of each folder its own, one after another in a process; a file that changed is read anew, but
    once for two of its functions, which share what it holds."""
    (tmp_path / "two.py").write_text(
        "seen = []\ndef a(images, prompts):\n    seen.append(1)\n    return [0.0] * len(prompts)\n"
        "def b(images, prompts):\n    return [float(len(seen))] * len(prompts)\n"
    )
    both = rewards.load_reward([f"{tmp_path}/two.py:a", f"{tmp_path}/two.py:b"], "cpu")
    assert both(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["x"]).item() == 1
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for folder, value in (("a", 1.0), ("b", 20.0), ("a", 1.0)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "near.py").write_text(f"value = {value}\n")
        mine = tmp_path / folder / "mine.py"
        for factor in (1, 2):
            text = f"import near\ndef f(i, p): return [{factor} * near.value]\n"
            mine.write_text(text + factor * "# of another size\n")
            scores = rewards.load_reward(f"{mine}:f", "cpu")(images, ["a"])
            assert scores.tolist() == [factor * value]


def test_a_file_imports_the_packages_beside_it(tmp_path):
    """With their modules, likewise of each folder its own."""
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for folder, value, init in (("a", 1.0, True), ("b", 20.0, True), ("c", 300.0, False)):
        (tmp_path / folder / "pack").mkdir(parents=True)
        (tmp_path / folder / "pack" / "near.py").write_text(f"value = {value}\n")
        if init:
            (tmp_path / folder / "pack" / "__init__.py").write_text("")
        text = "from pack.near import value\ndef f(i, p): return [value]\n"
        (tmp_path / folder / "mine.py").write_text(text)
        assert rewards.load_reward(f"{tmp_path}/{folder}/mine.py:f", "cpu")(images, ["a"]) == value


def test_of_a_class_an_instance_is_named(tmp_path):
    text = "class A:\n    def __call__(self, i, p): return [1.0] * len(p)\na = A()\n"
    (tmp_path / "mine.py").write_text(text)
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert rewards.load_reward(f"{tmp_path}/mine.py:a", "cpu")(images, ["x"]) == 1
    with pytest.raises(UserError, match="has no function or instance 'A'"):
        rewards.load_reward(f"{tmp_path}/mine.py:A", "cpu")


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


def test_rewards_may_have_worker_processes(tmp_path):
    (tmp_path / "with_workers.py").write_text(WORKERS)
    reward = rewards.load_reward(f"{tmp_path}/with_workers.py:f", "cpu")
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    expected = images.float().mean((1, 2, 3)).tolist()
    assert reward(images, PROMPTS).tolist() == pytest.approx(expected)
