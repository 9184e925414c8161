"""People's choices between two pictures, for diffusion_dpo.py --pairs and implicit_reward.py."""

from __future__ import annotations

import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

import prdp
from rewards import Reward
from support.cli import UserError, reading
from support.distributed import gather_objects, print0, processes, rank
from support.inputs import as_prompts
from support.report import phase

COLUMNS = {"prompt", "chosen", "rejected"}


def read_picture(path: str | Path, what: str) -> Tensor:
    """A picture file's pixels, (3, H, W) uint8, RGB, the right way up."""
    path = Path(path).expanduser()
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode[0] in "IF":
            raise ValueError("it has 16 or 32 bits a channel: save it with 8")
        if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
            raise ValueError("it is transparent: save it on a background")
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # Pillow's are of many kinds
        why = getattr(error, "strerror", None) or f"no picture that can be read ({error})"
        raise UserError(f"{what} {path}: {why}.") from error


class People:
    """People's choices, from a file; a checkpoint keeps a digest of them and of the pictures."""

    def __init__(self, file: str) -> None:
        self.file = file
        what = f"--pairs {file}"
        if Path(file).suffix.lower() != ".jsonl":
            raise UserError(f"{what}: must be .jsonl, an object a line.")
        with reading(what):
            data = Path(file).read_bytes()
            lines = data.decode("utf-8-sig").split("\n")
        records = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                records.append(self.read(f"{what}, line {number}", line))

        # Each process looks at some of the pictures.
        own = range(len(records))[rank() :: processes()]
        digests = {}
        with phase("pictures"), ThreadPoolExecutor() as pool:
            found = pool.map(lambda number: self.check(records[number]), own)
            for number, content in zip(own, found, strict=True):
                digests[number] = content
        for part in gather_objects(digests):
            digests |= part

        # Of two equal pictures none can be preferred.
        usable = [number for number in range(len(records)) if digests[number]]
        self.records = [records[number] for number in usable]
        if not usable:
            raise UserError(f"{what}: has no pair of two different pictures.")
        if len(usable) < len(records):
            lost = len(records) - len(usable)
            print0(f"warning: {what}: {lost} pairs of equal pictures are left out.")
        every = b"".join(digests[number] for number in usable)
        self.digest = hashlib.sha256(every).hexdigest()

    def read(self, what: str, line: str) -> dict:
        """The record in a line, with paths as they stand beside the file."""
        with reading(what):
            record = json.loads(line)
        found = set(record) if isinstance(record, dict) else set()
        if found != COLUMNS or not all(isinstance(x, str) and x for x in record.values()):
            raise UserError(f"{what}: must have prompt, chosen and rejected, texts, and no more.")
        (prompt,) = as_prompts([record["prompt"]], what)
        for name in ("chosen", "rejected"):
            if "://" in record[name]:
                raise UserError(f"{what}: {name} {record[name]}: download it, and give its path.")
        return {**record, "prompt": prompt, "what": what}

    def check(self, record: dict) -> bytes:
        """A digest of a pair, empty for equal pictures; UserError for what cannot be read."""
        chosen, rejected = self.pictures(record)
        if torch.equal(chosen, rejected):
            return b""
        parts = [record["prompt"].encode(), chosen.numpy().tobytes(), rejected.numpy().tobytes()]
        return hashlib.sha256(b"".join(parts)).digest()

    def pictures(self, record: dict) -> list[Tensor]:
        """The chosen and the rejected, each (3, H, W) uint8."""
        folder = Path(self.file).parent
        pictures = []
        for name in ("chosen", "rejected"):
            path = folder / Path(record[name]).expanduser()
            pictures.append(read_picture(path, f"{record['what']}: {name}"))
        return pictures

    def owner(self) -> Tensor:
        """Which process learns from each pair."""
        return torch.arange(len(self.records)) % processes()

    @torch.no_grad()
    def load(
        self, sd, seed: int, epoch: int, numbers: Tensor, mirror: bool = True
    ) -> tuple[Tensor, Tensor]:
        """x_0 (m, 2, C, H, W) of pairs (m,), the chosen first, and prompt_embeds (m, L, F): as in
        their code a sample of what the VAE makes of a picture, half of them mirrored to learn."""
        records = [self.records[n] for n in numbers]
        pictures = [picture for record in records for picture in self.pictures(record)]
        generators = prdp.image_generators(seed, epoch, numbers.tolist(), 2)
        latents = []
        with sd.at_work(sd.vae):  # in float32: half precision overflows in some VAEs
            for picture, generator in zip(pictures, generators, strict=True):
                pixels = prepare(picture, sd, generator if mirror else None).to(sd.device)
                encoded = sd.vae.encode(pixels[None]).latent_dist
                noise = torch.randn(sd.latent_shape, generator=generator).to(sd.device)
                latents.append(encoded.mean[0] + encoded.std[0] * noise)
        x_0 = sd.vae.config.scaling_factor * torch.stack(latents)
        if not x_0.isfinite().all():
            raise UserError(f"--pairs {self.file}: the model's VAE encodes a picture as NaN.")
        return x_0.unflatten(0, (-1, 2)), sd.encode([record["prompt"] for record in records])

    def state_dict(self) -> dict:
        return {"pairs": self.digest}

    def load_state_dict(self, state: dict) -> None:
        if state != self.state_dict():
            raise UserError(f"--pairs {self.file}: has other pairs than the run began with.")


class NoReward(Reward):
    """NaN for every image: people's choices need no scores."""

    def score(self, images: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.full((len(images),), math.nan, device=images.device), {}


def prepare(picture: Tensor, sd, generator: torch.Generator | None) -> Tensor:
    """(3, H, W) uint8 -> floats in [-1, 1] of the model's size, as in Diffusion-DPO's code: the
    shorter side scaled to it, the centre, and by a generator's choice mirrored."""
    height, width = (side * sd.pipe.vae_scale_factor for side in sd.latent_shape[1:])
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    if generator and torch.rand((), generator=generator) < 0.5:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
