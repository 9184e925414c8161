"""Black-box rewards behind one callable: (uint8 images (M, 3, H, W), M prompts) -> float32 (M,).

    load_reward("hpsv2", device)                                # official weights, from the hub
    load_reward("hpsv2:/path/HPS_v2_compressed.pt", device)     # or from a file or folder
    load_reward("pickscore=10,hpsv2=2,aesthetic=0.05", device)  # a weighted sum
    load_reward("mine.py:redness", device)                      # your (images, prompts) -> numbers
    load_reward(redness, device)                                # the same, already imported

    python rewards.py --reward hpsv2 --images picture.png --prompt "a cat"    # score by hand

A spec is NAME, NAME:PATH or FILE.py:FUNCTION, each with an optional =WEIGHT, joined by commas. A
path is one on this machine, never a name on the hub. What holds a comma, an = or a double quote
stands in double quotes, those within doubled: '"/data/v=2, big/my.py:redness"=0.5,hpsv2'. A file of
your own can import the modules beside it, but for those whose name Python already knows.

Raw units: cosines are not scaled. Each scorer gives what its authors' code gives, without that code
(see the README).
"""

from __future__ import annotations

import argparse
import dataclasses
import html
import importlib.util
import io
import itertools
import math
import os
import pickle
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Scorer = Callable[[Tensor, list[str]], Tensor]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of every CLIP-like scorer below
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # of HPSv2 and PickScore


# ---- Errors, as every command says them --------------------------------------------------------


class InputError(Exception):
    """Something the user gave cannot be used; the message names it and says what to do."""


class Parser(argparse.ArgumentParser):
    """One whose errors are InputErrors, and whose descriptions keep their lines."""

    def __init__(self, **options) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> None:
        raise InputError(f"{message}; see --help.")

    def add_fields(self, fields: Iterable[dataclasses.Field], groups: dict[str, str]) -> None:
        """A flag for each dataclass field; its metadata are argparse's options. A field that
        `groups` names begins a group of --help."""
        group = self
        for f in fields:
            if f.name in groups:
                group = self.add_argument_group(groups[f.name])
            options = {"type": type(f.default), **f.metadata}
            if f.default is False:
                options = {"action": "store_true", **f.metadata}
            elif f.default != "":
                options["help"] += f" (default: {f.default})"
            group.add_argument(option(f.name), default=argparse.SUPPRESS, **options)


def option(name: str) -> str:
    """The flag of a dataclass field."""
    return "--" + name.replace("_", "-")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever a damaged or foreign file raises within this block into an InputError."""
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"{what}: {in_brief(error)}.") from error


# What libraries say in many words, or only of their insides.
BRIEFLY = {
    "GLOBAL": "holds code beside weights, and is not opened (a .safetensors file cannot)",
    "central directory": "a file of weights is damaged or cut short",
    "deserializing header": "a file of weights is damaged or cut short",
    "Unable to load weights": "a file of weights is damaged or cut short",
    "size mismatch": "has weights of other shapes",
    "expected shape": "has weights of other shapes",
    "ignore_mismatched_sizes": "has weights of other shapes",
    "couldn't connect": "not cached, and the hub is out of reach",
    "were passed": "model_index.json lacks a part",
    "surrogates not allowed": "holds half a surrogate pair, which is no character",
}


def in_brief(error: BaseException) -> str:
    """Why a file cannot be used, in the words of a sentence."""
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    text = " ".join(str(link) for link in chain)
    for words, brief in BRIEFLY.items():
        if words in text:
            return brief
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    if isinstance(error, KeyError):
        reason = f"lacks {reason}"
    elif not isinstance(error, (OSError, ValueError)):
        reason = f"is of another form ({type(error).__name__}: {reason})"
    return reason.removeprefix("Error ").rstrip(".")


@contextmanager
def command(name: str) -> Iterator[None]:
    """A command's whole work: a foreseen error ends it in one sentence and exit code 2, Ctrl-C in
    130. A mistake of ours keeps its traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that an ASCII terminal lacks
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (
        BrokenPipeError
    ):  # of `| head`: nobody reads on, and the interpreter's last flush must not
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # complain of it again
        raise SystemExit(2) from None
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
        return ": ".join([*getattr(error, "__notes__", ()), text])
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


# ---- The callable ------------------------------------------------------------------------------


