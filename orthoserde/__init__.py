"""Checkpoints that know what a parametrized tensor is.

``save(model, path)`` writes the state *and configuration* of every parametrized tensor to one safetensors file;
``load(model, path)`` puts them back in place, bit for bit, or says what does not fit and changes nothing.
"""

from orthoserde._version import __version__
from orthoserde.api import load, save
from orthoserde.errors import (
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
    OrthoserdeError,
    Problem,
    RegistrationError,
    UnsupportedModuleError,
)
from orthoserde.registry import Codec, Registry, default_registry, register
from orthoserde.reports import Fidelity, LoadReport, SaveReport, TensorReport
from orthoserde.walk import ParametrizedTensor, parametrized_tensors

__all__ = [
    "CheckpointNotFoundError",
    "Codec",
    "CommitUncertainError",
    "ConfigError",
    "DamagedFileError",
    "Fidelity",
    "FileAccessError",
    "FileFormatError",
    "FormatVersionError",
    "IncompatibleModelError",
    "LegacyCheckpointWarning",
    "LoadInterruptedError",
    "LoadReport",
    "OrthoserdeError",
    "ParametrizedTensor",
    "Problem",
    "RegistrationError",
    "Registry",
    "SaveReport",
    "TensorReport",
    "UnsupportedModuleError",
    "__version__",
    "default_registry",
    "load",
    "parametrized_tensors",
    "register",
    "save",
]
