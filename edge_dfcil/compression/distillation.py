"""Data-free knowledge transfer: a student learns only from dreams of its teacher (DeepInversion, Yin et al., CVPR 2020,
section 4.4), in rounds. From the second round on the dreams are adaptive: optimised so that teacher and student differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from edge_dfcil import devices
from edge_dfcil.dreaming.inversion import Dream, Dreamer, Pool, make_pool
from edge_dfcil.dreaming.pixels import paint
from edge_dfcil.dreaming.work import GeneratingWork
from edge_dfcil.errors import SettingError
from edge_dfcil.methods._distillation import distil
from edge_dfcil.model.labels import Classes
from edge_dfcil.model.network import Network
from edge_dfcil.recipe import Recipe
from edge_dfcil.results import DistillReport, StageReport
from edge_dfcil.settings import CONFIG, Count, Positive, checked, validated
from edge_dfcil.training import augment, rehearsal
from edge_dfcil.training.callbacks import Callback
from edge_dfcil.training.loop import check_finite
from edge_dfcil.training.rehearsal import Generated, Rehearsal
from edge_dfcil.training.session import Session
from edge_dfcil.training.stage import Stage, StageSpec, Terms, set_batchnorm_momentum

if TYPE_CHECKING:
    from edge_dfcil.learner import Learner


@checked("Distillation")
@validated(frozen=True, config=CONFIG)
class Distillation:
    """How a student learns from its teacher's dreams. The temperature is the paper's, the other values are for a CPU."""

    rounds: Count = 12
    """In each round, dreams are added to the pool, and then the student learns from all of it."""
    dreams: Count = 640
    """Dreams added to the pool per round; the pool is discarded at the end."""
    generator_steps: Count = 80
    """Steps of the generator per round, from the second one on; the first has the recipe's."""
    steps: Count = 200
    """Steps of the student per round."""
    batch: Count = 64
    """Images per step."""
    learning_rate: Positive = 0.05
    """Of SGD, the peak of one cycle over all rounds."""
    temperature: Positive = 3.0
    """Logits are divided by it."""
    source: Literal["adaptive", "dreams", "noise"] = "adaptive"
    """"adaptive": dreams compete with the student from the second round on; "dreams": never; "noise": the baseline, no dreams."""
    quality: Literal["fast", "best"] = "fast"
    """Of the dreams: "fast" trains a generator, "best" optimises the pixels of every image."""
    inherit: bool = True
    """Ours, after DistilBERT (Sanh et al., 2019): the student starts with the teacher's tensors of the same name and shape, so
    that a shorter network of the same family only has to make up for the layers that it lacks."""


# The objective of a generator for a student that never sees a real image. With ABD's temperature of 1000 and a competing student,
# the teacher is unsure of the images as well. The content term has a weight of 0.1: with a larger one and augmentation, the
# statistics count too little.
OBJECTIVE: dict[str, Any] = {"inversion.content": 0.1, "inversion.content_temperature": 1.0, "inversion.augment": True}
FRESH = 256  # dreams that teacher and student are compared on
REPAIR = Distillation(rounds=4, learning_rate=0.02)  # of a pruned network, which has most of the knowledge already


