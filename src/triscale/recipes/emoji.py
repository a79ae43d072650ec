"""Real drawings: emoji by artists that were trained on and by others, 1,590 classes."""

from __future__ import annotations

from dataclasses import replace

from triscale.config import Phases, RunConfig
from triscale.data.settings import AugmentSettings, DataSettings
from triscale.models.settings import ModelSettings
from triscale.training.settings import BatchSettings, LossSettings, OptimSettings, TrainSettings


def config() -> RunConfig:
    """Zero-shot classification of 1,590 emoji, drawn by artists that were trained on and by others.

        triscale train emoji --data.root DIR

    DIR holds the data set `emoji`: `train/*.tar` and the evaluation sets `wds_*`. Two CPU cores with native bfloat16
    (AVX-512 BF16 or AMX): 18 minutes in all; elsewhere `--train.precision float32` may be faster. Top-1 in %: val 59.9,
    openmoji 33.7, fluent-emoji 79.7, fluent-emoji-high-contrast 57.5, fxemoji 55.4, unseen-classes 19.0 %.
    """
    shifts = ("openmoji", "fluent-emoji", "fluent-emoji-high-contrast", "fxemoji")
    return RunConfig(
        data=DataSettings(
            train=("train/*.tar",),
            eval=tuple(f"wds_{name}" for name in ("val", *shifts, "unseen-classes")),
            shifts=shifts,
            image_size=48,
            canvas=64,
            fit="pad",
            tokens=12,
            vocabulary=4096,
            caption_fields=("txt", "json:name"),
            caption_templates=("{c}", "an emoji of {c}", "a picture of {c}", "{c} emoji", "an icon showing {c}"),
            caption_part_dropout=0.5,
            ids="label",
            workers=0,  # two cores: a worker would take one from the towers, and decoded images are kept
            # Other artists draw other proportions, outlines and shades; left and right stay, since names tell them.
            augment=AugmentSettings(
                zoom=(0.8, 1.2),
                stretch=1.2,
                rotation=10,
                shear=6,
                shift=0.06,
                warp=0.02,
                fill="white",
                brightness=0.05,
                contrast=0.2,
                saturation=0.4,
                hue=12,
                grayscale=0.1,
                outline=0.15,
                two_tone=0.1,
                blur=0.15,
                erase=0.05,
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
        optim=OptimSettings(learning_rate=1.5e-3, weight_decay=0.2, warmup_steps=200),
        train=TrainSettings(steps=1900, precision="bfloat16", checkpoint_every_steps=500),
    )


def phases() -> Phases:
    """The recipe emoji in BASIC's three phases: labels first, then text beside a frozen image tower, then both.

        triscale train emoji-phases --data.root DIR

    Data, towers and hardware (CPU) are those of emoji. The image tower takes the same compute as there, a forward pass
    being one unit and a backward pass two: 1,900 steps of 256 samples, of which phase 2 takes the one pass over the
    5,068 samples whose features it keeps. With two fifths of the steps, mean of three seeds, top-1 in %: val 40.1, mean
    of shifts 32.9; phases 1 and 2 alone, given the same compute, 48.0 and 38.4; from scratch 47.7 and 41.4: a set this
    small gains nothing by phases (benchmarks/phases.py, docs/results.md). That took 9.5 minutes on one core.
    """
    base = config()
    image = replace(
        base,
        loss=LossSettings(name="classification", label_smoothing=0.1),
        batch=replace(base.batch, micro="128"),
        train=replace(base.train, steps=1400),
    )
    text = replace(
        base,
        data=replace(base.data, augment=AugmentSettings()),  # so that features of the frozen tower are kept
        batch=replace(base.batch, size=1024, micro="256"),
        optim=replace(base.optim, warmup_steps=100),
        train=replace(base.train, steps=600, frozen=("image.backbone",)),
    )
    both = replace(
        base,
        optim=replace(base.optim, learning_rate=3e-4, warmup_steps=50),
        train=replace(base.train, steps=493),
    )
    return Phases({"image": image, "text": text, "both": both})
