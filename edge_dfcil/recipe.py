"""Recipe: every setting of a learning run, by group and name, with its source.

Presets come with the package. `frozen`, the default, trains the backbone in the first task only, or not at all; `edge` trains it
at every task, in minutes on two CPU cores; `strict` stores no class statistics; `paper` is ABD's published setting. Change
settings with `RECIPES["edge"].changed({"augmentation.flip": False, "schedule.epochs": 3})`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_origin

from pydantic import BeforeValidator

from edge_dfcil import _flat_recipe as flat
from edge_dfcil.errors import SettingError
from edge_dfcil.settings import (
    CONFIG,
    Count,
    CountOrZero,
    Positive,
    Share,
    ShareBelowOne,
    Weight,
    checked,
    did_you_mean,
    validated,
)
from exporters.texts import parse_json, shown
from exporters.values import is_one_of

MAX_FILE = 1_000_000  # bytes of a recipe file; a complete recipe takes 3,000


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _unknown(name: str) -> str:
    groups = f"it has the groups {', '.join(GROUPS)}"
    return f"a recipe has no setting {name!r}{did_you_mean(name, list(SETTINGS), groups)}"


@checked("recipe.schedule")
@validated(frozen=True, kw_only=True, config=CONFIG)
class Schedule:
    """The classifier's schedule (ABD, supplement)."""

    epochs: Count = 250
    """Passes over a task's images."""
    first_epochs: Count | None = None
    """Passes over the first task's images; None: as `epochs`."""
    min_steps: CountOrZero = 0
    """Ours: a small task is repeated until it has had this many steps."""
    shape: Literal["step", "one_cycle"] = "step"
    """Of the learning rate: divided by ten at each milestone, as published, or one cycle (ours, for short schedules)."""
    milestones: Annotated[tuple[Share, ...], BeforeValidator(_tuple)] = (0.4, 0.6, 0.8)
    """Shares of the epochs at which the learning rate is multiplied by 0.1: epochs 100, 150, 200 of 250."""
    learning_rate: Positive = 0.1
    """Of SGD; the peak of a one-cycle schedule."""
    momentum: ShareBelowOne = 0.9
    """Of SGD."""
    weight_decay: Weight = 2e-4
    """Of SGD."""
    clip_gradient: Positive | None = None
    """Ours: largest gradient norm of a step."""
    batchnorm_momentum: Share | None = None
    """Ours: None keeps the network's own. Running statistics must keep up with a short schedule, since the classifier uses them
    in eval mode and dreams are made to match them; torchvision's MobileNetV3 has 0.01, which suits long schedules."""
    freeze: ShareBelowOne = 0.0
    """Ours: the share of the backbone's layers, counted from the input, that are frozen after the first task. They need no
    backward pass and keep no activations, and their features cannot be forgotten."""
    freeze_batchnorm: bool = False
    """Ours: running statistics of BatchNorm are frozen after the first task, and are used to normalise in training too."""
    later_learning_rate: Positive | None = None
    """Ours: the learning rate after the first task; None: as `learning_rate`."""
    adapt: Literal["always", "first", "never"] = "always"
    """Ours: when to train the backbone under a closed-form head. "first": in the first task, and only if it has not been trained
    before; later tasks are one pass over their images. Classes without statistics still require training."""
    drop_incomplete: bool = True
    """Skip batches smaller than the largest one."""
    mixed_precision: bool = False
    """Ours: training stages may compute in bf16 (autocast): on CUDA devices that support it, and on a CPU if it is measured to be
    faster, or requested by the learner's `precision`. False: always in float32."""


