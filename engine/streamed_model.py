"""A checkpoint's model of which the decoder's layers and the output matrix are read only when somebody asks for one.

In memory are the rest of the model (the shell: vision tower, projector, embedding), in float32, and what the caller
keeps of the layers it asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..models.checkpoint import Checkpoint
from ..models.decoder import DecoderHead, DecoderLayer
from ..models.interface import ProgressFn, no_progress
from ..models.registry import build_model, tied_weights
from ..models.weights import load_weights

DTYPE = torch.float32  # of everything that is read


class StreamedModel:
    """`model` is the shell: the model without its decoder's layers and output matrix, on `meta` until `load_shell`.

    Names of blocks and tensors are the model's own; `stored` gives the file's. Raises CorruptCheckpoint where the
    headers of the checkpoint do not fit the model, before a tensor is read.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.device = device
        model: Any = build_model(checkpoint)
        self._rename: Callable[[str], str | None] = model.rename
        self._check_headers(model)
        decoder = model.decoder
        self.config = decoder.config
        self.decoder_name = next(name for name, module in model.named_modules() if module is decoder)
        self._stored = {own: name for name in checkpoint.tensors if (own := self._rename(name)) is not None}
        del decoder.lm_head
        decoder.layers = nn.ModuleList()
        self.model = model

    def _check_headers(self, model: Any) -> None:
        """Loads the headers alone, strictly both ways."""
        headers = _HeadersOnly(self.checkpoint.folder)
        headers.tensors = self.checkpoint.tensors
        meta = torch.device("meta")
        load_weights(model, headers, self._rename, tied=tied_weights(model), dtype=DTYPE, device=meta)

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    def layer_name(self, index: int) -> str:
        """The model's name of decoder layer `index`."""
        return f"{self.decoder_name}.layers.{index}"

    @property
    def head_name(self) -> str:
        return f"{self.decoder_name}.lm_head"

    @property
    def has_head(self) -> bool:
        """Whether the output matrix is a tensor of its own, not the embedding."""
        return f"{self.head_name}.weight" in self._stored

    def stored(self, own: str) -> str:
        """The checkpoint's name of a tensor."""
        return self._stored[own]

    def tensors_of(self, block: str) -> list[str]:
        """The tensors of a block by the model's names, in the order of the files; the last norm is the head's."""
        if block == self.head_name:
            return [f"{self.decoder_name}.norm.weight", f"{block}.weight"]
        return [own for own in self._stored if own.startswith(f"{block}.")]

    def load_shell(self, progress: ProgressFn = no_progress) -> None:
        """Reads what is neither a decoder layer nor the output matrix."""
        streamed = (f"{self.decoder_name}.layers.", f"{self.head_name}.")
        names = [stored for own, stored in self._stored.items() if not own.startswith(streamed)]
        self._fill(self.model, names, "", progress)

    def drop_shell(self) -> None:
        """Gives the shell's memory back; config, positions and names stay."""
        self.model.to("meta")

    def layer(self, index: int, progress: ProgressFn = no_progress) -> DecoderLayer:
        """Reads a decoder layer."""
        with torch.device("meta"):
            layer = DecoderLayer(self.config)
        name = self.layer_name(index)
        self._fill(layer, [self._stored[own] for own in self.tensors_of(name)], f"{name}.", progress)
        return layer

    def head(self, progress: ProgressFn = no_progress) -> DecoderHead:
        """Reads the last norm and the output matrix, which must be there."""
        with torch.device("meta"):
            head = DecoderHead(self.config)
        self._fill(
            head, [self._stored[own] for own in self.tensors_of(self.head_name)], f"{self.decoder_name}.", progress
        )
        return head

    def _fill(self, module: nn.Module, names: Collection[str], prefix: str, progress: ProgressFn) -> None:
        def rename(stored: str) -> str | None:
            own = self._rename(stored)
            return None if own is None else own.removeprefix(prefix)

        part = self.checkpoint.part(names)
        load_weights(module, part, rename, tied={}, dtype=DTYPE, device=self.device, progress=progress)
        module.eval()


class _HeadersOnly(Checkpoint):
    """Every tensor on `meta`, so that a whole model can be checked against headers."""

    def iter_tensors(self, together: Callable[[str], str] | None = None) -> Iterator[tuple[str, Tensor]]:
        yield from self.headers().items()
