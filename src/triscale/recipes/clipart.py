"""Real drawings with real captions: clip art and its noisy, multilingual titles and tags."""

from __future__ import annotations

from triscale.config import RunConfig
from triscale.data.settings import AugmentSettings, DataSettings
from triscale.models.settings import ModelSettings
from triscale.training.settings import BatchSettings, OptimSettings, TrainSettings


def config() -> RunConfig:
    """Retrieval between clip art and its titles, folders and tags.

        triscale train clipart --data.root DIR

    DIR holds the data set `clipart`: `train/*.tar` and the evaluation set `wds_val`. Two CPU cores with native bfloat16
    (AVX-512 BF16 or AMX): TOTAL minutes in all; elsewhere `--train.precision float32` may be faster. RESULT %.
    """
    return RunConfig(
        data=DataSettings(
            train="train/*.tar",
            eval=("wds_val",),
            image_size=48,
            canvas=64,
            fit="pad",
            tokens=24,
            vocabulary=4096,
            caption_part_dropout=0.3,
            # Drawings of one series often share their whole caption.
            ids="caption",
            workers=0,  # two cores: a worker would take one from the towers, and decoded images are kept
            augment=AugmentSettings(
                zoom=(0.8, 1.2),
                stretch=1.2,
                rotation=10,
                shear=6,
                shift=0.06,
                warp=0.02,
                flip=0.5,
                fill="white",
                brightness=0.05,
                contrast=0.2,
                saturation=0.4,
                hue=12,
                grayscale=0.1,
                outline=0.05,
                blur=0.15,
                erase=0.1,
            ),
        ),
        model=ModelSettings(
            image="resnet10t",
            image_options='{"channels": [48, 96, 192, 384]}',
            text_width=128,
            text_layers=1,
            text_heads=4,
            embedding=256,
        ),
        batch=BatchSettings(size=256, micro="image=128,text=256", batch_norm="per_micro_batch"),
        optim=OptimSettings(learning_rate=1.5e-3, weight_decay=0.2, warmup_steps=150),
        train=TrainSettings(steps=1300, precision="bfloat16", checkpoint_every_steps=500),
    )
