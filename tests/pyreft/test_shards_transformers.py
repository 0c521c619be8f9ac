"""Shards between orthoserde and the real transformers, both ways."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import orthoserde

INDEX = "model.safetensors.index.json"


def llama(seed: int, tied: bool) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=None,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def equal(left: nn.Module, right: nn.Module) -> bool:
    one, other = left.state_dict(), right.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


tied_or_not = pytest.mark.parametrize("tied", [False, True])
sizes = pytest.mark.parametrize("size", ["10KB", "1GB"])


@tied_or_not
@sizes
def test_what_save_pretrained_wrote_is_loaded(tmp_path: Path, tied: bool, size: str) -> None:
    model = llama(0, tied)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / INDEX).exists() == (size == "10KB")
    other = llama(1, tied)
    report = orthoserde.load(other, tmp_path)
    assert report.missing_keys == report.unexpected_keys == []
    assert equal(other, model)


@tied_or_not
@sizes
def test_from_pretrained_loads_what_was_saved_and_has_nothing_to_say(
    tmp_path: Path, tied: bool, size: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = llama(0, tied)
    for value in (1.0, 2.0):  # the second time with other names of shards
        with torch.no_grad():
            model.model.norm.weight.fill_(value)
        orthoserde.save(model, tmp_path, max_shard_size=size)
    model.config.save_pretrained(tmp_path)
    model.generation_config.save_pretrained(tmp_path)
    logging.disable(logging.NOTSET)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other, said = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said.values()), said
    assert "warn" not in capfd.readouterr().err.lower()
    assert equal(other, model)
    assert transformers.LlamaForCausalLM.from_pretrained(tmp_path).model.norm.weight[0] == 2.0


def test_save_pretrained_cleans_a_folder_of_ours(tmp_path: Path) -> None:
    model = llama(0, False)
    for _ in range(2):
        with torch.no_grad():
            model.model.norm.weight.add_(1)
        orthoserde.save(model, tmp_path, max_shard_size="10KB")
    ours = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert not any((tmp_path / name).exists() for name in ours)
    other = llama(1, False)
    orthoserde.load(other, tmp_path)
    assert equal(other, model)


def test_a_training_run_goes_on_from_the_folder_that_transformers_reads(tmp_path: Path) -> None:
    model = llama(0, False)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(12).reshape(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    orthoserde.save(model, tmp_path, optimizer=optimizer, max_shard_size="10KB")
    model.config.save_pretrained(tmp_path)
    other = llama(1, False)
    its = torch.optim.AdamW(other.parameters())
    orthoserde.load(other, tmp_path, optimizer=its)
    for each, how in ((model, optimizer), (other, its)):
        how.zero_grad()
        each(input_ids=ids, labels=ids).loss.backward()
        how.step()
    assert equal(other, model)
