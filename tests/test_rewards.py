"""Rewards: specs, functions of one's own, preprocessing, and the official networks in small.

No official weights: the mapping of open_clip's into transformers is compared with the real
open_clip on random ones (tests/requirements.txt; those tests skip without it).
"""

import importlib
import importlib.util
import io
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rewards
from conftest import PROMPTS, ROOT
from support.cli import InputError
from support.inputs import load_network

TOY_TOKENIZER = ROOT / "toy" / "sd" / "tokenizer"
TOY_PICKSCORE = ROOT / "toy" / "pickscore"
THREE = ["a", "bb", "ccc"]


def noise_images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


# ---- words of --reward ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder and the home, with files whose names are hard on a parser."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = (
        "mine.py",
        "other/mine.py",
        "a, b=2/mine.py",
        " spaced .py",
        "v=2.pt",
        "v=2",
        "plain.pt",
    )
    for name in (*names, r"C:\me\my.py", r"C:\me\plain.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("words", "components"),
    [
        ("hpsv2", [("hpsv2", 1, "hpsv2", "")]),
        (
            ["mine.py:f=2 ", "hpsv2.1=-.5"],
            [("f", 2, "{}/mine.py", "f"), ("hpsv2.1", -0.5, "hpsv2.1", "")],
        ),
        ("pickscore:other", [("pickscore", 1, "pickscore", "{}/other")]),
        ("hpsv2:~/plain.pt=1e-3", [("hpsv2", 1e-3, "hpsv2", "{}/plain.pt")]),
        ("a, b=2/mine.py:f=3", [("f", 3, "{}/a, b=2/mine.py", "f")]),
        ("a, b=2/mine.py:f", [("f", 1, "{}/a, b=2/mine.py", "f")]),
        ("aesthetic:v=2.pt=2", [("aesthetic", 2, "aesthetic", "{}/v=2.pt")]),
        ("pickscore:v=2=1", [("pickscore", 1, "pickscore", "{}/v=2")]),
        (r"C:\me\my.py:f", [("f", 1, r"{}/C:\me\my.py", "f")]),
        (r"hpsv2:C:\me\plain.pt=2", [("hpsv2", 2, "hpsv2", r"{}/C:\me\plain.pt")]),
        (
            ["mine.py:f", "other/mine.py:f", "mine.py:g"],
            [
                ("f", 1, "{}/mine.py", "f"),
                ("f-2", 1, "{}/other/mine.py", "f"),
                ("g", 1, "{}/mine.py", "g"),
            ],
        ),
        (
            ["hpsv2", "hpsv2:plain.pt"],
            [("hpsv2", 1, "hpsv2", ""), ("hpsv2-2", 1, "hpsv2", "{}/plain.pt")],
        ),
    ],
)
def test_words_name_these_components_from_any_folder(folder, monkeypatch, words, components):
    expected = [
        (label, weight, source.format(folder), detail.format(folder))
        for label, weight, source, detail in components
    ]
    assert rewards.parse_reward(words) == expected
    resolved = rewards.resolve_reward(words)
    monkeypatch.chdir(folder / "other")
    assert rewards.parse_reward(resolved) == expected
    assert rewards.resolve_reward(resolved) == resolved


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([""], "--reward : no reward ''"),
        (["mine.py"], "--reward mine.py: no reward 'mine.py'; choose from hpsv2"),
        (["mine.py:"], "no reward 'mine.py:'"),
        (["hpsv2=inf"], "--reward hpsv2=inf: inf is no weight"),
        (["pickscore=10,hpsv2=2"], "words of their own: --reward pickscore=10 hpsv2=2"),
        (["pickscore:models/picks"], "no such file or folder: {}/models/picks; choose"),
        (["nowhere.py:f"], "no such file or folder: {}/nowhere.py; choose"),
        (
            ["hpsv2=.5 mine.py:f=1"],
            "several are words of their own: --reward hpsv2=.5 mine.py:f=1.",
        ),
        (
            [print, len],
            "--reward: must be words or a function, not list; of several functions make one",
        ),
        (["compressibility:nowhere"], "takes no path"),
        (["mine.py:f", "other/../mine.py:f=2"], "--reward other/../mine.py:f=2: is named twice"),
        (["hpsv2", "hpsv2=2"], "--reward hpsv2=2: is named twice"),
    ],
)
def test_words_that_are_wrong(folder, words, sentence):
    with pytest.raises(InputError) as error:
        rewards.parse_reward(words)
    assert sentence.format(folder) in str(error.value) and "\n" not in str(error.value)


