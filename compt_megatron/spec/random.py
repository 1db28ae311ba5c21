"""Random values of fresh parameters as a pure function of (seed, parameter name, index in the whole tensor).

Element i (row-major) of tensor `name` is made from word i % 4 of Philox4x64-10 block i // 4 under the key
(seed, hash of name). So any box of a tensor can be made alone and has the bytes of the same box of the whole tensor:
growth, initialisation and sharding agree whatever the layout and the number of workers.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Normals: Box and Muller 1958, in fp64
from 53-bit uniforms. The logarithm, sine and cosine are evaluated here from additions, products, divisions and square
roots alone (fdlibm's polynomials), all of which IEEE 754 rounds alike everywhere: a library's own vary in the last bit
between processors and between the body and the tail of a vector loop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from math import ceil, pi, prod

import numpy as np
import numpy.typing as npt
import torch

from compt_megatron.spec.table import Param

Region = tuple[slice, ...]
Words = npt.NDArray[np.uint64]
Doubles = npt.NDArray[np.float64]

_CHUNK = 1 << 16  # words transformed at once: few enough for the processor's cache, enough for threads not to queue
_SEEK = 512  # generating this many words takes about as long as moving the generator

# fdlibm e_log.c, k_sin.c, k_cos.c; highest power first
_LOG = (
    1.479819860511658591e-01,
    1.531383769920937332e-01,
    1.818357216161805012e-01,
    2.222219843214978396e-01,
    2.857142874366239149e-01,
    3.999999999940941908e-01,
    6.666666666666735130e-01,
)
_SIN = (
    1.58969099521155010221e-10,
    -2.50507602534068634195e-08,
    2.75573137070700676789e-06,
    -1.98412698298579493134e-04,
    8.33333333332248946124e-03,
    -1.66666666666666324348e-01,
)
_COS = (
    -1.13596475577881948265e-11,
    2.08757232129817482790e-09,
    -2.75573143513906633035e-07,
    2.48015872894767294178e-05,
    -1.38888888888741095749e-03,
    4.16666666666666019037e-02,
)
_LN2 = 6.93147180559945286227e-01
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD


def normal(
    seed: int, name: str, shape: tuple[int, ...], region: Region | None = None, scale: float = 1.0
) -> torch.Tensor:
    """Box `region` (all, if None) of the fp32 tensor `name` of `shape`, normal with standard deviation `scale`."""
    return _generate(seed, name, shape, region, lambda words: _box_muller(words, scale))


def uniform(
    seed: int, name: str, shape: tuple[int, ...], region: Region | None = None, low: float = 0.0, high: float = 1.0
) -> torch.Tensor:
    """Box `region` (all, if None) of the fp32 tensor `name` of `shape` with entries uniform in [low, high]."""
    return _generate(seed, name, shape, region, lambda words: low + (high - low) * _unit(words))


def initial(param: Param, seed: int, region: Region | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The fresh value of box `region` (all, if None) of a parameter, in `dtype`.

    The fp32 value is the definition; another dtype holds its rounding (so that a bf16 weight is the rounding of its
    fp32 master). A function of (seed, param.name, param.shape, param.init) and the element's index alone.
    """
    shape = param.shape
    if param.init.kind == "constant":
        sizes = [s.stop - s.start for s in region] if region is not None else shape
        value = torch.full(tuple(sizes), param.init.scale, dtype=torch.float32)
    elif param.init.kind == "normal":
        value = normal(seed, param.name, shape, region, param.init.scale)
    else:
        value = uniform(seed, param.name, shape, region, -param.init.scale, param.init.scale)
    return value.to(dtype)


