"""What pyvene's classes are called in files, and what of their configuration the tensors leave out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from orthoserde import json_values
from orthoserde.errors import ConfigError
from orthoserde.json_values import JSON
from orthoserde.registry import Registry
from orthoserde.registry.codec import own_tensors
from orthoserde.registry.registered_class import RegisteredClass
from orthoserde.tensor_bytes import dtype_name

#: Kind of a model that holds interventions and the model they act on.
MODEL_KIND = "pyvene>IntervenableModel"

#: Interventions of pyreft and pyvene, with the module that they are defined in.
KNOWN = {
    "LoreftIntervention": "pyreft.interventions",
    "NoreftIntervention": "pyreft.interventions",
    "ConsreftIntervention": "pyreft.interventions",
    "LobireftIntervention": "pyreft.interventions",
    "DireftIntervention": "pyreft.interventions",
    "NodireftIntervention": "pyreft.interventions",
    "RotatedSpaceIntervention": "pyvene.models.interventions",
    "BoundlessRotatedSpaceIntervention": "pyvene.models.interventions",
    "SigmoidMaskRotatedSpaceIntervention": "pyvene.models.interventions",
    "LowRankRotatedSpaceIntervention": "pyvene.models.interventions",
    "SigmoidMaskIntervention": "pyvene.models.interventions",
    "AutoencoderIntervention": "pyvene.models.interventions",
    "JumpReLUAutoencoderIntervention": "pyvene.models.interventions",
    "PCARotatedSpaceIntervention": "pyvene.models.interventions",
    "VanillaIntervention": "pyvene.models.interventions",
    "ZeroIntervention": "pyvene.models.interventions",
    "AdditionIntervention": "pyvene.models.interventions",
    "SubtractionIntervention": "pyvene.models.interventions",
    "CollectIntervention": "pyvene.models.interventions",
    "SkipIntervention": "pyvene.models.interventions",
    "NoiseIntervention": "pyvene.models.interventions",
}

#: The class whose ``state_dict`` is overridden, and with it that of the classes made from it.
OVERRIDING = "LoreftIntervention"

#: pyvene's and pyreft's own classes that are not trained; pyvene writes no file of them without a source of their own.
NOT_TRAINED = frozenset(
    {"VanillaIntervention", "ZeroIntervention", "AdditionIntervention", "SubtractionIntervention"}
    | {"CollectIntervention", "NoiseIntervention", "SkipIntervention", "PCARotatedSpaceIntervention"}
)

#: Classes whose rotation is square, so that pyvene knows of no rank.
_SQUARE = frozenset(
    {"RotatedSpaceIntervention", "BoundlessRotatedSpaceIntervention", "SigmoidMaskRotatedSpaceIntervention"}
)

# Fields of pyvene's RepresentationConfig that are JSON, in its order; the others are classes, modules and tensors.
REPRESENTATION = ("layer", "component", "unit", "max_number_of_units")
OPTIONAL = ("subspace_partition", "group_key", "intervention_link_key", "moe_key", "latent_dim")

#: Names that one and the same activation has had.
_LINEAR = {"LinearActivation", "Identity"}


def is_intervention(cls: type) -> bool:
    """Whether a class is made from pyvene's ``Intervention``."""
    return _base(cls, "Intervention", "interventions") is not None


def is_intervenable_model(cls: type) -> bool:
    """Whether a class is made from pyvene's ``IntervenableModel``."""
    return _base(cls, "BaseModel", "intervenable_base") is not None


def is_trained(cls: type) -> bool:
    """Whether a class is made from pyvene's ``TrainableIntervention``, so that pyvene writes a file of it."""
    return _base(cls, "TrainableIntervention", "interventions") is not None


def known_base(cls: type) -> str | None:
    """The nearest class of pyreft's or pyvene's own that an intervention is made from, itself included."""
    return next((base.__name__ for base in cls.__mro__ if KNOWN.get(base.__name__) == base.__module__), None)


