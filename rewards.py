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

import html
import importlib.util
import io
import itertools
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.cli import InputError, Parser, command, on_one_line, reading
from support.inputs import load_images, load_network, load_tensors, load_tokenizer, quiet

Scorer = Callable[[Tensor, list[str]], Tensor]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of every CLIP-like scorer below
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # of HPSv2 and PickScore


# ---- The callable --------------------------------------------------------------------------------


class Reward:
    """A weighted sum of scorers, by label. After a call `parts` holds the scores of each, (M,).

    `to` moves the networks that scorers list in their attribute `networks`.
    """

    def __init__(self, components: dict[str, tuple[float, Scorer]]) -> None:
        self.components = components
        self.parts: dict[str, Tensor] = {}
        self.networks: list[nn.Module] = []
        for label, (_, scorer) in components.items():
            networks = getattr(scorer, "networks", ())
            if not isinstance(networks, (list, tuple)) or not all(
                hasattr(network, "to") for network in networks
            ):
                raise InputError(
                    f"reward {label}: its attribute `networks` must be a list of torch modules."
                )
            self.networks += networks

    def to(self, device: torch.device) -> Reward:
        for network in self.networks:
            network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        assert images.dtype == torch.uint8 and images.ndim == 4, (images.dtype, images.shape)
        assert len(images) == len(prompts), (images.shape, len(prompts))
        self.parts = {
            label: checked(label, scorer, images, prompts)
            for label, (_, scorer) in self.components.items()
        }
        return sum(weight * self.parts[label] for label, (weight, _) in self.components.items())


def checked(label: str, scorer: Scorer, images: Tensor, prompts: list[str]) -> Tensor:
    """Scores of one component, float32 (M,) on the images' device; (M, 1) will do.

    InputError unless they are M finite numbers, and for whatever the scorer raises, SystemExit too,
    which would end the run as if all were well. Running out of memory is no fault of the scorer's.
    """
    try:
        # A copy: a scorer that changes its images must not change the next one's, or the grids.
        scores = scorer(images.clone(), list(prompts))
        scores = torch.as_tensor(scores, dtype=torch.float32, device=images.device).detach()
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"reward {label} failed: {on_one_line(error)}.") from error
    if scores.shape == (len(prompts), 1):
        scores = scores.squeeze(1)
    if scores.shape != (len(prompts),):
        shape = tuple(scores.shape)
        raise InputError(
            f"reward {label} returned numbers of shape {shape} for {len(prompts)} images."
        )
    if not scores.isfinite().all():
        bad = (~scores.isfinite()).nonzero()[0].item()
        raise InputError(f"reward {label} returned {scores[bad]} for the prompt {prompts[bad]!r}.")
    return scores


# ---- Words of --reward ---------------------------------------------------------------------------


class Component(NamedTuple):
    """One term of a reward."""

    label: str  # of its scores in the log: NAME or FUNCTION, and NAME-2 where that is taken
    weight: float
    source: str  # a NAME of LOADERS, or an absolute path FILE.py
    detail: str  # the absolute path of its weights, "" for the official ones; or the FUNCTION


def parse_reward(words: str | tuple | list) -> list[Component]:
    """The components that words name, paths made absolute; InputError for what cannot be loaded."""
    components, labels = [], Counter()
    for word in [words] if isinstance(words, str) else words:
        body, equals, number = word.strip().rpartition("=")
        weight = as_number(number)
        if not equals or weight is None:  # an = inside of a path
            body, weight = word.strip(), 1.0
        if not math.isfinite(weight):
            raise InputError(f"--reward {word}: {number} is no weight.")

        file, _, function = body.rpartition(":")  # the last colon: C:\me\my.py:f
        name, _, path = body.partition(":")  # the first: hpsv2:C:\me\weights.pt
        if file.endswith(".py") and function:
            label, source, detail = function, absolute(word, file), function
        elif name in LOADERS and path and name.endswith("compressibility"):
            raise InputError(f"--reward {word}: {name} takes no path.")
        elif name in LOADERS:
            label, source, detail = name, name, path and absolute(word, path)
        else:
            known = f"choose from {', '.join(LOADERS)}, FILE.py:FUNCTION"
            if "," in word:
                known = f"several are words of their own: --reward {' '.join(word.split(','))}"
            raise InputError(f"--reward {word}: no reward {body!r}; {known}.")
        if (source, detail) in [(c.source, c.detail) for c in components]:
            raise InputError(f"--reward {word}: is named twice.")
        labels[label] += 1
        if labels[label] > 1:
            label = f"{label}-{labels[label]}"
        components.append(Component(label, weight, source, detail))
    if not components:
        raise InputError("--reward: names no reward.")
    return components


