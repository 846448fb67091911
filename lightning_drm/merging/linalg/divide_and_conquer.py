"""Leading eigenvectors of a large symmetric matrix, in half of the memory and two thirds of the time of `syevd`.

LAPACK's `syevd` holds three matrices of doubles at its peak, which for a tall layer is twice the merge's own data. Here
the steps that decide which eigenvectors there are run in float64; what only rotates them afterwards runs in float32,
the precision in which they are wanted:

1. Reduce A to a tridiagonal matrix, `A = Q T Qᵀ`.
2. Tear T at its middle into two halves and one rank-one term, `T = diag(T_1, T_2) + ρ v vᵀ` (Cuppen, Numer. Math. 36,
   1981), and decompose the halves. With their eigenvectors Z and eigenvalues D, `T = Z (D + ρ z zᵀ) Zᵀ`.
3. Solve its secular equation: one eigenvalue λ_j lies between every two neighbours ("poles") in D. The eigenvectors
   have entries ẑ_i / (D_i − λ_j), with a ẑ recomputed from the λ, which makes them orthogonal to working precision
   (Gu & Eisenstat, SIAM J. Matrix Anal. Appl. 16, 1995).
4. Make those that the caller keeps a few columns at a time, rotate them by Z, and in the end by Q.

What differs from LAPACK: poles that coincide are moved apart, and entries of z that vanish are moved off zero, by one
or two units of rounding of the matrix, instead of being taken out of the problem ("deflation"). That moves eigenvalues
by a few k ε of the largest one, about what rounding in the matrix does, and needs no bookkeeping. The price is that on
rare matrices that fall apart into blocks a root is not found; callers have another solver for these. Within the halves,
which LAPACK solves, matrices of low rank still gain from deflation.

Cost for a (k, k) matrix and r vectors: 4/3 k³ operations for the reduction, and in float32 k² r for Z and 2 k² r for Q.
Memory: the matrix itself and the same in float32, 1.5 times the matrix in all.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import cython_lapack, lapack
from threadpoolctl import threadpool_limits
from torch import Tensor

Doubles: TypeAlias = NDArray[np.float64]

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # documented, not in its __all__

COLUMNS = 256  # eigenvectors made at once: enough for full BLAS speed, and few megabytes of doubles
EPS = float(np.finfo(np.float64).eps)
_THREADS = Lock()


def leading_eigenvectors(matrix: Tensor, num_kept: Callable[[Tensor], int]) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a symmetric matrix, the largest first, and eigenvectors of as many as are wanted.

    Args:
        matrix: Contiguous float64 matrix (k, k) on the CPU, of which only the upper triangle is read. Each half needs
            two rows: k ≥ 4. It is empty afterwards: its memory is needed for other things.
        num_kept: Says, from all eigenvalues (k,), how many eigenvectors are wanted.

    Returns:
        Eigenvalues (k,) in float64, and eigenvectors in the columns of a float32 matrix (k, r).

    Raises:
        torch.linalg.LinAlgError: If a step does not converge, or the matrix is not finite.
    """
    # scipy has threads of its own, whose number is one for the whole process.
    with _THREADS, threadpool_limits(torch.get_num_threads(), user_api="blas"):
        diagonal, beside, reflectors, tau = _reduce(matrix)
        norm = float(np.abs(diagonal).max() + 2 * np.abs(beside).max())
        if not norm < np.inf:
            raise LinAlgError("the matrix is not finite")
        torn = _tear(diagonal / (norm or 1), beside / (norm or 1))
        roots, weights = torn.solve()
        values = torch.from_numpy(roots[::-1] * norm)
        vectors = torn.vectors(weights, num_kept(values))
        del torn  # the halves' eigenvectors
        return values, _rotate(reflectors, tau, vectors)


def _reduce(matrix: Tensor) -> tuple[Doubles, Doubles, NDArray[np.float32], NDArray[np.float32]]:
    """Diagonal (k,) and subdiagonal (k − 1,) of the tridiagonal matrix, and the reflectors that lead to it."""
    size = len(matrix)
    # The transpose of rows is what LAPACK calls a matrix; it is overwritten.
    packed, diagonal, beside, tau, _ = lapack.dsytrd(matrix.numpy().T, lower=1, lwork=64 * size, overwrite_a=1)
    # One to the right, so that reflector i starts in row i: that is how `ormqr` wants to have them.
    reflectors = np.zeros((size, size), dtype=np.float32, order="F")
    with np.errstate(over="ignore"):  # on and above the diagonal is something else, of any size
        reflectors[:, 1:] = packed[:, :-1]
    matrix.data = matrix.new_empty(0)
    return diagonal, beside, reflectors, np.append(0, tau).astype(np.float32)


def _rotate(reflectors: NDArray[np.float32], tau: NDArray[np.float32], vectors: Tensor) -> Tensor:
    """Eigenvectors (k, r) of the full matrix from those of the tridiagonal one, in place."""
    block = 64  # of reflectors that LAPACK applies at once, at most
    lwork = block * max(1, vectors.shape[1]) + block * (block + 1)
    rotated, _, _ = lapack.sormqr("L", "N", reflectors, tau, vectors.numpy(), lwork=lwork, overwrite_c=1)
    return torch.from_numpy(rotated)


