"""Black-box rewards behind one callable: (uint8 images (M, 3, H, W), list of M prompts) -> float32 (M,).

    load_reward("hpsv2", device)                                     # official weights, from the hub
    load_reward("hpsv2:/path/HPS_v2_compressed.pt", device)          # or from a file or folder
    load_reward("pickscore=10,hpsv2=2,aesthetic=0.05", device)       # a weighted sum
    load_reward("my_rewards.py:redness", device)                     # your own function (images, prompts) -> M numbers

    python rewards.py --reward hpsv2 --images picture.png --prompt "a cat"     # score pictures by hand

Raw units: cosines are not scaled. Each scorer gives what its authors' code gives, without that code (see the README).
"""

from __future__ import annotations

import argparse
import html
import importlib.util
import io
import math
import os
import pickle
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Scorer = Callable[[Tensor, list[str]], Tensor]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of every CLIP-like scorer below
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # of HPSv2 and PickScore


class InputError(Exception):
    """Something the user gave cannot be used; the message names it and says what to do."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever a damaged or foreign file raises within this block into an InputError."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise InputError(f"{what}: cannot be used ({' '.join(reason.split())}).") from error


@contextmanager
def command(name: str) -> Iterator[None]:
    """A command's whole work: a foreseen error ends it in one sentence and exit code 2, Ctrl-C in
    130. A mistake of ours keeps its traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that an ASCII terminal lacks
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        sentence = in_words(error)
        if sentence is None:
            raise
        process = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"{name}{process}: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def in_words(error: Exception) -> str | None:
    """A foreseen error as one sentence with its mend, else None."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text
    if isinstance(error, torch.OutOfMemoryError):
        smaller = "--gradient-checkpointing, --lora-rank 8 or a smaller --microbatch"
        return f"out of GPU memory: try --offload on, or in a new run {smaller}."
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "out of memory: try a smaller --microbatch or --prompts-per-epoch."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'output'}: {error.strerror}; what was saved before is intact."
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        cause = " ".join(str(error).split("\n\n")[0].split())
        return f"--compile: failed ({cause}); begin a new run without it."
    return None


class Reward:
    """A weighted sum of scorers. After a call `parts` holds each component's own scores by label, float32 (M,).

    The networks that a scorer lists in its attribute `networks` are on `device` while it scores, then on `waiting`.
    """

    def __init__(
        self,
        components: dict[str, tuple[float, Scorer]],
        device: torch.device,
        waiting: torch.device,
    ) -> None:
        self.components, self.device, self.waiting = components, device, waiting
        self.parts: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        assert images.dtype == torch.uint8 and images.ndim == 4 and len(images) == len(prompts), (
            images.shape,
            len(prompts),
        )
        self.parts = {}
        for name, (_, scorer) in self.components.items():
            for network in getattr(scorer, "networks", ()):
                network.to(self.device)
            self.parts[name] = checked(name, scorer, images, prompts)
            for network in getattr(scorer, "networks", ()):
                network.to(self.waiting)
        return sum(weight * self.parts[name] for name, (weight, _) in self.components.items())


def checked(name: str, scorer: Scorer, images: Tensor, prompts: list[str]) -> Tensor:
    """Scores of one component, float32 (M,) on the images' device; InputError unless they are M finite numbers."""
    try:
        scores = torch.as_tensor(
            scorer(images, prompts), dtype=torch.float32, device=images.device
        ).detach()
    except torch.OutOfMemoryError:
        raise  # no fault of the scorer's
    except Exception as error:
        raise InputError(f"reward {name} failed: {on_one_line(error)}.") from error
    if scores.shape != (len(prompts),):
        raise InputError(
            f"reward {name} returned numbers of shape {tuple(scores.shape)} for {len(prompts)} images."
        )
    if not scores.isfinite().all():
        bad = (~scores.isfinite()).nonzero()[0].item()
        raise InputError(f"reward {name} returned {scores[bad]} for the prompt {prompts[bad]!r}.")
    return scores


class Component(NamedTuple):
    """One term of a reward spec: NAME, NAME:PATH or FILE.py:FUNCTION, with an optional =WEIGHT."""

    label: str  # under which its scores are logged
    weight: float
    name: str
    path: str


