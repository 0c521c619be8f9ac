"""Folders of ``save_pretrained``: what transformers makes of a model that was baked first."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from transformers import BertConfig, BertModel

import orthoserde


class Symmetric(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).mT


def tiny() -> BertModel:
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    return BertModel(config)


def constrained() -> BertModel:
    torch.manual_seed(0)
    model = tiny()
    first, second = model.encoder.layer
    orthogonal(first.attention.self.query)
    orthoserde.orthogonal(first.attention.self.key, structured=True)
    weight_norm(first.intermediate.dense)
    spectral_norm(second.output.dense)
    parametrize.register_parametrization(second.attention.self.value, "weight", Symmetric())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(second.intermediate.dense)
    nn.utils.spectral_norm(second.attention.self.key)
    return model.eval()


def test_a_baked_model_is_an_ordinary_one_to_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = constrained()
    tokens = torch.arange(12).view(2, 6)
    before = model(tokens).last_hidden_state
    report = orthoserde.bake_(model)
    assert len(report.tensors) == 7
    assert torch.equal(model(tokens).last_hidden_state, before)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = BertModel.from_pretrained(tmp_path).eval()
    assert not caplog.records
    assert torch.equal(loaded(tokens).last_hidden_state, before)


def test_without_baking_transformers_goes_on_with_random_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = constrained()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        loaded = BertModel.from_pretrained(tmp_path).eval()
    assert caplog.records
    tokens = torch.arange(12).view(2, 6)
    assert not torch.equal(loaded(tokens).last_hidden_state, model(tokens).last_hidden_state)
