"""Every error that a user can cause or meet, in one tree.

The message is one sentence that names the thing (a tensor, a file, an option), what was found and what is
allowed; the command line prints it as it is and exits with the class's ``exit_code``. ``assert`` is left for
our own invariants.
"""

from __future__ import annotations

import errno


class ErnieqError(Exception):
    """Base of all errors that are reported to the user in one sentence."""

    exit_code = 1


class UsageError(ErnieqError):
    """An option or argument has no meaning here (a bad bit rate, an output equal to the input)."""

    exit_code = 2


class CheckpointError(ErnieqError):
    """The source checkpoint can't be used: a file or tensor is missing, truncated or malformed."""

    exit_code = 3


class UnsupportedModelError(CheckpointError):
    """The configuration describes an architecture that ernieq does not implement."""


class MissingTensorError(CheckpointError):
    """A tensor that the configuration calls for is not in the checkpoint."""


class ShapeError(CheckpointError):
    """A tensor has a shape other than the one that the configuration or the code calls for."""


class NonFiniteError(CheckpointError):
    """A weight is NaN or infinite."""


class SourceChangedError(CheckpointError):
    """A file of the source vanished, or was changed, while it was in use."""


class TextError(ErnieqError):
    """A calibration or evaluation text is missing, empty, too short or not UTF-8."""

    exit_code = 4


class RecipeError(UsageError):
    """A recipe file or option asks for something that is refused (quantizing a router, 9 bits)."""


class OutputExistsError(UsageError):
    """The output path exists and ``--overwrite`` was not given."""


class OutputLockedError(UsageError):
    """Another process is writing the output."""


class JobDiffersError(UsageError):
    """The unfinished work beside the output is that of another recipe, source, text or program."""


class StorageError(ErnieqError):
    """The disk is full, read-only or not permitted."""

    exit_code = 5


class FormatError(ErnieqError):
    """A packed checkpoint breaks a MUST of ``ernieq/pack/FORMAT.md``."""

    exit_code = 6


class VerificationError(FormatError):
    """A packed checkpoint was read but failed its checks (hash, coverage, finite scales)."""


class BackendUnavailableError(ErnieqError):
    """The requested backend or instruction set can't run on this machine."""

    exit_code = 7


class ReproductionError(ErnieqError):
    """A conversion was run again and its bytes are not those of the packed checkpoint."""

    exit_code = 8


class InterruptedConversionError(ErnieqError):
    """A conversion was asked to stop, and has saved all finished work; the same call goes on with it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


def memory_fault(error: BaseException) -> str | None:
    """Whose memory ran out, in words; None if the error is another one.

    Python, the system and torch each say it in their own way; torch has no class for the processor's memory.
    """
    words = str(error)
    match error:
        case MemoryError() | OSError(errno=errno.ENOMEM):
            return "the memory of this machine ran out"
        case RuntimeError() if type(error).__name__ == "OutOfMemoryError":
            return "the memory of the GPU ran out"
        case RuntimeError() if "DefaultCPUAllocator" in words or "can't start new thread" in words:
            return "the memory of this machine ran out"
    return None
