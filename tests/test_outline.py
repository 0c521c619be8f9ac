"""A checkpoint as a tree of modules: what is alike stands once, and hostile names end nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, weight_norm

import orthoserde
from orthoserde.manifest import Manifest, TensorRecord
from orthoserde.outline import Branch, Leaf, label, natural, outline


def plain(*keys: str, shape: tuple[int, ...] = (2,)) -> Manifest:
    record = TensorRecord("float32", shape, (1,) * len(shape), True, requires_grad=True)
    return Manifest(tensors=dict.fromkeys(keys, record))


def names(branch: Branch) -> list[object]:
    """Names with what is in them."""
    inside: list[object] = [leaf.name for leaf in branch.leaves]
    return inside + [(each.name, each.count, names(each)) for each in branch.branches]


def test_layers_that_are_alike_stand_once() -> None:
    keys = [f"layers.{i}.{name}" for i in range(32) for name in ("q.weight", "norm.bias")]
    tree = outline(plain(*keys, "head.weight"))
    assert names(tree) == [
        ("head", 1, ["weight"]),
        ("layers", 1, [("0", 32, [("norm", 1, ["bias"]), ("q", 1, ["weight"])])]),
    ]
    layers = tree.branches[1].branches[0]
    assert layers.last == "31"
    assert layers.nbytes == 32 * 16
    assert tree.nbytes == 32 * 16 + 8
    assert len(outline(plain(*keys), join_alike=False).branches[0].branches) == 32


def test_those_that_differ_do_not() -> None:
    other = TensorRecord("float32", (3,), (1,), True, requires_grad=True)
    tensors = {**plain("0.w", "1.w", "3.w").tensors, "2.w": other}
    tree = outline(Manifest(tensors=tensors))
    assert [(each.name, each.last, each.count) for each in tree.branches] == [("0", "1", 2), ("2", "", 1), ("3", "", 1)]


def test_names_that_differ_in_more_than_numbers_are_not_alike() -> None:
    assert [each.name for each in outline(plain("q1.w", "k1.w", "k2.w")).branches] == ["k1", "q1"]
    assert [leaf.name for leaf in outline(plain("q1", "k1", "k2")).leaves] == ["k1", "q1"]


def test_tensors_that_are_alike_stand_once_too() -> None:
    tree = outline(plain(*(f"t{i}" for i in range(10_000)), "u1x", "u2y"))
    assert [(leaf.name, leaf.last, leaf.count) for leaf in tree.leaves] == [
        ("t0", "t9999", 10_000),
        ("u1x", "", 1),
        ("u2y", "", 1),
    ]
    assert tree.nbytes == 10_002 * 8


def test_configuration_makes_a_difference(tmp_path: Path) -> None:
    layers = [orthogonal(nn.Linear(4, 3), orthogonal_map=name) for name in ("cayley", "cayley", "householder")]
    orthoserde.save(nn.Sequential(*layers, weight_norm(nn.Linear(4, 3))), tmp_path / "m", include_weights=True)
    tree = outline(orthoserde.inspect(tmp_path / "m"))
    assert [(each.name, each.count) for each in tree.branches] == [("0", 2), ("2", 1), ("3", 1)]
    leaf = next(leaf for leaf in tree.branches[0].leaves if leaf.links)
    assert leaf.shape == (3, 4)
    assert leaf.nbytes == 4 * (12 + 16)
    assert leaf.links == ('torch>orthogonal: orthogonal_map="cayley", shape=[3,4], use_trivialization=true',)
    assert [leaf.sort for leaf in tree.branches[0].leaves] == ["parameter", "parameter", "computed"]


def test_ties_and_shared_modules_name_what_they_are_tied_to(tmp_path: Path) -> None:
    shared = weight_norm(nn.Linear(3, 3))
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(3, 3), "d": nn.Linear(3, 3)})
    model["d"].weight = model["c"].weight
    orthoserde.save(model, tmp_path / "m")
    tree = outline(orthoserde.inspect(tmp_path / "m"))
    tied = {(each.name, leaf.name): leaf.note for each in tree.branches for leaf in each.leaves if leaf.sort == "tied"}
    assert tied == {("b", "bias"): "= a.bias", ("b", "weight"): "= a.weight", ("d", "weight"): "= c.weight"}
    assert tree.nbytes == orthoserde.inspect(tmp_path / "m").nbytes


def test_training_state_is_no_part_of_the_model(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    orthoserde.save(model, tmp_path / "m", optimizer=optimizer, rng=True)
    assert names(outline(orthoserde.inspect(tmp_path / "m"))) == ["bias", "weight"]


def test_names_of_thousands_of_levels_are_one_name_in_the_end() -> None:
    tree = outline(plain(".".join("x" * 5000), "..", "."))
    depth = 0
    while tree.branches:
        tree, depth = tree.branches[-1], depth + 1
    assert depth < 40


def test_frozen_and_foreign_tensors() -> None:
    record = TensorRecord("float32", (2,), (1,), True)
    assert outline(Manifest(tensors={"w": record})).leaves == (Leaf("w", "frozen", (2,), "float32", 8),)
    foreign = Manifest(tensors={"w": record}, has_configuration=False)
    assert outline(foreign).leaves == (Leaf("w", "", (2,), "float32", 8),)


def test_labels_and_order() -> None:
    assert label("0", "31") == "0..31"
    assert label("layer_0_out", "layer_12_out") == "layer_{0..12}_out"
    assert label("a1b2", "a1b9") == "a1b{2..9}"
    assert sorted(["l10", "l2", "l1", "a", "10", "9"], key=natural) == ["9", "10", "a", "l1", "l2", "l10"]
