"""Models that train on a CPU, by name.

Neither has BatchNorm, so both take micro-batches of any size. Parameters, without the token and position embeddings
of the text tower (`vocabulary` + `tokens` rows of its width):

    cpu-tiny     image 1,265,712    text   413,184
    cpu-small    image 6,401,120    text 1,828,992
"""

from __future__ import annotations

from triscale.models.settings import ModelSettings

PRESETS: dict[str, ModelSettings] = {
    "cpu-tiny": ModelSettings(
        image="resnet10t",
        image_options=(
            '{"stem_type": "deep", "stem_width": 16, "channels": [32, 64, 128, 256], "norm_layer": "groupnorm1"}'
        ),
        text_width=128,
        text_layers=2,
        text_heads=4,
        embedding=128,
    ),
    "cpu-small": ModelSettings(
        image="resnet18",
        image_options='{"channels": [48, 96, 192, 384], "norm_layer": "groupnorm1"}',
        text_width=192,
        text_layers=4,
        text_heads=4,
        embedding=256,
    ),
}
