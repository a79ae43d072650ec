"""Where open_clip's weights hold our tensors: its ViT, its ResNet, timm's models in it, and its text transformer."""

from __future__ import annotations

from triscale.models.interop import BIAS, SCALE, Rule


def _transformer(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The blocks of our text transformer."""
    return (
        Rule(f"{ours}.blocks.*.attention_norm.**", f"{theirs}transformer.resblocks.*.ln_1.**"),
        Rule(f"{ours}.blocks.*.attention.qkv.weight", f"{theirs}transformer.resblocks.*.attn.in_proj_weight"),
        Rule(f"{ours}.blocks.*.attention.qkv.bias", f"{theirs}transformer.resblocks.*.attn.in_proj_bias"),
        Rule(f"{ours}.blocks.*.attention.out.**", f"{theirs}transformer.resblocks.*.attn.out_proj.**"),
        Rule(f"{ours}.blocks.*.mlp_norm.**", f"{theirs}transformer.resblocks.*.ln_2.**"),
        Rule(f"{ours}.blocks.*.mlp.0.**", f"{theirs}transformer.resblocks.*.mlp.c_fc.**"),
        Rule(f"{ours}.blocks.*.mlp.2.**", f"{theirs}transformer.resblocks.*.mlp.c_proj.**"),
    )


def text_rules(prefix: str, *, linear: bool) -> tuple[Rule, ...]:
    """Of the text tower, whose projection is a module of its own (`linear`) or a matrix."""
    projection = (
        Rule("text.projection.**", f"{prefix}text_projection.**")
        if linear
        else Rule("text.projection.weight", f"{prefix}text_projection", "transposed")
    )
    return (
        Rule("text.token_embedding.weight", f"{prefix}token_embedding.weight"),
        Rule("text.position_embedding", f"{prefix}positional_embedding"),
        *_transformer("text", prefix),
        Rule("text.norm.**", f"{prefix}ln_final.**"),
        projection,
    )


VIT_RULES = (
    Rule("image.backbone.cls_token", "visual.class_embedding", "unbatched"),
    Rule("image.backbone.pos_embed", "visual.positional_embedding", "unbatched"),
    Rule("image.backbone.patch_embed.proj.weight", "visual.conv1.weight"),
    Rule("image.backbone.norm_pre.**", "visual.ln_pre.**"),
    Rule("image.backbone.blocks.*.norm1.**", "visual.transformer.resblocks.*.ln_1.**"),
    Rule("image.backbone.blocks.*.attn.qkv.weight", "visual.transformer.resblocks.*.attn.in_proj_weight"),
    Rule("image.backbone.blocks.*.attn.qkv.bias", "visual.transformer.resblocks.*.attn.in_proj_bias"),
    Rule("image.backbone.blocks.*.attn.proj.**", "visual.transformer.resblocks.*.attn.out_proj.**"),
    Rule("image.backbone.blocks.*.norm2.**", "visual.transformer.resblocks.*.ln_2.**"),
    Rule("image.backbone.blocks.*.mlp.fc1.**", "visual.transformer.resblocks.*.mlp.c_fc.**"),
    Rule("image.backbone.blocks.*.mlp.fc2.**", "visual.transformer.resblocks.*.mlp.c_proj.**"),
    Rule("image.backbone.norm.**", "visual.ln_post.**"),
    Rule("image.projection.weight", "visual.proj", "transposed"),
)
RESNET_RULES = (
    Rule("image.backbone.stem.conv*.conv.weight", "visual.conv*.weight"),
    Rule("image.backbone.stem.conv*.bn.**", "visual.bn*.**"),
    *(
        Rule(f"image.backbone.stages.{stage}.*.{ours}.**", f"visual.layer{stage + 1}.*.{theirs}.**")
        for stage in range(4)
        for ours, theirs in (
            ("conv1_1x1.conv", "conv1"),
            ("conv1_1x1.bn", "bn1"),
            ("conv2_kxk.conv", "conv2"),
            ("conv2_kxk.bn", "bn2"),
            ("conv3_1x1.conv", "conv3"),
            ("conv3_1x1.bn", "bn3"),
            ("shortcut.conv.conv", "downsample.0"),
            ("shortcut.conv.bn", "downsample.1"),
        )
    ),
    Rule("image.backbone.head.pos_embed", "visual.attnpool.positional_embedding"),
    *(Rule(f"image.backbone.head.{part}.**", f"visual.attnpool.{part}_proj.**") for part in "qkv"),
    Rule("image.projection.**", "visual.attnpool.c_proj.**"),
)
TIMM_RULES = (
    Rule("image.backbone.**", "visual.trunk.**"),
    Rule("image.projection.**", "visual.head.proj.**"),
)
LOSS_RULES = (Rule(SCALE, "logit_scale"), Rule(BIAS, "logit_bias"))
