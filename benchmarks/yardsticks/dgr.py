"""DGR, Deep Generative Replay (Shin et al., NeurIPS 2017): a VAE learns the images, and replays them to the next task.

It stores no image but keeps its generator, many times the classifier's size, so it is not a method of the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.yardsticks.base import Yardstick
from edge_dfcil.dreaming.inversion import Dream
from edge_dfcil.methods._distillation import distil
from edge_dfcil.methods.task import Task
from edge_dfcil.model.network import Network
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import Stage, StageSpec, Terms

LEARNING_RATE = 1e-3  # Adam, of the VAE
MOST_LOG_VARIANCE = 20.0  # so that its first steps on large images do not overflow


class VAE(nn.Module):
    """Pixels in [0, 1] (N, 3, S, S) to a latent normal and back; three strided 5x5 convolutions each way.

    With the recipe `paper` (latent 1000, width 128) and 32 px the channels are the published 64-128-512, and it has
    28.3 M parameters where the ABD paper counts 28.7 M.
    """

    def __init__(self, image_size: int, *, latent: int, width: int) -> None:
        super().__init__()
        channels = (3, width // 2, width, 4 * width)
        self.side = -(-image_size // 8)
        self.image_size, self.latent, flat = image_size, latent, channels[-1] * self.side**2
        down: list[nn.Module] = []
        for before, after in pairwise(channels):
            down += [nn.Conv2d(before, after, 5, 2, 2), nn.BatchNorm2d(after), nn.ReLU()]
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(flat, 2 * latent))
        up: list[nn.Module] = [nn.Linear(latent, flat), nn.Unflatten(1, (channels[-1], self.side, self.side))]
        for before, after in zip(channels[:0:-1], channels[-2::-1], strict=True):
            up += [nn.BatchNorm2d(before), nn.ReLU(), nn.ConvTranspose2d(before, after, 5, 2, 2, output_padding=1)]
        self.decoder = nn.Sequential(*up)

    def decode(self, z: Tensor) -> Tensor:
        """Logits of pixels (N, 3, S, S)."""
        return self.decoder(z)[:, :, : self.image_size, : self.image_size]

    def loss(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction (binary cross-entropy) and KL to N(0, I), each summed per image (N,)."""
        mean, log_variance = self.encoder(pixels).chunk(2, 1)
        log_variance = log_variance.clamp(max=MOST_LOG_VARIANCE)
        logits = self.decode(mean + (0.5 * log_variance).exp() * torch.randn_like(mean))
        reconstruction = F.binary_cross_entropy_with_logits(logits, pixels, reduction="none").sum((1, 2, 3))
        return reconstruction, 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


class Replay:
    """Images from the VAE of the task before, labelled by the teacher; takes the place of dreams."""

    def __init__(self, vae: VAE, teacher: Network) -> None:
        self.vae, self.teacher = vae.eval().requires_grad_(False), teacher

    @property
    def nbytes(self) -> int:
        """Bytes of the VAE."""
        return sum(tensor.nbytes for tensor in self.vae.state_dict().values())

    @torch.no_grad()
    def sample(self, n: int) -> Dream:
        pixels = self.vae.decode(torch.randn(n, self.vae.latent, device=self.teacher.mean.device)).sigmoid()
        images = self.teacher.normalize(pixels.float())
        return Dream(images, self.teacher.classify(images).float())


class DGR(Yardstick):
    name = "dgr"

    def prepare(self, task: Task) -> Iterator[Stage]:
        if task.remembers:
            assert task.teacher is not None
            task.dreams = Replay(self._vae(task), task.teacher)  # type: ignore[assignment]  # it has the same `sample`
        return iter(())

    def loss(self, task: Task, batch: Batch) -> Terms:
        n, replay = len(batch), task.memory[1].sample(len(batch))
        logits = task.student.classify(torch.cat([batch.images, replay.images]))  # (2B, C)
        return {
            "real": (1 - task.rho) * F.cross_entropy(logits[:n], batch.targets),
            "replayed": task.rho * F.cross_entropy(logits[n:], replay.labels),
            "distillation": self.weight(task) * distil(logits[n:], replay.logits),
        }

    def refine(self, task: Task) -> Iterator[Stage]:
        """Trains the next VAE, on the new images and on what the last one replays."""
        vae, student, recipe = self._vae(task), task.student, task.recipe

        def loss(batch: Batch) -> Terms:
            images, weights = batch.images, torch.full((len(batch),), 1 - task.rho, device=task.device)
            if task.dreams is not None:
                images = torch.cat([images, task.dreams.sample(len(batch)).images])
                weights = torch.cat([weights, torch.full_like(weights, task.rho)])
            pixels = (images * student.std + student.mean).clamp(0, 1)
            reconstruction, kl = vae.loss(pixels)
            return {"reconstruction": (weights * reconstruction).mean(), "kl": (weights * kl).mean()}

        yield StageSpec(
            "vae",
            task.batches,
            recipe.generator.steps,
            loss,
            lambda: torch.optim.Adam(vae.parameters(), LEARNING_RATE),
            trains=[vae],
        )
        self.kept = {name: value.detach().clone() for name, value in vae.state_dict().items()}

    def _vae(self, task: Task) -> VAE:
        vae = VAE(task.student.image_size, latent=task.recipe.generator.latent, width=task.recipe.generator.width)
        if self.kept:
            vae.load_state_dict(self.kept)
        return vae.to(task.device)