class Reward:
    """A weighted sum of scorers, by label. After a call `parts` holds the scores of each, (M,).

    The networks that a scorer lists in its attribute `networks` are on `device` while it scores,
    then on `waiting`.
    """

    def __init__(
        self,
        components: dict[str, tuple[float, Scorer]],
        device: torch.device,
        waiting: torch.device,
    ) -> None:
        self.components, self.device, self.waiting = components, device, waiting
        self.parts: dict[str, Tensor] = {}
        for label, (_, scorer) in components.items():
            networks = getattr(scorer, "networks", ())
            if not isinstance(networks, (list, tuple)) or not all(
                hasattr(n, "to") for n in networks
            ):
                raise InputError(
                    f"reward {label}: its attribute `networks` must be a list of torch modules."
                )

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        assert images.dtype == torch.uint8 and images.ndim == 4, (images.dtype, images.shape)
        assert len(images) == len(prompts), (images.shape, len(prompts))
        self.parts = {}
        for label, (_, scorer) in self.components.items():
            for network in getattr(scorer, "networks", ()):
                network.to(self.device)
            self.parts[label] = checked(label, scorer, images, prompts)
            for network in getattr(scorer, "networks", ()):
                network.to(self.waiting)
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


def on_one_line(error: BaseException) -> str:
    """What failed and where, on one line."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{what} ({Path(where.filename).name}, line {where.lineno})"


# ---- Specs -------------------------------------------------------------------------------------


class Component(NamedTuple):
    """One term of a reward spec."""

    label: str  # of its scores in the log: NAME or FUNCTION, and NAME-2 where that is taken
    weight: float
    source: str  # a NAME of LOADERS, or an absolute path FILE.py
    detail: str  # the absolute path of its weights, "" for the official ones; or the FUNCTION


UNQUOTED = r'(?=(?:[^"]*"[^"]*")*[^"]*$)'  # what an even number of quotes follows
QUOTED = re.compile(r'"((?:[^"]|"")*)"')


def parse_reward(spec: str) -> list[Component]:
    """The components of a spec, paths made absolute; InputError for one that cannot be loaded."""
    components, labels = [], Counter()
    for part in re.split("," + UNQUOTED, spec):
        body, *numbers = re.split("=" + UNQUOTED, part)
        weight = parse_weight(spec, numbers)
        body = QUOTED.sub(lambda quoted: quoted[1].replace('""', '"'), body.strip())

        file, _, function = body.rpartition(":")  # the last colon: C:\me\my.py:f
        name, _, path = body.partition(":")  # the first: hpsv2:C:\me\weights.pt
        if file.endswith(".py") and function:
            label, source, detail = function, absolute(spec, file), function
        elif name in LOADERS and path and name.endswith("compressibility"):
            raise InputError(f"--reward {spec}: {name} takes no path.")
        elif name in LOADERS:
            label, source, detail = name, name, path and absolute(spec, path)
        else:
            known = ", ".join(LOADERS)
            raise InputError(
                f"--reward {spec}: no reward {name!r}; choose from {known}, FILE.py:FUNCTION."
            )
        if (source, detail) in [(c.source, c.detail) for c in components]:
            raise InputError(f"--reward {spec}: names {body} twice.")
        labels[label] += 1
        if labels[label] > 1:
            label = f"{label}-{labels[label]}"
        components.append(Component(label, weight, source, detail))
    return components


def parse_weight(spec: str, numbers: list[str]) -> float:
    """The number after the = of a component; 1 where there is none."""
    text = "=".join(numbers or ["1"])
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise InputError(
            f"--reward {spec}: {text!r} is no weight (what holds an = stands in double quotes)."
        )
    return weight


def absolute(spec: str, path: str) -> str:
    """The path as seen from any folder. Links stay: the hub's cache has files beside them."""
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.exists(path):
        raise InputError(f"--reward {spec}: no such file or folder: {path}.")
    return path


def resolve_reward(spec: str) -> str:
    """The same spec with absolute paths, which means the same in another folder."""
    parts = []
    for component in parse_reward(spec):
        part = component.source
        if component.detail:
            part += f":{component.detail}"
        if re.search(r'[,="]|^\s|\s$', part):
            part = '"' + part.replace('"', '""') + '"'
        if component.weight != 1:
            part += f"={component.weight}"
        parts.append(part)
    return ",".join(parts)


def reward_files(spec: str) -> list[Path]:
    """The Python files that a spec, if any, names, each once: code that a result depends on."""
    components = parse_reward(spec) if spec else []
    files = (c.source for c in components if c.source not in LOADERS)
    return [Path(file) for file in dict.fromkeys(files)]


