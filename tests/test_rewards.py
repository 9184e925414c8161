"""Rewards: words, functions of one's own, preprocessing, and the official networks in small.

No official weights: the mapping of open_clip's into transformers is compared with the real
open_clip on random ones (tests/requirements.txt; those tests skip without it).
"""

import contextlib
import importlib.util
import io
import itertools
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import rewards
from conftest import PROMPTS, ROOT
from support.cli import UserError

TOY_PICKSCORE = str(ROOT / "toy" / "pickscore")
THREE = ["a", "bb", "ccc"]


def noise_images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def score_three(reward) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum and the parts, of three small images."""
    return rewards.load_reward(reward, "cpu").score(noise_images(3, 3, 8, 8), THREE)


def refusal(reward) -> str:
    """What is said of it, in one sentence."""
    with pytest.raises(UserError) as error:
        score_three(reward)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- words of --reward ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder and the home, with files whose names are hard on a parser."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("mine.py", "near.py", "other/mine.py", "a, b=2/mine.py", "v=2", "plain.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("words", "components"),
    [
        ("hpsv2", ["hpsv2 1 hpsv2 "]),
        (["near.py:f=2 ", "hpsv2.1=-.5"], ["f 2 {}/near.py f", "hpsv2.1 -0.5 hpsv2.1 "]),
        ("pickscore:other", ["pickscore 1 pickscore {}/other"]),
        ("hpsv2:~/plain.pt=1e-3", ["hpsv2 0.001 hpsv2 {}/plain.pt"]),
        ("a, b=2/mine.py:f=3", ["f 3 {}/a, b=2/mine.py f"]),
        ("aesthetic:v=2=1", ["aesthetic 1 aesthetic {}/v=2"]),
        (["mine.py:f", "near.py:f"], ["f 1 {}/mine.py f", "f-2 1 {}/near.py f"]),
        (["hpsv2", "hpsv2:plain.pt"], ["hpsv2 1 hpsv2 ", "hpsv2-2 1 hpsv2 {}/plain.pt"]),
    ],
)
def test_words_name_these_components_from_any_folder(folder, monkeypatch, words, components):
    found = rewards.parse_reward(words)
    assert [f"{a} {w:g} {b} {c}" for a, w, b, c in found] == [c.format(folder) for c in components]
    resolved = rewards.resolve_reward(words)
    monkeypatch.chdir(folder / "other")
    assert rewards.parse_reward(resolved) == found
    assert rewards.resolve_reward(resolved) == resolved


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "--reward : no reward ''"),
        ("mine.py", "--reward mine.py: no reward 'mine.py'; choose from hpsv2"),
        ("hpsv2=inf", "--reward hpsv2=inf: inf is no weight"),
        ("pickscore=10,hpsv2=2", "FILE.py:FUNCTION; several are words of their own"),
        ("hpsv2=.5 mine.py:f=1", "several are words of their own"),
        ("pickscore:models/picks", "no such file or folder: {0}/models/picks; choose"),
        ("nowhere.py:f", "no such file or folder: {0}/nowhere.py; choose"),
        ([print, len], "must be words; a function is an argument of run ([<built-in function"),
        ({"hpsv2": 2}, "must be words; a function is an argument of run ({{'hpsv2': 2}})"),
        (["mine.py:f", "other/mine.py:g"], "put your files in one folder: {0}, {0}/other."),
        ([], "names no reward"),
        ("mine.py:f", "has no function or instance 'f'"),
    ],
)
def test_words_that_are_wrong(folder, words, sentence):
    assert sentence.format(folder) in refusal(words)


# ---- functions of one's own ----------------------------------------------------------------------


def test_weighted_sum_with_functions_of_your_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def brightness(images, prompts): return images.float().mean((1, 2, 3)) / 255\n"
        "def lengths(images, prompts): return [len(prompt) for prompt in prompts]\n"
    )
    images, mine = noise_images(3, 3, 16, 16), f"{tmp_path}/mine.py"
    words = [f"{mine}:brightness=0.5", f"{mine}:lengths=-2", "incompressibility"]
    reward = rewards.load_reward(words, "cpu")
    total, parts = reward.score(images, THREE)
    bright = images.double().mean((1, 2, 3)) / 255
    expected = 0.5 * bright - 2 * torch.tensor([1, 2, 3]) + rewards.jpeg_kilobytes(images)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    assert list(parts) == ["brightness", "lengths", "incompressibility"]
    assert parts["lengths"].tolist() == [1, 2, 3] and [*reward.files] == [mine]
    assert torch.equal(reward(images, THREE), total)
    assert rewards.load_reward(reward, "cpu") is reward
    assert "reward sum returned inf for the prompt 'a'" in refusal("incompressibility=1e39")


def test_callable_in_place_of_words():
    """It may fill one buffer each time: scores of before stay what they were."""

    class Judge:
        counts = torch.zeros(3)

        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            return self.counts.add_(1)

    (first, parts), (second, _) = score_three(Judge()), score_three(Judge().__call__)
    assert first.tolist() == parts["Judge"].tolist() == [1, 1, 1] and second.tolist() == [2, 2, 2]


def test_function_cannot_change_what_others_see():
    """Neither the next component nor the caller, whose grids would turn black."""
    images, prompts = noise_images(3, 3, 8, 8), list(THREE)
    before = images.clone()

    def greedy(images: Tensor, prompts: list[str]) -> Tensor:
        assert torch.equal(images, before) and prompts == THREE and not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float32
        images.zero_()
        prompts.clear()
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float64)
        return images[:, 0, 0, 0]

    rewards.Reward({"first": (1.0, greedy), "second": (1.0, greedy)})(images, prompts)
    assert torch.equal(images, before) and prompts == THREE and torch.is_grad_enabled()


def test_modules_in_the_folder_of_a_reward_file(tmp_path, monkeypatch):
    """They can be imported, also when the function runs; none hides Python's own or ours."""
    files = dict.fromkeys(("near_first", "near_later"), "value = 2.0")
    wrong = ("json", "colorsys", "support", "baselines")  # colorsys: of Python, seldom loaded
    files |= dict.fromkeys(wrong, "raise ImportError('the wrong one')")
    files["rewards"] = "import baselines, near_first, colorsys, json, rewards, support\n"
    files["rewards"] += "def f(images, prompts):\n    import near_later\n"
    files["rewards"] += "    return [near_first.value + near_later.value] * len(prompts)\n"
    for name, code in files.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert score_three(f"{tmp_path}/rewards.py:f")[0].tolist() == [4.0] * 3
    assert sys.modules["rewards"] is rewards


