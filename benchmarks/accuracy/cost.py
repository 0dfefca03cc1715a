"""What an answer costs, counted: multiply-adds and bytes of its parts. Never called time.

A multiply-add is two operations (FLOP). M tokens prefilled and P pairs of a token and one that it attends to, both
means over the decoder's L layers, as a turn's figures have them; S = 1 + patches of a tile; N tokens in the visual
store, R text tokens prefilled, E keys that a decode step reads, all layers together; h, f, V widths of the decoder, its
FFN and its vocabulary, q and kv those of all queries and all keys; w, g, T width, FFN width and layers run of the
tower, p its patch's side in pixels.

    part        multiply-adds
    encoder     tiles ((S - 1) 3 p^2 w + T S (4 w^2 + 2 w g) + 2 T S^2 w + S w)    the last: the saliency's one row
    projector   (w h + h^2) for each token that enters, newlines included
    prefill     L M (2 h q + 2 h kv + 3 h f) + 2 L P q + h V
    retrieval   L R N q
    decode      for each step L (2 h q + 2 h kv + 3 h f) + 2 q E + h V

Bytes are those of the weights, once for a picture (encoder, projector), for a prompt (prefill) and for each step of
decoding, and of keys and values: what prefill writes, what retrieval ranks, copies and writes, what steps read.
Activations are not counted, nor norms, activation functions, softmax, sampling and rotations.

Left out, because they are below a hundredth of their part: what methods inside the decoder spend on their rating rows,
and the clusters of those that merge. What this engine computes twice (PyramidDrop's projections at a stage) is not
counted either: it shows in seconds alone. Where a method prunes inside the decoder and retrieves, N is what entered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from accuracy.answering import Reply, Setting

from sparsevila.models.llava_next import LlavaNextConfig


@dataclass(frozen=True)
class Work:
    """Multiply-adds and bytes."""

    macs: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.macs + other.macs, self.bytes + other.bytes)

    @property
    def gflop(self) -> float:
        return 2e-9 * self.macs

    @property
    def megabytes(self) -> float:
        return 1e-6 * self.bytes


@dataclass(frozen=True)
class Cost:
    """The parts of what a turn or a conversation costs."""

    encoder: Work = Work()
    projector: Work = Work()
    prefill: Work = Work()
    retrieval: Work = Work()
    decode: Work = Work()

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Cost)))

    @property
    def total(self) -> Work:
        return sum((getattr(self, field.name) for field in fields(Cost)), Work())

    def to_json(self, conversations: int = 1) -> dict[str, dict[str, float]]:
        """GFLOP and MB by part and in all, a mean over that many conversations."""
        parts = {field.name: getattr(self, field.name) for field in fields(Cost)} | {"total": self.total}
        return {
            "gflop": {name: work.gflop / conversations for name, work in parts.items()},
            "megabytes": {name: work.megabytes / conversations for name, work in parts.items()},
        }


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a LLaVA-NeXT that its cost depends on; all weights and entries of the cache of one dtype."""

    patches: int  # of a tile
    patch_size: int  # pixels
    tower_width: int
    tower_ffn: int
    tower_layers: int  # those that are run
    width: int
    ffn: int
    layers: int
    query_width: int  # of all heads
    key_width: int  # of all key heads
    vocab_size: int
    element_bytes: int

    @staticmethod
    def of(config: LlavaNextConfig, element_bytes: int) -> ModelSizes:
        vision, text = config.vision, config.text
        return ModelSizes(
            patches=vision.grid**2,
            patch_size=vision.patch_size,
            tower_width=vision.hidden_size,
            tower_ffn=vision.intermediate_size,
            tower_layers=vision.layers_run(config.feature_layer),
            width=text.hidden_size,
            ffn=text.intermediate_size,
            layers=text.num_layers,
            query_width=text.num_heads * text.head_dim,
            key_width=text.num_kv_heads * text.head_dim,
            vocab_size=text.vocab_size,
            element_bytes=element_bytes,
        )

    @property
    def layer_weights(self) -> int:
        """Of a decoder layer's matrices."""
        return 2 * self.width * (self.query_width + self.key_width) + 3 * self.width * self.ffn

    @property
    def head_weights(self) -> int:
        return self.width * self.vocab_size

    @property
    def entry_bytes(self) -> int:
        """Key and value of one token in one layer."""
        return 2 * self.key_width * self.element_bytes


