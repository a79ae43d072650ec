"""How candidates rank in retrieval, block by block: the matrix of all scores is never held.

The place of a query's best positive is the number of candidates that rank before it, which is counted:

1. the scores of the positives are found in the tiles that hold them: a text has one image, the texts of an image stand
   together, so these tiles lie along the diagonal;
2. every tile of scores is computed once and serves both directions: for each image it counts the texts ahead of its
   best caption, for each text the images ahead of its own.

A score is always taken from the same tile, so a positive equals itself. Of equal scores the lower index ranks first:
off the diagonal all candidates of a tile stand on one side of the positives, so one comparison a direction does.
Rows of tiles are shared out over processes and the counts summed: integers, hence equal for any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from triscale import distributed

TILE_ROWS = 1024
TILE_COLUMNS = 2048


def candidates_ahead(
    images: Float[Tensor, "n d"],
    texts: Float[Tensor, "m d"],
    image_of_text: Int[Tensor, " m"],
    tile_rows: int = TILE_ROWS,
    tile_columns: int = TILE_COLUMNS,
) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
    """For each image how many texts rank before its best caption, and for each text how many images before its own.

    Args:
        images, texts: embeddings, finite and equal on every process.
        image_of_text: the index of each text's image, ascending; every image occurs.
        tile_rows, tile_columns: sides of the largest block of scores that is held.
    """
    image_index, text_index = (torch.arange(len(rows), device=rows.device) for rows in (images, texts))
    tiles = _Tiles(images, texts, image_of_text, tile_rows, tile_columns)
    own_score = _scores_of_positives(tiles, image_of_text, images)
    best_score, best_text = _best_texts(own_score, image_of_text, len(images))
    texts_ahead, images_ahead = torch.zeros_like(image_index), torch.zeros_like(text_index)
    for rows in tiles.rows():
        theirs = tiles.texts_of(rows)
        for columns in tiles.columns(slice(0, len(texts))):
            scores, ahead = tiles.scores(rows, columns)
            best, own = best_score[rows, None], own_score[columns]
            if theirs.start < columns.stop and columns.start < theirs.stop:
                earlier_text = text_index[columns] < best_text[rows, None]
                earlier_image = image_index[rows, None] < image_of_text[columns]
                texts_ahead[rows] += _count(ahead.copy_((scores > best) | ((scores == best) & earlier_text)))
                images_ahead[columns] += _count(ahead.copy_((scores > own) | ((scores == own) & earlier_image)).T)
            else:
                # These texts stand all behind the images' own, hence their own images behind these; or all before.
                behind = columns.start >= theirs.stop
                beats_text, beats_image = (torch.gt, torch.ge) if behind else (torch.ge, torch.gt)
                texts_ahead[rows] += _count(beats_text(scores, best, out=ahead))
                images_ahead[columns] += _count(beats_image(scores, own, out=ahead).T)
    return distributed.all_reduce_sum(texts_ahead), distributed.all_reduce_sum(images_ahead)


def best_candidates(
    queries: Float[Tensor, "q d"], candidates: Float[Tensor, "n d"], count: int, block: int = TILE_COLUMNS
) -> tuple[Int[Tensor, "q t"], Float[Tensor, "q t"]]:
    """The t = min(count, n) best-scoring candidates of a few queries and their scores, best first.

    Of equal scores the lower index ranks first. No more than q * (block + count) scores are held.
    """
    scores = queries.new_zeros(len(queries), 0)
    indices = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(candidates), block):
        found = queries @ candidates[start : start + block].T
        positions = torch.arange(start, start + found.shape[1], device=queries.device).expand_as(found)
        scores, order = torch.cat([scores, found], dim=1).sort(dim=1, descending=True, stable=True)
        indices = torch.cat([indices, positions], dim=1).gather(1, order[:, :count])
        scores = scores[:, :count]
    return indices, scores


class _Tiles:
    """This process's blocks of the matrix of scores, one at a time, in buffers that are used again.

    Its part is contiguous rows of tiles; all processes together have the tiles that one has.
    """

    def __init__(self, images: Tensor, texts: Tensor, image_of_text: Tensor, height: int, width: int) -> None:
        self._images, self._texts = images, texts
        self._height, self._width = height, width
        edges = torch.arange(0, len(images) + height, height, device=images.device)
        self._first_text = torch.searchsorted(image_of_text, edges).tolist()
        self._buffers = images.new_empty(2, height * width)

    def rows(self) -> Iterator[slice]:
        """The rows of each of this process's rows of tiles."""
        for tile in distributed.rows_of(len(self._first_text) - 1):
            yield slice(tile * self._height, min((tile + 1) * self._height, len(self._images)))

    def texts_of(self, rows: slice) -> slice:
        """The texts of the images in `rows`."""
        tile = rows.start // self._height
        return slice(self._first_text[tile], self._first_text[tile + 1])

    def columns(self, texts: slice) -> Iterator[slice]:
        """The columns of each tile that holds any of `texts`."""
        for start in range(texts.start // self._width * self._width, texts.stop, self._width):
            yield slice(start, min(start + self._width, len(self._texts)))

    def scores(self, rows: slice, columns: slice) -> tuple[Float[Tensor, "r c"], Float[Tensor, "r c"]]:
        """A tile's scores, and room for as many numbers; both valid until the next tile's scores are made."""
        images, texts = self._images[rows], self._texts[columns]
        scores, room = self._buffers[:, : len(images) * len(texts)].view(2, len(images), len(texts))
        return torch.mm(images, texts.T, out=scores), room


def _scores_of_positives(tiles: _Tiles, image_of_text: Int[Tensor, " m"], like: Tensor) -> Float[Tensor, " m"]:
    """The score of every text with its own image, on every process."""
    own_score = like.new_full((len(image_of_text),), -torch.inf)
    for rows in tiles.rows():
        own = tiles.texts_of(rows)
        for columns in tiles.columns(own):
            here = slice(max(own.start, columns.start), min(own.stop, columns.stop))
            image = image_of_text[here] - rows.start
            text = torch.arange(here.start - columns.start, here.stop - columns.start, device=like.device)
            own_score[here] = tiles.scores(rows, columns)[0][image, text]
    return distributed.all_reduce_max(own_score)


def _best_texts(own_score: Float[Tensor, " m"], image_of_text: Int[Tensor, " m"], images: int) -> tuple[Tensor, Tensor]:
    """Of each image the score (n,) and the index (n,) of its best text; of equal ones the first."""
    best_score = own_score.new_full((images,), -torch.inf)
    best_score.scatter_reduce_(0, image_of_text, own_score, "amax")
    text = torch.arange(len(own_score), device=own_score.device)
    is_best = own_score == best_score[image_of_text]
    best_text = torch.full_like(best_score, len(text), dtype=torch.int64)
    return best_score, best_text.scatter_reduce_(0, image_of_text[is_best], text[is_best], "amin")


def _count(ahead: Float[Tensor, "a b"]) -> Int[Tensor, " a"]:
    """The ones among zeros and ones, row by row: exact, a tile having less than 2^24 columns.

    On the CPU a product with ones takes a small part of the time of a sum of booleans.
    """
    return torch.mv(ahead, ahead.new_ones(ahead.shape[1])).long()
