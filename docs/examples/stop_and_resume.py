"""Train a small network, and go on from the last checkpoint if there is one: ``python stop_and_resume.py FOLDER``.

Kill it at any moment and start it again, as often as you like: it ends with the bits of a run that was never killed.
docs/tutorial/stop-and-resume.md explains how.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal
from torch.utils.data import DataLoader, TensorDataset

import orthoserde

EPOCHS = 4


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(1024, 8, generator=generator)
    labels = (points @ torch.randn(8, 4, generator=generator)).argmax(dim=1)
    return TensorDataset(points, labels)


def make_model() -> nn.Sequential:
    return nn.Sequential(orthogonal(nn.Linear(8, 24)), nn.ReLU(), nn.Dropout(0.1), nn.Linear(24, 4))


def make_optimizer(model: nn.Sequential) -> torch.optim.AdamW:
    groups = [
        {"params": model[0].parameters(), "weight_decay": 0.0},
        {"params": model[3].parameters(), "weight_decay": 0.01},
    ]
    return torch.optim.AdamW(groups)


def train(folder: Path, save_every: int = 10) -> None:
    folder.mkdir(exist_ok=True)
    checkpoint = folder / "checkpoint.safetensors"
    for unfinished in folder.glob(".checkpoint.safetensors.orthoserde-*"):
        unfinished.unlink()  # of a save that was killed

    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    shuffle = torch.Generator().manual_seed(0)
    loader = DataLoader(make_data(), batch_size=32, shuffle=True, generator=shuffle)
    model = make_model()
    optimizer = make_optimizer(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, epochs=EPOCHS, steps_per_epoch=len(loader))

    state: dict[str, Any] = {"scheduler": scheduler, "epoch": 0, "batch": 0, "order": shuffle.get_state()}
    if checkpoint.exists():
        print(orthoserde.load(model, checkpoint, optimizer=optimizer, state=state, rng=True))
    shuffle.set_state(state["order"])

    with (folder / "log.txt").open("a", buffering=1) as log:
        for epoch in range(state["epoch"], EPOCHS):
            for batch, (points, labels) in enumerate(loader):
                if batch < state["batch"]:
                    continue  # it was trained on before the process was killed
                points = points * random.uniform(0.9, 1.1)
                loss = nn.functional.cross_entropy(model(points), labels)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                scheduler.step()

                state["batch"] = batch + 1
                step = epoch * len(loader) + batch + 1
                log.write(f"{step} {loss.item()}\n")
                if step % save_every == 0:
                    orthoserde.save(model, checkpoint, optimizer=optimizer, state=state, rng=True)
            state.update(epoch=epoch + 1, batch=0, order=shuffle.get_state())
    orthoserde.save(model, checkpoint, optimizer=optimizer, state=state, rng=True)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
