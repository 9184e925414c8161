"""Black-box rewards behind one callable: (uint8 images (M, 3, H, W), M prompts) -> M numbers.

    load_reward("hpsv2", device)                              # official weights, from the hub
    load_reward("hpsv2:/path/HPS_v2_compressed.pt", device)   # or from a file or folder
    load_reward(["pickscore=10", "mine.py:redness"], device)  # a weighted sum, one part your own
    load_reward(redness, device)                              # a function already imported

A word is NAME, NAME:PATH or FILE.py:FUNCTION, and may end in =WEIGHT. Your own files lie in one
folder, and can import its other modules, except those whose names Python already knows. A NAME
gives what its authors' code gives (docs/running.md); cosines are not scaled.
"""

import contextlib
import html
import io
import itertools
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.cli import UserError, reading
from support.inputs import load_function, load_network, load_tensors, load_tokenizer, users_code

Scorer = Callable[[Tensor, list[str]], Tensor]
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # of every CLIP below
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # of HPSv2 and PickScore


class Reward:
    """A weighted sum of scorers: `components` are (weight, scorer) by label, `files` what a user's
    own hold, by path.

    The networks that a scorer lists in its attribute `networks` rest on `device`, and are on the
    images' while it runs."""

    def __init__(self, components: dict[str, tuple], files=None, device="cpu") -> None:
        self.components = components
        self.files = files or {}
        self.networks = []
        scorers = [scorer for _, scorer in components.values()]
        labels = ", ".join(components)
        with users_code(f"reward {labels}: its `networks`, a list of torch modules"):
            for scorer in scorers:
                self.networks += getattr(scorer, "networks", ())
            self.to(device)

    def to(self, device: torch.device | str) -> "Reward":
        self.device = torch.device(device)
        for network in self.networks:
            network.to(self.device)
        return self

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.score(images, prompts)[0]

    @torch.no_grad()
    def score(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and each component's scores before weights, by label: each (M,), in
        float64 where a scorer returns float64, integers or a list, else in float32."""
        assert images.dtype == torch.uint8 and len(images) == len(prompts), images.shape
        total, parts = 0.0, {}
        for label, (weight, scorer) in self.components.items():
            networks = getattr(scorer, "networks", ())
            if images.device.type == self.device.type:
                networks = ()
            try:
                with users_code(f"reward {label} failed"):
                    for network in networks:
                        network.to(images.device)
                    # Copies: a scorer that changes them must not change the next one's, or grids.
                    returned = scorer(images.clone(), list(prompts))
            finally:
                for network in networks:
                    network.to(self.device)
            parts[label] = checked(label, returned, prompts).to(images.device)
            total = total + weight * parts[label]
        return checked("sum", total, prompts).to(images.device), parts


def checked(label: str, returned: object, prompts: list[str]) -> Tensor:
    """What a scorer returned, as (M,) on the CPU; UserError unless it is M finite real numbers."""
    import numpy as np

    count, what = len(prompts), f"reward {label} returned"
    try:
        scores = torch.as_tensor(returned)
        if scores.is_complex() or scores.layout != torch.strided or np.ma.isMaskedArray(returned):
            raise TypeError("it is complex, masked or sparse")
        exact = torch.as_tensor(returned, dtype=torch.float64)  # as Python's floats are
        shape = tuple(exact.shape)
        numbers = exact.flatten().tolist()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        kind = type(returned).__name__
        if kind == "coroutine":
            returned.close()  # else Python warns that it was never awaited
        raise UserError(f"{what} a {kind}, not {count} real numbers ({error}).") from error
    if shape not in ((count,), (count, 1)):
        raise UserError(f"{what} numbers of shape {shape} for {count} images.")
    for number, prompt in zip(numbers, prompts, strict=True):
        if not math.isfinite(number):
            raise UserError(f"{what} {number} for the prompt {prompt!r}, one of {count}.")
    narrow = hasattr(returned, "dtype") and scores.is_floating_point() and scores.itemsize < 8
    return torch.tensor(numbers, dtype=torch.float32 if narrow else torch.float64)


def parse_reward(words: str | tuple | list) -> list[tuple]:
    """(label, weight, source, detail) of each word: source and detail are NAME and the path of its
    weights, "" for the official ones, or FILE.py and FUNCTION, paths absolute; the label is NAME or
    FUNCTION, NAME-2 where that is taken."""
    words = [words] if isinstance(words, str) else words
    if not isinstance(words, (tuple, list)) or not all(isinstance(word, str) for word in words):
        raise UserError(f"--reward: must be words; a function is an argument of run ({words!r}).")
    known = f"choose from {', '.join(LOADERS)}, FILE.py:FUNCTION; several are words of their own"
    components = []
    for word in words:
        what = f"--reward {word}"
        body, weight = word.strip(), 1.0
        with contextlib.suppress(ValueError):  # no =, or one inside of a path
            head, number = body.rsplit("=", 1)
            body, weight = head, float(number)
        if not math.isfinite(weight):
            raise UserError(f"{what}: {weight} is no weight.")
        label, _, path = body.partition(":")
        file, _, function = body.rpartition(":")
        own = file.endswith(".py") and function
        if own:
            label, path = function, file
        elif label not in LOADERS:
            raise UserError(f"{what}: no reward {body!r}; {known}.")
        elif path and label.endswith("compressibility"):
            raise UserError(f"{what}: {label} takes no path.")
        if path:
            path = os.path.abspath(os.path.expanduser(path))  # links stay: the hub's cache has them
            if not os.path.exists(path):
                raise UserError(f"{what}: no such file or folder: {path}; {known}.")
        same = sum(other[0].partition("-")[0] == label for other in components)
        name = f"{label}-{same + 1}" if same else label
        components.append((name, weight, *((path, function) if own else (label, path))))
    folders = {os.path.dirname(source) for _, _, source, _ in components if source not in LOADERS}
    if len(folders) > 1:  # each may hold a module of the same name
        raise UserError(f"--reward: put your files in one folder: {', '.join(sorted(folders))}.")
    return components


def resolve_reward(words: str | tuple | list) -> tuple[str, ...]:
    """The same words with absolute paths, which mean the same in another folder."""
    resolved = []
    for _, weight, source, detail in parse_reward(words):
        word = f"{source}:{detail}" if detail else source
        resolved.append(f"{word}={weight}" if weight != 1 or "=" in word else word)
    return tuple(resolved)


def load_reward(reward: str | tuple | list | Scorer, device: torch.device | str) -> Reward:
    """What words name, or a function, as a Reward that rests on `device`; a Reward as it is."""
    if isinstance(reward, Reward):
        return reward
    if callable(reward):
        label = getattr(reward, "__name__", type(reward).__name__)
        return Reward({label: (1.0, reward)}, device=device)

    components, files = {}, {}
    for label, weight, source, detail in parse_reward(reward):
        if source in LOADERS:
            scorer = LOADERS[source](detail)
        else:
            scorer = load_function(source, detail, files)
        components[label] = (weight, scorer)
    if not components:
        raise UserError("--reward: names no reward; a run from Python is given its own again.")
    contents = {file: Path(file).read_bytes() for file in files}  # as they are run
    return Reward(components, contents, device)


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size of each image as a JPEG of quality 95, in 1,000 bytes: (M, 3, H, W) uint8 -> (M,)."""
    from PIL import Image

    sizes = []
    for pixels in images.permute(0, 2, 3, 1).cpu().numpy():
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float32)