def distill(
    learner: Learner,
    to: str | nn.Module,
    *,
    settings: Distillation | None = None,
    evaluation: Any | None = None,
    classes: Classes | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> tuple[Learner, DistillReport]:
    """A learner with another backbone that knows the classes of `learner`, trained on generated images. `learner` is not changed.

    Parameters
    ----------
    to
        The student's backbone, as for `Learner`: a name, or a module, which is copied.
    settings
        None for `Distillation()`.
    evaluation
        A loader of known classes to measure teacher and student on; it is not learnt from.
    classes
        Names by target value for `evaluation`; None takes those of its data set.

    Raises
    ------
    NotLearnedError, BackboneError, DataError
        Before anything is trained: nothing learnt yet, a backbone that cannot be built, no image to measure on.
    DivergedError
        When a loss is not finite.
    """
    work = Distilling(learner, to, Distillation() if settings is None else settings, evaluation, classes)
    found: tuple[Learner, DistillReport] = learner.run(work, callbacks, progress, seed=learner.seed)
    return found


class Distilling(GeneratingWork):
    """The work of a session that teaches a student."""

    def __init__(
        self, learner: Learner, to: str | nn.Module, settings: Distillation, evaluation: Any | None, classes: Classes | None
    ) -> None:
        if not isinstance(settings, Distillation):
            raise SettingError(f"settings={settings!a:.80} is a {type(settings).__name__}; pass a Distillation")
        learner.check_answering()
        self._learner, self._recipe, self._settings = learner, learner.recipe, settings
        self._evaluation, self._classes = evaluation, classes
        # A trained head is less accurate over features of several scales.
        self._student = learner.model.untrained(to, seed=learner.seed, multiscale=False)
        self._before: float | None = None

    def prepare(self, session: Session[Any]) -> None:
        if self._evaluation is not None:
            with devices.seeded(None, session.device):
                self._before = self._learner.evaluate(self._evaluation, self._classes).accuracy

    def stages(self, session: Session[Any]) -> Iterator[Stage]:
        learner = self._learner
        network = self._network = self._student.network.grown(0)
        if self._settings.inherit:
            _inherit(network, learner.network)
        lesson = self._lesson = Lesson(network, learner.network.frozen(), self._recipe, self._settings, self._at_once)
        yield from lesson.stages()

    # For the planner

    def smaller(self) -> list[dict[str, int]]:
        return smaller_generator(self._recipe, self._settings)

    def rehearsal(self, changes: Mapping[str, int]) -> Rehearsal:
        student, teacher = self._student.network.grown(0), self._learner.network.frozen()
        return rehearsed(student, teacher, self._recipe.changed(changes), self._settings)

    def finish(self, session: Session[Any], reports: Sequence[StageReport]) -> tuple[Learner, DistillReport]:
        learner, network, settings = self._learner, self._network, self._settings
        check_finite(network)
        model = replace(self._student, network=network.requires_grad_(False).eval())
        student, after = learner.with_model(model), None
        if self._evaluation is not None:
            after = student.evaluate(self._evaluation, self._classes).accuracy
        return student, DistillReport(
            teacher=learner.model.architecture,
            student=model.architecture,
            parameters=(parameters(learner.network), parameters(network)),
            dreams=settings.rounds * settings.dreams if settings.source != "noise" else 0,
            agreement=self._lesson.agreement(),
            accuracy=None if self._before is None or after is None else (self._before, after),
            seconds=session.seconds,
            stages=tuple(reports),
        )


def _inherit(student: nn.Module, teacher: nn.Module) -> None:
    """Copies the teacher's tensors that the student has by the same name and in the same shape."""
    before, own = teacher.state_dict(), student.state_dict()
    student.load_state_dict({n: before[n] if n in before and before[n].shape == t.shape else t for n, t in own.items()})


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


class Lesson:
    """Trains a student in rounds: generated images are added to a pool, then the student learns from all of it.

    `at_once` images are generated at a time; None for a batch of the generator's.
    """

    def __init__(
        self, student: Network, teacher: Network, recipe: Recipe, settings: Distillation, at_once: int | None = None
    ) -> None:
        self._student, self._teacher, self._settings, self._device = student, teacher, settings, teacher.mean.device
        self._at_once = at_once
        total = settings.rounds * settings.dreams
        self._recipe = recipe.changed({"remember.pool": total, **OBJECTIVE})
        self._wanted = torch.arange(teacher.n_classes, device=self._device)
        self._pool, self._filled = Pool(total, teacher, self._device), 0
        self._fresh: Dream | Pool | None = None  # what was generated last
        self._dreamer = Dreamer(teacher, self._wanted, self._recipe)
        set_batchnorm_momentum(student, self._recipe)
        self._optimizer = torch.optim.SGD(
            student.parameters(), settings.learning_rate, momentum=0.9, weight_decay=self._recipe.schedule.weight_decay
        )
        steps = max(2, settings.rounds * settings.steps)
        self._scheduler: LRScheduler = OneCycleLR(
            self._optimizer, settings.learning_rate, total_steps=steps, cycle_momentum=False
        )

    def stages(self) -> Iterator[Stage]:
        settings = self._settings
        for number in range(settings.rounds):
            self._student.requires_grad_(False)  # it is not trained while generated images compete with it
            yield from self._dreams(number)
            self._student.requires_grad_(True)
            # One optimizer and one schedule over all rounds.
            yield StageSpec(
                "distil",
                self,
                settings.steps,
                self._loss,
                lambda: self._optimizer,
                lambda optimizer: self._scheduler,
                trains=[self._student],
                clip_gradient=self._recipe.schedule.clip_gradient,
                mixed_precision=self._recipe.schedule.mixed_precision,
            )
        if settings.source != "noise" and settings.quality == "fast":
            self._fresh = make_pool(self._dreamer, FRESH, self._at_once)
        else:
            yield from self._dream(FRESH, settings.rounds)

    def _dreams(self, number: int) -> Iterator[Stage]:
        """Adds a round's dreams to the pool."""
        yield from self._dream(self._settings.dreams, number)
        for dream in self._batches(self._fresh):
            self._filled += self._pool.write(self._filled, len(self._pool), dream)
        self._fresh = None

    def _dream(self, n: int, number: int) -> Iterator[Stage]:
        """Stores about `n` dreams in `_fresh`, of the kind of this round."""
        settings, adaptive = self._settings, self._settings.source == "adaptive" and number > 0
        student = self._student.eval() if adaptive else None
        if settings.source == "noise":
            self._fresh = self._noise(n)
            return
        if settings.quality == "best":
            few = Pool(n, self._teacher, self._device)
            yield from paint(few, self._teacher, self._wanted, self._recipe, student)
        else:
            self._dreamer.student = student
            if number > 0:
                self._dreamer.recipe = self._recipe.changed({"generator.steps": settings.generator_steps})
            yield self._dreamer.stage()
            few = make_pool(self._dreamer, n, self._at_once)
        self._fresh = few

    def _batches(self, dreams: Dream | Pool | None) -> Iterator[Dream]:
        """Generated images, a batch at a time: all of them as floats take too much memory."""
        assert dreams is not None, "the stages have not been run"
        return (dreams[index] for index in torch.arange(len(dreams), device=self._device).split(self._settings.batch))

    @torch.no_grad()
    def _noise(self, n: int) -> Dream:
        size = self._teacher.image_size
        images = torch.randn(n, 3, size, size, device=self._device).contiguous(memory_format=devices.memory_format(self._device))
        return Dream(images, self._teacher.classify(images).float())

    def __iter__(self) -> Iterator[Dream]:
        """Batches of the images generated so far."""
        while True:
            yield self._pool[torch.randint(self._filled, (self._settings.batch,), device=self._device)]

    def _loss(self, dream: Dream) -> Terms:
        """Both see the same images, augmented as real ones are in training: fewer generated images are needed, and augmentation
        widens their range of brightness and contrast, which is narrower than that of real ones."""
        teacher = self._teacher
        with torch.no_grad():
            images = augment.views(dream.images, teacher, self._recipe)
            before = teacher.classify(images)
        return {"distillation": distil(self._student.classify(images), before, self._settings.temperature)}

    @torch.no_grad()
    def agreement(self) -> float:
        """The share of equal answers on generated images that were not learnt from; on noise with `source="noise"`."""
        self._student.eval()
        right = [self._student.classify(dream.images).argmax(1) == dream.labels for dream in self._batches(self._fresh)]
        return float(torch.cat(right).float().mean())

    @property
    def nbytes(self) -> int:
        """Bytes of all generated images, and of those of one more round."""
        settings = self._settings
        return self._pool.nbytes * (settings.rounds + 1) // settings.rounds


def smaller_generator(recipe: Recipe, settings: Distillation) -> list[dict[str, int]]:
    """What can be made smaller to fit a memory budget, for the planner."""
    generates = settings.source != "noise" and settings.quality == "fast"
    return rehearsal.smaller(recipe, "generator.width") if generates else [{}]


def rehearsed(student: Network, teacher: Network, recipe: Recipe, settings: Distillation) -> Rehearsal:
    """A short lesson of `student`, which is discarded, for the planner."""
    few = replace(
        settings,
        rounds=min(settings.rounds, 2),  # in the second, dreams compete with the student
        dreams=min(settings.dreams, rehearsal.POOL),
        generator_steps=rehearsal.STEPS,
        steps=rehearsal.STEPS,
    )
    lesson = Lesson(student, teacher, rehearsal.short(recipe), few)

    def generated() -> Generated:
        images, wanted = few.rounds * few.dreams, (settings.rounds + 1) * settings.dreams
        return Generated(now=lesson.nbytes, whole=lesson.nbytes * wanted // (images + few.dreams))

    return Rehearsal(lesson.stages(), [student, teacher], student, generated)
