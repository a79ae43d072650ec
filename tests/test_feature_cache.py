"""Features of a frozen image tower in place of images: the same rows, the same step, never another tower's."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ranks
from pictures import SETTINGS, Pictures, make_reader, rules
from triscale import feature_cache
from triscale.config import RunConfig
from triscale.data import features
from triscale.data.features import FeatureParts, StoredFeatures
from triscale.data.loader import batches
from triscale.data.mixture import Mixture
from triscale.data.rows import BatchReader
from triscale.data.settings import AugmentSettings
from triscale.errors import RunError, UsageError
from triscale.feature_cache import is_cached, open_features
from triscale.losses import InfoNCE
from triscale.models.image import ImageTower, build_image_tower
from triscale.models.settings import ModelSettings
from triscale.training.frozen import freeze
from triscale.training.settings import BatchSettings, TrainSettings
from triscale.training.step import ContrastiveStep

CPU = torch.device("cpu")
BAD = (3, 17, 18, 40)
STILL = replace(SETTINGS, augment=AugmentSettings(), cache_features="auto", workers=0)
CONFIG = RunConfig(
    data=STILL,
    model=ModelSettings(image="resnet10t", image_options='{"channels": [8, 8, 8, 8], "stem_width": 8}', embedding=6),
    batch=BatchSettings(size=20),
    train=TrainSettings(steps=10, frozen=("image.backbone",), device="cpu"),
)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parts and a bit of the pictures."""
    monkeypatch.setattr(features, "PART_SAMPLES", 16)
    monkeypatch.setitem(feature_cache.BATCH, "cpu", 7)


def make_tower(seed: int = 0, frozen: Sequence[str] = ("image.backbone",)) -> ImageTower:
    torch.manual_seed(seed)
    tower = build_image_tower(CONFIG.model, STILL.image_size)
    freeze({"image": tower, "text": torch.nn.Linear(1, 1)}, frozen)
    return tower


def make_mixture(bad: Sequence[int] = BAD) -> Mixture:
    return Mixture(sources=(Pictures(bad=bad),), captions=(rules(STILL),), weights=None)


def compute(
    folder: Path, tower: ImageTower, mixture: Mixture | None = None, config: RunConfig = CONFIG
) -> StoredFeatures:
    found, signal = open_features(config, mixture or make_mixture(), tower, folder, CPU, lambda line: None)
    assert signal == 0
    return found


def readers(folder: Path, tower: ImageTower) -> tuple[BatchReader, BatchReader]:
    """One of pixels, and the same one of features."""
    pixels, stored = (make_reader(Pictures(bad=BAD), STILL) for _ in range(2))
    stored.image_rows = compute(folder, tower)
    return pixels, stored


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_those_of_pixels_with_their_tokens_ids_and_bad_records(tmp_path: Path, workers: int) -> None:
    tower = make_tower()
    pixels, stored = readers(tmp_path, tower)
    pairs = zip(
        batches(pixels, start=0, batch_size=30, last=90),
        batches(stored, start=0, batch_size=30, last=90, workers=workers),
        strict=True,
    )
    found_bad = 0
    for expected, found in pairs:
        assert torch.equal(expected.tokens[0:30], found.tokens[0:30])
        assert torch.equal(expected.ids[0:30], found.ids[0:30])
        assert expected.bad == found.bad
        found_bad += len(found.bad)
        with torch.no_grad():
            features_of_images = tower.features(expected.images[0:30])
        torch.testing.assert_close(found.images[0:30], features_of_images, rtol=1e-5, atol=1e-6)
    assert found_bad, "no bad sample was drawn"


def test_streamed_rows_are_the_held_ones(tmp_path: Path) -> None:
    _, stored = readers(tmp_path, make_tower())
    (held,), (streamed,) = (list(batches(stored, start=0, batch_size=30, last=30, held=held)) for held in (True, False))
    assert torch.equal(held.images[0:30], streamed.images[0:30])
    assert torch.equal(held.tokens[0:30], streamed.tokens[0:30])


def test_the_step_has_the_loss_and_gradient_of_the_step_on_images(tmp_path: Path) -> None:
    """Projection and dropout are trained; what is drawn for dropout is the same."""
    tower = make_tower()
    tower.dropout.p = 0.3
    pixels, stored = readers(tmp_path, tower)
    text = torch.nn.Embedding(100, 6)
    found = []
    for reader in (pixels, stored):
        batch = reader(range(24))
        step = ContrastiveStep({"image": tower, "text": First(text)}, InfoNCE(), micro_batch=7, keep=1, seed=4)
        out = step({"image": batch.images, "text": batch.tokens})
        assert tower.projection.weight.grad is not None and text.weight.grad is not None
        found.append((out.loss, tower.projection.weight.grad, text.weight.grad))
        tower.zero_grad(set_to_none=True)
        text.zero_grad(set_to_none=True)
    (loss, *gradients), (other, *others) = found
    assert float(loss) == pytest.approx(float(other), rel=1e-6)
    for one, two in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


class First(torch.nn.Module):
    def __init__(self, embedding: torch.nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens[:, 0])


