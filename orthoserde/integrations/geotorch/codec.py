"""The codec of geotorch's constraints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from orthoserde import _torch
from orthoserde.errors import ConfigError
from orthoserde.integrations.geotorch.constraints import ROUNDING, SORTS
from orthoserde.json_values import JSON
from orthoserde.parametrizations.orthogonal import OrthogonalCodec
from orthoserde.registry.codec import OneVersion, own_tensors

#: Names that geotorch gives to functions, by argument. A function of the user's own has none, and no configuration.
TRIVIALIZATIONS = ("expm", "cayley")
FUNCTIONS = ("softplus", "sin", "tanh", "scaled_sigmoid")

# Note [Batch of one]
# geotorch's constructors draw a random base and factorise it. On the meta device that costs nothing and leaves the
# random generators alone; but for a single matrix they ask for a number there, which a meta tensor does not have. For a
# batch they do not. So a constraint is made for a batch of one, and the batch is taken off again.
_BATCH = 1


class GeotorchCodec(OneVersion):
    """Codec of one of geotorch's constraints.

    Shapes: of the weight, and of each original, ``size``; matrices are the last two dimensions, those with more columns
    than rows transposed by geotorch itself, vectors the last one. Own tensors are ``base``, those of its factors
    (``0.base``, ``2.base``), and for ``Hurwitz`` ``In`` and ``alpha``. dtypes: float32 and float64.

    Source: geotorch 0.4.0.
    """

    version = 1

    def __init__(self, cls: type[nn.Module], name: str) -> None:
        self.type = cls
        self.kind = f"geotorch>{name}"
        self._sort = SORTS[name]

    def config(self, parametrization: nn.Module) -> dict[str, JSON] | None:
        """``size`` and the arguments of the construction; None where one of them is no number and has no name.

        What is read is built again, and has to be the same in every attribute.
        """
        found = vars(parametrization)
        size = _size(parametrization, self._sort.vectors)
        config: dict[str, JSON] = {"size": None if size is None else list(size)} if self._sort.sized else {}
        for argument in self._sort.arguments:
            if argument == "triv":
                config[argument] = _trivialization(parametrization)
            elif argument == "alpha":
                config[argument] = _value(own_tensors(parametrization).get("alpha"))
            elif argument != "f":
                config[argument] = found.get(argument)
        for name in FUNCTIONS if "f" in self._sort.arguments else (None,):
            candidate = config if name is None else {**config, "f": name}
            try:
                built = self._make(candidate, size)
            except ConfigError:
                continue
            if _same(_settings(built), _settings(parametrization)):
                return {argument: candidate[argument] for argument in sorted(candidate)}
        return None

    def build(self, config: Mapping[str, JSON], like: Tensor | None) -> nn.Module:
        """Make the constraint, its tensors on the meta device: no sample, no factorisation, no random numbers.

        Raises:
            ConfigError: geotorch does not take the configuration, or it is not for this tensor.
        """
        if like is None or (self._sort.sized and config.get("size") != list(like.shape)):
            shape = None if like is None else list(like.shape)
            raise ConfigError(f"{self.kind}: configured for size {config.get('size')}, the tensor has {shape}")
        built = self._make(config, list(like.shape)).to(like.dtype)
        for module in built.modules():
            for name, buffer in _torch.own_transient_buffers(module).items():
                # They hold nothing but the dtype and device in which geotorch samples.
                _torch.set_buffer(module, name, torch.empty(buffer.shape, dtype=like.dtype, device=like.device))
        return built

    def _make(self, config: Mapping[str, JSON], size: Sequence[int] | None) -> nn.Module:
        wanted = {*self._sort.arguments, *(("size",) if self._sort.sized else ())}
        if set(config) != wanted or size is None or not all(map(_is_argument, config, config.values())):
            raise ConfigError(f"{self.kind}: not a configuration of this geotorch: {dict(config)}")
        arguments: list[Any] = [config[name] for name in self._sort.arguments]
        try:
            with torch.device("meta"):
                if not self._sort.sized:
                    return self.type(*arguments)
                return _single(self.type(torch.Size((_BATCH, *size)), *arguments))
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise ConfigError(f"{self.kind}: {dict(config)} does not build: {error}") from error

    def tensors(self, parametrization: nn.Module) -> dict[str, Tensor]:
        """``base`` and the like, those of its factors by dotted name."""
        return own_tensors(parametrization)

    def compute(self, config: Mapping[str, JSON], tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight, with geotorch's own forward."""
        names = _names(self._sort.originals)
        built = self.build(config, tensors[names[0]])
        for role in own_tensors(built):
            path, _, name = role.rpartition(".")
            _torch.set_buffer(built.get_submodule(path), name, tensors[role])
        with torch.no_grad():
            weight: Tensor = built(*(tensors[name] for name in names))
        return weight

    def shape(self, originals: Mapping[str, torch.Size]) -> torch.Size | None:
        """That of each original."""
        return originals.get(_names(self._sort.originals)[0])

    def check(
        self, config: Mapping[str, JSON], originals: Mapping[str, Sequence[int]], roles: Mapping[str, Sequence[int]]
    ) -> str | None:
        """Originals of the size that is configured, and the tensors that geotorch makes for it."""
        names = _names(self._sort.originals)
        shapes = {name: list(shape) for name, shape in originals.items()}
        first = shapes.get(names[0])
        if first is None or shapes != dict.fromkeys(names, first):
            return f"expected {', '.join(names)} of one shape, got {shapes}"
        try:
            built = self.build(config, torch.empty((), device="meta").expand(first))
        except (ConfigError, RuntimeError) as error:
            return str(error)
        expected = {role: list(tensor.shape) for role, tensor in own_tensors(built).items()}
        if {role: list(shape) for role, shape in roles.items()} != expected:
            return f"expected tensors of the shapes {expected}, got {dict(roles)}"
        return None

    def residual(self, weight: Tensor) -> float | None:
        """Distance from the constraint; None where that depends on the configuration (see :meth:`residual_in`)."""
        return None if self._sort.by_config else self.residual_in(weight, {})

    def residual_in(self, weight: Tensor, config: Mapping[str, JSON]) -> float | None:
        """Distance of a computed tensor from the constraint in a configuration, in double precision.

        Of matrices: the largest entry of ``W - W^T``, ``W + W^T`` or ``W^T W - I``, the singular values beyond the rank
        or outside of the interval, ``|log det W|``, the negative eigenvalues, and real parts above ``-alpha``; of
        vectors, that of the norm from the radius. None for ``Rn`` and ``GLp``, NaN for what is not finite.
        """
        if self._sort.distance is None:
            return None
        if not torch.isfinite(weight).all():  # LAPACK's eigenvalues of such a matrix may write past its memory
            return math.nan
        return self._sort.distance(weight.detach().double(), config) if weight.numel() else 0.0

    def admits(self, weight: Tensor, config: Mapping[str, JSON]) -> bool:
        """Whether the distance is rounding; see Note [Rounding of geotorch]."""
        distance = self.residual_in(weight, config)
        if not distance:
            return True
        if math.isnan(distance):
            return False
        if self._sort.distance is SORTS["Stiefel"].distance:
            return OrthogonalCodec().admits(weight, {})
        eps = torch.finfo(torch.float64 if weight.dtype is torch.float64 else torch.float32).eps
        return distance <= ROUNDING * eps * self._sort.scale(weight.detach().double(), self._sort.vectors)

    def project(self, weight: Tensor, config: Mapping[str, JSON]) -> Tensor:
        """The nearest tensor on the constraint, for those of which state can be recovered.

        Raises:
            ConfigError: There is none (a singular matrix).
        """
        return self._sort.project(weight.detach().double(), config).to(weight.dtype)

    def recovers(self, config: Mapping[str, JSON]) -> bool:
        """Whether it is orthogonal, a sphere, or triangular; factors of a product are not determined by it."""
        return self._sort.recover is not None

    def from_weight(self, weight: Tensor, config: Mapping[str, JSON]) -> dict[str, Tensor]:
        """State of which ``weight`` is the computed tensor.

        Orthogonal matrices come back bit for bit: they are the first columns of ``base``, completed canonically, and
        ``original`` is zero. So do symmetric and skew ones; points of a sphere within ``4 eps`` of the radius.

        Raises:
            ConfigError: The weight alone does not determine it.
        """
        if self._sort.recover is None:
            raise ConfigError(f"{self.kind}: its factors are not determined by the computed weight")
        with torch.no_grad():
            return self._sort.recover(weight, config)