def parse_reward(spec: str) -> list[Component]:
    """The components of a spec, joined by commas. InputError for an unknown name, a bad weight, or a repeat."""
    components = []
    for part in spec.split(","):
        body, _, number = re.fullmatch(r"(.*?)(=([^=/\\]*))?", part.strip()).groups(
            default="1"
        )  # a path may hold a =
        name, _, path = body.partition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise InputError(f"--reward {spec}: {number!r} is no weight.")
        if name.endswith(".py") and path:
            components.append(Component(path, weight, name, path))
        elif name in LOADERS:
            components.append(Component(name, weight, name, path))
        else:
            raise InputError(
                f"--reward {spec}: no reward {name!r}; choose from {', '.join(LOADERS)}, FILE.py:FUNCTION."
            )
        if name.endswith("compressibility") and path:
            raise InputError(f"--reward {spec}: {name} takes no path.")
        if [c.label for c in components].count(components[-1].label) > 1:
            raise InputError(f"--reward {spec}: names {components[-1].label} twice.")
    return components


def load_reward(
    spec: str, device: torch.device | str, waiting: torch.device | str | None = None
) -> Reward:
    """The reward that `spec` names, its models loaded once; they score on `device`, and wait there or on `waiting`."""
    device, waiting, loaded = torch.device(device), torch.device(waiting or device), {}
    for label, weight, name, path in parse_reward(spec):
        scorer = load_function(name, path) if name.endswith(".py") else LOADERS[name](path, waiting)
        loaded[label] = (weight, scorer)
    return Reward(loaded, device, waiting)


def on_one_line(error: Exception) -> str:
    """What failed and where, on one line."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({Path(where.filename).name}, line {where.lineno})"


def load_function(file: str, function: str) -> Scorer:
    """Your own reward: `function` of the Python file `file`."""
    if not Path(file).is_file():
        raise InputError(f"--reward {file}:{function}: no such file.")
    spec = importlib.util.spec_from_file_location(
        f"reward_file_{Path(file).stem}", file
    )  # shadows no other module
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(
            f"--reward {file}:{function}: cannot be imported: {on_one_line(error)}."
        ) from error
    scorer = getattr(module, function, None)
    if not callable(scorer):
        raise InputError(f"--reward {file}:{function}: the file has no function {function!r}.")
    networks = getattr(scorer, "networks", ())
    if not isinstance(networks, (list, tuple)) or not all(
        hasattr(network, "to") for network in networks
    ):
        raise InputError(
            f"--reward {file}:{function}: its attribute `networks` must be a list of torch modules."
        )
    return scorer


# -------------------------------------------------------------------------------- JPEG size (DDPO, Sec. 5)


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size of each image as a JPEG of quality 95, in units of 1,000 bytes: (M, 3, H, W) uint8 -> (M,)."""
    from PIL import Image

    def size(pixels) -> int:
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG", quality=95)
        return buffer.tell()

    return torch.tensor(
        [size(pixels) / 1000 for pixels in images.permute(0, 2, 3, 1).cpu().numpy()]
    )


# -------------------------------------------------------------------------------- preprocessing


def normalise(pixels: Tensor) -> Tensor:
    """(M, 3, H, W) floats in [0, 1], with the mean and deviation CLIP was trained with."""
    mean, std = (
        torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD)
    )
    return (pixels - mean) / std


