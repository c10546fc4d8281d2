"""Every error this package raises on purpose. Each says what was wrong, what was expected and what to do.

    EdgeDfcilError
    ├── SettingError      a constructor argument or recipe value that cannot work
    ├── BackboneError     a network that cannot be built, split or inverted
    ├── DataError         images, targets or a loader that cannot be learnt from
    ├── ClassError        a class name that is unknown, repeated or already known
    ├── NotLearnedError   the learner has learnt no task yet
    ├── DivergedError     training produced a number that is not finite
    ├── Cancelled         `learner.cancel()` was called
    ├── BudgetError       the memory budget cannot be kept
    ├── ModelFileError    a model file that cannot be written or trusted
    └── ExportError       an artefact that could not be made, or disagrees with its model

Whatever is raised, the learner's model is the last committed one, and so is the file on disk.
"""


class EdgeDfcilError(Exception):
    """Base of all errors that this package raises on purpose: catch this one to catch them all."""


class SettingError(EdgeDfcilError, ValueError):
    """A constructor argument or recipe value that cannot work."""


class BackboneError(EdgeDfcilError, ValueError):
    """A network that cannot be built, split into backbone and head, or inverted."""


class DataError(EdgeDfcilError, ValueError):
    """Images, targets or a loader that cannot be learnt from."""


class ClassError(EdgeDfcilError, ValueError):
    """A class name that is unknown, repeated or already known."""


class NotLearnedError(EdgeDfcilError, RuntimeError):
    """The learner has learnt no task yet, so it has no answer to give."""


class DivergedError(EdgeDfcilError, ArithmeticError):
    """Training produced a number that is not finite; nothing was committed."""


class Cancelled(EdgeDfcilError):
    """`learner.cancel()` was called; nothing was committed."""


class BudgetError(EdgeDfcilError, MemoryError):
    """The memory budget cannot be kept; nothing was trained."""


class ModelFileError(EdgeDfcilError, OSError):
    """A model file that cannot be written, or cannot be trusted when read."""


class ExportError(EdgeDfcilError):
    """An artefact that could not be made, cannot be read, or disagrees with its model."""
