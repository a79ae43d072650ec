"""Records of runs made by hand, with names and captions as hostile as any data's."""

from __future__ import annotations

import math

import numpy as np

from triscale.data.samples import BadSample, Sample
from triscale.evaluation.matches import Matches
from triscale.evaluation.predictions import Predictions
from triscale.evaluation.record import Part, RunRecord
from triscale.evaluation.sets import EvaluationSet
from triscale.evaluation.suite import Results
from triscale.training.history import History

SCRIPT = "<script>document.title='owned'</script>"
HOSTILE = (
    SCRIPT,
    "[/red]bold[bold]",
    "W" * 10_000,
    "\u202egnp.exe\x1b[2J\x00",
    "קוף عربى",
    "👩\u200d🚒 🏳️\u200d🌈 \U0001f600",
    "\udcff&amp;<img src=x onerror=alert(1)>",
    "表" * 500,
    "a\u0300" * 400,
    "",
)


class Pictures:
    """A source of coloured squares; every seventh is bad."""

    def __init__(self, count: int) -> None:
        self.name = "pictures"
        self.count = count
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return self.count

    def file(self, index: int) -> str:
        return self.name

    def read(self, index: int, *, image: bool = True) -> Sample:
        if index % 7 == 6:
            raise BadSample("image-truncated", f"k{index}")
        side = 8 + index % 40
        pixels = np.full((side, 20, 3), (37 * index % 256, 91 * index % 256, 50), np.uint8)
        return Sample(key=f"k{index}", image=pixels, text=HOSTILE[index % 10].encode("utf-8", "replace"), label=b"0")


def classification_set(name: str, classnames: tuple[str, ...] = HOSTILE, count: int = 200) -> EvaluationSet:
    return EvaluationSet(
        name=name,
        task="classification",
        source=Pictures(count),
        classnames=classnames,
        templates=("{c}",),
        class_of_label=tuple(range(len(classnames))),
    )


def predictions(classes: int = len(HOSTILE), count: int = 200, right: float = 0.7, seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    is_right = rng.random(count) < right
    guesses = np.stack([rng.permutation(classes)[: min(5, classes)] for _ in range(count)])
    for row in range(count):
        others = [each for each in guesses[row] if each != labels[row]]
        guesses[row] = ([labels[row], *others] if is_right[row] else [*others, labels[row]])[: guesses.shape[1]]
    probabilities = np.sort(rng.dirichlet(np.full(guesses.shape[1], 0.3), count), axis=1)[:, ::-1]
    embeddings = rng.normal(size=(classes, 16))[labels] + 0.5 * rng.normal(size=(count, 16))
    return Predictions(
        samples=np.arange(count, dtype=np.int64),
        labels=labels.astype(np.int64),
        ahead=np.where(is_right, 0, 1 + np.arange(count) % 5).astype(np.int64),
        guesses=guesses.astype(np.int64),
        probabilities=probabilities.astype(np.float32),
        in_slices=np.zeros((count, 0), bool),
        at_levels=np.zeros((count, 0), bool),
        embedded=np.arange(count, dtype=np.int64),
        embeddings=(embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32),
        bad={"image-truncated": 3},
    )


def matches() -> Matches:
    count = len(HOSTILE)
    order = np.stack([(np.arange(5) + row) % count for row in range(count)]).astype(np.int64)
    scores = np.tile(np.linspace(0.9, 0.1, 5, dtype=np.float32), (count, 1))
    places = np.arange(count, dtype=np.int64)
    return Matches(
        images=places,
        text_ranks=places + 1,
        own_texts=places,
        best_texts=order,
        text_scores=scores,
        text_is_own=order == places[:, None],
        texts=places,
        image_ranks=places + 1,
        own_images=places,
        best_images=order,
        image_scores=scores,
        captions=HOSTILE,
    )


def classified(found: Predictions, **more: object) -> dict[str, object]:
    top1 = float((found.ahead == 0).mean())
    return {
        "task": "classification",
        "samples": len(found),
        "classes": len(HOSTILE),
        "top1": top1,
        "top1_interval": [top1 - 0.05, top1 + 0.05],
        "top5": float((found.ahead < 5).mean()),
        "mean_per_class": top1,
        "ece": 0.1,
        **more,
    }


def history() -> History:
    """Of 2,000 steps, with steps that were skipped and notices."""
    found = History(steps=2000, seconds=3723.4, skipped=2, notices=[(7, SCRIPT), (9, "[/red]")])
    from triscale.training.history import Curve

    for metric, value in (("loss", 6.0), ("accuracy", 0.5), ("gradient_norm", 3.0), ("learning_rate", 1e-3)):
        curve = found.curves[metric] = Curve()
        for step in range(1, 2001):
            bad = step in (500, 501)
            curve.add(step, None if bad else value * (math.exp(-step / 500) + 0.02 * math.sin(step)))
    found.evaluations = [(step, {SCRIPT: step / 4000, "val": step / 3000}) for step in (500, 1000, 1500)]
    return found


def hostile_record(name: str = SCRIPT, seed: int = 0) -> RunRecord:
    """A run in which everything that can be named has a hostile name."""
    found = {each: predictions(seed=seed + place) for place, each in enumerate((SCRIPT, "W" * 10_000))}
    sets = {each: classified(of, bad=3, bad_reasons={"image-truncated": 3}) for each, of in found.items()}
    sets[SCRIPT] |= {"levels": {SCRIPT: 0.9}, "slices": {"[/red]": {"samples": 10, "top1": 0.5}}}
    retrieval = {f"{way}_recall@{k}": 0.1 * k for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    sets["</td>captions"] = {"task": "retrieval", "samples": 10, **retrieval, "image_to_text_median_rank": 3.0}
    first, second = list(found)
    return RunRecord(
        name=name,
        recipe=SCRIPT,
        parts=(
            Part(
                settings={"batch.size": 256, "train.steps": 2000, "model.image": SCRIPT, "data.train": ["W" * 10_000]},
                resolved={"parameters": {SCRIPT: 12_345_678}, "versions": {"torch": "\x1b[2J"}, "plans": {}},
                history=history(),
                quarantine={"image-truncated": 5, SCRIPT: 2},
            ),
        ),
        results=Results(
            sets=sets,
            shift_mean=0.6,
            drop=0.1,
            robustness={
                "base": first,
                "shift_mean_interval": [0.55, 0.65],
                "drop_interval": [0.05, 0.15],
                "effective_robustness": 0.02,
                "effective_robustness_interval": [-0.01, 0.05],
                "shifts": {
                    second: {
                        "drop": 0.1,
                        "drop_interval": [0.05, 0.15],
                        "predicted_top1": 0.58,
                        "effective_robustness": 0.02,
                        "effective_robustness_interval": [-0.01, 0.05],
                        "line": {"slope": 1.0, "intercept": 0.0, "models": 9, "left_out": 0, "residual_spread": 0.01},
                    }
                },
            },
        ),
        predictions=found,
        matches={"</td>captions": matches()},
    )


def hostile_sets() -> dict[str, EvaluationSet]:
    """The sets of `hostile_record`."""
    captions = EvaluationSet(name="</td>captions", task="retrieval", source=Pictures(20))
    return {each: classification_set(each) for each in (SCRIPT, "W" * 10_000)} | {captions.name: captions}