def judge(networks: object = (), **behaviour) -> mock.Mock:
    return mock.Mock(__name__="f", networks=networks, **behaviour)


def test_function_that_misbehaves():
    for error in (RuntimeError("first\nsecond"), SystemExit("first second")):
        sentence = f"reward f failed: {type(error).__name__}: first second"
        assert sentence in refusal(judge(side_effect=error))
    for networks in (nn.Linear(1, 1), ["vit"], 3):
        sentence = "reward f: its `networks`, a list of torch modules: "
        assert sentence in refusal(judge(networks))


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_is_not_the_functions_fault_passes(error):
    """prdp.py has sentences for these."""
    with pytest.raises(error):
        score_three(judge(side_effect=error))


def test_a_function_that_runs_out_of_gpu_memory_is_named():
    """It stays that kind of error, so that a run tries smaller settings."""
    sentence = r"reward f failed: out of memory; try --offload on \(of networks in FUNCTION\."
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("out of memory")):
        with pytest.raises(torch.OutOfMemoryError, match=sentence):
            score_three(judge(side_effect=error))


NEAR = np.array([1.0, 1.0 + 1e-9, 1.0 + 2e-9])  # one number for float32
LARGE = torch.tensor([2**30, 2**30 + 1, 2**30 + 2])  # so are these
HALVES = torch.tensor([0.5, 1.0, 2.0])