def preprocess_clip(images: Tensor, size: int = 224) -> Tensor:
    """What CLIP's own processor does: Pillow's bicubic on uint8 to shortest edge `size`, centre crop, normalise.

    (M, 3, H, W) uint8 -> (M, 3, size, size) float32. Pillow itself: tensor resizing differs by up to 10 levels.
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

    pixels = torch.stack([resize(p) for p in images.permute(0, 2, 3, 1).cpu().numpy()]).permute(
        0, 3, 1, 2
    )
    return normalise(pixels.to(images.device).float() / 255)


def preprocess_hpsv2(images: Tensor, size: int = 224, antialias: bool = True) -> Tensor:
    """HPSv2's own transform: longest edge to `size`, zero padding to a square, normalise.

    (M, 3, H, W) uint8 -> (M, 3, size, size) float32. Bicubic on floats, neither clamped nor rounded, padded *before*
    normalising: borders are not zero. antialias=False is what its code did under torchvision < 0.17.
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
    """open_clip's cleaning: mend Unicode (by ftfy where it is installed), unescape HTML twice, fold spaces, lower case.

    Names of control tokens are cut out: transformers' tokenizer would obey them, and pool the text at the wrong place.
    """
    try:
        from ftfy import fix_text
    except ImportError:
        plain = {**str.maketrans("\u2018\u2019\u201c\u201d", "''\"\""), 0xFB01: "fi", 0xFB02: "fl"}

        def fix_text(text: str) -> str:
            return text.translate(plain)

    text = html.unescape(html.unescape(fix_text(prompt)))
    text = re.sub(r"<\|(start|end)oftext\|>|<(start|end)_of_text>", " ", text, flags=re.IGNORECASE)
    return re.sub(r"\s+", " ", text).strip().lower()


# -------------------------------------------------------------------------------- CLIP scorers


def features(output) -> Tensor:
    """Projected features from get_image_features or get_text_features: a tensor in transformers 4, an object in 5."""
    return output if torch.is_tensor(output) else output.pooler_output


def cosine_scorer(
    model, tokenizer, preprocess: Callable[[Tensor, int], Tensor], clean: Callable[[str], str]
) -> Scorer:
    """Cosine of image and prompt in a transformers CLIPModel, in float32, unscaled."""
    size, context = (
        model.config.vision_config.image_size,
        model.config.text_config.max_position_embeddings,
    )

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        options = dict(
            padding="max_length", truncation=True, max_length=context, return_tensors="pt"
        )
        tokens = tokenizer([clean(p) for p in prompts], **options).input_ids
        scores = []
        for pixels, ids in zip(images.split(32), tokens.split(32), strict=True):
            image = features(
                model.get_image_features(pixel_values=preprocess(pixels, size).to(model.device))
            )
            text = features(model.get_text_features(input_ids=ids.to(model.device)))
            scores.append(
                (F.normalize(image.float(), dim=-1) * F.normalize(text.float(), dim=-1)).sum(-1)
            )
        return torch.cat(scores)

    score.networks = (model,)
    return score


def from_hub(what: str, load: Callable, name: str, **options):
    """load(name, **options), with one clear sentence where neither the hub nor the cache nor the folder has it."""
    from safetensors import SafetensorError

    try:
        return load(name, **options)
    except (OSError, ValueError, SafetensorError) as error:
        where = (
            "damaged or incomplete"
            if Path(name).exists()
            else "not cached, and the hub is out of reach"
        )
        raise InputError(f"--reward {what}: cannot load {name}: {where}.") from error


