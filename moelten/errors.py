"""Errors of moelten: each is a built-in error with a name, raised at the boundary before any work.

Every message says what was expected, what came (dtype, shape), and what to do.
"""


class FormatError(ValueError):
    """A tensor does not have the dtype, shape or values that its format demands."""


class LayoutError(TypeError):
    """Packed weights met a kernel, device or version that they were not packed for."""


class UnsupportedError(NotImplementedError):
    """A format, scheme, model or parameter that moelten knows of and does not run here."""


class CheckpointError(ValueError):
    """A checkpoint is truncated, incomplete or contradicts its own configuration."""