def test_parts_that_are_there_stay_and_missing_torn_or_damaged_ones_are_computed_again(tmp_path: Path) -> None:
    tower = make_tower()
    compute(tmp_path, tower)
    whole = written(tmp_path)
    paths = sorted(tmp_path.rglob("*.safetensors"))
    assert len(paths) == 4
    paths[1].unlink()
    paths[2].write_bytes(paths[2].read_bytes()[:-5])
    torn = paths[0].with_name(f".{paths[0].name}.123")
    torn.write_bytes(b"torn")
    untouched = paths[0].stat().st_mtime_ns
    compute(tmp_path, tower)
    assert written(tmp_path) == whole
    assert paths[0].stat().st_mtime_ns == untouched, "what was there was computed again"
    assert not torn.exists()


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, data=replace(STILL, fit="pad" if STILL.fit == "crop" else "crop")),
        replace(CONFIG, data=replace(STILL, canvas=2 * STILL.image_size)),
        replace(CONFIG, model=replace(CONFIG.model, image_mean=(0.5, 0.5, 0.5))),
        replace(CONFIG, train=replace(CONFIG.train, precision="bfloat16")),
    ],
)
def test_features_of_another_preprocessing_are_never_taken(config: RunConfig, tmp_path: Path) -> None:
    tower = make_tower()
    first, second = compute(tmp_path, tower), compute(tmp_path, tower, config=config)
    assert first.parts.folder != second.parts.folder


def test_features_of_another_tower_or_other_data_are_never_taken(tmp_path: Path) -> None:
    first = compute(tmp_path, make_tower()).parts.folder
    tower = make_tower()
    assert compute(tmp_path, tower).parts.folder == first
    with torch.no_grad():
        next(b for b in tower.backbone.buffers() if b.is_floating_point()).add_(1e-3)
    assert compute(tmp_path, tower).parts.folder != first, "the statistics of BatchNorm count"
    assert compute(tmp_path, make_tower(seed=1)).parts.folder != first
    fewer = Mixture(sources=(Pictures(size=40),), captions=(rules(STILL),), weights=None)
    assert compute(tmp_path, make_tower(), fewer).parts.folder != first


def test_workers_decode_what_the_process_itself_would(tmp_path: Path) -> None:
    alone = compute(tmp_path / "alone", make_tower())
    config = replace(CONFIG, data=replace(STILL, workers=2))
    compute(tmp_path / "workers", make_tower(), config=config)
    assert written(tmp_path / "alone") == written(tmp_path / "workers")
    there = pickle.loads(pickle.dumps(alone))
    assert all(((0, index) in there) == ((0, index) in alone) == (index not in BAD) for index in range(60))


def compute_on_rank(rank: int, world: int, folder: str) -> int:
    features.PART_SAMPLES, feature_cache.BATCH["cpu"] = 16, 7
    compute(Path(folder), make_tower())
    return rank


def test_ranks_share_the_work_and_make_what_one_makes(tmp_path: Path) -> None:
    ranks.run_ranks(compute_on_rank, 2, str(tmp_path / "two"))
    ranks.run_ranks(compute_on_rank, 1, str(tmp_path / "one"))  # with as many threads
    assert written(tmp_path / "one") == written(tmp_path / "two")


@pytest.mark.parametrize(
    ("config", "tower", "cached", "words"),
    [
        (CONFIG, make_tower(), True, ""),
        (CONFIG, make_tower(frozen=["image"]), True, ""),
        (replace(CONFIG, train=replace(CONFIG.train, steps=3)), make_tower(), False, ""),
        (CONFIG, make_tower(frozen=[]), False, "is trained"),
        (CONFIG, make_tower(frozen=["image.backbone.layer1"]), False, "is trained"),
        (replace(CONFIG, data=replace(STILL, augment=AugmentSettings(flip=0.5))), make_tower(), False, "augmented"),
        (
            replace(CONFIG, data=replace(STILL, augment=AugmentSettings(crop_area=(0.5, 1.0)))),
            make_tower(),
            False,
            "augmented",
        ),
        (replace(CONFIG, data=replace(STILL, augment=AugmentSettings(fill="white"))), make_tower(), True, ""),
    ],
)
def test_features_are_kept_where_they_can_be_and_are_worth_it(
    config: RunConfig, tower: ImageTower, cached: bool, words: str
) -> None:
    assert is_cached(config, make_mixture(), tower) == cached
    assert not is_cached(replace(config, data=replace(config.data, cache_features="off")), make_mixture(), tower)
    asked = replace(config, data=replace(config.data, cache_features="on"))
    if words:
        with pytest.raises(UsageError, match=words):
            is_cached(asked, make_mixture(), tower)
    else:
        assert is_cached(asked, make_mixture(), tower)


def test_an_image_that_was_bad_and_is_not_any_more_ends_the_run(tmp_path: Path) -> None:
    reader = make_reader(Pictures(), STILL)
    reader.image_rows = compute(tmp_path, make_tower())  # of pictures of which some are bad
    with pytest.raises(RunError, match="can be decoded"):
        reader.rows(range(60))


def test_a_disk_that_is_full_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="could not be written") as failed:
        compute(tmp_path / "file", make_tower())
    assert "\n" not in str(failed.value)


def test_every_sample_is_in_one_part() -> None:
    parts = FeatureParts(Path("nowhere"), [40, 0, 16, 1], 3)
    places = [(source, index) for part in range(len(parts)) for source, r in [parts.samples(part)] for index in r]
    assert places == [(source, index) for source, count in enumerate(parts.counts) for index in range(count)]
    for part in range(len(parts)):
        source, samples = parts.samples(part)
        assert [parts.find((source, index)) for index in samples] == [(part, row) for row in range(len(samples))]