def philox_key(seed: int, name: str) -> tuple[int, int]:
    """The two 64-bit key words of a tensor's stream."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return seed % (1 << 64), int.from_bytes(digest, "little")


class _Stream:
    """Words of one tensor's stream; numpy's Philox (it increments its counter before each block)."""

    def __init__(self, seed: int, name: str) -> None:
        self._bits = np.random.Philox(key=np.array(philox_key(seed, name), dtype=np.uint64))
        self._state = self._bits.state
        self._next = -1  # the block that the generator would make next, if known

    def words(self, block: int, blocks: int) -> Words:
        """4 * blocks words from block number `block`."""
        if block != self._next:
            counter = (block - 1) % (1 << 256)
            parts = [(counter >> shift) & 0xFFFFFFFFFFFFFFFF for shift in (0, 64, 128, 192)]
            self._state["state"]["counter"] = np.array(parts, dtype=np.uint64)
            self._state["buffer_pos"] = 4
            self._bits.state = self._state
        self._next = block + blocks
        return self._bits.random_raw(4 * blocks)


def _generate(
    seed: int, name: str, shape: tuple[int, ...], region: Region | None, values: Callable[[Words], Doubles]
) -> torch.Tensor:
    """Turn the words of a box into values, a cache-sized chunk at a time."""
    if region is None:
        region = tuple(slice(0, size) for size in shape)
    inside = [0 <= part.start <= part.stop <= size for part, size in zip(region, shape, strict=True)]
    assert all(inside), f"{name}: region {region} is not a box of shape {shape}"
    sizes = tuple(s.stop - s.start for s in region)
    out = np.empty(sizes, dtype=np.float32)
    if out.size:
        starts, length = _runs(shape, region)
        _fill(_Stream(seed, name), starts, length, values, out.reshape(len(starts), length))
    return torch.from_numpy(out)


def _runs(shape: tuple[int, ...], region: Region) -> tuple[npt.NDArray[np.int64], int]:
    """The contiguous runs of a box: the flat index where each starts, in order, and their common length."""
    dim = len(shape)
    while dim > 0 and region[dim - 1] == slice(0, shape[dim - 1]):
        dim -= 1
    dim = max(dim - 1, 0)  # the outermost dimension that a run may span in part
    inner = prod(shape[dim + 1 :])
    length, first = ((region[dim].stop - region[dim].start) * inner, region[dim].start * inner) if shape else (1, 0)
    starts = np.zeros(1, dtype=np.int64)
    for size, part in zip(shape[:dim], region[:dim], strict=True):
        starts = (starts[:, None] * size + np.arange(part.start, part.stop)).reshape(-1)
    return starts * prod(shape[dim:]) + first, length


def _fill(
    stream: _Stream,
    starts: npt.NDArray[np.int64],
    length: int,
    values: Callable[[Words], Doubles],
    out: npt.NDArray[np.float32],
) -> None:
    """Write the values of all runs; out: [runs, length]. Runs are widened to whole blocks and trimmed afterwards."""
    if length > _CHUNK:
        for row in range(len(starts)):
            for at in range(0, length, _CHUNK):
                part = out[row : row + 1, at : at + _CHUNK]
                _fill(stream, starts[row : row + 1] + at, part.shape[1], values, part)
        return
    blocks = ceil((length + 3) / 4)
    runs = max(_CHUNK // (4 * blocks), 1)
    for row in range(0, len(starts), runs):
        some = starts[row : row + runs]
        words = _gather(stream, some // 4, blocks)
        made = values(words.reshape(-1)).reshape(len(some), 4 * blocks)
        shifts = some % 4
        if (shifts == shifts[0]).all():
            out[row : row + runs] = made[:, shifts[0] : shifts[0] + length]
            continue
        for shift in np.unique(shifts):
            rows = shifts == shift
            out[row : row + runs][rows] = made[rows, shift : shift + length]


def _gather(stream: _Stream, firsts: npt.NDArray[np.int64], blocks: int) -> Words:
    """Words [runs, 4 * blocks] of runs that start at blocks `firsts`; near runs are cut out of one generated range."""
    if len(firsts) == 1:
        return stream.words(int(firsts[0]), blocks).reshape(1, -1)
    words = np.empty((len(firsts), 4 * blocks), dtype=np.uint64)
    far = np.flatnonzero(4 * (np.diff(firsts) - blocks) > _SEEK) + 1
    if len(far) == len(firsts) - 1:  # each by itself
        for row, first in enumerate(firsts.tolist()):
            words[row] = stream.words(first, blocks)
        return words
    for group, into in zip(np.split(firsts, far), np.split(words, far), strict=True):
        row = 0
        while row < len(group):
            end = max(int(np.searchsorted(group, group[row] + _CHUNK // 4)), row + 1)
            some = group[row:end]
            covered = stream.words(int(some[0]), int(some[-1] - some[0]) + blocks).reshape(-1, 4)
            index = (some - some[0])[:, None] + np.arange(blocks)
            into[row:end] = covered[index].reshape(len(some), 4 * blocks)
            row = end
    return words


def _unit(words: Words) -> Doubles:
    """Uniforms in [0, 1) from the upper 53 bits."""
    unit = (words >> np.uint64(11)).astype(np.float64)
    unit *= 2.0**-53
    return unit


# Below, nearly everything is done in place and by whole-array integer operations where a choice is made: at 32 thousand
# numbers a call, allocating and masking would cost more than the arithmetic.


def _polynomial(x: Doubles, coefficients: tuple[float, ...]) -> Doubles:
    value = x * coefficients[0]
    value += coefficients[1]
    for coefficient in coefficients[2:]:
        value *= x
        value += coefficient
    return value


def _log(x: Doubles) -> Doubles:
    """Natural logarithm of positive normal numbers: exponent ln 2 - ((f²/2 - s (f²/2 + z P(z))) - f)."""
    bits = x.view(np.int64)
    exponent = bits - _SQRT_HALF_BITS
    exponent >>= 52
    rest = exponent << 52
    mantissa = np.subtract(bits, rest, out=rest).view(np.float64)  # in [sqrt(1/2), sqrt(2))
    f = mantissa - 1.0
    mantissa += 1.0
    s = np.divide(f, mantissa, out=mantissa)
    z = s * s
    half = 0.5 * f
    half *= f
    value = _polynomial(z, _LOG)
    value *= z
    value += half
    value *= s
    np.subtract(half, value, out=value)
    value -= f
    return np.subtract(exponent * _LN2, value, out=value)


def _sin_cos(turns: Doubles) -> tuple[Doubles, Doubles]:
    """Sine and cosine of 2 pi * turns, for turns in [0, 1): of x in [-pi/4, pi/4], then swapped and negated."""
    quarter = np.rint(4.0 * turns)
    turn = quarter.astype(np.int64)
    quarter *= 0.25
    x = np.subtract(turns, quarter, out=quarter)  # exact
    x *= 2.0 * pi
    z = x * x
    sine = _polynomial(z, _SIN)
    sine *= x * z
    sine += x
    cosine = _polynomial(z, _COS)
    cosine *= z * z
    z *= 0.5
    np.subtract(z, cosine, out=cosine)
    np.subtract(1.0, cosine, out=cosine)
    left, right = sine.view(np.int64), cosine.view(np.int64)
    differ = left ^ right
    differ &= -(turn & 1)
    left ^= differ
    right ^= differ
    left ^= (turn & 2) << 62
    turn += 1
    right ^= (turn & 2) << 62
    return sine, cosine


def _box_muller(words: Words, scale: float) -> Doubles:
    """Normals of standard deviation `scale` from pairs of words: r cos and r sin, r = sqrt(-2 log u)."""
    unit = _unit(words)
    radius = _log(unit[0::2] + 2.0**-53)
    radius *= -2.0
    np.sqrt(radius, out=radius)
    radius *= scale
    sine, cosine = _sin_cos(unit[1::2].copy())
    np.multiply(radius, cosine, out=unit[0::2])
    np.multiply(radius, sine, out=unit[1::2])
    return unit
