"""The errors that the runtime raises. `edge_dfcil.errors` has these and all others."""


class EdgeDfcilError(Exception):
    """Base of all errors that this package raises on purpose: catch this one to catch them all."""


class SettingError(EdgeDfcilError, ValueError):
    """A constructor argument or recipe value that cannot work."""


class DataError(EdgeDfcilError, ValueError):
    """Images, targets or a loader that cannot be learnt from or predicted."""


class SignatureError(EdgeDfcilError):
    """A file that is not what was signed, or a signature that cannot be made."""


class ExportError(EdgeDfcilError):
    """An artefact that could not be made, cannot be read, or disagrees with its model."""
