"""Checkpoints that know what a parametrized tensor is.

``save(model, path)`` writes the state *and configuration* of every parametrized tensor to one safetensors file;
``load(model, path)`` puts them back in place, bit for bit, or says what does not fit and changes nothing.

Next: ``inspect`` and ``verify`` look at a file without a model, ``diagnose`` finds what is about to lose a weight,
``Checkpoints`` keeps the files of a run, ``register`` names classes of your own. docs/index.md begins with a tutorial.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from orthoserde._version import __version__

# Importing this package takes no longer than a look at its names: a room is imported when something in it is first
# asked for. Type checkers see them all.
if TYPE_CHECKING:
    from orthoserde.api import build, inspect, load, save, verify
    from orthoserde.baking import bake_
    from orthoserde.charts.canonicalize import canonicalize_
    from orthoserde.charts.registering import orthogonal
    from orthoserde.conversion import ConversionReport, convert
    from orthoserde.errors import (
        AdapterError,
        BackgroundSaveError,
        CanonicalizeError,
        CheckpointNotFoundError,
        CommitUncertainError,
        ConfigError,
        DamagedFileError,
        FileAccessError,
        FileFormatError,
        FormatVersionError,
        IncompatibleModelError,
        LegacyCheckpointWarning,
        LoadInterruptedError,
        MissingPackageError,
        OrthoserdeError,
        Problem,
        ProofError,
        RegistrationError,
        TornSaveError,
        TrainingTrapWarning,
        UnsupportedModuleError,
    )
    from orthoserde.folder import Checkpoints
    from orthoserde.manifest import Manifest
    from orthoserde.proof import Difference, Grade, Proof, prove
    from orthoserde.registry import Registry, default_registry, register
    from orthoserde.registry.codec import Codec
    from orthoserde.reports import (
        BakeReport,
        CanonicalizeReport,
        ChartReport,
        Fidelity,
        Finding,
        LoadReport,
        SaveReport,
        Severity,
        TensorReport,
        VerifyReport,
    )
    from orthoserde.traps import diagnose
    from orthoserde.walk import ParametrizedTensor, parametrized_tensors

__all__ = [
    "AdapterError",
    "BackgroundSaveError",
    "BakeReport",
    "CanonicalizeError",
    "CanonicalizeReport",
    "ChartReport",
    "CheckpointNotFoundError",
    "Checkpoints",
    "Codec",
    "CommitUncertainError",
    "ConfigError",
    "ConversionReport",
    "DamagedFileError",
    "Difference",
    "Fidelity",
    "FileAccessError",
    "FileFormatError",
    "Finding",
    "FormatVersionError",
    "Grade",
    "IncompatibleModelError",
    "LegacyCheckpointWarning",
    "LoadInterruptedError",
    "LoadReport",
    "Manifest",
    "MissingPackageError",
    "OrthoserdeError",
    "ParametrizedTensor",
    "Problem",
    "Proof",
    "ProofError",
    "RegistrationError",
    "Registry",
    "SaveReport",
    "Severity",
    "TensorReport",
    "TornSaveError",
    "TrainingTrapWarning",
    "UnsupportedModuleError",
    "VerifyReport",
    "__version__",
    "bake_",
    "build",
    "canonicalize_",
    "convert",
    "default_registry",
    "diagnose",
    "inspect",
    "load",
    "orthogonal",
    "parametrized_tensors",
    "prove",
    "register",
    "save",
    "verify",
]

#: Where the public names live.
_HOMES = {
    "api": ("build", "inspect", "load", "save", "verify"),
    "baking": ("bake_",),
    "charts.canonicalize": ("canonicalize_",),
    "charts.registering": ("orthogonal",),
    "conversion": ("ConversionReport", "convert"),
    "errors": (
        "AdapterError",
        "BackgroundSaveError",
        "CanonicalizeError",
        "CheckpointNotFoundError",
        "CommitUncertainError",
        "ConfigError",
        "DamagedFileError",
        "FileAccessError",
        "FileFormatError",
        "FormatVersionError",
        "IncompatibleModelError",
        "LegacyCheckpointWarning",
        "LoadInterruptedError",
        "MissingPackageError",
        "OrthoserdeError",
        "Problem",
        "ProofError",
        "RegistrationError",
        "TornSaveError",
        "TrainingTrapWarning",
        "UnsupportedModuleError",
    ),
    "folder": ("Checkpoints",),
    "manifest": ("Manifest",),
    "proof": ("Difference", "Grade", "Proof", "prove"),
    "registry.codec": ("Codec",),
    "registry": ("Registry", "default_registry", "register"),
    "reports": (
        "BakeReport",
        "CanonicalizeReport",
        "ChartReport",
        "Fidelity",
        "Finding",
        "LoadReport",
        "SaveReport",
        "Severity",
        "TensorReport",
        "VerifyReport",
    ),
    "traps": ("diagnose",),
    "walk": ("ParametrizedTensor", "parametrized_tensors"),
}

_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _HOME_OF:
            value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
