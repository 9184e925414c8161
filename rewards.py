"""Black-box rewards behind one callable: (uint8 images (M, 3, H, W), M prompts) -> float32 (M,).

    load_reward("hpsv2", device)                              # official weights, from the hub
    load_reward("hpsv2:/path/HPS_v2_compressed.pt", device)   # or from a file or folder
    load_reward(["pickscore=10", "hpsv2=2"], device)          # a weighted sum
    load_reward("mine.py:redness", device)                    # your (images, prompts) -> numbers
    load_reward(redness, device)                              # the same, already imported

    python rewards.py --reward hpsv2 --images picture.png --prompt "a cat"    # score by hand

A word is NAME, NAME:PATH or FILE.py:FUNCTION, with an optional =WEIGHT: what follows the last = if
that is a number. A path is one on this machine, never a name on the hub. A file of your own can
import the modules beside it, but for those whose name Python already knows.

Raw units: cosines are not scaled. Each scorer gives what its authors' code gives, without that
code (docs/running.md).
"""

from __future__ import annotations

import contextlib
import html
import io
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.cli import InputError, Parser, command, reading
from support.inputs import MODULES, RUNNING, load_function, load_network, load_tensors
from support.inputs import load_tokenizer, quiet, read_picture, running

Scorer = Callable[[Tensor, list[str]], Tensor]

CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # of every CLIP below
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # of HPSv2 and PickScore


class Reward:
    """A weighted sum of scorers, by label. After a call `parts` holds the scores of each, (M,);
    `networks` are those that scorers list in an attribute of this name; `files` are users' code."""

    def __init__(self, components: dict[str, tuple[float, Scorer]], files: tuple = ()) -> None:
        self.components, self.files = components, files
        self.parts: dict[str, Tensor] = {}
        self.networks: list[nn.Module] = []
        for label, (_, scorer) in components.items():
            if isinstance(scorer, type):
                raise InputError(f"reward {label}: is a class; name an instance of it.")
            with running(f"reward {label}: its networks"):
                networks = getattr(scorer, "networks", ())
            listed = isinstance(networks, (list, tuple))
            if not (listed and all(hasattr(n, "to") for n in networks)):
                raise InputError(f"reward {label}: `networks` must be a list of torch modules.")
            self.networks += networks

    def to(self, device: torch.device | str) -> Reward:
        for network in self.networks:
            network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        assert images.dtype == torch.uint8 and images.ndim == 4, (images.dtype, images.shape)
        assert len(images) == len(prompts), (images.shape, len(prompts))
        self.parts = {label: checked(label, scorer, images, prompts)
                      for label, (_, scorer) in self.components.items()}  # fmt: skip
        return sum(weight * self.parts[label] for label, (weight, _) in self.components.items())

    def with_sum(self, total: Tensor) -> dict[str, Tensor]:
        """The parts, and of several what a call returned, under a label that none of them has."""
        name = "weighted sum" if "sum" in self.parts else "sum"
        return self.parts | ({name: total} if len(self.parts) > 1 else {})


def checked(label: str, scorer: Scorer, images: Tensor, prompts: list[str]) -> Tensor:
    """Scores of one component, float32 (M,) on the images' device; (M, 1) will do. InputError
    unless they are M finite numbers, and for whatever the scorer raises."""
    count = len(prompts)
    with running(f"reward {label} failed"):
        # A copy: a scorer that changes its images must not change the next one's, or the grids.
        scores = scorer(images.clone(), list(prompts))
    pair = isinstance(scores, tuple) and len(scores) != count  # as ddpo-pytorch's: scores, {}
    if pair or scores is None or isinstance(scores, dict):
        found = f"returned a {type(scores).__name__}; return the scores alone"
        raise InputError(f"reward {label} failed: {found}.")
    with running(f"reward {label} failed"):
        scores = torch.as_tensor(scores, dtype=torch.float32, device=images.device).detach()
        scores = scores.to_dense()
    if scores.shape not in ((count,), (count, 1)):
        shape = f"numbers of shape {tuple(scores.shape)} for {count} images"
        raise InputError(f"reward {label} returned {shape}.")
    scores = scores.view(count)
    if not scores.isfinite().all():
        bad = (~scores.isfinite()).nonzero()[0].item()
        raise InputError(f"reward {label} returned {scores[bad]} for the prompt {prompts[bad]!r}.")
    return scores


class Component(NamedTuple):
    """One term of a reward."""

    label: str  # of its scores in the log: NAME or FUNCTION, and NAME-2 where that is taken
    weight: float
    source: str  # a NAME of LOADERS, or an absolute path FILE.py
    detail: str  # the absolute path of its weights, "" for the official ones; or the FUNCTION


