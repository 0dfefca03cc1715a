"""Every error a user can meet, under one root. Imports nothing; everyone may import it.

A message says what happened with the expected and the found value; `hint` says what to do.
No text of Pillow, FFmpeg or CUDA goes in: it may hold addresses and paths.
"""

from __future__ import annotations

from typing import ClassVar


class SparseVILAError(Exception):
    """Root of all errors. `code` is stable and machine-readable; `exit_code` is what `chat.py` ends with."""

    code: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class InvalidRequest(SparseVILAError, ValueError):
    """A parameter or a prompt is out of its range."""

    code = "invalid_request"
    exit_code = 2


class ContextTooLong(InvalidRequest):
    """System text, media, history and prompt together pass the context."""

    code = "context_too_long"


class TemplateError(InvalidRequest):
    """A conversation cannot be written in the model's prompt format."""

    code = "template"


class ModelNotFound(SparseVILAError):
    """No weights under that name here."""

    code = "model_not_found"
    exit_code = 3


class UnsupportedModel(SparseVILAError):
    """The checkpoint asks for something that this engine does not compute."""

    code = "unsupported_model"
    exit_code = 3


class CorruptCheckpoint(SparseVILAError):
    """A checkpoint file is damaged, incomplete or contradicts itself."""

    code = "corrupt_checkpoint"
    exit_code = 3


class MediaError(SparseVILAError):
    """Root of what can be wrong with an image or a video."""

    code = "media"
    exit_code = 4


class MediaNotFound(MediaError):
    code = "media_not_found"


class NotARegularFile(MediaError):
    code = "not_a_regular_file"


class UnsupportedMedia(MediaError):
    code = "unsupported_media"


class CorruptMedia(MediaError):
    code = "corrupt_media"


class ImageTooSmall(MediaError):
    code = "image_too_small"


class ImageTooLarge(MediaError):
    code = "image_too_large"


class ImageTooNarrow(MediaError):
    code = "image_too_narrow"


class RemoteMediaRefused(MediaError):
    code = "remote_media_refused"


class InsufficientMemory(SparseVILAError):
    """The plan does not fit. Raised before the allocation where the plan shows it."""

    code = "insufficient_memory"
    exit_code = 5

    def __init__(self, need_bytes: int, free_bytes: int, *, what: str = "this request", hint: str = "") -> None:
        super().__init__(
            f"{what} needs {need_bytes / 2**30:.2f} GiB, {free_bytes / 2**30:.2f} GiB are free",
            hint=hint or "use fewer frames, a higher prefill sparsity or a smaller context",
        )
        self.need_bytes = need_bytes
        self.free_bytes = free_bytes


class SessionBusy(SparseVILAError):
    """A session answers one question at a time."""

    code = "session_busy"


class Closed(SparseVILAError):
    """The engine or the session was closed."""

    code = "closed"


class EngineDead(SparseVILAError):
    """The device failed in a way that a process cannot repair; start a new one."""

    code = "engine_dead"