@pytest.mark.parametrize(
    ("returned", "numbers", "dtype"),
    [
        (NEAR, NEAR, torch.float64),
        (tuple(NEAR[:, None].tolist()), NEAR, torch.float64),
        ([*torch.tensor(NEAR)], NEAR, torch.float64),
        (torch.tensor(NEAR)[:, None], NEAR, torch.float64),
        (LARGE, LARGE, torch.float64),
        (HALVES[:, None].bfloat16(), HALVES, torch.float32),
        (HALVES.numpy().astype("float16"), HALVES, torch.float32),
        (HALVES.clone().requires_grad_(), HALVES, torch.float32),
    ],
)
def test_scores_keep_their_precision(returned, numbers, dtype):
    """Close scores of one prompt are no ties, alone or in a sum with coarser ones."""
    one = (1.0, lambda images, prompts: torch.ones(3))
    reward = rewards.Reward({"f": (2.0, lambda images, prompts: returned), "one": one})
    total, parts = score_three(reward)
    assert parts["f"].dtype == total.dtype == dtype and not parts["f"].requires_grad
    assert parts["f"].tolist() == numbers.tolist() and len(set(total.tolist())) == 3


async def coroutine(images, prompts):
    return [0.0] * len(prompts)


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        (None, "returned a NoneType, not 3 real numbers"),
        ({"score": 1.0}, "returned a dict, not 3 real numbers"),
        ((HALVES, {}), "returned a tuple, not 3 real numbers"),
        (["good"] * 3, "returned a list, not 3 real numbers"),
        (coroutine, "returned a coroutine, not 3 real numbers"),
        (
            HALVES.to_sparse(),
            "returned a Tensor, not 3 real numbers (it is complex, masked or sparse",
        ),
        (HALVES.to("meta"), "returned a Tensor, not 3 real numbers"),
        (lambda *_: torch.nested.nested_tensor([HALVES] * 3), "returned a Tensor, not 3 real"),
        (HALVES.cfloat(), "returned a Tensor, not 3 real numbers (it is complex"),
        ([np.complex64(1)] * 3, "returned a list, not 3 real numbers (it is complex"),
        (np.ma.array(HALVES, mask=[0, 1, 0]), "returned a MaskedArray, not 3 real numbers"),
        ([1.0], "returned numbers of shape (1,) for 3 images"),
        ([[1.0, 2.0]] * 3, "returned numbers of shape (3, 2) for 3 images"),
        (1.0, "returned numbers of shape () for 3 images"),
        ([0.0, 0.0, float("nan")], "returned nan for the prompt 'ccc'"),
        (1e5 * HALVES.half(), "returned inf for the prompt 'bb'"),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine", "ignore:The PyTorch API of nested tensors")
def test_what_are_no_scores(returned, sentence):
    assert sentence in refusal(returned if callable(returned) else judge(return_value=returned))


@pytest.mark.parametrize("fails", [False, True])
def test_networks_visit_the_images_device_one_after_another(fails):
    """Also when a scorer raises."""
    events, scorers = [], {}
    for name in ("a", "b"):
        network = nn.Linear(1, 1)
        network.to = lambda device, name=name: events.append((name, str(device)))

        def score(images, prompts, name=name):
            events.append(name)
            return [1 / (name == "a" or not fails)] * len(prompts)

        score.networks = [network]
        scorers[name] = (1.0, score)

    reward = rewards.Reward(scorers, device="meta")
    assert events == [("a", "meta"), ("b", "meta")] and len(reward.networks) == 2
    with pytest.raises(UserError) if fails else contextlib.nullcontext():
        score_three(reward)
    assert events[2:5] == [("a", "cpu"), "a", ("a", "meta")]
    assert events[5:] == [("b", "cpu"), "b", ("b", "meta")]


def test_jpeg_sizes_equal_pillows():
    images = noise_images(3, 3, 40, 24)
    images[1] = 7
    buffers = [io.BytesIO() for _ in images]
    for image, buffer in zip(images, buffers, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="jpeg", quality=95)
    sizes = [len(buffer.getvalue()) / 1000 for buffer in buffers]
    more = rewards.load_reward("incompressibility", "cpu")(images, THREE)
    less = rewards.load_reward("compressibility", "cpu")(images, THREE)
    assert more.tolist() == pytest.approx(sizes) and more.dtype == torch.float32
    assert torch.equal(less, -more) and more[0] > more[1]


