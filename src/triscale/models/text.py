"""BASIC's text tower: a bidirectional pre-norm transformer whose top layer is averaged over the real tokens.

Source: *Combined Scaling for Zero-shot Transfer Learning* (arXiv 2111.10050), section on models; initialisation as
CLIP's (arXiv 2103.00020, `CLIP.initialize_parameters` of its code).

Captions are much shorter than a token row, so only real tokens are computed: they stand packed, one after another, and
take their places in padded rows for the attention product alone.

Shapes: m rows of l tokens, t real tokens in all of them, w width, d embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from triscale.errors import UsageError
from triscale.models.settings import ModelSettings

PAD = 0


class Packing(NamedTuple):
    """Which of the m*l places of a batch of token rows hold the t packed tokens."""

    attended: Bool[Tensor, "m l"]
    """True where a token stands."""
    places: Int64[Tensor, " t"]
    """Each token's place in the flattened rows, ascending."""

    @property
    def rows(self) -> Int64[Tensor, " t"]:
        """Each token's row."""
        return self.places // self.attended.shape[1]

    def unpack(self, x: Float[Tensor, "t c"]) -> Float[Tensor, "m l c"]:
        """Put packed tokens in their places, zeros elsewhere."""
        m, columns = self.attended.shape
        return x.new_zeros(m * columns, x.shape[1]).index_copy(0, self.places, x).view(m, columns, -1)

    def pack(self, x: Float[Tensor, "m l c"]) -> Float[Tensor, "t c"]:
        """The inverse of `unpack`."""
        return x.flatten(0, 1).index_select(0, self.places)


def pack_tokens(tokens: Int[Tensor, "m l"]) -> Packing:
    """Pack what is not padding; a row of nothing but padding counts as full, so that its embedding is finite.

    On the meta device every token counts as real: the most that a batch of this shape can take.
    """
    real = tokens != PAD
    attended = real | ~real.any(dim=1, keepdim=True)
    if tokens.is_meta:
        return Packing(attended, torch.arange(tokens.numel(), device=tokens.device))
    return Packing(attended, attended.flatten().nonzero().squeeze(1))


def _linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    """A linear layer with normal weights and no bias at the start."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Multi-head self-attention over the real tokens of a row."""

    def __init__(self, width: int, heads: int, residual_std: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = _linear(width, 3 * width, std=width**-0.5)
        self.out = _linear(width, width, std=residual_std)

    def forward(self, x: Float[Tensor, "t w"], packing: Packing) -> Float[Tensor, "t w"]:
        """Attend from every token to those of its row."""
        m, columns = packing.attended.shape
        qkv = packing.unpack(self.qkv(x)).view(m, columns, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=packing.attended[:, None, None, :])
        return self.out(packing.pack(mixed.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Attention and a GELU MLP of ratio 4, each pre-normalised, with dropout and stochastic depth on its branch."""

    def __init__(self, width: int, heads: int, residual_std: float, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, residual_std)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            _linear(width, 4 * width, std=(2 * width) ** -0.5),
            nn.GELU(),
            _linear(4 * width, width, std=residual_std),
        )
        self.dropout = nn.Dropout(dropout)
        self.drop_path = drop_path

    def forward(self, x: Float[Tensor, "t w"], packing: Packing) -> Float[Tensor, "t w"]:
        """Refine the tokens."""
        x = x + self._drop(self.attention(self.attention_norm(x), packing), packing)
        return x + self._drop(self.mlp(self.mlp_norm(x)), packing)

    def _drop(self, branch: Float[Tensor, "t w"], packing: Packing) -> Float[Tensor, "t w"]:
        """Dropout, and stochastic depth: the branch is left out for some rows, and larger for the others."""
        branch = self.dropout(branch)
        if not self.training or self.drop_path == 0:
            return branch
        kept = branch.new_empty(len(packing.attended), 1).bernoulli_(1 - self.drop_path) / (1 - self.drop_path)
        return branch * kept.index_select(0, packing.rows)


class TextTower(nn.Module):
    """Token rows to embeddings, (m, l) -> (m, d), not normalised.

    Token 0 is padding: it is never attended to nor averaged, so a row's embedding does not depend on how far it is
    padded. (A row of nothing but padding attends to its padding, so that its embedding is finite.)

    Args:
        vocabulary: number of token ids.
        tokens: longest row, in tokens; shorter ones are welcome.
        width, layers, heads: of the transformer.
        embedding: d.
        dropout: probability on each residual branch.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        tokens: int,
        width: int,
        layers: int,
        heads: int,
        embedding: int,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        # What is added to the residual stream 2*layers times starts smaller by the root of that number.
        residual_std = (2 * layers * width) ** -0.5
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Parameter(torch.empty(tokens, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(width, heads, residual_std, dropout, drop_path * depth / max(layers - 1, 1))
            for depth in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embedding, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.01)
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must spare, by timm's convention: positions, which have no scale to shrink."""
        return {"position_embedding"}

    def forward(self, tokens: Int[Tensor, "m l"]) -> Float[Tensor, "m d"]:
        """Embed token rows; l is at most the tower's `tokens`."""
        packing = pack_tokens(tokens)
        words = self.token_embedding(tokens.flatten().index_select(0, packing.places))
        x = self.dropout(words + F.embedding(packing.places % tokens.shape[1], self.position_embedding))
        for block in self.blocks:
            x = block(x, packing)
        sums = packing.unpack(self.norm(x)).sum(dim=1)
        return self.projection(sums / packing.attended.sum(dim=1, keepdim=True).to(sums.dtype))


def build_text_tower(settings: ModelSettings, *, vocabulary: int, tokens: int) -> TextTower:
    """The text tower that `settings` describe, freshly initialised from torch's default generator.

    Raises:
        UsageError: a size below 1, heads that do not divide the width, or a probability outside [0, 1).
    """
    sizes = {"text-width": settings.text_width, "text-layers": settings.text_layers, "text-heads": settings.text_heads}
    for name, size in sizes.items():
        if size < 1:
            raise UsageError(f"--model.{name} is {size}; it must be at least 1")
    if settings.text_width % settings.text_heads:
        raise UsageError(
            f"--model.text-width {settings.text_width} is not a multiple of --model.text-heads {settings.text_heads}"
        )
    return TextTower(
        vocabulary=vocabulary,
        tokens=tokens,
        width=settings.text_width,
        layers=settings.text_layers,
        heads=settings.text_heads,
        embedding=settings.embedding,
        dropout=settings.dropout,
        drop_path=settings.drop_path,
    )
