"""BASIC in its three phases (Pham et al., arXiv 2111.10050): labels, then text beside a frozen image tower, then both.

What is known of the paper is taken from it: the towers, AdaFactorW with a second moment of 0.99, the softmax classifier
of phase 1, the frozen image tower and the batch of 65,536 pairs in phase 2, the low learning rate of phase 3, labels
turned into text by prompts, images of 224 pixels and 64 tokens. Learning rates, steps, weight decay, label smoothing
and the batches of phases 1 and 3 are chosen here. No result has been reproduced.

Every recipe reads, below --data.root DIR,

    labelled/*.tar    images with a class: KEY.jpg, KEY.cls
    classnames.txt    the name of class k in line k + 1
    pairs/*.tar       images with captions: KEY.jpg, KEY.txt

In phases 2 and 3 labelled samples are drawn with the others, in proportion to their numbers, the text being the name of
the class in a prompt of CLIP's; samples of one class are positives of each other. Shards are fetched from URLs with
--data.train and --data.window-shards; features of the frozen image tower are then not kept.
"""

from __future__ import annotations

from dataclasses import replace

from triscale.config import Phases, RunConfig, with_preset
from triscale.data.settings import AugmentSettings, DataSettings
from triscale.training.settings import BatchSettings, LossSettings, OptimSettings, TrainSettings

LABELLED = "labelled/*.tar classes=classnames.txt templates=clip ids=label"


def small() -> Phases:
    """BASIC-S: CoAtNet-0 and a text transformer of 6 layers of width 1024, in three phases.

        torchrun --nproc-per-node 8 -m triscale train basic-s --data.root DIR

    For one machine of 8 GPUs of 80 GB. Not run yet: no time (minutes) and no result (%); a CPU takes it at toy size.
    """
    return _phases("basic-s", rate=1e-3)


def medium() -> Phases:
    """BASIC-M: CoAtNet-3 and a text transformer of 12 layers of width 1024, in three phases.

        torchrun --nproc-per-node 8 -m triscale train basic-m --data.root DIR

    For some machines of 8 GPUs of 80 GB. Not run yet: no time (minutes) and no result (%); a CPU takes it at toy size.
    """
    return _phases("basic-m", rate=1e-3)


def large() -> Phases:
    """BASIC-L: CoAtNet-7 and a text transformer of 12 layers of width 2048, in three phases.

        torchrun --nnodes N --nproc-per-node 8 -m triscale train basic-l --data.root DIR --parallel.shard full

    For hundreds of GPUs of 80 GB, the towers sharded over them. Not run yet: no time (minutes) and no result (%); a CPU
    takes it at toy size.
    """
    return _phases("basic-l", rate=5e-4)


def _phases(preset: str, rate: float) -> Phases:
    optim = OptimSettings(
        name="adafactorw", beta2=0.99, learning_rate=rate, weight_decay=0.01, warmup_steps=10_000, schedule="linear"
    )
    train = TrainSettings(precision="bfloat16", checkpoint_every_steps=1000, collective_timeout_seconds=600)
    labels = RunConfig(
        data=DataSettings(
            train=("labelled/*.tar",),
            ids="label",
            augment=AugmentSettings(crop_area=(0.08, 1.0), flip=0.5),
            workers=8,
        ),
        loss=LossSettings(name="classification", label_smoothing=0.1),
        batch=BatchSettings(size=16_384, remat="selective"),
        optim=optim,
        train=replace(train, steps=500_000),
    )
    pairs = replace(
        labels,
        data=DataSettings(train=("pairs/*.tar", LABELLED), workers=8),
        loss=LossSettings(),
        batch=BatchSettings(size=65_536, remat="selective"),
    )
    phases = {
        "image": labels,
        "text": replace(pairs, train=replace(train, steps=500_000, frozen=("image",))),
        "both": replace(
            pairs,
            data=replace(pairs.data, augment=AugmentSettings(crop_area=(0.9, 1.0))),
            optim=replace(optim, learning_rate=rate / 50, warmup_steps=1000),
            train=replace(train, steps=50_000),
        ),
    }
    return Phases(phases).changed(lambda config: with_preset(config, preset))