@dataclass(frozen=True)
class _Torn:
    """D + ρ z zᵀ in the coordinates of two halves' eigenvectors, the poles D in ascending order and all different.

    Args:
        poles: D, shape (k,).
        z: Of unit length and without zeros, shape (k,).
        rho: ρ, positive.
        places: Where each pole's eigenvector is among those of both halves, shape (k,).
        halves: The eigenvectors of the two halves, in float32.
    """

    poles: Doubles
    z: Doubles
    rho: float
    places: NDArray[np.int64]
    halves: tuple[Tensor, Tensor]

    def solve(self) -> tuple[Doubles, Doubles]:
        """The roots λ, ascending, and ẑ: the vector for which they are the exact eigenvalues."""
        size = len(self.poles)
        roots, squares = np.empty(size), np.ones(size)
        for start in range(0, size, COLUMNS):
            columns = np.arange(start, min(start + COLUMNS, size))
            gaps, roots[columns] = self._gaps(columns)
            between = self.poles[:, None] - self.poles[columns]
            between[columns, columns - start] = 1
            squares *= np.prod(np.divide(gaps, between, out=between), axis=1)
        return roots, np.copysign(np.sqrt(np.abs(squares)), self.z)

    def vectors(self, weights: Doubles, count: int) -> Tensor:
        """Eigenvectors of the tridiagonal matrix (k, count), from the largest root down, for ẑ."""
        size = len(self.poles)
        vectors = torch.empty(count, size, dtype=torch.float32, device="cpu").T
        inside = np.empty((size, COLUMNS), dtype=np.float32)
        upper, lower = self.halves
        for start in range(0, count, COLUMNS):
            stop = min(start + COLUMNS, count)
            gaps, _ = self._gaps(size - 1 - np.arange(start, stop))
            np.divide(weights[:, None], gaps, out=gaps)
            gaps /= np.linalg.norm(gaps, axis=0)
            inside[self.places, : stop - start] = gaps
            top, bottom = torch.from_numpy(inside)[:, : stop - start].tensor_split((len(upper),))
            torch.mm(upper, top, out=vectors[: len(upper), start:stop])
            torch.mm(lower, bottom, out=vectors[len(upper) :, start:stop])
        return vectors

    def _gaps(self, columns: NDArray[np.int64]) -> tuple[Doubles, Doubles]:
        """The differences D_i − λ_j (k, c) to some of the roots, each to full relative precision, and these roots."""
        size = ctypes.c_int(len(self.poles))
        rho, root = ctypes.c_double(self.rho), ctypes.c_double()
        number, info = ctypes.c_int(), ctypes.c_int()
        gaps, roots = np.empty((size.value, len(columns)), order="F"), np.empty(len(columns))
        solve = _secular_equation()
        for place, column in enumerate(columns.tolist()):
            number.value = column + 1
            solve(
                ctypes.byref(size),
                ctypes.byref(number),
                self.poles.ctypes.data,
                self.z.ctypes.data,
                gaps.ctypes.data + place * gaps.strides[1],
                ctypes.byref(rho),
                ctypes.byref(root),
                ctypes.byref(info),
            )
            if info.value:
                raise LinAlgError(f"root {column} of the secular equation")
            roots[place] = root.value
        return gaps, roots


def _tear(diagonal: Doubles, beside: Doubles) -> _Torn:
    """Tear a tridiagonal matrix of norm 1 at its middle."""
    middle = len(diagonal) // 2
    rho, sign = max(abs(beside[middle - 1]), EPS), np.copysign(1, beside[middle - 1])
    diagonal[middle - 1 : middle + 1] -= rho
    upper, first, last_row = _half(diagonal[:middle], beside[: middle - 1], row=-1)
    lower, second, first_row = _half(diagonal[middle:], beside[middle:], row=0)
    poles, z = np.append(first, second), np.append(last_row, sign * first_row)
    places = np.argsort(poles, kind="stable")
    steps = 2 * EPS * np.arange(len(poles))
    poles = np.maximum.accumulate(poles[places] - steps) + steps
    z = z[places] / np.sqrt(2)  # both rows have unit length
    z = np.copysign(np.maximum(np.abs(z), EPS), z)
    return _Torn(poles, z, float(2 * rho), places, (upper, lower))


def _half(diagonal: Doubles, beside: Doubles, row: int) -> tuple[Tensor, Doubles, Doubles]:
    """Eigenvectors of a tridiagonal matrix in float32, its eigenvalues, and one row of the vectors in float64."""
    values, vectors, info = lapack.dstevd(diagonal, beside)
    if info:
        raise LinAlgError("half of a tridiagonal matrix")
    return torch.from_numpy(vectors.astype(np.float32)), values, vectors[row].copy()


@cache
def _secular_equation() -> Callable[..., None]:
    """LAPACK's `dlaed4`, which scipy hands out to Cython and, in the same table, to everybody else."""
    capsule: Any = cython_lapack.__pyx_capi__["dlaed4"]
    signature = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))(capsule)
    if not signature.startswith(b"void (int *, int *,"):
        raise LinAlgError(f"scipy's LAPACK has integers of another size: {signature.decode()}")
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 8)(pointer(capsule, signature))