def load_clip(what: str, kind: type, name: str, device: torch.device):
    """A transformers model, frozen, in float32 whatever the file holds; InputError if the file lacks any weight."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading from disk; downloads keep theirs
    model, report = from_hub(
        what, kind.from_pretrained, name, dtype=torch.float32, output_loading_info=True
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        raise InputError(f"--reward {what}: {name} is no complete {kind.__name__}.")
    return model.to(device).eval().requires_grad_(False)


def load_torch(what: str, path: str) -> dict:
    """A checkpoint file as a dict of tensors, by the safe loader; InputError for a missing, damaged or unsafe file."""
    if not Path(path).is_file():
        raise InputError(f"--reward {what}: no such file: {path}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(f"--reward {what}: {path} is no intact checkpoint of tensors.") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise InputError(f"--reward {what}: {path} is no checkpoint of tensors.")
    return state


def load_pickscore(path: str, device: torch.device) -> Scorer:
    """PickScore (Kirstain et al. 2023): cosine in a CLIP ViT-H/14, about 0.2. `path`: any CLIPModel folder."""
    from transformers import CLIPModel, CLIPTokenizer

    model = load_clip("pickscore", CLIPModel, path or "yuvalkirstain/PickScore_v1", device)
    tokenizer = from_hub("pickscore", CLIPTokenizer.from_pretrained, path or TOKENIZER)
    return cosine_scorer(model, tokenizer, preprocess_clip, clean=str)


def load_hpsv2(version: str, file: str) -> Callable[[str, torch.device], Scorer]:
    """HPSv2 (Wu et al. 2023): cosine in a finetuned open_clip ViT-H/14, about 0.27. `path`: the official .pt file."""

    def load(path: str, device: torch.device) -> Scorer:
        from huggingface_hub import hf_hub_download
        from transformers import CLIPTokenizer

        path = path or from_hub(version, lambda repo: hf_hub_download(repo, file), "xswu/HPSv2")
        beside = (
            Path(path).parent
            if (Path(path).parent / "tokenizer_config.json").is_file()
            else TOKENIZER
        )
        model = hpsv2_model(version, load_torch(version, path))
        tokenizer = from_hub(version, CLIPTokenizer.from_pretrained, str(beside))
        return cosine_scorer(
            model.to(device).eval().requires_grad_(False), tokenizer, preprocess_hpsv2, clean_text
        )

    return load


def vit_h_14_config():
    """open_clip's ViT-H-14 as a transformers config: exact GELU in both towers, 16 heads of 80 and of 64."""
    from transformers import CLIPConfig

    shared = dict(hidden_act="gelu", projection_dim=1024, num_attention_heads=16)
    text = dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, eos_token_id=49407, **shared
    )
    vision = dict(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, patch_size=14, **shared
    )
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)


def hpsv2_model(what: str, state_dict: dict[str, Tensor], config=None):
    """A transformers CLIPModel in float32 from an open_clip state dict, every tensor accounted for, or InputError."""
    from transformers import CLIPModel

    with torch.device("meta"):
        model = CLIPModel(config or vit_h_14_config())
    try:
        weights = {
            name: value.float() for name, value in open_clip_to_transformers(state_dict).items()
        }
        model.load_state_dict(weights, strict=True, assign=True)
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--reward {what}: its checkpoint is no open_clip ViT-H-14 (other weights)."
        ) from error
    for embeddings in (
        model.text_model.embeddings,
        model.vision_model.embeddings,
    ):  # not in a checkpoint: 0, 1, 2, ...
        embeddings.position_ids = torch.arange(embeddings.position_embedding.num_embeddings)[None]
    return model


def open_clip_to_transformers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip CLIP's weights under transformers' names of a CLIPModel. KeyError for a name that is not CLIP's."""
    whole = {
        "logit_scale": "logit_scale",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        **{f"ln_final.{p}": f"text_model.final_layer_norm.{p}" for p in ("weight", "bias")},
        **{
            f"visual.ln_pre.{p}": f"vision_model.pre_layrnorm.{p}" for p in ("weight", "bias")
        },  # (sic)
        **{f"visual.ln_post.{p}": f"vision_model.post_layernorm.{p}" for p in ("weight", "bias")},
    }
    transposed = {
        "visual.proj": "visual_projection.weight",
        "text_projection": "text_projection.weight",
    }
    parts = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    mapped = {}
    for name, value in state_dict.items():
        if name == "attn_mask":  # some exports carry it; transformers makes its own
            continue
        if name in transposed:  # x @ projection there, projection(x) here
            mapped[transposed[name]] = value.T.contiguous()
        elif match := re.fullmatch(
            r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name
        ):
            tower = "vision_model" if match[1] else "text_model"
            layer = f"{tower}.encoder.layers.{match[2]}"
            if match[3] == "attn.in_proj":  # query, key and value, stacked in this order
                for projection, rows in zip("qkv", value.chunk(3), strict=True):
                    mapped[f"{layer}.self_attn.{projection}_proj.{match[4]}"] = rows
            else:
                mapped[f"{layer}.{parts[match[3]]}.{match[4]}"] = value
        else:
            mapped[whole[name]] = value
    return mapped