def _names(originals: int) -> tuple[str, ...]:
    return ("original",) if originals == 1 else tuple(f"original{i}" for i in range(originals))


def _is_argument(name: str, value: JSON) -> bool:
    """Whether a value is one that an argument of this name can have."""
    if name == "size":
        return isinstance(value, list) and all(type(side) is int and side >= 0 for side in value)
    if name == "triv":
        return value in TRIVIALIZATIONS
    if name == "f":
        return value in FUNCTIONS
    if name in ("lower", "rank"):
        return type(value) is (bool if name == "lower" else int)
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _size(module: nn.Module, vectors: bool) -> list[int] | None:
    """Size that a constraint was made for, from what it keeps of it; any for one that keeps nothing."""
    found = vars(module)
    n, batch = found.get("n"), found.get("tensorial_size", ())
    if type(n) is not int or not isinstance(batch, (tuple, list)):
        return None if found.keys() & {"n", "tensorial_size"} else []
    k = found.get("k", n)
    sides = [n] if vectors else [k, n] if found.get("transposed") else [n, k]
    return [*batch, *sides]


def _trivialization(module: nn.Module) -> str | None:
    """Name of the function by which the first orthogonal factor maps skew matrices; None if it has none."""
    for part in module.modules():
        table = getattr(part, "trivializations", None)
        if isinstance(table, dict) and "triv" in vars(part):
            return next((name for name in TRIVIALIZATIONS if table.get(name) is vars(part)["triv"]), None)
    return None


