"""Checkpoints that know what a parametrized tensor is.

``save(model, path)`` writes the state *and configuration* of every parametrized tensor to one safetensors file;
``load(model, path)`` puts them back in place, bit for bit, or says what does not fit and changes nothing.
"""

from orthoserde._version import __version__
from orthoserde.api import build, inspect, load, save, verify
from orthoserde.baking import bake_
from orthoserde.charts import orthogonal
from orthoserde.codec import Codec
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
from orthoserde.rechart import canonicalize_
from orthoserde.registry import Registry, default_registry, register
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