@checked("recipe.augmentation")
@validated(frozen=True, kw_only=True, config=CONFIG)
class Augmentation:
    """Augmentation of real images in training (ABD, supplement), and test-time augmentation."""

    brightness: Weight = 63 / 255
    """Colour jitter: the factor is drawn from 1 -/+ this."""
    contrast: Weight = 0.8
    """Colour jitter: the factor is drawn from 1 -/+ this."""
    flip: bool = True
    """Mirror images at random; switch it off where left and right differ, as for digits."""
    crop_padding: CountOrZero = 4
    """Pixels of zeros around the image before the random crop."""
    rotations: bool = False
    """Ours, after self-supervised label augmentation (Lee et al., ICML 2020): in the first task images rotated by 90, 180 and 270
    degrees are separate classes for a second head, which is deleted afterwards. Features of more classes transfer better. A
    step takes four times as long."""
    mirrored_answers: bool = False
    """Ours, test-time augmentation (Krizhevsky et al., 2012): the classifier's logits are the mean over an image and its
    mirror image, here and in exported models, at twice the work per answer. Learning is unchanged."""

    def __post_init__(self) -> None:
        if self.mirrored_answers and not self.flip:
            raise SettingError(
                "recipe.augmentation.mirrored_answers treats mirrored images as equal, and recipe.augmentation.flip=False does "
                "not; set both"
            )


@checked("recipe.generator")
@validated(frozen=True, kw_only=True, config=CONFIG)
class Generator:
    """The generator of dreams (ABD, supplement)."""

    latent: Count = 1000
    """Length of the noise vector z."""
    width: Count = 128
    """Channels of its convolutions."""
    steps: Count = 10_000
    """Optimizer steps per task."""
    batch: Count = 128
    """Images per step."""
    learning_rate: Positive = 1e-3
    """Of Adam."""
    schedule: Literal["constant", "one_cycle"] = "constant"
    """Of the learning rate; one cycle is ours."""


@checked("recipe.inversion")
@validated(frozen=True, kw_only=True, config=CONFIG)
class Inversion:
    """Weights of the inversion objective (ABD, eqs. 1 to 5)."""

    content: Weight = 1.0
    """Cross-entropy against the class that the teacher predicts (eq. 1)."""
    content_temperature: Positive = 1000.0
    """What the logits of that term are divided by."""
    diversity: Weight = 1.0
    """All classes are generated equally often (eq. 2)."""
    statistics: Weight = 50.0
    """Batch statistics match those of the BatchNorm layers (eq. 4)."""
    smoothness: Weight = 1e-3
    """Distance between images and their blur (eq. 3)."""
    augment: bool = False
    """Ours: the classifier sees the generator's images augmented, as it saw real ones in training, since its running statistics
    come from augmented images. Without it dreams already look augmented, and a student that sees them augmented again learns
    less. Replay by dreams gained nothing from it (`adopt` in the workshop), so recipes leave it off."""
    competition: Weight = 10.0
    """Adaptive dreams (Adaptive DeepInversion, Yin et al., CVPR 2020): the weight of 1 - JS, where a student competes with a
    generator's dreams. The paper's weight is for pixel dreams, `pixels.competition`."""


@checked("recipe.pixels")
@validated(frozen=True, kw_only=True, config=CONFIG)
class Pixels:
    """Pixel dreams (DeepInversion, Yin et al., CVPR 2020, section 4.1, CIFAR-10): slower than a generator's, and finer."""

    steps: Count = 2000
    """Of Adam, on each batch of images."""
    batch: Count = 256
    """Images that are optimised together."""
    learning_rate: Positive = 0.05
    """Of Adam."""
    statistics: Weight = 10.0
    """Weight of the distance to the statistics of the BatchNorm layers."""
    first_layer: Weight = 1.0
    """The first BatchNorm layer's share in that distance; 10 for ImageNet."""
    variation: Weight = 2.5e-5
    """Weight of total variation."""
    l2: Weight = 0.0
    """Weight of the images' norm."""
    competition: Weight = 10.0
    """Weight of 1 - JS in adaptive dreams."""
    jitter: CountOrZero = 2
    """Pixels that an image is shifted by at each step, at most, with wrap-around."""


