"""For test suites: assert that a checkpoint goes on. It works with pytest and unittest, and imports neither."""

from __future__ import annotations

from collections.abc import Callable

from orthoserde.errors import ConfigError
from orthoserde.proof.proving import Path, Reference, prove
from orthoserde.proof.report import Grade, Proof


def assert_continues(
    path: Path,
    make: Callable[[], object],
    step: Callable[..., object],
    *,
    reference: Reference | None = None,
    steps: int = 3,
    within: float | None = None,
) -> Proof:
    """Fail unless a checkpoint goes on; the other arguments are those of :func:`orthoserde.prove`.

    Args:
        path: The checkpoint.
        make: Makes what is loaded.
        step: Takes one training step.
        reference: What the run that never stopped did next. Without it two fresh loads have to agree.
        steps: Number of training steps.
        within: None if every bit has to agree; else the largest difference that may be, in units of the largest value
            of a tensor, as in :attr:`orthoserde.Proof.max_difference`. It needs a reference.

    Returns:
        The proof.

    Raises:
        AssertionError: It does not; the message is the proof.
        ConfigError: ``within`` without a reference; or as :func:`orthoserde.prove` says.
        ProofError: As :func:`orthoserde.prove` says.

    Example:
        >>> import pathlib, sys, tempfile, torch, orthoserde
        >>> from orthoserde.testing import assert_continues
        >>> code = '''
        ... import torch
        ... def make():
        ...     return torch.nn.Linear(2, 1)
        ... def step(model):
        ...     return model(torch.ones(2))
        ... '''
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "my_model.py").write_text(code)
        ...     sys.path.insert(0, folder)
        ...     import my_model
        ...     saved = orthoserde.save(my_model.make(), f"{folder}/model.safetensors")
        ...     proof = assert_continues(f"{folder}/model.safetensors", my_model.make, my_model.step, steps=1)
        ...     sys.path.remove(folder)
        >>> str(proof.grade)
        'deterministic'
    """
    if within is not None and reference is None:
        raise ConfigError("within: two fresh loads are compared bit by bit; give a reference")
    proof = prove(path, make, step, reference=reference, steps=steps)
    if within is not None and proof.max_difference is not None:
        fine = proof.max_difference <= within
    else:
        fine = proof.grade is (Grade.DETERMINISTIC if reference is None else Grade.BIT_EXACT)
    if not fine:
        raise AssertionError(str(proof))
    return proof