def parse_reward(words: str | tuple | list) -> list[Component]:
    """The components that words name, paths made absolute, each with its own label; InputError for
    what cannot be loaded or is named twice."""
    components, labels = [], Counter()
    words = [words] if isinstance(words, str) else words
    if not isinstance(words, (tuple, list)) or not all(isinstance(word, str) for word in words):
        found = f"not {type(words).__name__}; of several functions make one"
        raise InputError(f"--reward: must be words or a function, {found}.")
    for word in words:
        what, body, weight = f"--reward {word}", word.strip(), 1.0
        with contextlib.suppress(ValueError):  # else an = inside of a path
            head, equals, number = body.rpartition("=")
            if equals:
                body, weight = head, float(number)
        if not math.isfinite(weight):
            raise InputError(f"{what}: {weight} is no weight.")

        known = f"choose from {', '.join(LOADERS)}, FILE.py:FUNCTION"
        several = re.split("[, ]+", word.strip())
        if len(several) > 1:
            known = f"several are words of their own: --reward {' '.join(several)}"
        file, _, function = body.rpartition(":")  # the last colon: C:\me\my.py:f
        label, _, path = body.partition(":")  # the first: hpsv2:C:\me\weights.pt
        own = file.endswith(".py") and function
        if own:
            label, path = function, file
        elif label not in LOADERS:
            raise InputError(f"{what}: no reward {body!r}; {known}.")
        elif path and label.endswith("compressibility"):
            raise InputError(f"{what}: {label} takes no path.")
        if path:  # links stay: the hub's cache has files beside them
            path = os.path.abspath(os.path.expanduser(path))
            if not os.path.exists(path):
                raise InputError(f"{what}: no such file or folder: {path}; {known}.")

        names = (path, function) if own else (label, path)
        if names in [other[2:] for other in components]:
            raise InputError(f"{what}: is named twice.")
        labels[label] += 1
        if labels[label] > 1:
            label = f"{label}-{labels[label]}"
        components.append(Component(label, weight, *names))
    return components


def resolve_reward(words: str | tuple | list) -> tuple[str, ...]:
    """The same words with absolute paths, which mean the same in another folder."""
    named = {f"{c.source}:{c.detail}".rstrip(":"): c.weight for c in parse_reward(words)}
    return tuple(word + f"={w}" * (w != 1 or "=" in word) for word, w in named.items())


