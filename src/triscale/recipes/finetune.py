"""Fine-tuning of any trained model on a small data set, with an eye on what it could do before."""

from __future__ import annotations

from triscale.config import RunConfig
from triscale.data.settings import DataSettings
from triscale.fine_tuning import FineTuning
from triscale.training.settings import BatchSettings, OptimSettings, TrainSettings


def config() -> FineTuning:
    """Fine-tuning of a model on your data: contrastive, gentle, interpolated with what it was (docs/finetune.md).

        triscale train finetune --train.init MODEL --data.train SOURCES --data.eval SETS --data.guard SETS

    MODEL is a run folder, an exported model, one of open_clip or Hugging Face, or hf-hub:NAME. A CPU takes small models
    and data in minutes; docs/finetune.md has an example with its scores in %.

    The defaults are those that keep most of the model, where the literature gives them:

    - The loss is the one that the model was trained with, on captions or on class names in prompts, not a new
      classifier: "Finetune like you pretrain" (Goyal et al., arXiv 2212.00638). Equal captions, such as names of a
      class, are positives of each other.
    - Its learning rate of 1e-5, AdamW with a weight decay of 0.1, and 10 passes over the data; warmup over at most a
      tenth of them. Towers much smaller than ViT-B bear, and need, a higher rate.
    - The layers next to the input change least: a mild layer decay of 0.9 (BEiT, Bao et al., arXiv 2106.08254, and for
      CLIP Dong et al., arXiv 2212.06138, decay more, with higher rates at the top).
    - Weights are interpolated with the initial ones afterwards, half and half unless told otherwise: WiSE-FT (Wortsman
      et al., arXiv 2109.01903).
    - No augmentation, which depends on the data, and lets features of a locked image tower be kept.

    `--train.frozen image` locks the image tower (LiT, Zhai et al., arXiv 2111.07991), `text` the text tower; heads
    before towers (LP-FT, Kumar et al., arXiv 2202.10054) is one run with both backbones frozen, another from it.
    """
    return FineTuning(
        RunConfig(
            data=DataSettings(ids="caption"),
            batch=BatchSettings(size=256, batch_norm="per_micro_batch"),
            optim=OptimSettings(learning_rate=1e-5, weight_decay=0.1, layer_decay=0.9, warmup_steps=100),
            train=TrainSettings(steps=0, epochs=10.0, interpolate=(0.0, 0.25, 0.5, 0.75, 1.0)),
        )
    )