def load_aesthetic(path: str, device: torch.device) -> Scorer:
    """LAION aesthetic predictor v2 on CLIP ViT-L/14, about 5; ignores the prompt. `path`: the official .pth."""
    from huggingface_hub import hf_hub_download
    from transformers import CLIPVisionModelWithProjection

    repository = "trl-lib/ddpo-aesthetic-predictor"
    path = path or from_hub(
        "aesthetic", lambda repo: hf_hub_download(repo, "aesthetic-model.pth"), repository
    )
    head = aesthetic_head(load_torch("aesthetic", path)).to(device)
    model = load_clip(
        "aesthetic", CLIPVisionModelWithProjection, "openai/clip-vit-large-patch14", device
    )

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        pixels = (
            preprocess_clip(part, model.config.image_size).to(model.device)
            for part in images.split(32)
        )
        return torch.cat(
            [head(F.normalize(model(pixel_values=p).image_embeds, dim=-1)) for p in pixels]
        ).squeeze(-1)

    score.networks = (model, head)
    return score


def aesthetic_head(state_dict: dict[str, Tensor]) -> torch.nn.Sequential:
    """The head 768-1024-128-64-16-1, linear throughout (its dropout is off, it has no activations), in float32."""
    sizes, places = (768, 1024, 128, 64, 16, 1), (0, 2, 4, 6, 7)  # places among the official layers
    head = torch.nn.Sequential(
        *(torch.nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
    )
    try:
        for layer, place in zip(head, places, strict=True):
            layer.load_state_dict(
                {p: state_dict[f"layers.{place}.{p}"].float() for p in ("weight", "bias")}
            )
    except (KeyError, RuntimeError) as error:
        raise InputError(
            "--reward aesthetic: its checkpoint is not the head sac+logos+ava1-l14-linearMSE."
        ) from error
    return head.eval().requires_grad_(False)


LOADERS: dict[str, Callable[[str, torch.device], Scorer]] = {
    "hpsv2": load_hpsv2("hpsv2", "HPS_v2_compressed.pt"),
    "hpsv2.1": load_hpsv2("hpsv2.1", "HPS_v2.1_compressed.pt"),
    "pickscore": load_pickscore,
    "aesthetic": load_aesthetic,
    "compressibility": lambda path, device: lambda images, prompts: -jpeg_kilobytes(images),
    "incompressibility": lambda path, device: lambda images, prompts: jpeg_kilobytes(images),
}


# -------------------------------------------------------------------------------- scores by hand


def load_images(paths: list[str]) -> dict[str, Tensor]:
    """RGB pictures of files and folders: path -> (1, 3, H, W) uint8."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    pictures = {}
    for file, named in (
        (f, p == f) for p in map(Path, paths) for f in (sorted(p.iterdir()) if p.is_dir() else [p])
    ):
        try:
            pictures[str(file)] = torch.from_numpy(
                np.array(Image.open(file).convert("RGB"))
            ).permute(2, 0, 1)[None]
        except (UnidentifiedImageError, IsADirectoryError):
            if named:  # and not merely found in a folder
                raise InputError(f"--images {file}: is no picture.") from None
        except OSError as error:
            raise InputError(
                f"--images {file}: cannot be read ({error.strerror or error})."
            ) from error
    if not pictures:
        raise InputError(f"--images {' '.join(paths)}: no pictures there.")
    return pictures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Score pictures with a reward.")
    parser.add_argument("--reward", required=True, help="as in prdp.py")
    parser.add_argument(
        "--images", required=True, nargs="+", help="picture files, or folders of them"
    )
    parser.add_argument("--prompt", default="", help="the prompt of all of them")
    args = parser.parse_args(argv)
    try:
        pictures, rows = load_images(args.images), []
        reward = load_reward(args.reward, "cuda" if torch.cuda.is_available() else "cpu")
        for file, picture in pictures.items():
            total = reward(picture, [args.prompt]).item()
            rows.append((file, [*(part.item() for part in reward.parts.values()), total]))
    except InputError as error:
        print(f"rewards.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    names = [*reward.parts, "sum"][: None if len(reward.parts) > 1 else 1]
    print("".join(f"{name:>18}" for name in names) + "  image")
    for file, values in rows:
        print(
            "".join(f"{value:>18.6g}" for _, value in zip(names, values, strict=False))
            + f"  {file}"
        )


if __name__ == "__main__":
    main()