# ---- functions of one's own --------------------------------------------------------------------

MINE = """
import sys, torch

def brightness(images, prompts): return images.float().mean((1, 2, 3)) / 255
def lengths(images, prompts): return [len(p) for p in prompts]
def column(images, prompts): return [[len(p)] for p in prompts]
def greedy(images, prompts):
    images.zero_()
    return [prompts.pop() == "x" for _ in range(len(prompts))]

def too_few(images, prompts): return [1.0]
def pairs(images, prompts): return [[1.0, 2.0]] * len(prompts)
def nan(images, prompts): return [0.0] * (len(prompts) - 1) + [float("nan")]
def inf(images, prompts): return [float("inf")] * len(prompts)
def words(images, prompts): return ["good"] * len(prompts)
def nothing(images, prompts): return None
def raises(images, prompts): return 1 / 0
def verbose(images, prompts): raise RuntimeError("first" + chr(10) + "second")
def ends(images, prompts): sys.exit()
def ends_well(images, prompts): sys.exit(0)
def moved(images, prompts): return [0.0] * len(prompts)
moved.networks = torch.nn.Linear(1, 1)
number = 3

def gpu_full(images, prompts): raise torch.OutOfMemoryError("CUDA out of memory")
def cpu_full(images, prompts): raise MemoryError
def stopped(images, prompts): raise KeyboardInterrupt
"""


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """A reward file; what importing it adds to Python's search path is taken away again."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def test_weighted_sum_with_functions_of_your_own(mine):
    images = noise_images(3, 3, 16, 16)
    words = [f"{mine}:brightness=0.5", f"{mine}:lengths=-2", "incompressibility"]
    reward = rewards.load_reward(words, "cpu")
    total = reward(images, THREE)
    bright = images.double().mean((1, 2, 3)) / 255
    expected = 0.5 * bright - 2 * torch.tensor([1, 2, 3]) + rewards.jpeg_kilobytes(images)
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
    assert list(reward.parts) == ["brightness", "lengths", "incompressibility"]
    assert reward.parts["lengths"].tolist() == [1, 2, 3] and total.dtype == torch.float32


def test_the_sum_has_a_label_of_its_own():
    """Also beside a function of that name."""
    reward = rewards.Reward(
        {"sum": (1.0, lambda images, prompts: [1.0]), "b": (2.0, lambda images, prompts: [3.0])}
    )
    total = reward(noise_images(1, 3, 8, 8), ["a"])
    found = {name: x.item() for name, x in reward.with_sum(total).items()}
    assert found == {"sum": 1.0, "b": 3.0, "weighted sum": 7.0}


def test_a_class_is_no_reward(mine):
    mine.write_text(
        "class Judge:\n    def __call__(self, images, prompts):\n        return [0.0]\n"
    )
    with pytest.raises(InputError, match="reward Judge: is a class; name an instance of it"):
        rewards.load_reward(f"{mine}:Judge", "cpu")


def test_column_of_numbers_will_do(mine):
    reward = rewards.load_reward(f"{mine}:column", "cpu")
    for count in (1, 3):
        assert reward(noise_images(count, 3, 8, 8), THREE[:count]).tolist() == [1, 2, 3][:count]


def test_callable_in_place_of_a_spec():
    class Judge:
        def __call__(self, images: Tensor, prompts: list[str]) -> list[int]:
            return self.verdict(images, prompts)

        @staticmethod
        def verdict(images: Tensor, prompts: list[str]) -> list[int]:
            return [len(p) for p in prompts]

    for function, label in ((Judge.verdict, "verdict"), (Judge(), "Judge")):
        reward = rewards.load_reward(function, "cpu")
        assert reward(noise_images(3, 3, 8, 8), THREE).tolist() == [1, 2, 3]
        assert list(reward.parts) == [label]


def test_function_cannot_change_what_others_see(mine):
    """Neither the next component nor the caller, whose grids would turn black."""
    images, prompts = noise_images(3, 3, 8, 8), list(THREE)
    before = images.clone()
    words = [f"{mine}:{name}" for name in ("greedy", "brightness", "lengths")]
    reward = rewards.load_reward(words, "cpu")
    reward(images, prompts)
    assert torch.equal(images, before) and prompts == THREE
    assert torch.equal(reward.parts["brightness"], before.float().mean((1, 2, 3)) / 255)
    assert reward.parts["lengths"].tolist() == [1, 2, 3]


def test_modules_beside_a_reward_file(mine, monkeypatch):
    """They can be imported, also when the function runs; none hides Python's own or ours."""
    for name in ("beside_first", "beside_later"):
        mine.with_name(f"{name}.py").write_text("value = 2.0")
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("json", "colorsys", "support", "baselines"):  # colorsys: of Python, seldom loaded
        mine.with_name(f"{name}.py").write_text("raise ImportError('the wrong one')")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    mine.with_name("rewards.py").write_text(
        "import baselines, beside_first, colorsys, json, rewards, support\n"
        "def f(images, prompts):\n"
        "    import beside_later\n"
        "    return [beside_first.value + beside_later.value] * len(prompts)\n"
    )
    reward = rewards.load_reward(f"{mine.with_name('rewards.py')}:f", "cpu")
    assert reward(noise_images(3, 3, 8, 8), THREE).tolist() == [4.0] * 3
    assert sys.modules["rewards"] is rewards and sys.modules["json"] is json


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("too_few", "returned numbers of shape (1,) for 3 images"),
        ("pairs", "returned numbers of shape (3, 2) for 3 images"),
        ("nan", "returned nan for the prompt 'ccc'"),
        ("inf", "returned inf for the prompt 'a'"),
        ("words", "failed: ValueError"),
        ("nothing", "failed: "),
        ("raises", "failed: ZeroDivisionError: division by zero (mine.py, line 17)"),
        ("verbose", "failed: RuntimeError: first second (mine.py"),
        ("ends", "failed: SystemExit: (mine.py"),
        ("ends_well", "failed: SystemExit: 0 (mine.py"),
        ("number", "has no function 'number'"),
        ("missing", "has no function 'missing'"),
        ("moved", "`networks` must be a list of torch modules"),
    ],
)
def test_function_that_misbehaves(function, sentence, mine):
    with pytest.raises(InputError) as error:
        rewards.load_reward(f"{mine}:{function}", "cpu")(noise_images(3, 3, 8, 8), THREE)
    assert sentence in str(error.value) and function in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("import sys; sys.exit()", "cannot be imported: SystemExit: (mine.py, line 1)"),
        ("def f(:", "cannot be imported: SyntaxError: "),
        ("import no_such_module", "cannot be imported: ModuleNotFoundError: "),
    ],
)
def test_file_that_cannot_be_imported(code, sentence, mine):
    mine.write_text(code)
    with pytest.raises(InputError) as error:
        rewards.load_reward(f"{mine}:f", "cpu")
    assert f"--reward {mine}:f: {sentence}" in str(error.value)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("gpu_full", torch.OutOfMemoryError),
        ("cpu_full", MemoryError),
        ("stopped", KeyboardInterrupt),
    ],
)
def test_what_is_not_the_functions_fault_passes(function, error, mine):
    """prdp.py has sentences for these."""
    with pytest.raises(error):
        rewards.load_reward(f"{mine}:{function}", "cpu")(noise_images(3, 3, 8, 8), THREE)
    mine.write_text(MINE + f"\n{function}(None, None)")
    with pytest.raises(error):
        rewards.load_reward(f"{mine}:lengths", "cpu")


