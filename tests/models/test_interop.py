"""One table a format carries every tensor there and back; what does not fit is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foreign_models import HF_TEXT, HF_VISION, OPEN_CLIP, TEXT
from triscale.errors import UsageError
from triscale.models.dual_encoder import DualEncoder, build_dual_encoder
from triscale.models.interop import BIAS, SCALE, ForeignModel, Rule, check_fit, to_ours, to_theirs
from triscale.models.interop_hf import read_hugging_face, write_hugging_face
from triscale.models.interop_open_clip import read_cleaning, read_open_clip, write_open_clip
from triscale.models.presets import PRESETS
from triscale.training import checkpoint

HUGGING_FACE: dict[str, dict[str, Any]] = {
    "clip": {
        "model_type": "clip",
        "projection_dim": 16,
        "text_config": {**HF_TEXT, "vocab_size": 520},
        "vision_config": HF_VISION,
    },
    "siglip": {
        "model_type": "siglip",
        "text_config": {**HF_TEXT, "vocab_size": 520},
        "vision_config": HF_VISION,
    },
}
FORMATS = [*OPEN_CLIP, *HUGGING_FACE]


def describe(name: str) -> ForeignModel:
    return read_hugging_face(HUGGING_FACE[name], {}) if name in HUGGING_FACE else read_open_clip(OPEN_CLIP[name], {})


def build(foreign: ForeignModel) -> DualEncoder:
    return build_dual_encoder(
        foreign.model, image_size=foreign.image_size, vocabulary=foreign.vocabulary, tokens=foreign.tokens
    )


def tensors_of(model: DualEncoder, foreign: ForeignModel) -> dict[str, Tensor]:
    scalars = {SCALE: torch.tensor(2.5), **({BIAS: torch.tensor(-9.0)} if foreign.bias else {})}
    return {**checkpoint.module_tensors(model.towers()), **scalars}


@pytest.mark.parametrize("name", FORMATS)
def test_every_tensor_of_ours_goes_there_and_comes_back(name: str) -> None:
    foreign = describe(name)
    torch.manual_seed(0)
    ours = tensors_of(build(foreign), foreign)
    theirs = to_theirs(foreign.rules, ours)
    assert sum(tensor.numel() for tensor in theirs.values()) == sum(tensor.numel() for tensor in ours.values())
    with torch.device("meta"):
        expected = tensors_of(build(foreign), foreign)
    check_fit(foreign.rules, expected, theirs, ignored=(), where="weights")
    back = to_ours(foreign.rules, expected, theirs)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)


@pytest.mark.parametrize("name", FORMATS)
def test_our_towers_are_described_as_they_came(name: str) -> None:
    foreign = describe(name)
    with torch.device("meta"):
        model = build(foreign)
    sizes: dict[str, Any] = {
        "image_size": foreign.image_size,
        "fit": foreign.fit,
        "tokens": foreign.tokens,
        "vocabulary": foreign.vocabulary,
    }
    if name in HUGGING_FACE:
        config, preprocess, rules = write_hugging_face(model, foreign.model, **sizes, end=519)
        again = read_hugging_face(config, preprocess)
    else:
        config, rules = write_open_clip(model, foreign.model, **sizes, bias=foreign.bias)
        again = read_open_clip(config["model_cfg"], config["preprocess_cfg"])
    assert again == foreign and rules == foreign.rules


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_the_names_and_shapes_are_open_clips(name: str) -> None:
    open_clip = pytest.importorskip("open_clip.model", reason="open_clip is not installed")
    config = {key: value for key, value in OPEN_CLIP[name].items() if key != "custom_text"}
    kind = open_clip.CustomTextCLIP if "custom_text" in OPEN_CLIP[name] else open_clip.CLIP
    foreign = describe(name)
    with torch.device("meta"):
        theirs = kind(**config).state_dict()
        expected = tensors_of(build(foreign), foreign)
    check_fit(foreign.rules, expected, theirs, ignored=foreign.ignored, where="weights")


@pytest.mark.parametrize("name", ["clip-vit-b32", "clip-vit-b16", "clip-vit-l14", "clip-rn50"])
def test_presets_are_what_open_clips_configurations_say(name: str) -> None:
    vision = {
        "clip-vit-b32": {"layers": 12, "width": 768, "patch_size": 32},
        "clip-vit-b16": {"layers": 12, "width": 768, "patch_size": 16},
        "clip-vit-l14": {"layers": 24, "width": 1024, "patch_size": 14},
        "clip-rn50": {"layers": [3, 4, 6, 3], "width": 64, "patch_size": None},
    }
    preset = PRESETS[name]
    width = preset.model.text_width
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": width // 64, "layers": 12}
    config = {
        "embed_dim": preset.model.embedding,
        "vision_cfg": {"image_size": 224, **vision[name]},
        "text_cfg": text,
    }
    assert read_open_clip(config, {}).model == preset.model


def test_what_does_not_fit_is_named_with_how_much_more() -> None:
    foreign = describe("vit")
    with torch.device("meta"):
        expected = tensors_of(build(foreign), foreign)
        theirs = to_theirs(foreign.rules, expected)

    def refusal(changed: dict[str, Tensor]) -> str:
        with pytest.raises(UsageError) as caught:
            check_fit(foreign.rules, expected, changed, ignored=foreign.ignored, where="'weights.safetensors'")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    missing = {name: tensor for name, tensor in theirs.items() if name not in ("visual.proj", "text_projection")}
    assert "lacks visual.proj (and 1 more" in refusal(missing)
    assert "has extra, which" in refusal({**theirs, "extra": torch.zeros(1)})
    shaped = {**theirs, "visual.proj": torch.zeros(3, 4)}
    assert "visual.proj as (3, 4), the configuration says (48, 16)" in refusal(shaped)
    assert "no weight" in refusal({**theirs, "ln_final.bias": torch.zeros(32, dtype=torch.int64)})


def test_a_tensor_without_a_place_is_named() -> None:
    with pytest.raises(UsageError, match="no place for image.b and 1 more"):
        to_theirs((Rule("image.a", "a"),), {name: torch.zeros(1) for name in ("image.a", "image.b", "image.c")})


def test_half_precision_becomes_single() -> None:
    rules, expected = (Rule("a", "b"),), {"a": torch.empty(2, device="meta")}
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        assert to_ours(rules, expected, {"b": torch.ones(2, dtype=kind)})["a"].dtype == torch.float32


BAD_OPEN_CLIP: list[tuple[dict[str, Any], str]] = [
    ({}, "vision_cfg"),
    ({"embed_dim": 10**9}, "embed_dim"),
    ({"embed_dim": True}, "embed_dim"),
    ({"vision_cfg": {"layers": 10**6}}, "layers"),
    ({"vision_cfg": {"layers": [1, 2]}}, "ResNet"),
    ({"vision_cfg": {"width": 100}}, "head_width"),
    ({"vision_cfg": {"mlp_ratio": "4"}}, "mlp_ratio"),
    ({"vision_cfg": {"attentional_pool": True}}, "attentional_pool"),
    ({"vision_cfg": {"qk_norm": True}}, "qk_norm"),
    ({"vision_cfg": {"timm_model_name": "convnext_atto", "timm_pool": "map"}}, "map"),
    ({"vision_cfg": {"timm_model_name": 3}}, "timm_model_name"),
    ({"text_cfg": {"vocab_size": -1}}, "vocab_size"),
    ({"text_cfg": {"mlp_ratio": 2}}, "mlp_ratio"),
    ({"text_cfg": {"hf_model_name": "roberta-base"}}, "hf_model_name"),
    ({"text_cfg": {"pool_type": "last"}}, "causally"),
    ({"multimodal_cfg": {}}, "multimodal_cfg"),
]


@pytest.mark.parametrize(("changes", "word"), BAD_OPEN_CLIP)
def test_what_our_towers_have_not_is_refused_in_one_line(changes: dict[str, Any], word: str) -> None:
    base: dict[str, Any] = {"embed_dim": 16, "vision_cfg": {}, "text_cfg": TEXT} if changes else {}
    with pytest.raises(UsageError, match=word) as caught:
        read_open_clip({**base, **changes}, {})
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_options_of_its_own_is_refused() -> None:
    assert read_cleaning({}) == "lower"
    assert read_cleaning({"hf_tokenizer_name": "a/b", "tokenizer_kwargs": {"clean": "canonicalize"}}) == "canonicalize"
    for options in ({"clean": "odd"}, {"strip_sep_token": True}, 3, {"clean": "canonicalize"}):
        with pytest.raises(UsageError, match="tokenizer_kwargs"):
            read_cleaning({"tokenizer_kwargs": options})


BAD_HUGGING_FACE: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "bert"}, "bert"),
    ({"vision_config": 3}, "vision_config"),
    ({"vision_config": {"hidden_size": 2**40}}, "hidden_size"),
    ({"vision_config": {"hidden_act": "relu"}}, "relu"),
    ({"vision_config": {"layer_norm_eps": 1e-3}}, "layer_norm_eps"),
    ({"vision_config": {"num_channels": 1}}, "channels"),
    ({"text_config": {"intermediate_size": 100}}, "MLP"),
]


@pytest.mark.parametrize(("changes", "word"), BAD_HUGGING_FACE)
def test_another_model_of_hugging_face_is_refused_in_one_line(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        read_hugging_face({"model_type": "clip", **changes}, {})


def test_preprocessing_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(UsageError, match="longest"):
        read_open_clip(OPEN_CLIP["vit"], {"resize_mode": "longest"})
    with pytest.raises(UsageError, match="three numbers"):
        read_open_clip(OPEN_CLIP["vit"], {"mean": [0.5]})
