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
    ├── SignatureError    a file that is not what was signed
    ├── HubError          the Hugging Face Hub did not give or take a model
    └── ExportError       an artefact that could not be made, or disagrees with its model

Five of them are raised by the runtime too, so `exporters.errors` defines them.
After any error, the learner's model and the file on disk are the last committed ones.
"""

from edge_dfcil._version import __version__

# The wheel edge-dfcil-runtime contains `exporters` too: installing it replaces these files, and removing it deletes them.
try:
    from exporters._version import __version__ as _found
except ModuleNotFoundError:
    _found = "missing"
if _found != __version__:
    raise ImportError(
        f"edge-dfcil is {__version__} and its package exporters is {_found}: edge-dfcil-runtime has replaced or removed "
        f"its files; pip uninstall edge-dfcil-runtime, then pip install --force-reinstall --no-deps edge-dfcil=={__version__}"
    )

from exporters.errors import DataError as DataError
from exporters.errors import EdgeDfcilError as EdgeDfcilError
from exporters.errors import ExportError as ExportError
from exporters.errors import SettingError as SettingError
from exporters.errors import SignatureError as SignatureError


class BackboneError(EdgeDfcilError, ValueError):
    """A network that cannot be built, split into backbone and head, or inverted."""


class ClassError(EdgeDfcilError, ValueError):
    """A class name that is unknown, repeated or already known."""


class NotLearnedError(EdgeDfcilError, RuntimeError):
    """The learner has learnt no task yet, so it cannot answer."""


class DivergedError(EdgeDfcilError, ArithmeticError):
    """Training produced a number that is not finite; nothing was committed."""


class Cancelled(EdgeDfcilError):
    """`learner.cancel()` was called; nothing was committed."""


class BudgetError(EdgeDfcilError, MemoryError):
    """The memory budget cannot be kept; nothing was trained."""


class ModelFileError(EdgeDfcilError, OSError):
    """A model file that cannot be written, or cannot be trusted when read."""


class HubError(EdgeDfcilError, OSError):
    """The Hugging Face Hub did not give or take a model; nothing local was changed."""
