"""SparseVILA engine: vision-language models with decoupled visual sparsity, quantised, on one GPU or none.

The names below are the public face. They are imported on first use (PEP 562), so that
`import sparsevila` is quick and does not import torch.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

logging.getLogger("sparsevila").addHandler(logging.NullHandler())

_HOMES = {
    "engine.engine": ("Engine",),
    "engine.session": ("Session",),
    "engine.config": (
        "Attachment",
        "Chunk",
        "EngineInfo",
        "Image",
        "Result",
        "SamplingParams",
        "Sparsity",
        "Stats",
        "Turn",
        "Video",
    ),
    "errors": (
        "Closed",
        "ContextTooLong",
        "CorruptCheckpoint",
        "CorruptMedia",
        "EngineDead",
        "ImageTooLarge",
        "ImageTooNarrow",
        "ImageTooSmall",
        "InsufficientMemory",
        "InvalidRequest",
        "MediaError",
        "MediaNotFound",
        "ModelNotFound",
        "NotARegularFile",
        "RemoteMediaRefused",
        "SessionBusy",
        "SparseVILAError",
        "TemplateError",
        "UnsupportedMedia",
        "UnsupportedModel",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*sorted(_HOME_OF), "__version__"]

if TYPE_CHECKING:
    from .engine.config import (
        Attachment,
        Chunk,
        EngineInfo,
        Image,
        Result,
        SamplingParams,
        Sparsity,
        Stats,
        Turn,
        Video,
    )
    from .engine.engine import Engine
    from .engine.session import Session
    from .errors import (
        Closed,
        ContextTooLong,
        CorruptCheckpoint,
        CorruptMedia,
        EngineDead,
        ImageTooLarge,
        ImageTooNarrow,
        ImageTooSmall,
        InsufficientMemory,
        InvalidRequest,
        MediaError,
        MediaNotFound,
        ModelNotFound,
        NotARegularFile,
        RemoteMediaRefused,
        SessionBusy,
        SparseVILAError,
        TemplateError,
        UnsupportedMedia,
        UnsupportedModel,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