@pytest.mark.parametrize("shape", [(32, 32), (50, 37), (37, 50), (64, 300), (20, 20)])
def test_preprocess_clip_equals_transformers_processor(shape):
    images = noise_images(2, 3, *shape)
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    pixels = [image.permute(1, 2, 0).numpy() for image in images]
    expected = CLIPImageProcessorPil(**sizes)(pixels, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(rewards.preprocess_clip(images, 32).numpy(), expected, atol=1e-6)


def resampling_matrix(old: int, new: int) -> np.ndarray:
    """(new, old): bicubic resampling of one axis, Keys' kernel with a = -1/2, as wide as the scale
    when shrinking (antialias) and cut off at the border."""
    scale = old / new
    centres = (np.arange(new)[:, None] + 0.5) * scale
    x = np.abs(np.arange(old) + 0.5 - centres) / max(scale, 1)
    inner, outer = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    matrix = np.where(x < 1, inner, np.where(x < 2, outer, 0))
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(64, 64, 32, 32), (37, 51, 23, 32), (64, 20, 32, 10), (32, 21, 32, 21), (16, 9, 32, 18)],
)
def test_preprocess_hpsv2_equals_its_definition(height, width, rows, columns):
    """Longest side to 32, unclamped, zero padding *before* normalising, as matrices in numpy."""
    images = noise_images(2, 3, height, width)
    padded = np.zeros((2, 3, 32, 32))
    top, left = (32 - rows) // 2, (32 - columns) // 2
    pixels = resampling_matrix(height, rows) @ (images.numpy() / 255)
    pixels = pixels @ resampling_matrix(width, columns).T
    padded[:, :, top : top + rows, left : left + columns] = pixels
    mean = np.array([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    std = np.array([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    ours = rewards.preprocess_hpsv2(images, 32)
    np.testing.assert_allclose(ours, (padded - mean) / std, atol=2e-5)


@pytest.fixture(scope="session")
def open_clip():
    """The real open_clip. It imports torchvision, which has no CPU build, for image transforms
    that are not used here: a stand-in lets the import pass."""
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed: pip install --no-deps -r tests/requirements.txt")
    parts = ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc")
    stand_ins = {f"torchvision{part}": mock.MagicMock(__spec__=None) for part in parts}
    with mock.patch.dict(sys.modules, stand_ins):
        return importlib.import_module("open_clip")


def tiny_open_clip(open_clip, tokens: int = 50) -> nn.Module:
    """Random everywhere; heads as wide as 10 and two square projections tell mistakes apart."""
    vision = {"layers": 2, "width": 30, "head_width": 10, "patch_size": 8, "image_size": 32}
    text = {"context_length": 12, "vocab_size": tokens, "width": 20, "heads": 2, "layers": 2}
    towers = open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text)
    model = open_clip.model.CLIP(20, *towers).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(0.5 * torch.randn(p.shape))
    return model


def tiny_config(start: int = 48, end: int = 49, tokens: int = 50) -> CLIPConfig:
    """That of `tiny_open_clip`."""
    both = dict(hidden_act="gelu", projection_dim=20, num_hidden_layers=2)
    text = dict(both, hidden_size=20, intermediate_size=80, num_attention_heads=2)
    text |= dict(
        max_position_embeddings=12, vocab_size=tokens, bos_token_id=start, eos_token_id=end
    )
    vision = dict(both, hidden_size=30, intermediate_size=120, num_attention_heads=3)
    vision |= dict(patch_size=8, image_size=32)
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)


def largest_difference(theirs, state: dict, config: CLIPConfig, pixels: Tensor, ids: Tensor):
    """Between open_clip's features and those of a CLIPModel that takes all of the state and nothing
    else, over their rms. open_clip pads texts with 0, transformers with the end token."""
    ours = CLIPModel(config).eval().requires_grad_(False)
    ours.load_state_dict(rewards.open_clip_to_transformers(state))
    a, b = theirs.encode_image(pixels), ours.get_image_features(pixels).pooler_output
    c, d = theirs.encode_text(ids), ours.get_text_features(ids.where(ids > 0, ids.max()))
    pairs = ((a, b), (c, d.pooler_output))
    return max(((x - y).abs().max() / x.square().mean().sqrt()).item() for x, y in pairs)


def swap_query_and_key(state: dict[str, Tensor]) -> None:
    for name in state:
        if "in_proj" in name:
            query, key, value = state[name].chunk(3)
            state[name] = torch.cat([key, query, value])


@pytest.mark.parametrize(
    ("tower", "field", "value", "breaks"),
    [
        ("vision", "hidden_act", "gelu", None),  # as it is
        ("vision", "hidden_act", "quick_gelu", None),
        ("text", "hidden_act", "quick_gelu", None),
        ("vision", "num_attention_heads", 2, None),
        ("text", "num_attention_heads", 4, None),
        ("text", "eos_token_id", 47, None),
        ("text", "hidden_act", "gelu", swap_query_and_key),
        ("text", "hidden_act", "gelu", lambda state: state["text_projection"].t_()),
    ],
)
def test_mapped_weights_give_open_clips_features(open_clip, tower, field, value, breaks):
    """And each mistake one could make is told apart."""
    theirs, config = tiny_open_clip(open_clip), tiny_config()
    state = {name: x.clone() for name, x in theirs.state_dict().items()}
    setattr(getattr(config, f"{tower}_config"), field, value)
    if breaks:
        breaks(state)
    ids = torch.randint(1, 47, (3, 12))
    ids[:, 0] = 48  # the start; the end, 49, at three places, and padding after it
    for row, end in enumerate((5, 11, 2)):
        ids[row, end], ids[row, end + 1 :] = 49, 0
    gap = largest_difference(theirs, state, config, torch.randn(3, 3, 32, 32), ids)
    assert gap < 2e-5 if value == "gelu" and not breaks else gap > 1e-3


@pytest.mark.skipif("PRDP_FULL_SIZE" not in os.environ, reason="12 GB, minutes: PRDP_FULL_SIZE=1")
def test_full_size_vit_h_14(open_clip):
    """HPSv2's real architecture, random weights: 686 tensors map strictly, and features agree."""
    sizes = {**open_clip.get_model_config("ViT-H-14"), "quick_gelu": False}
    theirs = open_clip.model.CLIP(**sizes).eval().requires_grad_(False)
    state = theirs.state_dict()
    assert len(state) == 686 and sum(value.numel() for value in state.values()) == 986_109_441
    pixels, ids = torch.randn(2, 3, 224, 224), torch.randint(1, 49405, (2, 77))
    ids[:, 0], ids[0, 9], ids[1, 76] = 49406, 49407, 49407
    assert largest_difference(theirs, state, rewards.vit_h_14_config(), pixels, ids) < 1e-5


def test_text_cleaning_equals_open_clips(open_clip):
    """And names of control tokens are cut out."""
    prompts = ["A  cat\n\twith &amp;amp; hats", "it\u2019s \u201cfine\u201d", "\ufb01sh", "  UP  "]
    prompts += ["", "caf\u00e9 \U0001f600"]
    basic, fold = open_clip.tokenizer.basic_clean, open_clip.tokenizer.whitespace_clean
    assert [rewards.clean_text(x) for x in prompts] == [fold(basic(x)).lower() for x in prompts]
    assert rewards.clean_text("a <|endoftext|> b<start_of_text>") == "a b"


def test_hpsv2_is_open_clips_cosine(open_clip, tmp_path, monkeypatch):
    """In float32 from a checkpoint in half precision, in whose folder is a tokenizer; of an empty
    and a long prompt and control tokens too. A tokenizer of another model is refused."""
    tokenizer, path = CLIPTokenizer.from_pretrained(TOY_PICKSCORE), tmp_path / "HPS_v2.pt"
    config = tiny_config(tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer))
    monkeypatch.setattr(rewards, "vit_h_14_config", lambda: config)
    theirs = tiny_open_clip(open_clip, len(tokenizer)).half()
    torch.save({"epoch": 1, "state_dict": theirs.state_dict()}, path)
    tokenizer.save_pretrained(tmp_path)
    theirs.float()

    images, prompts = noise_images(5, 3, 40, 30), ["", "red " * 100, "a cat & dog", *PROMPTS[:2]]
    ids = tokenizer(prompts, padding="max_length", truncation=True, max_length=12)["input_ids"]
    text = theirs.encode_text(torch.tensor(ids), normalize=True)
    image = theirs.encode_image(rewards.preprocess_hpsv2(images, 32), normalize=True)
    reward = rewards.load_reward(f"hpsv2:{path}", "cpu")
    scores = reward(images, ["", "red " * 100, "A <|endoftext|> cat &amp; dog", *PROMPTS[:2]])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, (image * text).sum(-1), rtol=1e-4, atol=1e-5)

    tokenizer.add_tokens("sks")
    tokenizer.save_pretrained(tmp_path)
    assert "--reward hpsv2: its tokenizer has 123 tokens" in refusal(f"hpsv2:{path}")
    (tmp_path / "tokenizer_config.json").unlink()  # then it is the hub's
    assert f"--reward hpsv2: the tokenizer of {rewards.TOKENIZER}" in refusal(f"hpsv2:{path}")