def encoding(sizes: ModelSizes, tiles: int) -> Work:
    """The tower over a picture or a clip of that many tiles."""
    w, tokens = sizes.tower_width, 1 + sizes.patches
    patch = 3 * sizes.patch_size**2 * w
    layer = 4 * w * w + 2 * w * sizes.tower_ffn
    attended = 2 * sizes.tower_layers * tokens**2 * w + tokens * w
    macs = tiles * (sizes.patches * patch + sizes.tower_layers * tokens * layer + attended)
    return Work(macs, (patch + sizes.tower_layers * layer) * sizes.element_bytes)


def projecting(sizes: ModelSizes, tokens: int) -> Work:
    """The projector over what enters the decoder."""
    weights = sizes.tower_width * sizes.width + sizes.width**2
    return Work(weights * tokens, weights * sizes.element_bytes)


def prefilling(sizes: ModelSizes, tokens: float, pairs: float) -> Work:
    """A prompt; means over layers of its tokens and of its pairs of a token and one that it attends to."""
    weights = sizes.layers * sizes.layer_weights
    macs = weights * tokens + 2 * sizes.layers * pairs * sizes.query_width + sizes.head_weights
    written = sizes.layers * tokens * sizes.entry_bytes
    return Work(macs, (weights + sizes.head_weights) * sizes.element_bytes + written)


def retrieving(sizes: ModelSizes, rows: int, store: int, active: float) -> Work:
    """Ranking `store` entries of each layer for `rows` tokens of a question, and copying `active` of them."""
    ranked = sizes.layers * store * sizes.key_width * sizes.element_bytes
    copied = 2 * sizes.layers * active * sizes.entry_bytes
    return Work(sizes.layers * rows * store * sizes.query_width, ranked + copied)


def decoding(sizes: ModelSizes, steps: int, first_read_bytes: int) -> Work:
    """That many steps, the first of which finds `first_read_bytes` of keys and values; each adds a token."""
    weights = sizes.layers * sizes.layer_weights + sizes.head_weights
    added = sizes.layers * steps * (steps + 1) // 2 * sizes.entry_bytes
    read = steps * first_read_bytes + added
    entries = read / sizes.entry_bytes
    return Work(steps * weights + 2 * sizes.query_width * entries, steps * weights * sizes.element_bytes + read)


@dataclass(frozen=True)
class Manner:
    """How a setting prunes, as far as a turn's figures do not say."""

    inside: bool = False  # the decoder: then all that the encoder made enters, whatever is kept of it
    retrieves: bool = False

    @staticmethod
    def of(setting: Setting) -> Manner:
        return Manner(setting.needs_question, setting.sparsity.decode > 0)

    def entered(self, reply: Reply) -> int:
        """Visual tokens that a turn brought into the decoder; one that found an empty cache placed the picture."""
        if reply.cached_tokens > 0:
            return 0
        return reply.visual_total if self.inside else reply.visual_kept


def input_tokens(reply: Reply, manner: Manner) -> float:
    """Visual tokens that a layer prefilled, mean over layers; text and newlines go through all of them."""
    return reply.layer_tokens - (reply.prompt_tokens - manner.entered(reply))


def turn_cost(sizes: ModelSizes, reply: Reply, steps: int, manner: Manner) -> Cost:
    """One question and its answer, without the encoder.

    steps: decode steps of the answer, one for each of its tokens but the first and one for the token that ends it.
    """
    visual = manner.entered(reply)
    projected = visual + reply.structural if visual else 0
    ranked = reply.visual_total if manner.inside else reply.visual_kept
    rows = reply.prompt_tokens - projected
    return Cost(
        projector=projecting(sizes, projected) if projected else Work(),
        prefill=prefilling(sizes, reply.layer_tokens, reply.layer_pairs),
        retrieval=retrieving(sizes, rows, ranked, reply.visual_active) if manner.retrieves else Work(),
        decode=decoding(sizes, steps, reply.kv_read_bytes),
    )


def own_steps(reply: Reply) -> int:
    """Decode steps of the answer that was given: the token that ends it is decoded too, unless the limit cut it."""
    return reply.output_tokens - reply.was_cut


def conversation_cost(
    sizes: ModelSizes, tiles: int, replies: Sequence[Reply], steps: Sequence[int], manner: Manner
) -> Cost:
    """A picture of that many tiles, encoded once, and the turns about it; the decode steps of each."""
    turns = (turn_cost(sizes, reply, n, manner) for reply, n in zip(replies, steps, strict=True))
    return total_cost([Cost(encoder=encoding(sizes, tiles)), *turns])


def total_cost(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost())
