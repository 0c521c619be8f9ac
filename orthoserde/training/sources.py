"""Tensors of training state: which can be stored, and under which key."""

from __future__ import annotations

import torch
from torch import Tensor

from orthoserde import _torch
from orthoserde.checkpoint import LiveTensor, TensorSource
from orthoserde.errors import ConfigError
from orthoserde.manifest import TensorRecord
from orthoserde.manifest.training import PREFIX
from orthoserde.tensor_bytes import DTYPES, dtype_name


class Sources:
    """Collects the tensors of trees under keys of training state; see :func:`orthoserde.manifest.trees.encode_tree`."""

    def __init__(self) -> None:
        self.records: dict[str, TensorRecord] = {}
        self.sources: dict[str, TensorSource] = {}

    def put(self, where: str, tensor: Tensor) -> str:
        """Take a tensor, to be read when the checkpoint is.

        Args:
            where: Its place, which becomes its key.
            tensor: Any ordinary tensor.

        Raises:
            ConfigError: It cannot be stored, or another one has its place.
        """
        key = f"{PREFIX}{where}"
        if key in self.sources:
            raise ConfigError(f"{where}: two tensors would be stored under this name; rename one")
        if _torch.overrides_dispatch(tensor):
            raise ConfigError(f"{where}: a {type(tensor).__qualname__} is not an ordinary tensor; gather it first")
        plain = tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type != "meta"
        if not plain or dtype_name(tensor.dtype) not in DTYPES:
            raise ConfigError(
                f"{where}: expected a dense tensor with elements, got layout {tensor.layout}, {tensor.dtype}, "
                f"on {tensor.device}"
            )
        own = tensor.detach()
        self.records[key] = TensorRecord(dtype_name(own.dtype), tuple(own.shape), tuple(own.stride()), parameter=False)
        self.sources[key] = LiveTensor(own)
        return key