def as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def absolute(word: str, path: str) -> str:
    """The path as seen from any folder. Links stay: the hub's cache has files beside them."""
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.exists(path):
        raise InputError(f"--reward {word}: no such file or folder: {path}.")
    return path


def resolve_reward(words: str | tuple | list) -> tuple[str, ...]:
    """The same words with absolute paths, which mean the same in another folder."""
    resolved = []
    for component in parse_reward(words):
        word = component.source + (component.detail and f":{component.detail}")
        if component.weight != 1 or "=" in word:
            word += f"={component.weight}"
        resolved.append(word)
    return tuple(resolved)


def reward_files(words: tuple) -> list[Path]:
    """The Python files that words name, each once: code that a result depends on."""
    files = (c.source for c in (parse_reward(words) if words else ()) if c.source not in LOADERS)
    return [Path(file) for file in dict.fromkeys(files)]


@quiet()
def load_reward(reward: str | tuple | list | Scorer, device: torch.device | str) -> Reward:
    """The reward that words name, or that is given, with its models on `device`."""
    if callable(reward):
        label = getattr(reward, "__name__", type(reward).__name__)
        return Reward({label: (1.0, reward)})
    components = {}
    for label, weight, source, detail in parse_reward(reward):
        load = LOADERS.get(source, load_function)
        arguments = (detail,) if source in LOADERS else (source, detail)
        components[label] = (weight, load(*arguments))
    return Reward(components).to(torch.device(device))


def load_function(file: str, function: str) -> Scorer:
    """Your own reward: `function` of the Python file `file`."""
    # Last in the search path: the file finds the modules beside it, now and when it is called, and
    # none of them hides Python's own, an installed one or ours.
    folder = os.path.dirname(file)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(f"reward_file {file}", file)  # nobody's name
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        what = on_one_line(error)
        raise InputError(f"--reward {file}:{function}: cannot be imported: {what}.") from error
    scorer = getattr(module, function, None)
    if not callable(scorer):
        raise InputError(f"--reward {file}:{function}: the file has no function {function!r}.")
    return scorer


