"""The language model: Llama, Mistral and Qwen2 are one decoder whose differences are config fields.

Stateless. The runner owns the loop over layers: between `project` and `finish` it does the attention, and with it
everything about caches and sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..kernels.rope import rope
from ..kernels.silu_mul import silu_mul
from ..quant.awq import HeadGroups
from ..quant.linear import Linear
from ..quant.scale_group import ScaledBlock, ScaleGroup
from .blocks import RMSNorm, empty_embedding
from .checkpoint import ConfigReader
from .rotary import RopeConfig

MAX_LAYERS = 512  # far above any released decoder; bounds what a config can make us allocate

# Keys that hub configs leave out take the defaults of their Hugging Face class.
_COMMON = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_QWEN_VL = {
    "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
    "intermediate_size": 29568, "max_position_embeddings": 32768, "vocab_size": 152064,
}  # fmt: skip
# A flat config has the whole model's type, a nested one that of its text part.
_QWEN_VL_TYPES = ("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text")
_DEFAULTS = {
    "llama": {**_COMMON, "intermediate_size": 11008, "max_position_embeddings": 2048, "vocab_size": 32000},
    "mistral": {**_COMMON, "intermediate_size": 14336, "max_position_embeddings": 131072, "vocab_size": 32000},
    "qwen2": {**_COMMON, "intermediate_size": 22016, "max_position_embeddings": 32768, "vocab_size": 151936},
    **dict.fromkeys(_QWEN_VL_TYPES, _QWEN_VL),
}
_DEFAULT_KV_HEADS = {"mistral": 8, **dict.fromkeys(_QWEN_VL_TYPES, 8)}  # the others: as many as query heads
_DEFAULT_EPS = dict.fromkeys(_QWEN_VL_TYPES, 1e-5)  # the others: 1e-6
_DEFAULT_THETA = dict.fromkeys(_QWEN_VL_TYPES, 1e6)  # the others: 1e4
_DEFAULT_SLIDING_WINDOW = {"mistral": 4096}


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    max_context: int  # positions that the checkpoint was made for
    qkv_bias: bool
    tie_word_embeddings: bool

    @staticmethod
    def from_hf(text: ConfigReader, *, tied: bool = False, model_type: str = "llama") -> DecoderConfig:
        """Reads a Hugging Face text config; each key once.

        `tied` is the top level's tie_word_embeddings, `model_type` that of a config that names none.
        """
        kind = text.get_str("model_type", default=model_type, choices=tuple(_DEFAULTS))
        defaults = _DEFAULTS[kind]
        hidden = text.get_int("hidden_size", default=defaults["hidden_size"], low=1, high=65536)
        heads = text.get_int("num_attention_heads", default=defaults["num_attention_heads"], low=1, high=1024)
        kv_heads = text.get_int(
            "num_key_value_heads", default=_DEFAULT_KV_HEADS.get(kind, heads), low=1, high=heads, none_ok=True
        )
        head_dim = text.get_int("head_dim", default=None, low=2, high=1024, none_ok=True) or hidden // heads
        kv_heads = heads if kv_heads is None else kv_heads
        if heads % kv_heads or head_dim % 2:
            raise UnsupportedModel(
                f"text config: expected num_attention_heads a multiple of num_key_value_heads and an even head_dim, "
                f"got {heads}, {kv_heads}, {head_dim}"
            )
        for key in ("attention_bias", "mlp_bias"):
            if text.get_bool(key, default=False):
                raise UnsupportedModel(f"text config: {key} true is not computed here")
        text.get_str("hidden_act", default="silu", choices=("silu",))
        positions = text.get_int("max_position_embeddings", default=defaults["max_position_embeddings"], low=1)
        rotary = RopeConfig.from_hf(
            text,
            default_theta=_DEFAULT_THETA.get(kind, 1e4),
            max_positions=positions,
            head_dim=head_dim if kind in _QWEN_VL_TYPES else None,
        )
        return DecoderConfig(
            hidden_size=hidden,
            intermediate_size=text.get_int(
                "intermediate_size", default=defaults["intermediate_size"], low=1, high=1 << 20
            ),
            num_layers=text.get_int("num_hidden_layers", default=defaults["num_hidden_layers"], low=1, high=MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=text.get_int("vocab_size", default=defaults["vocab_size"], low=1, high=1 << 24),
            rms_norm_eps=text.get_float("rms_norm_eps", default=_DEFAULT_EPS.get(kind, 1e-6), low=0.0),
            rope=rotary,
            max_context=_context(text, kind, rotary, positions),
            qkv_bias=kind.startswith("qwen2"),
            tie_word_embeddings=text.get_bool("tie_word_embeddings", default=tied),
        )


def _context(text: ConfigReader, kind: str, rotary: RopeConfig, positions: int) -> int:
    """Positions that full attention computes as the checkpoint means it."""
    # A linearly scaled Llama states the length before scaling (Vicuna 16k: 4096 and factor 4).
    context = int(positions * rotary.factor) if rotary.type == "linear" else positions
    window = text.get_int("sliding_window", default=_DEFAULT_SLIDING_WINDOW.get(kind), low=1, none_ok=True)
    if kind.startswith("qwen2") and not text.get_bool("use_sliding_window", default=False):
        window = None
    # Inside its window, sliding attention is full attention.
    return context if window is None else min(context, window)


class _Attention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, {"q_proj": q, "k_proj": kv, "v_proj": kv}, bias=config.qkv_bias)
        self.o_proj = Linear(q, config.hidden_size)


class _MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = Linear(config.hidden_size, {"gate_proj": size, "up_proj": size})
        self.down_proj = Linear(size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu_mul(self.gate_up_proj(x)))


class DecoderLayer(ScaledBlock):
    """One layer, cut where attention happens."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _MLP(config)

    def enter(self, hidden: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The residual stream with what the layer before adds to it, and queries, keys and values of its norm.

        hidden and added (M, hidden_size) -> (M, hidden_size) and (M, H + 2 H_kv, D), not yet rotated.
        """
        hidden, normed = self.input_layernorm.add(hidden, added)
        return hidden, self.self_attn.qkv_proj(normed).reshape(hidden.shape[0], -1, self.head_dim)

    def leave(self, hidden: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """Output projection and MLP: hidden (M, hidden_size), attended (M, H D) -> the residual stream and what the
        MLP adds to it, both (M, hidden_size)."""
        hidden, normed = self.post_attention_layernorm.add(hidden, self.self_attn.o_proj(attended))
        return hidden, self.mlp(normed)

    def project(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (M, hidden_size) -> q (H, M, D), k and v (H_kv, M, D), q and k rotated."""
        q, k, v = self.enter(hidden)[1].transpose(0, 1).split(self.heads)
        return rope(q, cos, sin), rope(k, cos, sin), v

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """What follows attention: hidden (M, hidden_size), attended (H, M, D) -> (M, hidden_size)."""
        hidden, added = self.leave(hidden, attended.transpose(0, 1).reshape(hidden.shape[0], -1))
        return hidden + added

    def scale_groups(self) -> tuple[ScaleGroup, ...]:
        """Norms feed qkv and gate_up; values reach o_proj as weighted means, and silu(gate) * up is linear in up."""
        attn, mlp = self.self_attn, self.mlp
        heads = HeadGroups(self.heads[0], self.heads[1], self.head_dim)
        v, up = attn.qkv_proj.parts["v_proj"], mlp.gate_up_proj.parts["up_proj"]
        return (
            ScaleGroup({"self_attn.qkv_proj": attn.qkv_proj}, self.input_layernorm),
            ScaleGroup({"self_attn.o_proj": attn.o_proj}, attn.qkv_proj, rows=v, heads=heads),
            ScaleGroup({"mlp.gate_up_proj": mlp.gate_up_proj}, self.post_attention_layernorm),
            ScaleGroup({"mlp.down_proj": mlp.down_proj}, mlp.gate_up_proj, rows=up),
        )


class DecoderHead(ScaledBlock):
    """What stands behind the last layer, as a block of its own; its modules have the decoder's names."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (M, hidden_size) -> logits (M, vocab_size)."""
        return self.lm_head(self.norm(hidden))

    def scale_groups(self) -> tuple[ScaleGroup, ...]:
        return (ScaleGroup({"lm_head": self.lm_head}, self.norm),)


class Decoder(nn.Module):
    """Embedding, layers, norm and head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = empty_embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)

    def layer(self, index: int) -> DecoderLayer:
        """The layer `index`, from 0."""
        layer = self.layers[index]
        assert isinstance(layer, DecoderLayer)
        return layer

    def embed(self, ids: Tensor) -> Tensor:
        """ids (M,) int64 -> (M, hidden_size)."""
        return self.embed_tokens(ids)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (M,) or, of multimodal RoPE, (3, M) int64 -> cos and sin (M, D/2) in the model's dtype."""
        rotary = self.config.rope
        frequencies = rotary.frequencies(self.config.head_dim).to(positions.device)
        angle = positions.float()[..., None] * frequencies  # (M, D/2) or (3, M, D/2)
        if positions.ndim == 2:
            angle = rotary.by_axis(angle)
        dtype = self.norm.weight.dtype
        return (angle.cos() * rotary.attention_factor).to(dtype), (angle.sin() * rotary.attention_factor).to(dtype)

    def logits(self, hidden: Tensor, added: Tensor | None = None) -> Tensor:
        """hidden (M, hidden_size), and what the last layer adds to it -> (M, vocab_size) float32."""
        return self.lm_head(self.norm.add(hidden, added)[1]).float()
