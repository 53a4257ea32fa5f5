"""Errors that a user can mend. The command line prints their message as one line and exits with code 2."""


class DistillationError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigurationError(DistillationError, ValueError):
    """A setting has a value that cannot work."""


class DataError(DistillationError, ValueError):
    """A dataset is missing, unreadable, empty or lacks a column."""


class TokenizerError(DistillationError, ValueError):
    """A tokenizer cannot be aligned, because it gives no offsets or hides its tokens' text."""


class UnsupportedModelError(DistillationError, ValueError):
    """A model cannot be loaded, or its parts cannot be found."""


class CheckpointError(DistillationError, OSError):
    """A checkpoint is missing, incomplete or belongs to another run."""


class NonFiniteLossError(DistillationError, FloatingPointError):
    """A loss became NaN or infinite too many steps in a row."""