# ---- JPEG size (DDPO, Sec. 5) ------------------------------------------------------------------


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size of each image as a JPEG of quality 95, in 1,000 bytes: (M, 3, H, W) uint8 -> (M,)."""
    from PIL import Image

    def size(pixels) -> int:
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG", quality=95)
        return buffer.tell()

    return torch.tensor(
        [size(pixels) / 1000 for pixels in images.permute(0, 2, 3, 1).cpu().numpy()]
    )


# ---- Preprocessing -----------------------------------------------------------------------------


def normalise(pixels: Tensor) -> Tensor:
    """(M, 3, H, W) floats in [0, 1], with the mean and deviation CLIP was trained with."""
    mean = torch.tensor(CLIP_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(CLIP_STD, device=pixels.device).view(3, 1, 1)
    return (pixels - mean) / std


def preprocess_clip(images: Tensor, size: int = 224) -> Tensor:
    """CLIP's own: Pillow's bicubic on uint8 to shortest edge `size`, centre crop, normalise.

    (M, 3, H, W) uint8 -> (M, 3, size, size) float32. Pillow itself: resizing tensors differs from
    it by up to 10 levels.
    """
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


def preprocess_hpsv2(images: Tensor, size: int = 224, antialias: bool = True) -> Tensor:
    """HPSv2's own: longest edge to `size`, zero padding to a square, normalise.

    (M, 3, H, W) uint8 -> (M, 3, size, size) float32. Bicubic on floats, neither clamped nor
    rounded, padded *before* normalising: borders are not zero. antialias=False is what its code did
    under torchvision < 0.17.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    pixels = images.float() / 255
    if scale != 1:
        shape = (round(height * scale), round(width * scale))
        pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=antialias)
    rows, columns = size - pixels.shape[-2], size - pixels.shape[-1]
    pixels = F.pad(pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    return normalise(pixels)


def clean_text(prompt: str) -> str:
    """open_clip's cleaning: mend Unicode, unescape HTML twice, fold spaces, lower case.

    ftfy mends where it is installed. Names of control tokens are cut out: transformers' tokenizer
    would obey them, and pool the text at the wrong place.
    """
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


# ---- CLIP scorers --------------------------------------------------------------------------------


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

    score.networks = (model,)
    return score


def fetch(reward: str, repository: str, file: str) -> str:
    """The path of a file of the hub, from the cache if it is there."""
    from huggingface_hub import hf_hub_download

    with reading(f"--reward {reward}: {file} of {repository}"):
        return hf_hub_download(repository, file)


def load_pickscore(path: str) -> Scorer:
    """PickScore (Kirstain et al. 2023): cosine in a CLIP ViT-H/14, about 0.2.

    `path`: any CLIPModel folder, tokenizer included.
    """
    from transformers import CLIPModel

    folder = path or "yuvalkirstain/PickScore_v1"
    model = load_network(f"--reward pickscore: {folder}", CLIPModel, folder)
    tokenizer = load_tokenizer("--reward pickscore", path or TOKENIZER)
    return cosine_scorer(model, tokenizer, preprocess_clip, clean=str)


def load_hpsv2(version: str, file: str) -> Callable[[str], Scorer]:
    """HPSv2 (Wu et al. 2023): cosine in a finetuned open_clip ViT-H/14, about 0.27.

    `path`: the official .pt file; the tokenizer beside it is used if there is one.
    """

    def load(path: str) -> Scorer:
        path = path or fetch(version, "xswu/HPSv2", file)
        model = hpsv2_model(version, load_tensors(f"--reward {version}", path))
        beside = Path(path).parent
        named = str(beside) if (beside / "tokenizer_config.json").is_file() else TOKENIZER
        tokenizer = load_tokenizer(f"--reward {version}", named)
        return cosine_scorer(model, tokenizer, preprocess_hpsv2, clean_text)

    return load


def vit_h_14_config():
    """open_clip's ViT-H-14 as a transformers config.

    Exact GELU in both towers; 16 heads, of 64 in the text's, of 80 in the image's.
    """
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
    try:
        weights = open_clip_to_transformers(state_dict)
        weights = {name: value.float() for name, value in weights.items()}
        model.load_state_dict(weights, strict=True, assign=True)
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--reward {what}: its checkpoint is no open_clip ViT-H-14 (other weights)."
        ) from error
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        count = embeddings.position_embedding.num_embeddings
        embeddings.position_ids = torch.arange(count)[None]  # not in a checkpoint
    return model.eval().requires_grad_(False)