def extend(registry: Registry, types: Iterable[type[nn.Module]]) -> Registry:
    """A registry that also knows these classes, as far as they are pyvene's; interventions are adapters.

    Raises:
        RegistrationError: Two different interventions have one name.
    """
    found = list(types)
    codecs: list[RegisteredClass] = [InterventionCodec(cls) for cls in found if is_intervention(cls)]
    codecs += [ModelCodec(cls) for cls in found if is_intervenable_model(cls)]
    bases = {_base(cls, "Intervention", "interventions") for cls in found} - {None}
    return registry.extended(codecs, [base for base in bases if base is not None])


def _base(cls: type, name: str, module: str) -> type | None:
    for base in cls.__mro__:
        if base.__name__ == name and base.__module__ == f"pyvene.models.{module}":
            return base
    return None


class _NotBuilt(RegisteredClass):
    """A class that pyvene makes, from things that are not in a file."""

    def build(self, config: Mapping[str, JSON], like: Tensor | None) -> nn.Module:
        """Refused: it is made for, or around, a model that the file does not hold.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{self.kind}: is made by pyreft around a base model; make it there, and use load")


class InterventionCodec(_NotBuilt):
    """An intervention. Its kind is its class's name alone, so that a class may move to another module."""

    def __init__(self, cls: type[nn.Module]) -> None:
        super().__init__(cls, f"pyvene>{cls.__name__}", 1)

    def config(self, parametrization: nn.Module) -> dict[str, JSON] | None:
        """Constructor arguments, read from the live module; None where one of them is not JSON.

        ``base`` is the nearest class of pyreft's or pyvene's own, ``trained`` whether pyvene trains it; ``rank``,
        ``dtype``, ``dropout`` and ``act_fn`` are None where the class has nothing of the sort.
        """
        tensors = own_tensors(parametrization)
        source = tensors.get("learned_source.weight", tensors.get("learned_source"))
        dropout = getattr(parametrization, "dropout", None)
        return _as_json(
            {
                "base": known_base(self.type),
                "trained": is_trained(self.type),
                "rank": None if known_base(self.type) in _SQUARE else _rank(tensors),
                "dtype": None if source is None else dtype_name(source.dtype),
                "dropout": float(dropout.p) if isinstance(dropout, nn.Dropout) else None,
                "act_fn": _activation(getattr(parametrization, "act_fn", None)),
                "keep_last_dim": getattr(parametrization, "keep_last_dim", None),
                "source_constant": getattr(parametrization, "is_source_constant", None),
                "subspace_partition": getattr(parametrization, "subspace_partition", None),
            }
        )


class ModelCodec(_NotBuilt):
    """A ``ReftModel`` or another ``IntervenableModel``: where its interventions act."""

    def __init__(self, cls: type[nn.Module]) -> None:
        super().__init__(cls, MODEL_KIND, 1)

    def config(self, parametrization: nn.Module) -> dict[str, JSON] | None:
        """``mode``, and of each representation what says where and when it acts; None where that is not JSON."""
        config = getattr(parametrization, "config", None)
        return _as_json(
            {
                "mode": getattr(config, "mode", None),
                "representations": [
                    {field: getattr(each, field, None) for field in (*REPRESENTATION, *OPTIONAL)}
                    for each in getattr(config, "representations", ())
                ],
            }
        )


def _rank(tensors: Mapping[str, Tensor]) -> int | None:
    """``low_rank_dimension``, as the shapes say it."""
    for name, dim in (
        ("rotate_layer.parametrizations.weight.original", -1),
        ("rotate_layer.weight", -1),
        ("proj_layer.weight", 0),
        ("W_enc", -1),
    ):
        if name in tensors and tensors[name].dim():
            return int(tensors[name].shape[dim])
    return None


def _activation(function: object) -> str | None:
    if function is None:
        return None
    if not isinstance(function, nn.Module):
        return str(getattr(function, "__name__", type(function).__name__))
    name = type(function).__name__
    arguments = function.extra_repr()
    return "linear" if name in _LINEAR else f"{name}({arguments})" if arguments else name


def _as_json(config: dict[str, object]) -> dict[str, JSON] | None:
    try:
        return {key: json_values.to_json(value) for key, value in config.items()}
    except ConfigError:
        return None