@quiet()
def load_reward(reward: str | tuple | list | Scorer, device: torch.device | str) -> Reward:
    """The reward that words name, or that is given, with its models on `device`."""
    if isinstance(reward, Reward):
        return reward
    if callable(reward):
        label = getattr(reward, "__name__", type(reward).__name__)
        return Reward({label: (1.0, reward)})
    while MODULES and not RUNNING:  # of a reward before: what was edited since is read again
        sys.modules.pop(MODULES.popitem()[0], None)
    components, files = {}, {}
    for label, weight, source, detail in parse_reward(reward):
        if source in LOADERS:
            scorer = LOADERS[source](detail)
        else:
            scorer = load_function(f"--reward {source}:{detail}", source, detail)
            files[source] = detail
        components[label] = (weight, scorer)
    if not components:
        raise InputError("--reward: names no reward.")
    return Reward(components, tuple(files)).to(device)


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size of each image as a JPEG of quality 95, in 1,000 bytes: (M, 3, H, W) uint8 -> (M,)."""
    from PIL import Image

    sizes = []
    for pixels in images.permute(0, 2, 3, 1).cpu().numpy():
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)


def normalise(pixels: Tensor) -> Tensor:
    """(M, 3, H, W) floats in [0, 1], with the mean and deviation CLIP was trained with."""
    return (pixels - CLIP_MEAN.to(pixels.device)) / CLIP_STD.to(pixels.device)


def preprocess_clip(images: Tensor, size: int = 224) -> Tensor:
    """CLIP's own: Pillow's bicubic on uint8 to shortest edge `size`, centre crop, normalise.

    (M, 3, H, W) uint8 -> (M, 3, size, size) float32. Pillow itself: resizing tensors differs from
    it by up to 10 levels."""
    import numpy as np
    from PIL import Image

    height, width = images.shape[-2:]
    longer = int(size * max(height, width) / min(height, width))
    new_width, new_height = (size, longer) if width <= height else (longer, size)
    left, top = (new_width - size) // 2, (new_height - size) // 2

    def resize(pixels) -> Tensor:
        picture = Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture.crop((left, top, left + size, top + size))))

    pixels = torch.stack([resize(p) for p in images.permute(0, 2, 3, 1).cpu().numpy()])
    return normalise(pixels.permute(0, 3, 1, 2).to(images.device).float() / 255)


def preprocess_hpsv2(images: Tensor, size: int = 224) -> Tensor:
    """HPSv2's own: longest edge to `size`, zero padding to a square, normalise.

    (M, 3, H, W) uint8 -> (M, 3, size, size) float32. Bicubic on floats, neither clamped nor
    rounded, padded *before* normalising: borders are not zero."""
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    pixels = images.float() / 255
    if scale != 1:
        shape = (round(height * scale), round(width * scale))
        pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True)
    rows, columns = size - pixels.shape[-2], size - pixels.shape[-1]
    pixels = F.pad(pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    return normalise(pixels)


def clean_text(prompt: str) -> str:
    """open_clip's cleaning: mend Unicode, unescape HTML twice, fold spaces, lower case.

    ftfy mends where it is installed. Names of control tokens are cut out: transformers' tokenizer
    would obey them, and pool the text at the wrong place."""
    try:
        from ftfy import fix_text
    except ImportError:
        plain = {**str.maketrans("\u2018\u2019\u201c\u201d", "''\"\""), 0xFB01: "fi", 0xFB02: "fl"}

        def fix_text(text: str) -> str:
            return text.translate(plain)

    text = html.unescape(html.unescape(fix_text(prompt)))
    control = r"<\|(start|end)oftext\|>|<(start|end)_of_text>"
    text = re.sub(control, " ", text, flags=re.IGNORECASE)
    return re.sub(r"\s+", " ", text).strip().lower()


def cosine_scorer(
    model, tokenizer, preprocess: Callable[[Tensor, int], Tensor], clean: Callable[[str], str]
) -> Scorer:
    """Cosine of image and prompt in a transformers CLIPModel, in float32, unscaled."""
    size = model.config.vision_config.image_size
    context = model.config.text_config.max_position_embeddings
    options = {"padding": "max_length", "truncation": True, "max_length": context}

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        texts = [clean(prompt) for prompt in prompts]
        tokens = tokenizer(texts, **options, return_tensors="pt").input_ids.to(model.device)
        scores = []
        for part, ids in zip(images.split(32), tokens.split(32), strict=True):
            pixels = preprocess(part, size).to(model.device)
            image = model.get_image_features(pixel_values=pixels).pooler_output.float()
            text = model.get_text_features(input_ids=ids).pooler_output.float()
            scores.append((F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(-1))
        return torch.cat(scores)

    score.networks, score.tokenizer = (model,), tokenizer
    return score


def fetch(reward: str, repository: str, file: str) -> str:
    """The path of a file of the hub, from the cache if it is there."""
    from huggingface_hub import hf_hub_download

    with reading(f"--reward {reward}: {file} of {repository}"):
        return hf_hub_download(repository, file)


def load_pickscore(path: str) -> Scorer:
    """PickScore (Kirstain et al. 2023): cosine in a CLIP ViT-H/14, about 0.2. `path`: any CLIPModel
    folder, tokenizer included."""
    from transformers import CLIPModel

    folder = path or "yuvalkirstain/PickScore_v1"
    model = load_network(f"--reward pickscore: {folder}", CLIPModel, folder)
    tokenizer = load_tokenizer("--reward pickscore", path or TOKENIZER)
    return cosine_scorer(model, tokenizer, preprocess_clip, clean=str)


def load_hpsv2(version: str, file: str, path: str) -> Scorer:
    """HPSv2 (Wu et al. 2023): cosine in a finetuned open_clip ViT-H/14, about 0.27.

    `path`: the official .pt file; the tokenizer beside it is used if there is one."""
    path = path or fetch(version, "xswu/HPSv2", file)
    model = hpsv2_model(version, load_tensors(f"--reward {version}", path))
    beside = Path(path).parent
    named = str(beside) if (beside / "tokenizer_config.json").is_file() else TOKENIZER
    tokenizer = load_tokenizer(f"--reward {version}", named)
    return cosine_scorer(model, tokenizer, preprocess_hpsv2, clean_text)


def vit_h_14_config():
    """open_clip's ViT-H-14 as a transformers config.

    Exact GELU in both towers; 16 heads, of 64 in the text's, of 80 in the image's."""
    from transformers import CLIPConfig

    shared = {"hidden_act": "gelu", "projection_dim": 1024, "num_attention_heads": 16}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    return CLIPConfig(
        text_config={**shared, **text, "eos_token_id": 49407},
        vision_config={**shared, **vision, "patch_size": 14},
        projection_dim=1024,
    )


def hpsv2_model(what: str, state_dict: dict[str, Tensor], config=None):
    """An open_clip state dict as a float32 CLIPModel, every tensor accounted for; or InputError."""
    from transformers import CLIPModel

    with torch.device("meta"):
        model = CLIPModel(config or vit_h_14_config())
    weights = {n: x.float() for n, x in open_clip_to_transformers(state_dict).items()}
    with reading(f"--reward {what}: no open_clip ViT-H-14"):
        model.load_state_dict(weights, assign=True)
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        count = embeddings.position_embedding.num_embeddings
        embeddings.position_ids = torch.arange(count)[None]  # not in a checkpoint
    return model.eval().requires_grad_(False)


RENAMED = [  # open_clip's names, in this order, and a CLIPModel's
    (r"^visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"^transformer\.resblocks", "text_model.encoder.layers"),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
    (r"^visual\.ln_pre", "vision_model.pre_layrnorm"),  # (sic)
    (r"^visual\.ln_post", "vision_model.post_layernorm"),
    (r"^visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^token_embedding", "text_model.embeddings.token_embedding"),
    (r"^positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final", "text_model.final_layer_norm"),
]


def open_clip_to_transformers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip CLIP's weights under a CLIPModel's names."""
    mapped = {}
    for name, value in state_dict.items():
        for theirs, ours in RENAMED:
            name = re.sub(theirs, ours, name)
        if ".in_proj_" in name:  # query, key and value, stacked in this order
            for projection, rows in zip("qkv", value.chunk(3), strict=True):
                mapped[name.replace("in_proj_", f"{projection}_proj.")] = rows
        elif name.endswith("projection.weight"):  # x @ projection there, projection(x) here
            mapped[name] = value.T.contiguous()
        elif name != "attn_mask":  # some exports carry it; transformers makes its own
            mapped[name] = value
    return mapped


