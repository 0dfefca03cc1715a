"""What no number of the page says."""

from __future__ import annotations

from pathlib import Path

TEXT = """## What is not shown

- **Large models.** No published weights were at hand. All right answers are those of the built-in model: 4 million
  parameters, trained on a drawn world, 16 to 64 tokens a tile. How much a large model loses at the same sparsity, and
  what its longer contexts gain, cannot be read off it.
- **Public benchmarks.** No data set was at hand. Readers and metrics are there ([evaluation.md](evaluation.md)); their
  scores are not.
- **GPUs.** Nothing here was timed on one, nor on the paper's RTX A6000. Seconds are of one CPU thread and of a model
  whose decode steps spend most of their time on weights and calls: decode sparsity can hardly show in them. What it
  saves is in the counts of tokens and bytes.
- **The paper's speed-ups.** They are of 7B models with 8-bit towers and 4-bit decoders; what a CPU makes of such
  shapes is in the [README](../README.md#what-is-measured), apart from accuracy.
- **Other seeds of training.** There is one checkpoint. Intervals are over questions, not over trainings, and the
  saliency that pruning ranks by was learnt once."""


def section(results: Path, figures: Path) -> str:
    return TEXT
