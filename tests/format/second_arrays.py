"""Arrays of the second reader: dtypes and strides, and the canonical completion of docs/reference/file-format.md."""

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any

# By dtype: its code in the container, and what numpy calls it. Of what numpy lacks, the bits are read as integers.
DTYPES = {
    **{"bool": ("BOOL", "?"), "uint8": ("U8", "u1"), "int8": ("I8", "i1")},
    **{"uint16": ("U16", "<u2"), "uint32": ("U32", "<u4"), "uint64": ("U64", "<u8")},
    **{"int16": ("I16", "<i2"), "int32": ("I32", "<i4"), "int64": ("I64", "<i8")},
    **{"float16": ("F16", "<f2"), "float32": ("F32", "<f4"), "float64": ("F64", "<f8")},
    **{"bfloat16": ("BF16", "<u2"), "float8_e4m3fn": ("F8_E4M3", "u1"), "float8_e5m2": ("F8_E5M2", "u1")},
    **{"complex64": ("C64", "<c8"), "complex128": ("F64", "<c16")},
}


def laid_out(values: Array, stride: list[int]) -> Array:
    """A copy of the values with these strides if they are dense, else row-major."""
    steps = sorted((step, size) for step, size in zip(stride, values.shape, strict=True) if size != 1)
    if values.size and [step for step, _ in steps] != np.cumprod([1, *(size for _, size in steps)])[:-1].tolist():
        return values.copy()
    memory = np.empty(values.size, values.dtype)
    array = np.lib.stride_tricks.as_strided(memory, values.shape, [step * values.itemsize for step in stride])
    array[...] = values
    return array


def array_of(stored: bytes, dtype: str, shape: list[int], stride: list[int]) -> Array:
    """The tensor whose bytes in the file are these."""
    return laid_out(np.frombuffer(stored, DTYPES[dtype][1]).reshape(shape), stride)


# A number is its parts, one if it is real and two if it is complex: the first axis of every array below.


def parts_of(values: Array) -> Array:
    return np.stack([values.real, values.imag] if np.iscomplexobj(values) else [values]).astype(np.float64)


def times(x: Array, y: Array) -> Array:
    if len(x) == 1:
        return x * y
    (a, b), (c, d) = x, y
    return np.stack([a * c - b * d, a * d + b * c])


def conj(x: Array) -> Array:
    return x if len(x) == 1 else np.stack([x[0], -x[1]])


def squared(x: Array) -> Array:
    return x[0] * x[0] if len(x) == 1 else x[0] * x[0] + x[1] * x[1]


def tree_sum(x: Array, axis: int) -> Array:
    """The tree sum along an axis, counted from the last: -1 or -2."""
    x = np.moveaxis(x, axis, 0)
    while len(x) > 1:
        half = (len(x) + 1) // 2
        x = np.concatenate([x[: len(x) - half] + x[half:], x[len(x) - half : half]])
    return x[0] if len(x) else np.zeros(x.shape[1:])


def completion(w: Array) -> Array:
    """U(W) of W, (n, k): the other n - k columns of the product of its Householder reflectors."""
    n, k = w.shape
    a = parts_of(w)
    v = np.zeros_like(a)
    for j in range(k):
        norm = np.sqrt(tree_sum(squared(a[:, j:, j]), -1))
        head = a[:, j, j]
        size = np.sqrt(squared(head))
        phase = head / size if size > 0 else np.array([1.0, 0.0])[: len(a)]
        v[:, j:, j] = a[:, j:, j]
        v[:, j, j] = head + phase * norm
        length = tree_sum(squared(v[:, j:, j]), -1)
        if length > 0:
            v[:, j:, j] *= np.sqrt(2 / length)
        column = v[:, j:, j, None]
        s = tree_sum(times(conj(column), a[:, j:, j + 1 :]), -2)
        a[:, j:, j + 1 :] -= times(column, s[:, None, :])
    t = np.zeros((len(a), k, k))
    for j in range(k):
        o = tree_sum(times(conj(v[:, :, :j]), v[:, :, j, None]), -2)
        t[:, :j, j] = -1 * tree_sum(times(t[:, :j, :j], o[:, None, :]), -1)
        t[0, j, j] = 1
    m = np.zeros((len(a), k, n - k))
    u = parts_of(np.eye(n, n - k, -k, dtype=w.dtype))
    for j in range(k):
        m += times(t[:, :, j, None], conj(v[:, None, k:, j]))
    for j in range(k):
        u -= times(v[:, :, j, None], m[:, None, j, :])
    return (u[0] if len(u) == 1 else np.stack([*u], axis=-1).view("c16")[..., 0]).astype(w.dtype)


def base_of(columns: Array) -> Array:
    """The base [W | U(W)], column-major, of the columns W: (..., n, k)."""
    whole = [np.concatenate([w, completion(w)], axis=1) for w in columns.reshape(-1, *columns.shape[-2:])]
    n = columns.shape[-2]
    base = np.empty((*columns.shape[:-2], n, n), columns.dtype).swapaxes(-1, -2)
    base[...] = np.array(whole).reshape(base.shape)
    return base