def open_clip_to_transformers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip CLIP's weights under a CLIPModel's names; KeyError for a name not CLIP's."""
    whole = {
        "logit_scale": "logit_scale",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    }
    for p in ("weight", "bias"):
        whole[f"ln_final.{p}"] = f"text_model.final_layer_norm.{p}"
        whole[f"visual.ln_pre.{p}"] = f"vision_model.pre_layrnorm.{p}"  # (sic)
        whole[f"visual.ln_post.{p}"] = f"vision_model.post_layernorm.{p}"
    transposed = {
        "visual.proj": "visual_projection.weight",
        "text_projection": "text_projection.weight",
    }
    parts = {
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    block = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")

    mapped = {}
    for name, value in state_dict.items():
        if name == "attn_mask":  # some exports carry it; transformers makes its own
            continue
        if name in transposed:  # x @ projection there, projection(x) here
            mapped[transposed[name]] = value.T.contiguous()
        elif match := block.fullmatch(name):
            visual, index, part, kind = match.groups()
            layer = f"{'vision' if visual else 'text'}_model.encoder.layers.{index}"
            if part == "attn.in_proj":  # query, key and value, stacked in this order
                for projection, rows in zip("qkv", value.chunk(3), strict=True):
                    mapped[f"{layer}.self_attn.{projection}_proj.{kind}"] = rows
            else:
                mapped[f"{layer}.{parts[part]}.{kind}"] = value
        else:
            mapped[whole[name]] = value
    return mapped


def load_aesthetic(path: str) -> Scorer:
    """LAION aesthetic predictor v2 on CLIP ViT-L/14, about 5; ignores the prompt.

    `path`: the official .pth file of its head.
    """
    from transformers import CLIPVisionModelWithProjection

    path = path or fetch("aesthetic", "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
    head = aesthetic_head(load_tensors("--reward aesthetic", path))
    clip = "openai/clip-vit-large-patch14"
    model = load_network(f"--reward aesthetic: {clip}", CLIPVisionModelWithProjection, clip)

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        scores = []
        for part in images.split(32):
            pixels = preprocess_clip(part, model.config.image_size).to(model.device)
            embeds = model(pixel_values=pixels).image_embeds
            scores.append(head(F.normalize(embeds, dim=-1)).squeeze(-1))
        return torch.cat(scores)

    score.networks = (model, head)
    return score


def aesthetic_head(state_dict: dict[str, Tensor]) -> nn.Sequential:
    """The head 768-1024-128-64-16-1, in float32: its dropout is off, and it has no activations."""
    sizes = (768, 1024, 128, 64, 16, 1)
    places = (0, 2, 4, 6, 7)  # among the official layers
    head = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
    try:
        for layer, place in zip(head, places, strict=True):
            names = {p: f"layers.{place}.{p}" for p in ("weight", "bias")}
            layer.load_state_dict({p: state_dict[name] for p, name in names.items()})
    except (KeyError, RuntimeError) as error:
        raise InputError(
            "--reward aesthetic: its checkpoint is not the head sac+logos+ava1-l14-linearMSE."
        ) from error
    return head.eval().requires_grad_(False)


LOADERS: dict[str, Callable[[str], Scorer]] = {
    "hpsv2": load_hpsv2("hpsv2", "HPS_v2_compressed.pt"),
    "hpsv2.1": load_hpsv2("hpsv2.1", "HPS_v2.1_compressed.pt"),
    "pickscore": load_pickscore,
    "aesthetic": load_aesthetic,
    "compressibility": lambda path: lambda images, prompts: -jpeg_kilobytes(images),
    "incompressibility": lambda path: lambda images, prompts: jpeg_kilobytes(images),
}


# ---- Scores by hand ------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Score pictures with a reward.")
    parser.add_argument("--reward", required=True, nargs="+", help="as in prdp.py")
    parser.add_argument("--images", required=True, nargs="+", help="picture files, or folders")
    parser.add_argument("--prompt", default="", help="the prompt of all of them")
    with command("rewards.py"):
        args = parser.parse_args(argv)
        pictures = load_images(args.images)
        reward = load_reward(args.reward, "cuda" if torch.cuda.is_available() else "cpu")
        for number, (file, picture) in enumerate(pictures.items()):
            scores = {"sum": reward(picture, [args.prompt])}
            scores = reward.parts | (scores if len(reward.parts) > 1 else {})
            if number == 0:
                print("".join(f"{name:>18}" for name in scores) + "  image")
            print("".join(f"{score.item():>18.6g}" for score in scores.values()) + f"  {file}")


if __name__ == "__main__":
    main()