def load_reward(
    spec: str | Scorer, device: torch.device | str, waiting: torch.device | str | None = None
) -> Reward:
    """The reward that `spec` names, or is, its models loaded once.

    They score on `device`, and wait there or on `waiting`.
    """
    device = torch.device(device)
    waiting = torch.device(waiting or device)
    if callable(spec):
        label = getattr(spec, "__name__", type(spec).__name__)
        return Reward({label: (1.0, spec)}, device, waiting)
    components = {}
    for label, weight, source, detail in parse_reward(spec):
        if source in LOADERS:
            scorer = LOADERS[source](detail, waiting)
        else:
            scorer = load_function(source, detail)
        components[label] = (weight, scorer)
    return Reward(components, device, waiting)


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


# ---- CLIP scorers ------------------------------------------------------------------------------


def cosine_scorer(
    model, tokenizer, preprocess: Callable[[Tensor, int], Tensor], clean: Callable[[str], str]
) -> Scorer:
    """Cosine of image and prompt in a transformers CLIPModel, in float32, unscaled."""
    size = model.config.vision_config.image_size
    context = model.config.text_config.max_position_embeddings

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        tokens = tokenizer(
            [clean(p) for p in prompts],
            padding="max_length",
            truncation=True,
            max_length=context,
            return_tensors="pt",
        ).input_ids.to(model.device)
        scores = []
        for part, ids in zip(images.split(32), tokens.split(32), strict=True):
            pixels = preprocess(part, size).to(model.device)
            image = model.get_image_features(pixel_values=pixels).pooler_output.float()
            text = model.get_text_features(input_ids=ids).pooler_output.float()
            scores.append((F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(-1))
        return torch.cat(scores)

    score.networks = (model,)
    return score


def from_hub(what: str, load: Callable, name: str, **options):
    """load(name, **options); InputError where neither the hub, the cache nor the folder has it."""
    from safetensors import SafetensorError

    try:
        return load(name, **options)
    except (OSError, ValueError, SafetensorError) as error:
        why = "not cached, and the hub is out of reach"
        if Path(name).exists():
            why = "damaged or incomplete"
        raise InputError(f"--reward {what}: cannot load {name}: {why}.") from error


def load_network(what: str, kind: type, folder: str, **options):
    """A diffusers or transformers network, in float32 whatever the file's; InputError if the file
    lacks any of its weights, or holds one that is no number."""
    try:
        network, found = kind.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **options
        )
    except OSError as error:
        if not any(Path(folder, options.get("subfolder", "")).glob("*.fp16.*")):
            raise
        mend = "from_pretrained it with variant='fp16', then save_pretrained it"
        raise InputError(f"{what}: is there as its fp16 variant alone; {mend}.") from error
    missing = {*found["missing_keys"], *found["mismatched_keys"]}
    weights = network.named_parameters()
    missing |= {name for name, p in weights if p.is_meta or not p.isfinite().all()}
    if missing:
        raise InputError(
            f"{what}: {len(missing)} weights are missing, misshapen or not finite ({min(missing)})."
        )
    return network


def load_clip(what: str, kind: type, name: str, device: torch.device):
    """A transformers model of the hub or a folder, frozen."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading from disk; downloads keep theirs
    load = partial(load_network, f"--reward {what}: {name}", kind)
    return from_hub(what, load, name).to(device).eval().requires_grad_(False)


def load_torch(what: str, path: str) -> dict[str, Tensor]:
    """A checkpoint file's tensors, by the safe loader; InputError for a damaged or unsafe file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(f"--reward {what}: {path} is no intact checkpoint of tensors.") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise InputError(f"--reward {what}: {path} is no checkpoint of tensors.")
    return state


def load_pickscore(path: str, device: torch.device) -> Scorer:
    """PickScore (Kirstain et al. 2023): cosine in a CLIP ViT-H/14, about 0.2.

    `path`: any CLIPModel folder, tokenizer included.
    """
    from transformers import CLIPModel, CLIPTokenizer

    model = load_clip("pickscore", CLIPModel, path or "yuvalkirstain/PickScore_v1", device)
    tokenizer = from_hub("pickscore", CLIPTokenizer.from_pretrained, path or TOKENIZER)
    return cosine_scorer(model, tokenizer, preprocess_clip, clean=str)


