"""CoAtNet-7 of timm's building blocks, known to timm as `coatnet_7_224`; timm itself has CoAtNet-0 to -5.

Source: Dai et al., *CoAtNet: Marrying Convolution and Attention for All Data Sizes* (arXiv 2106.04803), the largest of
its models. At a sixteenth of the image's side it turns from convolutions to transformer blocks of twice the width,
which none of timm's configurations can say: their transformers widen only where they halve the resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.classifier import NormMlpClassifierHead
from timm.layers.norm import LayerNorm2d
from timm.models import generate_default_cfgs, register_model
from timm.models.maxxvit import MaxxVitConvCfg, MaxxVitStage, MaxxVitTransformerCfg, Stem
from torch import Tensor, nn

STRIDES = (2, 2, 2, 1, 2)
BLOCKS = ("C", "C", "C", "T", "T")
"""timm's letters: MBConv and transformer blocks with relative attention."""
CONV_NORM_EPS = 1e-5

default_cfgs = generate_default_cfgs(
    {"coatnet_7_224.untrained": {"input_size": (3, 224, 224), "fixed_input_size": True}}
)


class CoAtNet(nn.Module):
    """Images to pooled features, (m, 3, s, s) -> (m, w), w the last of `embed_dim`, by a stem and five stages.

    Args:
        img_size: s; relative attention fixes it.
        embed_dim: width of each stage.
        depths: blocks of each stage.
        stem_width: of the stem's two convolutions.
        dim_head: width of an attention head; must divide the last two widths.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        embed_dim: Sequence[int] = (256, 512, 1024, 2048, 3072),
        depths: Sequence[int] = (2, 4, 8, 42, 2),
        stem_width: int = 192,
        dim_head: int = 128,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not len(embed_dim) == len(depths) == len(STRIDES):
            raise ValueError(f"embed_dim and depths must have {len(STRIDES)} numbers each")
        conv, transformer = MaxxVitConvCfg(norm_eps=CONV_NORM_EPS), MaxxVitTransformerCfg(dim_head=dim_head)
        self.stem = Stem(3, stem_width, act_layer=conv.act_layer, norm_layer=conv.norm_layer, norm_eps=CONV_NORM_EPS)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        inputs, side = stem_width, img_size // 2
        stages = []
        for width, depth, stride, kind in zip(embed_dim, depths, STRIDES, BLOCKS, strict=True):
            side = (side - 1) // stride + 1
            stage = MaxxVitStage(
                inputs,
                width,
                stride=2,
                depth=depth,
                feat_size=(side, side),
                block_types=kind,
                conv_cfg=conv,
                transformer_cfg=transformer,
                drop_path=[next(rates) for _ in range(depth)],
            )
            if stride == 1:
                _keep_resolution(stage.blocks[0])
            stages.append(stage)
            inputs = width
        self.stages = nn.Sequential(*stages)
        # The head of timm's CoAtNets, without a classifier: pool, norm, a layer of as many features, tanh.
        norm = partial(LayerNorm2d, eps=transformer.norm_eps)
        self.head = NormMlpClassifierHead(inputs, 0, hidden_size=inputs, norm_layer=norm)
        for part in (self.stem, *(block for stage in stages for block in stage.blocks)):
            part.init_weights(scheme="vit_eff")

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must spare, by timm's convention: the relative position biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The layers, by timm's convention: the stem, then blocks or whole stages; the head with the last of them."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^head", (99999,))]}

    def forward(self, images: Float[Tensor, "m 3 s s"]) -> Float[Tensor, "m w"]:
        """The features, pooled over places."""
        return self.head(self.stages(self.stem(images)))


def _keep_resolution(block: nn.Module) -> None:
    """Take the pooling out of a transformer block that halves the resolution: x + attention, x widened by a product.

    What is left is the paper's sum, proj(pool(x)) + attention(pool(norm(x))), without its pooling.
    """
    block.get_submodule("shortcut").register_module("pool", nn.Identity())
    block.get_submodule("norm1").register_module("down", nn.Identity())


@register_model
def coatnet_7_224(pretrained: bool = False, **options: Any) -> CoAtNet:
    """CoAtNet-7 without a classifier: 2.44 B parameters."""
    # What timm.create_model says of weights; there are none.
    timms = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "num_classes"}
    return CoAtNet(**{name: value for name, value in options.items() if name not in timms})