@checked("recipe.remember")
@validated(frozen=True, kw_only=True, config=CONFIG)
class Remember:
    """How a task remembers the classes of earlier tasks."""

    dreams: Literal["generator", "pixels"] = "generator"
    """Ours: a method may use either kind of dreams; pixel dreams need a pool."""
    pool: CountOrZero = 0
    """Dreams made once per task, with the teacher's outputs; 0: fresh dreams at every step, as published."""
    mu: Weight | None = None
    """Weight of the distillation term; None: the method's published value."""
    local_cross_entropy: bool = True
    """ABD, eq. 6; False is the ablation "standard cross-entropy"."""
    head_finetuning: bool = True
    """ABD, eq. 8; False is the ablation."""
    importance: bool = True
    """ABD, eq. 7: feature distillation weighted by the old head; False: plain."""
    distil_on: Literal["both", "real", "synthetic"] = "both"
    """ABD, eq. 7: on real and generated images; one of them alone is the ablation."""
    class_statistics: bool = True
    """Ours: whether a method may store class statistics between tasks besides weights: sums over images (means, counts)."""
    min_images: Count = 10
    """Fewest images behind a stored class statistic: a sum over fewer reveals too much about each."""
    images_per_direction: CountOrZero = 0
    """Ours: the stored covariance keeps only its leading directions, one per this number of images; 0: all. A covariance of fewer
    images than features is spanned by them, so a file with it reveals which images it was made from (`edge-dfcil audit`)."""
    min_directions: Count = 1
    """Ours: fewest directions kept. Few images are revealed by the class means anyway, and then fewer directions cost most."""

    def __post_init__(self) -> None:
        if self.dreams == "pixels" and not self.pool:
            raise SettingError(
                "recipe.remember.dreams is 'pixels', which are made once per task; set how many with recipe.remember.pool"
            )


@checked("recipe.refine")
@validated(frozen=True, kw_only=True, config=CONFIG)
class Refine:
    """Head refinement, a closing stage (ours, after R-DFCIL, Gao et al., ECCV 2022): backbone frozen in eval mode."""

    epochs: CountOrZero = 0
    """Passes over the task's images; 0: no refinement."""
    min_steps: CountOrZero = 0
    """A small task is repeated until it has had this many steps."""
    learning_rate: Positive = 0.005
    """Of SGD."""
    align_head: Weight = 0.0
    """Ours, after "Maintaining discrimination and fairness" (Zhao et al., CVPR 2020): at the end, the head's rows of the current
    classes are scaled down to this share of the mean norm of the old rows, which saw only dreams in the task; 0: off."""
    head: Literal["trained", "lda"] = "trained"
    """Ours: the final head. "lda" is a closed form from class statistics, which follow the backbone through a drift map; for
    classes without statistics they come from generated images."""
    calibrate: bool = False
    """Ours: a temperature and rejection thresholds. For a closed-form head over a backbone that is not trained in the task, they
    need no held-out images; otherwise they are found on `held_out`."""
    held_out: ShareBelowOne = 0.0
    """Ours: a share of the task's images that is not trained on, for calibration; 0: none."""
    false_rejections: ShareBelowOne = 0.05
    """The share of the task's own images that the thresholds reject."""


GROUPS: dict[str, type] = {
    group.__name__.lower(): group for group in (Schedule, Augmentation, Generator, Inversion, Pixels, Remember, Refine)
}
# Every setting by its dotted name: "schedule.epochs".
SETTINGS = {f"{name}.{field.name}": field for name, group in GROUPS.items() for field in dataclasses.fields(group)}


