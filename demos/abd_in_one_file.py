"""ABD, "Always Be Dreaming" (Smith et al., ICCV 2021), in one file: learn new classes without keeping an image.

    python demos/abd_in_one_file.py            needs torch and scikit-learn; about two minutes on one CPU core

It learns scikit-learn's handwritten digits, two a task. Before a task, a generator is trained to invert the classifier
(section 4 of the paper); its images then replace the old digits, which are not kept (section 5). `edge_dfcil` is not used
here; its losses and gradients are the same for the same weights and images (tests/test_one_file.py).

The steps do the same work as the published code, including unneeded work, which is marked "waste". The package leaves it out,
and `python -m benchmarks speed` measures the difference.
"""

import copy
import math
from typing import cast

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

# Values for the digits, with the published ones for CIFAR-100 in brackets. A value without brackets is the published one.
SIZE, DEPTH = 16, 8  # pixels a side, layers of the residual network (32, 32)
LATENT, WIDTH = 64, 32  # of the generator (1000, 128)
BATCH, EPOCHS, GENERATOR_STEPS = 32, 20, 150  # real images per step, as many generated; the others per task (128, 250, 10,000)
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 2e-4  # SGD
MILESTONES = (0.4, 0.6, 0.8)  # shares of the epochs after which the learning rate is divided by 10
STATISTICS, SMOOTHNESS, DISTILLATION = 50.0, 1e-3, 0.1  # weights of loss terms

Losses = dict[str, Tensor]  # the named terms of a loss; their sum is minimised


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters: subsampled in space, padded with zero channels."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.padding = (1, 0) if before == after else (2, (after - before) // 2)
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, self.stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding)))


class ResNet(nn.Module):
    """Images (N, 3, S, S) to features (N, 64) (He et al., CVPR 2016, section 4.2)."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        blocks, channels = (depth - 2) // 6, ((16, 16), (16, 32), (32, 64))
        stages = (nn.Sequential(Block(a, b), *(Block(b, b) for _ in range(blocks - 1))) for a, b in channels)
        self.stages = nn.Sequential(*stages)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(F.relu(self.bn1(self.conv1(x)))).mean((2, 3))


class Classifier(nn.Module):
    """Images (N, 3, S, S) to logits (N, classes)."""

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


class Generator(nn.Sequential):
    """Noise (N, latent) to normalised images (N, 3, S, S): a map of 8 x 8 is doubled in size until it has S x S pixels."""

    def __init__(self, image_size: int, latent: int, width: int) -> None:
        layers: list[nn.Module] = [nn.Linear(latent, width * 64), nn.Unflatten(1, (width, 8, 8)), nn.BatchNorm2d(width)]
        doublings = int(math.log2(image_size / 8))
        for out in [*[width] * (doublings - 1), width // 2]:
            layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(width, out, 3, padding=1)]
            layers += [nn.BatchNorm2d(out, eps=0.8), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(width // 2, 3, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(3, affine=False))
        self.latent = latent

    def sample(self, n: int) -> Tensor:
        return self(torch.randn(n, self.latent, device=next(self.parameters()).device))


class Teacher:
    """The classifier before a task, in eval mode, and the divergence of its last images from those that it has learnt from."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = copy.deepcopy(classifier).eval().requires_grad_(True)  # waste: its weights collect gradients
        self.divergences: list[Tensor] = []  # one for each BatchNorm layer
        for layer in self.classifier.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.register_forward_hook(self._compare)  # waste: at every pass, not only when inverting

    def __call__(self, images: Tensor) -> Tensor:
        self.divergences = []
        return self.classifier(images)

    def _compare(self, layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Channel-mean of KL(N(m, r) || N(u, v)), running statistics m, r against the batch's u, v (eq. 4)."""
        x, m, r = inputs[0], cast(Tensor, layer.running_mean), cast(Tensor, layer.running_var)
        u, v = x.mean((0, 2, 3)), x.permute(1, 0, 2, 3).reshape(len(m), -1).var(1, correction=0)  # waste: a copy of x
        self.divergences.append((torch.log(v.sqrt() / r.sqrt()) - (1 - (r + (m - u) ** 2) / v) / 2).mean())


def inversion_losses(teacher: Teacher, images: Tensor) -> Losses:
    """Small if generated images (N, 3, S, S) are like those that the teacher has learnt from (eqs. 1 to 5)."""
    o = teacher(images)  # (N, classes)
    p = o.softmax(1).mean(0)
    row = torch.exp(-(torch.arange(-2.0, 3.0, device=o.device) ** 2) / 4)  # a Gaussian of variance 2
    kernel = (torch.outer(row, row) / row.sum() ** 2).expand(3, 1, 5, 5)
    blurred = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=3)
    return {
        "content": F.cross_entropy(o / 1000, o.argmax(1)),
        "diversity": 1 + (p * (p + 1e-20).log()).sum() / math.log(len(p)),
        "statistics": STATISTICS * torch.stack(teacher.divergences).mean(),
        "smoothness": SMOOTHNESS * F.mse_loss(blurred, images),
    }


