"""What a model is run on while it is quantised: encoded media, and embedded sequences for its decoder.

A sequence is written in the model's own prompt format: opening, visual tokens, question, answer. Its text is kept as
far as it takes no more than half of the positions, and the visual tokens fill what is left from the front: of a picture
the whole view and the first rows of its tiles, of a clip the first frames. Nothing is pruned, because the decoder has
to serve every sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.interface import Frames, ProgressFn, PromptPiece, VisionLanguageModel, VisualTokens, no_progress
from .calibration_set import CalibrationSample
from .prompt import encode_pieces
from .tokenizer import Tokenizer


@dataclass(eq=False)
class CalibrationSequence:
    """One sample on its way through the decoder's layers."""

    hidden: Tensor  # (M, hidden_size) float32, replaced by each layer
    positions: Tensor  # (M,) int64, of multimodal RoPE (3, M)


def embed_sample(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    sample: CalibrationSample,
    tokens: VisualTokens | None,
    *,
    max_positions: int,
) -> CalibrationSequence:
    """The sample as it enters the first layer. `tokens` are those of its frames, None where it has none."""
    before, after = _texts(model, tokenizer, sample, max_positions // 2)
    device = model.decoder.embed_tokens.weight.device
    hidden, positions, start = [], [], 0
    for ids in (before, None, after):
        if ids is not None:
            part, start = model.text_positions(len(ids), start)
            hidden.append(model.decoder.embed(torch.tensor(ids, dtype=torch.int64, device=device)))
            positions.append(part)
        elif tokens is not None:
            front = tokens.select(torch.arange(min(len(tokens), max_positions - len(before) - len(after))))
            part, start = model.visual_positions(front.token_map, start)
            hidden.append(model.embed_visual(front))
            positions.append(part)
    return CalibrationSequence(torch.cat(hidden), torch.cat(positions, dim=-1).to(device))


def _texts(
    model: VisionLanguageModel, tokenizer: Tokenizer, sample: CalibrationSample, limit: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and after the media, at most `limit` together; the end of a longer text is left out."""
    opening = model.prompt.opening(first=True, system=None)
    asked: list[PromptPiece] = model.prompt.question(sample.question, after_media=sample.frames is not None)
    if sample.answer:
        last = asked[-1]
        gap = "" if isinstance(last, str) and last[-1:].isspace() else " "
        asked = [*asked, f"{gap}{sample.answer}", *model.prompt.closing()]
    if sample.frames is None:
        return (), encode_pieces(tokenizer, [*opening, *asked], start=True)[:limit]
    before = encode_pieces(tokenizer, opening, start=True)[:limit]
    return before, encode_pieces(tokenizer, asked, start=False)[: limit - len(before)]


def encode_frames(model: VisionLanguageModel, frames: Frames, progress: ProgressFn = no_progress) -> VisualTokens:
    """The features of one item, unpruned."""
    with torch.no_grad():
        return model.encode(model.preprocess(frames), progress)