@dataclass(frozen=True, init=False)
class Recipe:
    """All settings of `learn_task`, in groups. The groups' defaults are the published ones of ABD (Smith et al., ICCV 2021) on
    CIFAR-100.

    "ours" marks what the paper does not have; each such part is off by default and on in the `edge` recipe.

    Parameters
    ----------
    preset, version
        The preset that this recipe is made from. A settings file takes the settings that it leaves out from there.
    schedule, augmentation, generator, inversion, pixels, remember, refine
        The groups; each with the published values by default.
    origin
        For `dataclasses.replace`: the recipe whose groups are used where none is given.

    Raises
    ------
    SettingError
        For a setting that is unknown, of a wrong type or out of range.
    """

    preset: str
    version: int
    schedule: Schedule
    augmentation: Augmentation
    generator: Generator
    inversion: Inversion
    pixels: Pixels
    remember: Remember
    refine: Refine
    # `dataclasses.replace` reads this from the recipe that it copies and passes it to `__init__`, so that a group with the name
    # of a flat setting ("schedule") is not lost.
    origin: InitVar[Recipe | None] = property(lambda self: self)  # noqa: RUF009

    def __init__(
        self,
        *,
        preset: str = "paper",
        version: int = 1,
        schedule: Schedule | str | None = None,
        augmentation: Augmentation | None = None,
        generator: Generator | None = None,
        inversion: Inversion | None = None,
        pixels: Pixels | None = None,
        remember: Remember | None = None,
        refine: Refine | None = None,
        origin: Recipe | None = None,
        **old_names: Any,
    ) -> None:
        if not isinstance(preset, str) or not preset:
            raise SettingError(f"recipe.preset is {preset!r}; it must be a name")
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise SettingError(f"recipe.version is {version!r}; it must be a whole number of 1 or more")
        if isinstance(schedule, str):
            old_names["schedule"], schedule = schedule, None
        given = (schedule, augmentation, generator, inversion, pixels, remember, refine)
        groups = {}
        for (name, kind), group in zip(GROUPS.items(), given, strict=True):
            groups[name] = group if group is not None else kind() if origin is None else getattr(origin, name)
            if not isinstance(groups[name], kind):
                raise SettingError(f"recipe.{name} is {group!r}; it must be a {kind.__name__}")
        if old_names:
            changes = dotted(old_names)
            flat.warn(changes, "Recipe takes groups now; change settings by recipe.changed({...}) with the names")
            groups |= _changed(groups, changes)
        for name, value in {"preset": preset, "version": version, **groups}.items():
            object.__setattr__(self, name, value)

    if not TYPE_CHECKING:  # a type checker must report the old names

        def __getattr__(self, name: str) -> Any:
            if name not in flat.NAMES:
                raise AttributeError(f"a recipe has no {name!r}")
            group, _, new = flat.NAMES[name].partition(".")
            flat.warn({flat.NAMES[name]: None}, f"recipe.{name} is in a group now; read")
            return getattr(getattr(self, group), new)

    def changed(self, changes: Mapping[str, Any]) -> Recipe:
        """A recipe with other settings: `recipe.changed({"schedule.epochs": 3, "generator.width": 32})`.

        A string is parsed ("3", "1e-3", "0.4,0.6", "true", "none"). The former names without groups are accepted too ("epochs",
        "generator_steps"). Raises `SettingError` for a setting that is unknown, of a wrong type or out of range.
        """
        typed = {name: _of_text(name, value) if isinstance(value, str) else value for name, value in dotted(changes).items()}
        groups: dict[str, Any] = {name: getattr(self, name) for name in GROUPS}
        return replace(self, **_changed(groups, typed))

    def differences(self) -> dict[str, Any]:
        """The settings that differ from the preset, by dotted name; all of them if the package has no such preset."""
        preset = PRESETS.get((self.preset, self.version))
        own, theirs = _settings(self), {} if preset is None else _settings(preset)
        return {name: value for name, value in own.items() if name not in theirs or theirs[name] != value}

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values: `preset`, `version`, and a mapping for each group."""
        values = asdict(self)
        values["schedule"]["milestones"] = list(self.schedule.milestones)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; takes the flat form of model files of schema 1 as well.

        Settings that are left out come from the preset that is named, or, if none is named, from the preset that agrees with
        most of the settings given. Raises `SettingError` for a name that this version does not know.
        """
        settings = {name: value for name, value in values.items() if name not in ("preset", "version")}
        try:
            changes = dotted(settings)
        except SettingError as error:
            raise SettingError(f"{error}; if a newer version wrote it, upgrade edge-dfcil") from None
        if "preset" in values:
            base = _named(values["preset"], values.get("version"), whole=changes.keys() >= SETTINGS.keys())
        else:
            changes = _as_once_accepted(changes)
            base = max((PAPER, EDGE), key=lambda preset: _agreement(preset, changes))
        return base.changed(changes)


def dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted name, given by group, by dotted name or by the former flat name. Raises `SettingError` for others."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in GROUPS and isinstance(value, Mapping):
            named = {f"{name}.{inner}": one for inner, one in value.items()}
        else:
            named = {flat.NAMES.get(name, name): value}
        if twice := found.keys() & named.keys():
            raise SettingError(f"the setting {sorted(twice)[0]!r} is given twice, by different names; give it once")
        found |= named
    for name in found:
        if not isinstance(name, str):
            raise SettingError(f"a recipe has no setting {name!r}; settings are strings such as 'schedule.epochs'")
        if name not in SETTINGS:
            raise SettingError(_unknown(name))
    return found


def _changed(groups: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The groups that the changes concern, with the changes made."""
    found: dict[str, dict[str, Any]] = {}
    for setting, value in changes.items():
        group, _, name = setting.partition(".")
        found.setdefault(group, {})[name] = value
    return {group: replace(groups[group], **values) for group, values in found.items()}


def _of_text(setting: str, text: str) -> Any:
    """The value in a string: a number, a bool, None, or numbers separated by commas. Otherwise the string."""
    group, _, name = setting.partition(".")
    field: Any = GROUPS[group].__pydantic_fields__[name]  # type: ignore[attr-defined]
    if get_origin(field.annotation) is Literal:
        return text
    if get_origin(field.annotation) is tuple:
        return tuple(_number(part) for part in text.split(",") if part.strip())
    return _number(text)


def _number(text: str) -> Any:
    word = text.strip().lower()
    if word in _WORDS:
        return _WORDS[word]
    for kind in (int, float):
        try:
            value = kind(word)
        except ValueError:
            continue
        return int(value) if value == value // 1 else value  # "1e3" is a whole number
    return text


_WORDS = {"none": None, "null": None, "true": True, "false": False}


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Every setting of a recipe by its dotted name."""
    return {f"{group}.{name}": value for group in GROUPS for name, value in asdict(getattr(recipe, group)).items()}


def _agreement(preset: Recipe, changes: Mapping[str, Any]) -> int:
    own = _settings(preset)
    return sum((list(own[name]) if isinstance(own[name], tuple) else own[name]) == value for name, value in changes.items())


def _as_once_accepted(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a model file of schema 1, whose checks accepted a bool as a number, and 0 first epochs as None."""
    found = dict(changes)
    for name, value in changes.items():
        if isinstance(value, bool) and "bool" not in str(SETTINGS[name].type):
            found[name] = int(value)
    if found.get("schedule.first_epochs") == 0:
        found["schedule.first_epochs"] = None
    return found


def _named(preset: Any, version: Any, whole: bool) -> Recipe:
    """The preset of a name and version, the latest by default. For complete settings (`whole`) it may be unknown."""
    released = [recipe for (name, number), recipe in PRESETS.items() if name == preset and version in (None, number)]
    if released:
        return released[-1]
    if not whole:
        known = ", ".join(f"{name} {number}" for name, number in PRESETS)
        raise SettingError(
            f"the recipe leaves settings out, and its preset {preset!r}, version {version!r}, is unknown; there are {known}; "
            "name one of these, or give every setting; if a newer version wrote it, upgrade edge-dfcil"
        )
    return Recipe(preset=preset, version=1 if version is None else version)


PAPER = Recipe(preset="paper")

EDGE = Recipe(
    preset="edge",
    schedule=Schedule(
        epochs=8,
        first_epochs=12,
        min_steps=400,
        shape="one_cycle",
        clip_gradient=5.0,
        batchnorm_momentum=0.1,
        drop_incomplete=False,
        mixed_precision=True,
    ),
    generator=Generator(latent=64, width=64, steps=250, batch=64, learning_rate=2e-3, schedule="one_cycle"),
    # With few steps, a weight of 10 leaves the statistics without effect: a student learns nothing from such dreams.
    inversion=Inversion(competition=1.0),
    # With few steps and small batches, a weight of 10 for the statistics leaves the class without effect.
    pixels=Pixels(steps=200, batch=128, learning_rate=0.1, statistics=1.0),
    remember=Remember(pool=2560),
    refine=Refine(epochs=2, min_steps=150, learning_rate=0.05, align_head=1.0),
)

# A frozen backbone, features of several scales and a closed-form head are more accurate than training at every task, in a
# hundredth of the time (docs/research-log.md). Classes without statistics are learnt as with `edge`.
FROZEN_1 = replace(EDGE.changed({"schedule.adapt": "first", "refine.head": "lda", "refine.calibrate": True}), preset="frozen")
# A full covariance reveals which images it was made from, almost with certainty if they are fewer than the features. One
# direction per 16 images removes most of that, for a point of accuracy. Thresholds are chosen on images not trained on.
FROZEN = replace(
    FROZEN_1.changed({"remember.images_per_direction": 16, "remember.min_directions": 64, "refine.held_out": 0.1}), version=2
)

STRICT_1 = replace(EDGE.changed({"remember.class_statistics": False}), preset="strict")
# As `frozen`, but only the rows of the head are kept: what makes them comparable is recomputed from generated images; 1,500 of
# them, instead of 6,144, cost two points. Later classes use the features learnt from the first task's classes: rotated images
# as extra classes make these features more general.
STRICT = replace(
    STRICT_1.changed({"schedule.adapt": "first", "refine.head": "lda", "augmentation.rotations": True, "remember.pool": 6144}),
    version=2,
)

# Never change a preset that has been released: add a version, and let RECIPES name it. Files state the version they use.
PRESETS = {(recipe.preset, recipe.version): recipe for recipe in (PAPER, EDGE, FROZEN_1, FROZEN, STRICT_1, STRICT)}
RECIPES = {"frozen": FROZEN, "edge": EDGE, "strict": STRICT, "paper": PAPER}
DEFAULT = "frozen"


def find_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by name, or the one given. Raises `SettingError` for an unknown name."""
    if isinstance(recipe, Recipe):
        return recipe
    if not is_one_of(recipe, RECIPES):
        raise SettingError(f"no recipe is called {recipe!a:.80}; choose one of {', '.join(RECIPES)}, or pass a Recipe")
    return RECIPES[recipe]


def read_recipe(path: Path) -> Recipe:
    """A recipe from a JSON file in the form of `Recipe.to_dict`. One that names no preset changes `edge`.

    Raises `SettingError` if the file cannot be read or is not a recipe.
    """
    try:
        with open(path, "rb") as file:
            values = parse_json(file.read(MAX_FILE + 1).decode("utf-8"), MAX_FILE)
    except (OSError, ValueError) as error:
        raise SettingError(
            f"{path} is not a recipe ({shown(error)[:200]}); it must be JSON as `Recipe.to_dict` writes it"
        ) from error
    if not isinstance(values, dict):
        raise SettingError(f'{path} is not a recipe; it must be a JSON object such as {{"schedule": {{"epochs": 3}}}}')
    return Recipe.from_dict({"preset": "edge", **values})
