"""How many tiles a trained model's embeddings leave out of the second sweep, and how far that moves the gradients.

    python benchmarks/negligible.py RUN SHARDS [--pairs 4096]

The first pairs of the shards (`SHARDS` as --data.train takes them), embedded by the run's model; InfoNCE forward and
backward with and without `skip_negligible`, in the order of the shards and sorted into 16 groups by the signs of the
captions' first four principal components; at the run's own scale and at 100; with the rounding of bfloat16 and of
float32; in tiles of 512 x 1,024 and of 128 x 128.
"""

from __future__ import annotations

import argparse
import io
import itertools

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import triscale
from triscale.data.captions import all_captions
from triscale.data.sources import open_source
from triscale.inference import ZeroShotModel
from triscale.losses import InfoNCE, sweeps, tiles
from triscale.losses.negligible import TileBounds

AT_ONCE = 256
ROUNDING = {"bfloat16": 2.0**-7, "float32": 2.0**-23}
TILES = ((512, 1024), (128, 128))
COMPONENTS = 4


def embed(model: ZeroShotModel, shards: str, pairs: int) -> tuple[Tensor, Tensor]:
    """Embeddings of images and captions, (pairs, d) each."""
    source, images, texts = open_source(shards, ""), [], []
    for first in range(0, min(pairs, len(source)), AT_ONCE):
        samples = [source.read(i) for i in range(first, min(first + AT_ONCE, pairs, len(source)))]
        pictures = [Image.open(io.BytesIO(s.image)) if isinstance(s.image, bytes) else s.image for s in samples]
        images.append(model.encode_image(pictures))
        texts.append(model.encode_text([all_captions(sample, ("txt",))[0] for sample in samples]))
    return torch.cat(images).float(), torch.cat(texts).float()


def grouped(texts: Tensor) -> Tensor:
    """An order of the rows by 16 groups."""
    centred = F.normalize(texts) - F.normalize(texts).mean(0)
    torch.manual_seed(0)
    components = torch.pca_lowrank(centred, q=COMPONENTS, center=False)[2]
    signs = (centred @ components > 0).long()
    return (signs * 2 ** torch.arange(COMPONENTS)).sum(1).argsort(stable=True)


def run(skip: bool, x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor, int]:
    """Gradients of both lanes, and the products' FLOPs."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        InfoNCE(logit_scale=scale, skip_negligible=skip)(x, y).backward()
    assert x.grad is not None and y.grad is not None
    return x.grad, y.grad, counter.get_total_flops()


def main() -> None:
    """Embed, measure every case and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a trained run")
    parser.add_argument("shards", help="image-text pairs")
    parser.add_argument("--pairs", type=int, default=4096, help="of which so many are taken")
    options = parser.parse_args()
    model = triscale.load(options.run)
    x, y = embed(model, options.shards, options.pairs)
    orders = {"as they come": torch.arange(len(x)), "in 16 groups": grouped(y)}
    cases = itertools.product(orders, (float(model.logit_scale), 100.0), ROUNDING, TILES)
    for order, scale, rounding, tile in cases:
        tiles.TILE_ROWS, tiles.TILE_COLUMNS = tile
        eps = ROUNDING[rounding]
        sweeps.TileBounds = lambda own, ranks, shape, _, eps=eps: TileBounds(own, ranks, shape, eps)  # type: ignore
        rows = orders[order]
        whole, some = (run(skip, x[rows], y[rows], scale) for skip in (False, True))
        left_out = (1 - some[2] / whole[2]) * 4 / 3  # three of four products are the second sweep's
        error = max(float((a - b).norm() / a.norm()) for a, b in zip(whole[:2], some[:2], strict=True))
        case = f"{order}, scale {scale:.1f}, rounding of {rounding}, tiles {tile[0]} x {tile[1]}"
        print(f"{case}: {left_out:.1%} left out, gradients off by {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