def load_hpsv2(version: str, file: str) -> Callable[[str, torch.device], Scorer]:
    """HPSv2 (Wu et al. 2023): cosine in a finetuned open_clip ViT-H/14, about 0.27.

    `path`: the official .pt file; the tokenizer beside it is used if there is one.
    """

    def load(path: str, device: torch.device) -> Scorer:
        from huggingface_hub import hf_hub_download
        from transformers import CLIPTokenizer

        path = path or from_hub(version, lambda repo: hf_hub_download(repo, file), "xswu/HPSv2")
        model = hpsv2_model(version, load_torch(version, path))
        beside = Path(path).parent
        if not (beside / "tokenizer_config.json").is_file():
            beside = TOKENIZER
        tokenizer = from_hub(version, CLIPTokenizer.from_pretrained, str(beside))
        model = model.to(device).eval().requires_grad_(False)
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
    return model


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


def load_aesthetic(path: str, device: torch.device) -> Scorer:
    """LAION aesthetic predictor v2 on CLIP ViT-L/14, about 5; ignores the prompt.

    `path`: the official .pth file of its head.
    """
    from huggingface_hub import hf_hub_download
    from transformers import CLIPVisionModelWithProjection

    def download(repository: str) -> str:
        return hf_hub_download(repository, "aesthetic-model.pth")

    path = path or from_hub("aesthetic", download, "trl-lib/ddpo-aesthetic-predictor")
    head = aesthetic_head(load_torch("aesthetic", path)).to(device)
    clip = "openai/clip-vit-large-patch14"
    model = load_clip("aesthetic", CLIPVisionModelWithProjection, clip, device)

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        scores = []
        for part in images.split(32):
            pixels = preprocess_clip(part, model.config.image_size).to(model.device)
            embeds = model(pixel_values=pixels).image_embeds
            scores.append(head(F.normalize(embeds, dim=-1)).squeeze(-1))
        return torch.cat(scores)

    score.networks = (model, head)
    return score


def aesthetic_head(state_dict: dict[str, Tensor]) -> torch.nn.Sequential:
    """The head 768-1024-128-64-16-1, in float32: its dropout is off, and it has no activations."""
    sizes = (768, 1024, 128, 64, 16, 1)
    places = (0, 2, 4, 6, 7)  # among the official layers
    head = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
    try:
        for layer, place in zip(head, places, strict=True):
            names = {p: f"layers.{place}.{p}" for p in ("weight", "bias")}
            layer.load_state_dict({p: state_dict[name] for p, name in names.items()})
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


# ---- Scores by hand ----------------------------------------------------------------------------


def load_images(paths: list[str]) -> dict[str, Tensor]:
    """RGB pictures of files and folders: path -> (1, 3, H, W) uint8."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    files = {}  # whether it was named, and not merely found in a folder
    for path in map(Path, paths):
        if path.is_dir():
            files |= dict.fromkeys(sorted(path.iterdir()), False)
        else:
            files[path] = True
    pictures = {}
    for file, named in files.items():
        try:
            pixels = np.array(Image.open(file).convert("RGB"))
        except (UnidentifiedImageError, IsADirectoryError):
            if named:
                raise InputError(f"--images {file}: is no picture.") from None
        except OSError as error:
            why = error.strerror or error
            raise InputError(f"--images {file}: cannot be read ({why}).") from error
        else:
            pictures[str(file)] = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if not pictures:
        raise InputError(f"--images {' '.join(paths)}: no pictures there.")
    return pictures


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description="Score pictures with a reward.")
    parser.add_argument("--reward", required=True, help="as in prdp.py")
    parser.add_argument("--images", required=True, nargs="+", help="picture files, or folders")
    parser.add_argument("--prompt", default="", help="the prompt of all of them")
    rows = []
    with command("rewards.py"):
        args = parser.parse_args(argv)
        pictures = load_images(args.images)
        reward = load_reward(args.reward, "cuda" if torch.cuda.is_available() else "cpu")
        for file, picture in pictures.items():
            total = reward(picture, [args.prompt]).item()
            rows.append((file, [*(part.item() for part in reward.parts.values()), total]))
    names = [*reward.parts, "sum"]
    if len(reward.parts) == 1:
        names = names[:1]
    print("".join(f"{name:>18}" for name in names) + "  image")
    for file, values in rows:
        print("".join(f"{value:>18.6g}" for value in values[: len(names)]) + f"  {file}")


if __name__ == "__main__":
    main()