def load_aesthetic(path: str) -> Scorer:
    """LAION aesthetic predictor v2 on CLIP ViT-L/14, about 5; ignores the prompt. `path`: the
    official .pth file of its head, 768-1024-128-64-16-1: its dropout is off, and it has no
    activations."""
    from transformers import CLIPVisionModelWithProjection

    path = path or fetch("aesthetic", "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
    layers = nn.Sequential(
        nn.Linear(768, 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout(),
        nn.Linear(128, 64), nn.Dropout(), nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip
    head = nn.ModuleDict({"layers": layers}).eval().requires_grad_(False)
    with reading(f"--reward aesthetic: {path} is no head sac+logos+ava1-l14-linearMSE"):
        head.load_state_dict(load_tensors("--reward aesthetic", path))
    clip = "openai/clip-vit-large-patch14"
    model = load_network(f"--reward aesthetic: {clip}", CLIPVisionModelWithProjection, clip)

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        scores = []
        for part in images.split(32):
            pixels = preprocess_clip(part, model.config.image_size).to(model.device)
            embeds = model(pixel_values=pixels).image_embeds
            scores.append(layers(F.normalize(embeds, dim=-1)).squeeze(-1))
        return torch.cat(scores)

    score.networks = (model, head)
    return score


LOADERS: dict[str, Callable[[str], Scorer]] = {
    "hpsv2": partial(load_hpsv2, "hpsv2", "HPS_v2_compressed.pt"),
    "hpsv2.1": partial(load_hpsv2, "hpsv2.1", "HPS_v2.1_compressed.pt"),
    "pickscore": load_pickscore,
    "aesthetic": load_aesthetic,
    "compressibility": lambda path: lambda images, prompts: -jpeg_kilobytes(images),
    "incompressibility": lambda path: lambda images, prompts: jpeg_kilobytes(images),
}


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Score pictures with a reward.")
    parser.add_argument("--reward", required=True, nargs="+", help="as in prdp.py")
    parser.add_argument("--images", required=True, nargs="+", metavar="FILE")
    parser.add_argument("--prompt", default="", help="of all of them (default: an empty one)")
    with command("rewards.py"):
        args = parser.parse_args(argv)
        pictures = [read_picture(file, "--images")[None] for file in args.images]
        reward = load_reward(args.reward, "cuda" if torch.cuda.is_available() else "cpu")
        for file, picture in zip(args.images, pictures, strict=True):
            total = reward(picture, [args.prompt])
            scores = reward.with_sum(total)
            if picture is pictures[0]:
                print("".join(f"{name:>18}" for name in scores) + "  image")
            print("".join(f"{score.item():>18.6g}" for score in scores.values()) + f"  {file}")


if __name__ == "__main__":
    main()
