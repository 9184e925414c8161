"""People's choices between two pictures, for baselines/diffusion_dpo.py --pairs."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

import prdp
from support.cli import UserError, reading
from support.distributed import gather_objects, processes, rank
from support.inputs import as_prompts, read_picture
from support.report import phase

COLUMNS = {"prompt", "chosen", "rejected"}


class People:
    """People's choices, from a file; a checkpoint keeps a digest of them and of the pictures."""

    def __init__(self, file: str) -> None:
        self.file, self.records = file, []
        if Path(file).suffix.lower() != ".jsonl":
            raise UserError(f"--pairs {file}: must be .jsonl, an object a line.")
        with reading(f"--pairs {file}"):
            data = Path(file).read_bytes()
            lines = data.decode("utf-8-sig").split("\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                self.records.append(self.read(f"--pairs {file}, line {number}", line))
        if not self.records:
            raise UserError(f"--pairs {file}: has no pair.")
        own, digests = range(len(self.records))[rank() :: processes()], {}
        with phase("pictures", len(own)) as done, ThreadPoolExecutor() as pool:
            for number, found in zip(own, pool.map(self.check, own), strict=True):
                digests[number] = found
                done(1)
        for part in gather_objects(digests):
            digests |= part
        every = b"".join(digests[number] for number in sorted(digests))
        self.digest = hashlib.sha256(every).hexdigest()

    def read(self, what: str, line: str) -> dict:
        with reading(what):
            record = json.loads(line)
        found = set(record) if isinstance(record, dict) else set()
        if found != COLUMNS or not all(isinstance(x, str) and x for x in record.values()):
            raise UserError(f"{what}: must have prompt, chosen and rejected, texts, and no more.")
        (prompt,) = as_prompts([record["prompt"]], what)
        return {**record, "prompt": prompt, "what": what}

    def check(self, number: int) -> bytes:
        """A digest of a pair, whose pictures can be used; else UserError."""
        record = self.records[number]
        parts = [record["prompt"].encode(), *(x.numpy().tobytes() for x in self.pictures(record))]
        return hashlib.sha256(b"".join(parts)).digest()

    def pictures(self, record: dict) -> list[Tensor]:
        """Both, (3, H, W) uint8; UserError for what cannot be read or compared."""
        folder, what = Path(self.file).parent, record["what"]
        names = ("chosen", "rejected")
        both = [read_picture(folder / record[name], f"{what}: {name}") for name in names]
        if torch.equal(*both):
            raise UserError(f"{what}: its two pictures are the same.")
        return both

    def owner(self) -> Tensor:
        """Which process learns from each pair."""
        return torch.arange(len(self.records)) % processes()

    @torch.no_grad()
    def load(self, sd, seed: int, epoch: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """x_0 (m, 2, C, H, W) of pairs (m,), the chosen first, and prompt_embeds (m, L, W): as in
        their code a sample of what the VAE makes of a picture."""
        records, latents = [self.records[n] for n in numbers], []
        pictures = [picture for record in records for picture in self.pictures(record)]
        generators = prdp.image_generators(seed, epoch, numbers.tolist(), 2)
        with sd.autocast(sd.vae):
            for picture, generator in zip(pictures, generators, strict=True):
                pixels = prepare(picture, sd, generator).to(sd.device)
                found = sd.vae.encode(pixels[None]).latent_dist
                noise = torch.randn(sd.latent_shape, generator=generator).to(sd.device)
                latents.append(found.mean[0].float() + found.std[0].float() * noise)
        x_0 = sd.vae.config.scaling_factor * torch.stack(latents)
        return x_0.unflatten(0, (-1, 2)), sd.encode([record["prompt"] for record in records])

    def state_dict(self) -> dict:
        return {"pairs": self.digest}

    def load_state_dict(self, state: dict) -> None:
        if state != self.state_dict():
            raise UserError(f"--pairs {self.file}: has other pairs than the run began with.")


def prepare(picture: Tensor, sd, generator: torch.Generator) -> Tensor:
    """(3, H, W) uint8 -> floats in [-1, 1] of the model's size, as in Diffusion-DPO's code: the
    shorter side scaled to it, the centre, and at random mirrored."""
    height, width = (side * sd.pipe.vae_scale_factor for side in sd.latent_shape[1:])
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    if torch.rand((), generator=generator) < 0.5:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