@pytest.mark.parametrize("name", ["pickscore", "clip"])
def test_pickscore_and_clip_are_the_models_own_cosine(name, tmp_path):
    """In float32 from a folder in half precision, whatever the batch; of a long prompt too. A
    tokenizer of another model is refused."""
    tokenizer = CLIPTokenizer.from_pretrained(TOY_PICKSCORE)
    tokenizer.save_pretrained(tmp_path)
    model = CLIPModel.from_pretrained(TOY_PICKSCORE).half()
    model.save_pretrained(tmp_path)
    images, prompts = noise_images(5, 3, 40, 30), ["", "red " * 100, *PROMPTS]
    ids = tokenizer(prompts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    reward = rewards.load_reward(f"{name}:{tmp_path}", "cpu")
    scores = reward(images, prompts)
    with torch.no_grad():
        pixels = rewards.preprocess_clip(images, 32)
        logits = model.float()(input_ids=ids.input_ids, pixel_values=pixels).logits_per_image
    expected = logits.diag() / model.logit_scale.exp()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    singly = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(scores, singly, rtol=0, atol=1e-5)

    tokenizer.add_tokens("sks")
    tokenizer.save_pretrained(tmp_path)
    said = refusal(f"{name}:{tmp_path}")
    assert said.startswith(f"--reward {name}: {tmp_path}: its tokenizer has 123 tokens")


def test_official_clips(monkeypatch):
    """Both take the tokenizer of OpenCLIP's ViT-H/14, whose weights `clip` has too."""
    asked = []
    model = CLIPModel.from_pretrained(TOY_PICKSCORE)
    monkeypatch.setattr(rewards, "load_network", lambda *x: asked.append(x[0::2]) or model)
    monkeypatch.setattr(rewards, "load_tokenizer", lambda *x: asked.append(x[:2]))
    rewards.load_reward(["pickscore", "clip"], "cpu")
    pick, vit = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    words = f"--reward pickscore: {pick}", f"--reward clip: {vit}"
    assert asked == [(words[0], pick), (words[0], vit), (words[1], vit), (words[1], vit)]


def test_aesthetic_head_is_one_affine_map(tmp_path, monkeypatch):
    """Its five layers have no activations: they collapse to w . x + b, of unit vectors x."""
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


@pytest.mark.parametrize("name", ["hpsv2.1", "aesthetic"])
@pytest.mark.parametrize(
    ("content", "sentence"),
    [(Path("x"), "damaged"), (3, "no checkpoint of tensors"), (torch.ones(3), "issing")],
)
def test_checkpoint_that_is_wrong(name, content, sentence, tmp_path, monkeypatch):
    """One with code, with numbers, with other weights."""
    monkeypatch.setattr(rewards, "vit_h_14_config", tiny_config)
    torch.save({"state_dict": {"weight": content}}, tmp_path / "weights.pt")
    message = refusal(f"{name}:{tmp_path}/weights.pt")
    assert message.startswith(f"--reward {name}: ") and sentence in message
