"""Hugging Face encoders as text towers, from configurations written here; nothing is downloaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from step_errors import step_errors
from triscale.errors import UsageError
from triscale.models.dual_encoder import build_dual_encoder
from triscale.models.hf_text import build_hugging_face_text, self_contained
from triscale.models.settings import ModelSettings
from triscale.models.text import Pooling

transformers = pytest.importorskip("transformers", reason="the extra transformers is not installed")

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 12,
}
BERT = ModelSettings(image="resnet10t", text="hf:bert", text_options=json.dumps(SIZES), embedding=8)
TOKENS = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0], [4, 3, 2, 1], [7, 0, 0, 0]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a BERT's configuration and weights, as the hub has them; it dropouts nothing."""
    torch.manual_seed(1)
    config = transformers.BertConfig(vocab_size=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_the_state_of_the_top_layer_is_pooled_and_projected(folder: Path, pooling: Pooling) -> None:
    settings = replace(BERT, text=f"hf:{folder}", text_options="{}", text_weights="pretrained", text_pooling=pooling)
    tower = build_hugging_face_text(settings, vocabulary=20, tokens=4)
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    for row, embedding in zip(TOKENS, tower(TOKENS), strict=True):
        states = theirs(row[row != 0][None]).last_hidden_state[0]
        pooled = {"mean": states.mean(dim=0), "first": states[0], "last": states[-1]}[pooling]
        torch.testing.assert_close(embedding, tower.projection.weight @ pooled, rtol=1e-5, atol=1e-5)


def test_a_row_of_nothing_but_padding_is_finite() -> None:
    tower = build_hugging_face_text(BERT, vocabulary=20, tokens=4)
    assert tower(torch.zeros(2, 4, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize("kind", ["bert", "roberta", "t5"])
def test_its_step_in_micro_batches_is_exact_with_the_librarys_own_dropout(kind: str) -> None:
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    options = t5 if kind == "t5" else SIZES
    settings = replace(BERT, text=f"hf:{kind}", text_options=json.dumps(options))
    torch.manual_seed(0)
    tower = build_hugging_face_text(settings, vocabulary=20, tokens=4)
    assert not torch.equal(tower(TOKENS), tower(TOKENS))
    inputs = {"image": torch.arange(4), "text": TOKENS}
    errors = step_errors({"image": nn.Embedding(4, 8), "text": tower}, inputs, micro_batch=2)
    assert max(errors.values()) < 1e-10
    assert all(parameter.grad is not None for parameter in tower.parameters())


@pytest.mark.parametrize("kind", ["bert", "roberta", "t5"])
def test_every_parameter_has_a_layer_for_layer_wise_decay(kind: str) -> None:
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    settings = replace(BERT, text=f"hf:{kind}", text_options=json.dumps(t5 if kind == "t5" else SIZES))
    tower = build_hugging_face_text(settings, vocabulary=20, tokens=4)
    layers, names = tower.parameter_layers(), [name for name, _ in tower.named_parameters()]
    assert layers.keys() == set(names)
    assert layers[names[0]] == 0, "embeddings"
    assert set(layers.values()) == {0, 1, 2, 3} and layers["projection.weight"] == 3
    assert [layers[name] for name in names] == sorted(layers.values()), "names are in the order of the layers"


def test_settings_from_a_folder_become_ones_that_need_none(folder: Path) -> None:
    settings = replace(BERT, text=f"hf:{folder}", text_options="{}", text_weights="pretrained")
    tower = build_hugging_face_text(settings, vocabulary=20, tokens=4)
    alone = self_contained(settings)
    assert alone.text == "hf:bert" and str(folder) not in alone.text_options
    again = build_hugging_face_text(alone, vocabulary=15, tokens=4).eval()
    again.load_state_dict(tower.state_dict())
    assert torch.equal(again(TOKENS), tower.eval()(TOKENS))
    assert self_contained(alone) == replace(alone, text_options=self_contained(alone).text_options)
    assert self_contained(ModelSettings()) == ModelSettings()


def test_the_vocabulary_of_random_weights_is_the_tokenizers(folder: Path) -> None:
    for settings in (BERT, self_contained(BERT)):
        assert build_hugging_face_text(settings, vocabulary=33, tokens=4).encoder.config.vocab_size == 33


def test_it_is_the_text_tower_of_a_dual_encoder_and_takes_no_memory_on_meta(folder: Path) -> None:
    with torch.device("meta"):
        settings = replace(BERT, text=f"hf:{folder}", text_weights="pretrained")
        model = build_dual_encoder(settings, image_size=32, vocabulary=20, tokens=4)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": "hf:/no/such/folder"}, "no configuration"),
        ({"text": "hf:vit", "text_options": "{}"}, "no text encoder"),
        ({"text": "hf:bert", "text_weights": "pretrained"}, "has no weights"),
        ({"text_options": "{"}, "not JSON"),
        ({"text_options": "[]"}, "JSON object"),
        ({"text_options": '{"colour": 1}'}, "no field 'colour'"),
        ({"text_options": '{"auto_map": {}}'}, "may not set auto_map"),
        ({"text_options": '{"hidden_size": 15}'}, "hf:bert"),
        ({"text_options": '{"max_position_embeddings": 3}'}, "takes 3 tokens, not 4"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(changes: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        build_hugging_face_text(replace(BERT, **changes), vocabulary=20, tokens=4)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_more_tokens_than_the_weights_is_refused(folder: Path) -> None:
    settings = replace(BERT, text=f"hf:{folder}", text_options="{}", text_weights="pretrained")
    with pytest.raises(UsageError, match="has 20 token ids, the tokenizer 21"):
        build_hugging_face_text(settings, vocabulary=21, tokens=4)


def test_weights_that_are_a_pickle_or_lack_tensors_are_refused(folder: Path) -> None:
    settings = replace(BERT, text=f"hf:{folder}", text_options="{}", text_weights="pretrained")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    kept = {name: tensor for name, tensor in tensors.items() if "layer.1.attention" not in name}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="lack .* tensors of the model, such as encoder.layer.1"):
        build_hugging_face_text(settings, vocabulary=20, tokens=4)
    weights.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match="cannot build"):
        build_hugging_face_text(settings, vocabulary=20, tokens=4)


def test_code_of_a_repository_is_never_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass C: ...\n", encoding="utf-8")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.C"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UsageError, match="no configuration"):
        build_hugging_face_text(replace(BERT, text=f"hf:{tmp_path}", text_options="{}"), vocabulary=20, tokens=4)
    assert not ran.exists()