def normalise(pixels: Tensor) -> Tensor:
    """(M, 3, H, W) floats in [0, 1], with the mean and deviation CLIP was trained with."""
    return (pixels - CLIP_MEAN.to(pixels.device)) / CLIP_STD.to(pixels.device)


def preprocess_clip(images: Tensor, size: int = 224) -> Tensor:
    """CLIP's own, (M, 3, H, W) uint8 -> (M, 3, size, size) float32: Pillow's bicubic on uint8 to
    shortest edge `size` (torch's differs by up to 10 levels), centre crop, normalise."""
    import numpy as np
    from PIL import Image

    edges = images.shape[-1], images.shape[-2]
    width, height = (int(size * edge / min(edges)) for edge in edges)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = []
    for image in images.permute(0, 2, 3, 1).cpu().numpy():
        picture = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        pixels.append(np.array(picture.crop((left, top, left + size, top + size))))
    pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return normalise(pixels.to(images.device).float() / 255)


def preprocess_hpsv2(images: Tensor, size: int = 224) -> Tensor:
    """HPSv2's own, (M, 3, H, W) uint8 -> (M, 3, size, size) float32: bicubic on floats, neither
    clamped nor rounded, to longest edge `size`, zero padding to a square, and then normalise. The
    authors' code antialiases from torchvision 0.17 on, as here, and up to 0.16 (2023) does not."""
    scale = size / max(images.shape[-2:])
    shape = [round(edge * scale) for edge in images.shape[-2:]]
    pixels = F.interpolate(images.float() / 255, shape, mode="bicubic", antialias=True)
    rows, columns = (size - edge for edge in shape)
    pixels = F.pad(pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    return normalise(pixels)


def clean_text(prompt: str) -> str:
    """open_clip's cleaning: Unicode mended by ftfy (where it is not installed, plain quotes and
    ligatures alone), HTML unescaped twice, spaces folded, lower case. Names of control tokens are
    cut out: transformers' tokenizer would end or begin the text there."""
    plain = {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0xFB01: "fi", 0xFB02: "fl"}
    text = prompt.translate(plain)
    with contextlib.suppress(ImportError):
        from ftfy import fix_text

        text = fix_text(prompt)
    text = html.unescape(html.unescape(text))
    text = re.sub(r"<\|(start|end)oftext\|>|<(start|end)_of_text>", " ", text, flags=re.IGNORECASE)
    return re.sub(r"\s+", " ", text).strip().lower()


def cosine_scorer(model: nn.Module, tokenizer, preprocess: Callable, clean: Callable) -> Scorer:
    """Cosine of image and prompt in a transformers CLIPModel, in float32, unscaled."""
    size = model.config.vision_config.image_size
    context = model.config.text_config.max_position_embeddings
    options = {"padding": "max_length", "truncation": True, "max_length": context}

    def score(images, prompts):
        tokens = tokenizer([*map(clean, prompts)], **options, return_tensors="pt").input_ids
        scores = []
        for part, ids in zip(images.split(32), tokens.split(32), strict=True):
            pixels = preprocess(part, size).to(model.device)
            image = model.get_image_features(pixel_values=pixels).pooler_output.float()
            text = model.get_text_features(input_ids=ids.to(model.device)).pooler_output.float()
            scores.append((F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(-1))
        return torch.cat(scores)

    score.networks = (model,)
    return score


def load_clip(what: str, weights: str, path: str) -> Scorer:
    """PickScore (Kirstain et al. 2023), about 0.2, and CLIP. `path`: a folder with tokenizer."""
    from transformers import CLIPModel

    what = f"{what}: {path or weights}"
    model = load_network(what, CLIPModel, path or weights)
    tokenizer = load_tokenizer(what, path or TOKENIZER, model.config.text_config.vocab_size)
    return cosine_scorer(model, tokenizer, preprocess_clip, clean=str)


def load_hpsv2(what: str, file: str, path: str) -> Scorer:
    """HPSv2 (Wu et al. 2023), about 0.27. `path`: its .pt; a tokenizer in its folder is used."""
    from transformers import CLIPModel

    weights = open_clip_to_transformers(load_tensors(what, path, "xswu/HPSv2", file))
    options = {"config": vit_h_14_config(), "state_dict": weights}
    model = load_network(f"{what}: {path or file}", CLIPModel, None, **options)
    folder = os.path.dirname(path)
    if not os.path.isfile(f"{folder}/tokenizer_config.json"):
        folder = TOKENIZER
    tokenizer = load_tokenizer(what, folder, model.config.text_config.vocab_size)
    return cosine_scorer(model, tokenizer, preprocess_hpsv2, clean_text)


def vit_h_14_config():
    """open_clip's ViT-H-14: exact GELU; 16 heads, of 64 in the text tower, of 80 in the image's."""
    from transformers import CLIPConfig

    both = dict(hidden_act="gelu", projection_dim=1024, num_attention_heads=16, eos_token_id=49407)
    text = dict(both, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24)
    vision = dict(both, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32)
    vision["patch_size"] = 14
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)


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
    """LAION aesthetic predictor v2, about 5; ignores the prompt. `path`: the .pth of its head."""
    from transformers import CLIPVisionModelWithProjection

    what = "--reward aesthetic"
    head = "aesthetic-model.pth"
    weights = load_tensors(what, path, "trl-lib/ddpo-aesthetic-predictor", head)
    widths = itertools.pairwise((768, 1024, 128, 64, 16, 1))
    layers = nn.ModuleDict({n: nn.Linear(*pair) for n, pair in zip("02467", widths, strict=True)})
    with reading(f"{what}: {path} is no head sac+logos+ava1-l14-linearMSE"):
        nn.ModuleDict({"layers": layers}).load_state_dict(weights)
    head = nn.Sequential(*layers.values()).requires_grad_(False)  # 1, 3 and 5 are dropout
    clip = "openai/clip-vit-large-patch14"
    model = load_network(f"{what}: {clip}", CLIPVisionModelWithProjection, clip)

    def score(images, prompts):
        scores = []
        for part in images.split(32):
            pixels = preprocess_clip(part, model.config.image_size).to(model.device)
            embeds = model(pixel_values=pixels).image_embeds
            scores.append(head(F.normalize(embeds, dim=-1)).squeeze(-1))
        return torch.cat(scores)

    score.networks = (model, head)
    return score


LOADERS = {  # NAME -> scorer of the weights in a path
    "hpsv2": lambda path: load_hpsv2("--reward hpsv2", "HPS_v2_compressed.pt", path),
    "hpsv2.1": lambda path: load_hpsv2("--reward hpsv2.1", "HPS_v2.1_compressed.pt", path),
    "pickscore": lambda path: load_clip("--reward pickscore", "yuvalkirstain/PickScore_v1", path),
    "clip": lambda path: load_clip("--reward clip", TOKENIZER, path),
    "aesthetic": load_aesthetic,
    "compressibility": lambda path: lambda images, prompts: -jpeg_kilobytes(images),
    "incompressibility": lambda path: lambda images, prompts: jpeg_kilobytes(images),
}
