"""Recipe: every number of a learning run, by name, with its source.

Two recipes come with the package. `paper` is ABD's published setting to the letter; `edge`, the default, learns a
task in minutes on two CPU cores. Change a number with `dataclasses.replace(RECIPES["edge"], flip=False)`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal

from edge_dfcil.errors import SettingError


@dataclass(frozen=True)
class Recipe:
    """All settings of `learn_task`. The defaults are the published ones of ABD (Smith et al., ICCV 2021) on CIFAR-100.

    "ours" marks what the paper does not have; each such part is off by default and on in the `edge` recipe.
    """

    # The classifier's schedule (ABD, supplement).
    epochs: int = 250  # passes over a task's images
    first_epochs: int | None = None  # the same for the first task; None: as `epochs`
    min_steps: int = 0  # ours: a small task is repeated until it has had this many steps
    schedule: Literal["step", "one_cycle"] = "step"
    milestones: tuple[float, ...] = (0.4, 0.6, 0.8)  # lr x 0.1 at these shares of the epochs: 100, 150, 200 of 250
    learning_rate: float = 0.1  # SGD; the peak of a one-cycle schedule
    momentum: float = 0.9
    weight_decay: float = 2e-4
    clip_gradient: float | None = None  # ours: largest gradient norm of a step
    # Ours: None keeps the network's own. Running statistics must keep up with a short schedule, since the classifier
    # answers by them and dreams are made to match them; torchvision's MobileNetV3 comes with 0.01, made for long ones.
    batchnorm_momentum: float | None = None
    # Ours: the share of the backbone's layers, counted from the image, that stay as the first task left them. They need no
    # backward pass and keep no activations, and what they give cannot be forgotten.
    freeze: float = 0.0
    drop_incomplete: bool = True  # skip batches smaller than the largest one

    # Augmentation of real images (ABD, supplement).
    brightness: float = 63 / 255  # colour jitter: factor drawn from 1 -/+ this
    contrast: float = 0.8
    flip: bool = True  # horizontally; switch off where left and right differ, as for digits
    crop_padding: int = 4  # pixels of zeros around the image before the random crop

    # The generator (ABD, supplement; "ours" after section 6 of our reference trials).
    latent: int = 1000  # length of z
    width: int = 128  # channels
    generator_steps: int = 10_000
    generator_batch: int = 128
    generator_learning_rate: float = 1e-3  # Adam
    generator_schedule: Literal["constant", "one_cycle"] = "constant"

    # The inversion objective (ABD, eqs. 1 to 5).
    content: float = 1.0
    content_temperature: float = 1000.0
    diversity: float = 1.0
    statistics: float = 50.0
    smoothness: float = 1e-3
    # Ours: the classifier sees the generator's images augmented, as it saw real ones in training: its running statistics are
    # of those. Without it dreams look augmented already, and a student that is shown them augmented again learns less. What
    # a task remembers by dreams gained nothing from it (`adopt` in the workshop), so that recipes leave it off.
    augment_dreams: bool = False

    # Adaptive dreams (Adaptive DeepInversion, Yin et al., CVPR 2020): the weight of 1 - JS, where a student competes with a
    # generator's dreams. The paper's weight is of pixel dreams, below.
    competition: float = 10.0

    # Pixel dreams (DeepInversion, Yin et al., CVPR 2020, section 4.1, CIFAR-10): slower than a generator's, and finer.
    pixel_steps: int = 2000  # of Adam, on each batch of images
    pixel_batch: int = 256
    pixel_learning_rate: float = 0.05
    pixel_statistics: float = 10.0
    pixel_first_layer: float = 1.0  # the first BatchNorm layer's share; 10 for ImageNet
    pixel_variation: float = 2.5e-5
    pixel_l2: float = 0.0
    pixel_competition: float = 10.0  # of adaptive ones
    pixel_jitter: int = 2  # pixels that an image is shifted by at each step, at most, round its edges

    # Remembering.
    dreams: Literal["generator", "pixels"] = "generator"  # ours: a method may remember through either; pixels need a pool
    pool: int = 0  # dreams made once a task, with the teacher's outputs; 0: fresh dreams at every step, as published
    mu: float | None = None  # weight of the distillation term; None: the method's published value
    local_cross_entropy: bool = True  # ABD, eq. 6; False is the ablation "standard cross-entropy"
    head_finetuning: bool = True  # ABD, eq. 8; False is the ablation
    importance: bool = True  # ABD, eq. 7: feature distillation weighted by the old head; False: plain
    distil_on: Literal["both", "real", "synthetic"] = "both"

    # Head refinement, a closing stage (ours, after R-DFCIL, Gao et al., ECCV 2022): backbone frozen in eval mode.
    refine_epochs: int = 0
    refine_min_steps: int = 0
    refine_learning_rate: float = 0.005
    # Ours, after "Maintaining discrimination and fairness" (Zhao et al., CVPR 2020): at the end, the head's rows of the
    # current classes are scaled down to this share of the old ones' mean norm, for which there were only dreams; 0: not.
    align_head: float = 0.0

    # Ours, after the test-time views of the ImageNet years (Krizhevsky et al., 2012): the classifier's logits are the mean of
    # those of an image and of its mirror image, here and in what is exported, at twice the work an answer. Learning is the same.
    mirrored_answers: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            # Annotations are text here: "int | None" is a whole number, or nothing.
            kind, _, optional = str(field.type).partition(" | ")
            value, (wanted, said) = getattr(self, field.name), _KINDS.get(kind, (object, ""))
            if not isinstance(value, wanted) and not (optional and value is None):
                raise SettingError(f"recipe.{field.name} is {value!r}; it must be {said}{' or None' if optional else ''}")
        for name in ("epochs", "generator_steps", "generator_batch", "latent", "width", "pixel_steps", "pixel_batch"):
            if getattr(self, name) < 1:
                raise SettingError(f"recipe.{name} is {getattr(self, name)}; it must be 1 or more")
        rates = ("learning_rate", "generator_learning_rate", "refine_learning_rate", "pixel_learning_rate")
        for name in (*rates, "content_temperature"):
            if not getattr(self, name) > 0:
                raise SettingError(f"recipe.{name} is {getattr(self, name)}; it must be above 0")
        for name in ("min_steps", "refine_epochs", "refine_min_steps", "pool", "crop_padding", "weight_decay", "align_head"):
            if getattr(self, name) < 0:
                raise SettingError(f"recipe.{name} is {getattr(self, name)}; it must not be negative")
        if self.dreams == "pixels" and not self.pool:
            raise SettingError("recipe.dreams is 'pixels', which are made once a task; say how many with recipe.pool")
        if self.mirrored_answers and not self.flip:
            raise SettingError(
                "recipe.mirrored_answers takes mirrored images for alike, and recipe.flip=False does not; set both"
            )
        if not 0 <= self.freeze < 1:
            raise SettingError(f"recipe.freeze is {self.freeze}; it is a share of layers, from 0 to below 1")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise SettingError(f"recipe.{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON takes them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The inverse of `to_dict`. Raises `SettingError` for a name this version does not know."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise SettingError(f"the recipe names {', '.join(unknown)}, which this version does not know; upgrade edge-dfcil")
        typed: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        return cls(**typed)


_KINDS: dict[str, tuple[type, str]] = {
    "bool": (bool, "True or False"),
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
}
_CHOICES = {
    "schedule": ("step", "one_cycle"),
    "generator_schedule": ("constant", "one_cycle"),
    "distil_on": ("both", "real", "synthetic"),
    "dreams": ("generator", "pixels"),
}

PAPER = Recipe()

EDGE = replace(
    PAPER,
    epochs=8,
    first_epochs=12,
    min_steps=400,
    schedule="one_cycle",
    clip_gradient=5.0,
    batchnorm_momentum=0.1,
    drop_incomplete=False,
    latent=64,
    width=64,
    generator_steps=250,
    generator_batch=64,
    generator_learning_rate=2e-3,
    generator_schedule="one_cycle",
    pixel_steps=200,
    pixel_batch=128,
    pixel_learning_rate=0.1,
    pixel_statistics=1.0,  # with few steps and small batches, 10 leaves the class no say
    competition=1.0,  # with few steps, 10 leaves the statistics no say: a student learns nothing from what is dreamt then
    pool=2560,
    refine_epochs=2,
    refine_min_steps=150,
    refine_learning_rate=0.05,
    align_head=1.0,
)

RECIPES = {"paper": PAPER, "edge": EDGE}


def find_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by name, or the one given. Raises `SettingError` for an unknown name."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise SettingError(f"no recipe is called {recipe!r}; choose one of {', '.join(RECIPES)}, or pass a Recipe")
    return RECIPES[recipe]