# ---- pixels ------------------------------------------------------------------------------------


def test_jpeg_sizes_equal_pillows():
    images = noise_images(3, 3, 40, 24)
    images[1] = 7
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="jpeg", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    more = rewards.load_reward("incompressibility", "cpu")(images, THREE)
    less = rewards.load_reward("compressibility", "cpu")(images, THREE)
    assert more.tolist() == pytest.approx(sizes) and more.dtype == torch.float32
    assert torch.equal(less, -more) and more[0] > more[1]


@pytest.mark.parametrize("shape", [(32, 32), (50, 37), (37, 50), (64, 300), (20, 20)])
def test_preprocess_clip_equals_transformers_processor(shape):
    from transformers import CLIPImageProcessorPil

    images = noise_images(2, 3, *shape)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    pixels = [image.permute(1, 2, 0).numpy() for image in images]
    expected = CLIPImageProcessorPil(**sizes)(pixels, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(rewards.preprocess_clip(images, 32).numpy(), expected, atol=1e-6)


def cubic(x: float, a: float) -> float:
    """Keys' kernel."""
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    if x < 2:
        return a * (((x - 5) * x + 8) * x - 4)
    return 0.0


def resampling_matrix(old: int, new: int) -> np.ndarray:
    """(new, old): antialiased bicubic resampling of one axis: the kernel is as wide as the scale
    when shrinking, and cut off at the border."""
    scale, matrix = old / new, np.zeros((new, old))
    width = max(scale, 1.0)
    for o in range(new):
        for i in range(old):
            matrix[o, i] += cubic((i + 0.5 - (o + 0.5) * scale) / width, -0.5)
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("shape", "inner"),
    [
        ((64, 64), (32, 32)),
        ((50, 37), (32, 24)),
        ((37, 51), (23, 32)),
        ((64, 20), (32, 10)),
        ((32, 21), (32, 21)),
        ((16, 9), (32, 18)),
    ],
)
def test_preprocess_hpsv2_equals_its_definition(shape, inner):
    """Longest side to 32, unclamped, zero padding *before* normalising, as matrices in numpy."""
    images = noise_images(2, 3, *shape)
    pixels = images.numpy() / 255
    if shape != inner:
        rows, columns = (resampling_matrix(a, b) for a, b in zip(shape, inner, strict=True))
        pixels = rows @ pixels @ columns.T
    padded = np.zeros((2, 3, 32, 32))
    top, left = (32 - inner[0]) // 2, (32 - inner[1]) // 2
    padded[:, :, top : top + inner[0], left : left + inner[1]] = pixels
    mean = np.array([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    std = np.array([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    ours = rewards.preprocess_hpsv2(images, 32)
    np.testing.assert_allclose(ours, (padded - mean) / std, atol=2e-5)


def test_scores_by_hand_of_pictures_of_any_mode(tmp_path, capsys):
    """The table has a row for each picture."""
    picture = Image.fromarray(noise_images(24, 20, 3).numpy())
    files = [str(tmp_path / f"{mode}.png") for mode in ("RGB", "RGBA", "L", "P")]
    for mode, file in zip(("RGB", "RGBA", "L", "P"), files, strict=True):
        picture.convert(mode).save(file)
    words = ["incompressibility=2", "compressibility"]
    rewards.main(["--reward", *words, "--images", *files, "--prompt", "x"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["incompressibility", "compressibility", "sum", "image"] and len(rows) == 5
    assert float(rows[1][2]) == pytest.approx(float(rows[1][0]), rel=1e-4)  # 2 x - x
    assert rows[1][:3] == rows[2][:3]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("notes.txt", "no picture that can be read"), ("nowhere.png", "No such file or directory")],
)
def test_scores_by_hand_of_no_picture(name, sentence, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("not a picture")
    with pytest.raises(SystemExit) as stop:
        rewards.main(["--reward", "compressibility", "--images", str(tmp_path / name)])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    assert message.startswith(f"rewards.py: --images {tmp_path / name}: {sentence}")


# ---- open_clip's weights in transformers -------------------------------------------------------


@pytest.fixture(scope="session")
def open_clip():
    """The real open_clip. It imports torchvision, which has no CPU build, for image transforms
    that are not used here: a stand-in lets the import pass."""
    import transformers  # noqa: F401  (first: it must not see the stand-in)

    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed: pip install --no-deps -r tests/requirements.txt")
    parts = ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc")
    stand_ins = {f"torchvision{part}": mock.MagicMock(__spec__=None) for part in parts}
    with mock.patch.dict(sys.modules, stand_ins):
        return importlib.import_module("open_clip")


def tiny_open_clip(open_clip) -> nn.Module:
    """Random everywhere; heads as wide as 10 and two square projections tell mistakes apart."""
    vision = {"layers": 2, "width": 30, "head_width": 10, "patch_size": 8, "image_size": 32}
    text = {"context_length": 12, "vocab_size": 50, "width": 20, "heads": 2, "layers": 2}
    model = open_clip.model.CLIP(
        embed_dim=20,
        vision_cfg=open_clip.CLIPVisionCfg(**vision),
        text_cfg=open_clip.CLIPTextCfg(**text),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape))
    return model.eval()


def clip_config(width: int, text: dict, vision: dict):
    """A CLIPConfig whose text tower is as wide as the projection, as ViT-H/14's."""
    from transformers import CLIPConfig

    shared = {"hidden_act": "gelu", "projection_dim": width, "patch_size": 8, "image_size": 32}
    text = {"hidden_size": width, "intermediate_size": 4 * width, **shared, **text}
    return CLIPConfig(text_config=text, vision_config={**shared, **vision}, projection_dim=width)


def tiny_clip_config():
    """That of `tiny_open_clip`."""
    text = {"num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 12}
    text |= {"vocab_size": 50, "eos_token_id": 49, "bos_token_id": 48}
    vision = {"num_attention_heads": 3, "num_hidden_layers": 2}
    return clip_config(20, text, {"hidden_size": 30, "intermediate_size": 120, **vision})


def largest_differences(theirs, ours, pixels: Tensor, ids: Tensor) -> list[float]:
    """Between open_clip's and our features, image and text, over their root mean square."""
    with torch.no_grad():
        features = [
            (theirs.encode_image(pixels), ours.get_image_features(pixel_values=pixels)),
            (theirs.encode_text(ids), ours.get_text_features(input_ids=ids)),
        ]
    return [
        ((a - b.pooler_output).abs().max() / a.square().mean().sqrt()).item() for a, b in features
    ]


def swap_query_and_key(state: dict[str, Tensor]) -> None:
    for name in state:
        if "in_proj" in name:
            query, key, value = state[name].chunk(3)
            state[name] = torch.cat([key, query, value])


def transpose_text_projection(state: dict[str, Tensor]) -> None:
    state["text_projection"] = state["text_projection"].T


@pytest.mark.parametrize(
    ("tower", "field", "value", "break_state"),
    [
        pytest.param(None, None, None, None, id="as it is"),
        pytest.param("vision", "hidden_act", "quick_gelu", None, id="vision activation"),
        pytest.param("text", "hidden_act", "quick_gelu", None, id="text activation"),
        pytest.param("vision", "num_attention_heads", 2, None, id="vision heads"),
        pytest.param("text", "num_attention_heads", 4, None, id="text heads"),
        pytest.param("text", "eos_token_id", 47, None, id="end token not in the text"),
        pytest.param(None, None, None, swap_query_and_key, id="query and key swapped"),
        pytest.param(None, None, None, transpose_text_projection, id="text projection transposed"),
    ],
)
def test_mapped_weights_give_open_clips_features(open_clip, tower, field, value, break_state):
    """And each mistake one could make is told apart."""
    theirs, config = tiny_open_clip(open_clip), tiny_clip_config()
    state = dict(theirs.state_dict())
    if tower:
        setattr(getattr(config, f"{tower}_config"), field, value)
    if break_state:
        break_state(state)
    ours = rewards.hpsv2_model("hpsv2", state, config).eval()
    pixels, ids = torch.randn(3, 3, 32, 32), torch.randint(1, 47, (3, 12))
    ids[:, 0] = 48  # the start; the end, 49, at three places, and padding after it
    for row, end in enumerate((5, 11, 2)):
        ids[row, end], ids[row, end + 1 :] = 49, 0
    gap = max(largest_differences(theirs, ours, pixels, ids))
    if tower or break_state:
        assert gap > 1e-3
    else:
        assert gap < 2e-5


@pytest.mark.skipif("PRDP_FULL_SIZE" not in os.environ, reason="12 GB, minutes: PRDP_FULL_SIZE=1")
def test_full_size_vit_h_14(open_clip):
    """HPSv2's real architecture, random weights: 686 tensors map strictly, and features agree."""
    sizes = {**open_clip.get_model_config("ViT-H-14"), "quick_gelu": False}
    theirs = open_clip.model.CLIP(**sizes).eval()
    state = theirs.state_dict()
    assert len(state) == 686 and sum(value.numel() for value in state.values()) == 986_109_441
    ours = rewards.hpsv2_model("hpsv2", state).eval()
    pixels, ids = torch.randn(2, 3, 224, 224), torch.randint(1, 49405, (2, 77))
    ids[:, 0], ids[0, 9], ids[1, 76] = 49406, 49407, 49407
    image, text = largest_differences(theirs, ours, pixels, ids)
    print(f"largest difference over the features' rms: image {image:.1e}, text {text:.1e}")
    assert max(image, text) < 1e-5


def test_padding_token_does_not_matter(open_clip):
    """open_clip pads with 0, transformers with the end token: the first end token is pooled."""
    state = tiny_open_clip(open_clip).state_dict()
    ours = rewards.hpsv2_model("hpsv2", state, tiny_clip_config()).eval()
    ids = torch.tensor([[48, 3, 4, 49] + [0] * 8, [48, 3, 4, 49] + [49] * 8])
    with torch.no_grad():
        first, second = ours.get_text_features(input_ids=ids).pooler_output
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ftfy", [True, False])
@pytest.mark.parametrize(
    "prompt",
    [
        "A  cat\n\twith &amp;amp; hats",
        "it\u2019s \u201cfine\u201d",
        "\ufb01sh",
        "  UPPER  ",
        "",
        "caf\u00e9 \U0001f600",
    ],
)
def test_text_cleaning_equals_open_clips(open_clip, monkeypatch, prompt, ftfy):
    """With ftfy, or without."""
    clean = open_clip.tokenizer.whitespace_clean(open_clip.tokenizer.basic_clean(prompt))
    if not ftfy:
        monkeypatch.setitem(sys.modules, "ftfy", None)
    assert rewards.clean_text(prompt) == clean.lower()


def test_text_cleaning_cuts_out_control_tokens():
    assert rewards.clean_text("a <|endoftext|> b<start_of_text>") == "a b"


# ---- scorers -----------------------------------------------------------------------------------


@pytest.fixture
def tiny_hpsv2(tmp_path, monkeypatch) -> Path:
    """A checkpoint in half precision with the official one's layout, beside a tokenizer."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(TOY_TOKENIZER)
    tokenizer.save_pretrained(tmp_path)
    words, text_width, vision_width = len(tokenizer), 16, 24

    text = {"num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 16}
    text |= {"vocab_size": words, "eos_token_id": tokenizer.eos_token_id}
    vision = {"num_attention_heads": 2, "num_hidden_layers": 1}
    vision |= {"hidden_size": vision_width, "intermediate_size": 4 * vision_width}
    config = clip_config(text_width, {**text, "bos_token_id": tokenizer.bos_token_id}, vision)
    monkeypatch.setattr(rewards, "vit_h_14_config", lambda: config)

    shapes = {
        "logit_scale": (),
        "positional_embedding": (16, text_width),
        "text_projection": (text_width, text_width),
        "token_embedding.weight": (words, text_width),
        "visual.class_embedding": (vision_width,),
        "visual.positional_embedding": (17, vision_width),
        "visual.conv1.weight": (vision_width, 3, 8, 8),
        "visual.proj": (vision_width, text_width),
    }
    for tower, width in (("", text_width), ("visual.", vision_width)):
        block = f"{tower}transformer.resblocks.0."
        for layer, rows, columns in (
            ("attn.in_proj_", 3 * width, width),
            ("attn.out_proj.", width, width),
            ("mlp.c_fc.", 4 * width, width),
            ("mlp.c_proj.", width, 4 * width),
        ):
            shapes |= {f"{block}{layer}weight": (rows, columns), f"{block}{layer}bias": (rows,)}
        norms = ["ln_final"] if tower == "" else ["visual.ln_pre", "visual.ln_post"]
        for norm in (*norms, f"{block}ln_1", f"{block}ln_2"):
            shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    state = {name: (0.3 * torch.randn(shape)).half() for name, shape in shapes.items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "HPS_v2_compressed.pt")
    return tmp_path / "HPS_v2_compressed.pt"


@pytest.mark.parametrize("name", ["pickscore", "hpsv2"])
def test_score_is_the_models_own_cosine_in_fp32_whatever_the_batch(name, tiny_hpsv2):
    """Against CLIPModel's own forward; an empty prompt, one in upper case, a control token."""
    from transformers import CLIPModel, CLIPTokenizer

    images, prompts = noise_images(5, 3, 40, 30), ["", "A RED circle", *PROMPTS]
    if name == "pickscore":
        path = folder = TOY_PICKSCORE
        model, pixels = CLIPModel.from_pretrained(path), rewards.preprocess_clip(images, 32)
    else:
        path, folder = tiny_hpsv2, tiny_hpsv2.parent
        model = rewards.hpsv2_model("hpsv2", torch.load(path)["state_dict"])
        pixels = rewards.preprocess_hpsv2(images, 32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = CLIPTokenizer.from_pretrained(folder)(
        prompts, padding=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, pixel_values=pixels).logits_per_image
    expected = logits.diag() / model.logit_scale.exp()

    score = rewards.load_reward(f"{name}:{path}", "cpu")
    scores = score(images, prompts)
    assert scores.dtype == torch.float32 and scores.shape == (5,)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    singly = torch.cat([score(images[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(scores, singly, rtol=0, atol=1e-5)
    if name == "hpsv2":
        with_control = score(images[:1], ["a red <|endoftext|> circle"])
        assert torch.equal(with_control, score(images[:1], ["a red circle"]))


def test_half_precision_folder_and_long_prompt(tmp_path):
    """from_pretrained would take the file's own dtype; a prompt longer than the context is cut."""
    from transformers import CLIPModel, CLIPTokenizer

    CLIPModel.from_pretrained(TOY_PICKSCORE).half().save_pretrained(tmp_path)
    CLIPTokenizer.from_pretrained(TOY_PICKSCORE).save_pretrained(tmp_path)
    model = load_network("pickscore", CLIPModel, str(tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    score, images = rewards.load_reward(f"pickscore:{tmp_path}", "cpu"), noise_images(1, 3, 32, 32)
    assert torch.equal(score(images, ["red " * 100]), score(images, ["red " * 14]))


def test_aesthetic_head_is_one_affine_map(tmp_path, monkeypatch):
    """Its five layers have no activations: they collapse to w . x + b, of unit vectors x."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes, places = (768, 1024, 128, 64, 16, 1), (0, 2, 4, 6, 7)
    state = {}
    w, bias = torch.eye(768, dtype=torch.float64), torch.zeros(768, dtype=torch.float64)
    for place, (a, b) in zip(places, itertools.pairwise(sizes), strict=True):
        layer, shift = torch.randn(b, a) / a**0.5, torch.randn(b)
        state |= {f"layers.{place}.weight": layer, f"layers.{place}.bias": shift}
        w, bias = layer.double() @ w, layer.double() @ bias + shift.double()
    torch.save(state, tmp_path / "head.pth")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "patch_size": 8}
    small |= {"num_attention_heads": 2, "image_size": 32, "projection_dim": 768}
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**small)).eval()
    monkeypatch.setattr(rewards, "load_network", lambda *_: model)

    images = noise_images(3, 3, 32, 48)
    scores = rewards.load_reward(f"aesthetic:{tmp_path / 'head.pth'}", "cpu")(images, THREE)
    with torch.no_grad():
        embeds = model(pixel_values=rewards.preprocess_clip(images, 32)).image_embeds.double()
    expected = (embeds / embeds.norm(dim=-1, keepdim=True)) @ w.T + bias
    torch.testing.assert_close(scores.double(), expected.squeeze(-1), rtol=1e-5, atol=1e-5)


# ---- files that are damaged --------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


@pytest.mark.parametrize("name", ["hpsv2.1", "aesthetic"])
@pytest.mark.parametrize(
    ("content", "damage", "sentence"),
    [
        pytest.param(torch.ones(3), truncate, "weights.pt: ", id="truncated"),
        pytest.param(Path("x"), None, "is damaged, or holds code beside weights", id="unsafe"),
        pytest.param(3, None, "no checkpoint of tensors", id="numbers"),
        pytest.param(torch.ones(3), None, "Error(s) in loading state_dict", id="other weights"),
    ],
)
def test_checkpoint_that_is_wrong(name, content, damage, sentence, tmp_path):
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": {"weight": content}}, file)
    if damage:
        damage(file)
    with pytest.raises(InputError, match=f"--reward {name}: ") as error:
        rewards.load_reward(f"{name}:{file}", "cpu")
    assert sentence in str(error.value)


def drop_projection(file: Path) -> None:
    state = load_file(file)
    del state["visual_projection.weight"]
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("file", "damage", "sentence"),
    [
        ("model.safetensors", truncate, "a file of weights is damaged or cut short"),
        ("model.safetensors", drop_projection, "weights are missing"),
        ("tokenizer.json", truncate, "its tokenizer: "),
    ],
)
def test_pickscore_folder_that_is_wrong(file, damage, sentence, tmp_path):
    folder = shutil.copytree(TOY_PICKSCORE, tmp_path / "pickscore")
    damage(folder / file)
    with pytest.raises(InputError, match=sentence):
        rewards.load_reward(f"pickscore:{folder}", "cpu")
