"""Settings as JSON and back, what a resumed run may change, and values that cannot work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from triscale.config import Phases, RunConfig, flatten, from_dict, read_config, refuse_changes, to_dict, with_steps
from triscale.data.settings import AugmentSettings, DataSettings
from triscale.errors import UsageError
from triscale.fine_tuning import FineTuning, ModelDescription, as_begun, refuse_other_model, with_model
from triscale.models.settings import ModelSettings
from triscale.recipes import RECIPES
from triscale.training.settings import (
    BatchSettings,
    LossSettings,
    OptimSettings,
    TrainSettings,
    parse_compile,
    parse_per_lane,
)
from triscale.validation import validate


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_survives_json_and_is_valid(recipe: str) -> None:
    made = RECIPES[recipe]()
    if isinstance(made, FineTuning):
        made = replace(made.of, train=replace(made.of.train, init="runs/scenes"))
    for config in made.of.values() if isinstance(made, Phases) else [made]:
        assert from_dict(RunConfig, to_dict(config)) == config
        validate(config)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_says_command_hardware_time_and_result(recipe: str) -> None:
    text = RECIPES[recipe].__doc__ or ""
    assert f"triscale train {recipe}" in text
    for word in ("CPU", "minutes", "%"):
        assert word in text, f"the docstring of {recipe} does not mention {word}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"rot": "x"}}, "data.rot"),
        ({"sead": 1}, "sead"),
        ({"seed": "one"}, "seed"),
        ({"seed": True}, "seed"),
        ({"data": {"fit": "stretch"}}, "data.fit"),
        ({"data": {"augment": {"zoom": [1.0]}}}, "data.augment.zoom"),
        ({"data": 3}, "data"),
    ],
)
def test_a_wrong_field_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_dict(RunConfig, values)


def test_a_resumed_run_may_change_what_no_weight_depends_on() -> None:
    before = RunConfig()
    now = replace(
        before,
        data=replace(before.data, workers=5, root="/elsewhere", max_bad=0.5),
        train=replace(before.train, keep_checkpoints=9, eval_every_steps=7, checkpoint_every_minutes=1.0),
    )
    refuse_changes(before, now)


@pytest.mark.parametrize(
    ("section", "changed", "name"),
    [
        ("optim", OptimSettings(learning_rate=0.5), "optim.learning_rate"),
        ("optim", OptimSettings(name="lion"), "optim.name"),
        ("optim", OptimSettings(ema=0.9), "optim.ema"),
        ("optim", OptimSettings(layer_decay=0.9), "optim.layer_decay"),
        ("batch", BatchSettings(size=7), "batch.size"),
        ("batch", BatchSettings(compile="default"), "batch.compile"),
        ("data", DataSettings(augment=AugmentSettings(rotation=3.0)), "data.augment.rotation"),
        ("train", TrainSettings(steps=5), "train.steps"),
    ],
)
def test_a_field_that_changes_the_numbers_is_refused_by_name(section: str, changed: object, name: str) -> None:
    with pytest.raises(UsageError, match=name):
        refuse_changes(RunConfig(), replace(RunConfig(), **{section: changed}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(batch=BatchSettings(size=0)),
        RunConfig(batch=BatchSettings(micro="0")),
        RunConfig(batch=BatchSettings(keep="-1")),
        RunConfig(batch=BatchSettings(micro="image=4")),
        RunConfig(batch=BatchSettings(compile="fast")),
        RunConfig(batch=BatchSettings(compile="text=default")),
        RunConfig(batch=BatchSettings(compile="image=reduce-overhead,text=none")),
        RunConfig(batch=BatchSettings(compile="default", remat="image=selective,text=none")),
        RunConfig(batch=BatchSettings(compile="default", batch_norm="synchronised")),
        RunConfig(train=TrainSettings(steps=0)),
        RunConfig(optim=OptimSettings(ema=1.0)),
        RunConfig(optim=OptimSettings(beta2=1.0)),
        RunConfig(optim=OptimSettings(momentum=-0.1)),
        RunConfig(optim=OptimSettings(layer_decay=0.0)),
        RunConfig(optim=OptimSettings(layer_decay=1.1)),
        RunConfig(optim=OptimSettings(cooldown_steps=-1)),
        RunConfig(loss=LossSettings(logit_scale=0.0)),
        RunConfig(loss=LossSettings(label_smoothing=0.1)),
        RunConfig(loss=LossSettings(name="classification"), data=DataSettings(train=("scenes",))),
        RunConfig(loss=LossSettings(name="classification"), batch=BatchSettings(micro="image=4,text=4")),
        RunConfig(data=DataSettings(max_bad=1.5)),
        RunConfig(data=DataSettings(augment=AugmentSettings(crop_area=(0.0, 1.0)))),
        RunConfig(data=DataSettings(augment=AugmentSettings(crop_area=(0.5, 1.1)))),
        RunConfig(data=DataSettings(augment=AugmentSettings(crop_area=(0.9, 0.8)))),
        RunConfig(data=DataSettings(augment=AugmentSettings(crop_aspect=(0.0, 1.0)))),
        RunConfig(data=DataSettings(caption_templates=("no slot",))),
    ],
)
def test_values_that_cannot_work_are_refused_before_anything_starts(config: RunConfig) -> None:
    with pytest.raises(UsageError):
        validate(config)


def test_a_value_per_lane() -> None:
    lanes = ("image", "text")
    assert parse_per_lane("m", "64", lanes, 1) == {"image": 64, "text": 64}
    assert parse_per_lane("m", "auto", lanes, 1) == {"image": "auto", "text": "auto"}
    assert parse_per_lane("m", "image=8, text=auto", lanes, 1) == {"image": 8, "text": "auto"}


def test_a_compilation_per_lane() -> None:
    lanes = ("image", "text")
    assert parse_compile("default", lanes) == {"image": "default", "text": "default"}
    assert parse_compile("image=none, text=default", lanes) == {"image": "none", "text": "default"}
    for remat in ("none", "block", "image=selective,text=block"):
        validate(RunConfig(batch=BatchSettings(compile="image=none,text=default", remat=remat)))
    with pytest.raises(UsageError, match="CUDA graphs"):
        parse_compile("max-autotune", lanes)


def test_names_are_flat_in_messages() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}


@pytest.mark.parametrize("name", ["data", "Text", "", "a b", "../x"])
def test_a_phase_has_a_name_that_options_and_folders_can_bear(name: str) -> None:
    with pytest.raises(UsageError, match="phase"):
        Phases({name: RunConfig()})


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"nonsense": 1}', '{"phases": 3}', '{"phases": {}}', '{"phases": {"a": 1}}']
)
def test_a_config_file_that_cannot_be_read_is_named(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError):
        read_config(path)


def test_epochs_become_whole_steps_and_bound_the_warmup() -> None:
    config = RunConfig(
        batch=BatchSettings(size=16), optim=OptimSettings(warmup_steps=100), train=TrainSettings(steps=0, epochs=2.5)
    )
    made = with_steps(config, 40)
    assert (made.train.steps, made.train.epochs, made.optim.warmup_steps) == (7, 0.0, 0)
    assert with_steps(config, 40_000).optim.warmup_steps == 100
    assert with_steps(made, 1000) == made, "a run that has begun keeps its steps"
    validate(config)
    with pytest.raises(UsageError, match="--train.steps 7 and --train.epochs 2.5 both say how long"):
        validate(replace(config, train=replace(config.train, steps=7)))


def test_a_model_brings_its_towers_preprocessing_and_loss_and_no_clamp_that_it_is_above() -> None:
    described = ModelDescription(
        model=ModelSettings(text_width=64),
        image_size=20,
        fit="squash",
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        tokens=9,
        vocabulary=77,
        logit_scale=100.0,
        bias=False,
    )
    made = with_model(RunConfig(), described)
    assert made.model == replace(described.model, image_mean=described.mean, image_std=described.std)
    assert (made.data.image_size, made.data.fit, made.data.tokens, made.data.vocabulary) == (20, "squash", 9, 77)
    assert (made.loss.name, made.loss.logit_scale, made.loss.max_logit_scale) == ("info_nce", 100.0, 100.0)
    assert with_model(RunConfig(), replace(described, logit_scale=117.0)).loss.max_logit_scale == 0
    siglip = with_model(RunConfig(), replace(described, logit_scale=10.0, bias=True)).loss
    assert (siglip.name, siglip.max_logit_scale) == ("sigmoid", 0)
    assert as_begun(RunConfig(seed=3), made) == replace(made, seed=3)
    with pytest.raises(UsageError, match="--model.text-width 32: the model is that of --train.init, which has 64"):
        refuse_other_model(made, replace(made, model=replace(made.model, text_width=32)))
    refuse_other_model(made, replace(made, model=replace(made.model, dropout=0.1), seed=5))