def _value(scalar: Tensor | None) -> float | int | None:
    return None if scalar is None or scalar.device.type == "meta" or scalar.numel() != 1 else scalar.item()


def _single(module: nn.Module) -> nn.Module:
    """Take the batch of one off a constraint on the meta device; see Note [Batch of one]."""
    for part in module.modules():
        found = vars(part)
        if "tensorial_size" in found:
            found["tensorial_size"] = found["tensorial_size"][_BATCH:]
        for name, buffer in _torch.own_buffers(part).items():
            if buffer is not None and buffer.dim():
                _torch.set_buffer(part, name, torch.empty(buffer.shape[_BATCH:], dtype=buffer.dtype, device="meta"))
    return module


def _settings(module: nn.Module) -> Iterator[tuple[str, object, object]]:
    """Every part of a constraint, and every attribute of it that is not nn.Module's own."""
    for path, part in module.named_modules():
        yield path, "type", type(part)
        for name in sorted(vars(part)):
            if not name.startswith("_") and name != "training":
                yield path, name, vars(part)[name]


def _same(left: Iterator[tuple[str, object, object]], right: Iterator[tuple[str, object, object]]) -> bool:
    ours, theirs = list(left), list(right)
    return len(ours) == len(theirs) and all(
        one[:2] == other[:2] and _equal(one[2], other[2]) for one, other in zip(ours, theirs, strict=True)
    )


def _equal(left: object, right: object) -> bool:
    """Whether two attributes mean the same. geotorch makes the functions of ``SL`` anew for each instance."""
    if left is right:
        return True
    if isinstance(left, FunctionType) and isinstance(right, FunctionType):
        cells = [[cell.cell_contents for cell in function.__closure__ or ()] for function in (left, right)]
        return left.__code__ is right.__code__ and all(map(_equal, *cells))
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):  # any of them says a size
        return len(left) == len(right) and all(map(_equal, left, right))
    return type(left) is type(right) and isinstance(left, (bool, int, float, str)) and left == right