def learning_losses(student: Classifier, teacher: Teacher, images: Tensor, targets: Tensor, dreams: Tensor) -> Losses:
    """For B real images of new classes, their targets (B,), and B generated images, which the teacher labels (eqs. 6 to 8)."""
    n, n_old, n_seen = len(images), teacher.classifier.head.out_features, student.head.out_features
    rho = n_old / n_seen
    with torch.no_grad():
        labels = teacher(dreams).argmax(1)
        teacher(images)  # waste: nothing uses these logits
        both = torch.cat([images, dreams])
        before = teacher(both)  # waste: this pass alone would give the labels, too
    features = student.backbone(both)
    detached = student.backbone(both).detach()  # waste: features.detach() is the same
    all_targets = torch.cat([targets, labels])
    weights = torch.where(all_targets < n_old, rho, 1 - rho)
    return {
        # Eq. 6: separates the new classes from each other, on real images alone.
        "local": (1 - rho) * F.cross_entropy(student.head(features[:n])[:, n_old:], targets - n_old),
        # Eq. 8: only the head learns to separate old classes from new ones.
        "head": (weights * F.cross_entropy(student.head(detached), all_targets, reduction="none")).mean(),
        # Eq. 7: keeps features unchanged in the directions that the old head uses.
        "distillation": DISTILLATION * F.mse_loss(teacher.classifier.head(features), before),
    }


def descend(optimizer: torch.optim.Optimizer, losses: Losses) -> dict[str, float]:
    optimizer.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    return {name: loss.item() for name, loss in losses.items()}


def learn(student: Classifier, teacher: Teacher | None, images: Tensor, targets: Tensor) -> None:
    """One task. Without a teacher, in the first task and when fine-tuning, the loss is plain cross-entropy."""
    if teacher is not None:
        generator = Generator(SIZE, LATENT, WIDTH)
        adam = torch.optim.Adam(generator.parameters(), 1e-3)
        for _ in range(GENERATOR_STEPS):
            descend(adam, inversion_losses(teacher, generator.sample(BATCH)))
        generator.eval().requires_grad_(False)
    sgd = torch.optim.SGD(student.train().parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, [round(share * EPOCHS) for share in MILESTONES])
    for _ in range(EPOCHS):
        for index in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:  # incomplete batches are dropped
            x, y = images[index], targets[index]
            if teacher is None:
                descend(sgd, {"cross-entropy": F.cross_entropy(student(x), y)})
            else:
                descend(sgd, learning_losses(student, teacher, x, y, dreams=generator.sample(BATCH)))
        schedule.step()


def main() -> None:
    pixels, y = map(torch.from_numpy, load_digits(return_X_y=True))
    x = (pixels.float().view(-1, 1, 8, 8) / 16 - 0.3) / 0.35  # approximate mean and deviation
    x = F.interpolate(x, (SIZE, SIZE), mode="bilinear").expand(-1, 3, -1, -1)
    train, test = train_test_split(range(len(y)), test_size=0.25, stratify=y, random_state=0)
    for method in ("fine-tuning", "ABD"):  # the first shows what is lost without a teacher
        torch.manual_seed(0)
        student = Classifier(ResNet(DEPTH), nn.Linear(64, 2))
        for seen in range(2, 11, 2):
            teacher = Teacher(student) if method == "ABD" and seen > 2 else None
            if seen > 2:  # two more outputs; the rows of the old ones are kept
                rows, student.head = student.head, nn.Linear(64, seen)
                student.head.weight.data[:-2], student.head.bias.data[:-2] = rows.weight.data, rows.bias.data
            new = [i for i in train if seen - 2 <= y[i] < seen]
            learn(student, teacher, x[new], y[new])
            known = [i for i in test if y[i] < seen]
            right = (student.eval()(x[known]).argmax(1) == y[known]).float().mean()
            print(f"{method}: {100 * right:.1f} % of the test images of {seen} digits", flush=True)


if __name__ == "__main__":
    main()
