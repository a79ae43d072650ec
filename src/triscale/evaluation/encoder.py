"""What evaluation needs of a model, and how a set's samples reach it: in fixed batches, shared out over processes.

Batch i of a set is its samples i*n to (i+1)*n whatever the number of processes; each process takes a contiguous part
of the batches. So every embedding is computed in the same company on one process and on W, and results are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from triscale import distributed
from triscale.data.resize import fit_square
from triscale.data.samples import BadSample
from triscale.data.settings import Fit
from triscale.errors import RunError
from triscale.evaluation.sets import EvaluationSet, Example


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A dual encoder as evaluation sees it. Evaluation mode, no_grad and autocast are the caller's business."""

    image: Callable[[UInt8[Tensor, "n 3 s s"]], Float[Tensor, "n d"]]
    """Embeds images, s = `image_size`, that come on the CPU; embeddings need not be normalised."""
    text: Callable[[list[str]], Float[Tensor, "n d"]]
    """Embeds texts; embeddings need not be normalised."""
    logit_scale: Callable[[], float]
    """The learned factor on cosines, as it is now."""
    image_size: int
    fit: Fit
    """How an image becomes square: "crop" its middle, "pad" it with white, or "squash" it."""
    device: str = "cpu"
    """Where the embeddings are."""
    batch_size: int = 256
    """Images, or texts, embedded at once."""
    workers: int = 0
    """Processes that read and decode; 0: this one does."""
    finish: Callable[[], None] = lambda: None
    """Called by every process where it has embedded all it has to, and the others perhaps not: a model that processes
    hold together serves them."""

    def embed_images(self, images: Sequence[UInt8[np.ndarray, "h w 3"]]) -> Float[Tensor, "n d"]:
        """Make `images` (n >= 1) square and embed them: float32 rows of length 1."""
        squares = np.stack([fit_square(image, self.image_size, self.fit) for image in images])
        pixels = torch.from_numpy(squares).permute(0, 3, 1, 2).contiguous()
        return F.normalize(self.image(pixels).float(), dim=-1)

    def embed_texts(self, texts: list[str]) -> Float[Tensor, "n d"]:
        """Embed `texts` (n >= 1) in batches: float32 rows of length 1."""
        starts = range(0, len(texts), self.batch_size)
        embeddings = [self.text(texts[start : start + self.batch_size]) for start in starts]
        return F.normalize(torch.cat(embeddings).float(), dim=-1)


def read_batches(evaluation_set: EvaluationSet, encoder: Encoder) -> Iterator[tuple[list[Example], int]]:
    """Read this process's batches of a set: each the examples that can be read, and the number that can't.

    To be read to its end by all processes, which wait there for each other where the encoder asks for it.
    """
    batch_size = encoder.batch_size
    batches = -(-len(evaluation_set) // batch_size)
    rank, world = distributed.rank(), distributed.world_size()
    for batch in range(batches * rank // world, batches * (rank + 1) // world):
        indices = range(batch * batch_size, min((batch + 1) * batch_size, len(evaluation_set)))
        examples = [example for example in (_read(evaluation_set, index) for index in indices) if example]
        yield examples, len(indices) - len(examples)
    encoder.finish()


def _read(evaluation_set: EvaluationSet, index: int) -> Example | None:
    try:
        return evaluation_set.read(index)
    except BadSample:
        return None
    except OSError as error:
        raise RunError(f"evaluation set {evaluation_set.name!r}: sample {index} could not be read: {error}") from error
