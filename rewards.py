"""Black-box rewards behind one callable: (uint8 images (M, 3, H, W), M prompts) -> float32 (M,).

load_reward("pickscore", device)                     # weights from the hub
load_reward("pickscore:path/to/folder", device)      # or from a folder
load_reward("incompressibility", device)
"""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Reward = Callable[[Tensor, list[str]], Tensor]

# What every CLIP-like scorer was trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it and says what to do."""


def load_reward(spec: str, device: torch.device | str) -> Reward:
    """The reward named by `spec` ("NAME" or "NAME:PATH"), loaded once; calls need no gradient and take any batch size."""
    name, _, path = spec.partition(":")
    if name not in LOADERS:
        raise InputError(f"--reward {spec}: unknown reward; choose from {', '.join(LOADERS)}.")
    if path and name.endswith("compressibility"):
        raise InputError(f"--reward {spec}: {name} takes no path.")
    return LOADERS[name](path, torch.device(device))


# ------------------------------------------------------------------------------------------------ JPEG size (DDPO, Sec. 5)


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size of each image as a JPEG of quality 95, in units of 1,000 bytes: (M, 3, H, W) uint8 -> (M,)."""
    from PIL import Image

    def size(pixels) -> int:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        return buffer.tell()

    sizes = [size(pixels) for pixels in images.permute(0, 2, 3, 1).cpu().numpy()]
    return torch.tensor(sizes, dtype=torch.float32, device=images.device) / 1000


def load_incompressibility(path: str, device: torch.device) -> Reward:
    return lambda images, prompts: jpeg_kilobytes(images)


def load_compressibility(path: str, device: torch.device) -> Reward:
    return lambda images, prompts: -jpeg_kilobytes(images)


# ------------------------------------------------------------------------------------------------ CLIP scorers


def preprocess_clip(images: Tensor, size: int = 224) -> Tensor:
    """What CLIP's own processor does: bicubic in Pillow on uint8 to shortest edge `size`, centre crop, normalise.

    (M, 3, H, W) uint8 -> (M, 3, size, size) float32. Pillow itself, since tensor resizing differs by up to 10 levels.
    """
    import numpy as np
    from PIL import Image

    height, width = images.shape[-2:]
    short, long = min(height, width), max(height, width)
    scaled = (size, int(size * long / short)) if width == short else (int(size * long / short), size)  # (width, height)
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2

    def resize(pixels) -> Tensor:
        picture = Image.fromarray(pixels)
        if picture.size != scaled:
            picture = picture.resize(scaled, Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(picture.crop((left, top, left + size, top + size))).copy())

    pixels = torch.stack([resize(p) for p in images.permute(0, 2, 3, 1).cpu().numpy()]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels.to(images.device).float() / 255 - mean) / std


def features(output) -> Tensor:
    """The projected features of get_image_features and get_text_features: a tensor in transformers 4, an object in 5."""
    return output if torch.is_tensor(output) else output.pooler_output


def load_pickscore(path: str, device: torch.device) -> Reward:
    """PickScore (Kirstain et al. 2023): cosine of image and prompt in a CLIP ViT-H/14, unscaled (about 0.2), float32.

    `path` may name any transformers CLIPModel folder with its tokenizer.
    """
    from transformers import CLIPModel, CLIPTokenizer

    model_name, tokenizer_name = path or "yuvalkirstain/PickScore_v1", path or "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    try:
        model = CLIPModel.from_pretrained(model_name, dtype=torch.float32).to(device).eval().requires_grad_(False)
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_name)
    except (OSError, ValueError) as error:
        where = (
            f"{path} is no folder with a CLIPModel and its tokenizer"
            if path
            else "its weights are not cached and the hub is out of reach"
        )
        raise InputError(f"--reward pickscore: {where}.") from error
    size, context = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        tokens = tokenizer(
            prompts, padding="max_length", truncation=True, max_length=context, return_tensors="pt"
        ).input_ids
        image = features(model.get_image_features(pixel_values=preprocess_clip(images, size).to(device)))
        text = features(model.get_text_features(input_ids=tokens.to(device)))
        return (F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(-1)

    return reward


LOADERS = {
    "pickscore": load_pickscore,
    "incompressibility": load_incompressibility,
    "compressibility": load_compressibility,
}
