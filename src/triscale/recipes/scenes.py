"""The demo: a zero-shot classifier of drawn scenes, trained on two CPU cores in minutes."""

from __future__ import annotations

from triscale.config import RunConfig
from triscale.data.settings import DataSettings
from triscale.models.settings import ModelSettings
from triscale.training.settings import BatchSettings, LossSettings, OptimSettings, TrainSettings


def config() -> RunConfig:
    """Zero-shot classification of drawn scenes, nothing to download.

        triscale train scenes

    Two CPU cores: 5 minutes. Top-1 in % among all 144 classes, 24 of which are never trained on: val 97.8,
    unseen 94.8; v2 74.2, sketch 24.7, rendition 53.2, adversarial 10.5, objectnet 26.1, their mean 37.7 %.
    """
    shifts = ("v2", "sketch", "rendition", "adversarial", "objectnet")
    return RunConfig(
        data=DataSettings(
            train=("scenes",),
            eval=tuple(f"scenes:{split}" for split in ("val", "unseen", *shifts)),
            shifts=shifts,
            image_size=32,
            tokens=16,
            vocabulary=512,
            ids="label",
            workers=0,  # two cores: a worker would take one from the towers, and drawn images are kept
        ),
        model=ModelSettings(
            image="resnet10t",
            image_options='{"channels": [40, 64, 96, 128], "stem_width": 16}',
            text_width=64,
            text_layers=1,
            text_heads=4,
            embedding=128,
        ),
        loss=LossSettings(logit_scale=10.0),
        batch=BatchSettings(size=512, micro="32", batch_norm="per_micro_batch"),
        optim=OptimSettings(learning_rate=5e-3, weight_decay=0.05, warmup_steps=40),
        train=TrainSettings(steps=500, checkpoint_every_steps=100),
    )
