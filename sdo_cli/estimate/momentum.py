"""What mofasgd keeps, sends and computes (``optimizers/low_rank.py``), from the shapes of the matrices."""

from collections.abc import Iterable, Iterator, Sequence

from sdo_cli.estimate.work import NOTHING, Operation, Work, moving

FP32 = 4
# multiply-adds of a small singular value decomposition in units of its side cubed (Golub and Van Loan, 5.4.5)
DECOMPOSITION = 21

Matrices = Sequence[tuple[int, int]]


def with_ranks(matrices: Matrices, rank: int) -> Iterator[tuple[int, int, int]]:
    """Rows, columns and the rank each matrix has: never more than its shorter side."""
    return ((m, n, min(rank, m, n)) for m, n in matrices)


def momentum_bytes(matrices: Matrices, rank: int) -> int:
    """``U``, ``S`` and ``V`` of every matrix, in fp32."""
    return FP32 * sum(r * (m + n) + r for m, n, r in with_ranks(matrices, rank))


def product_bytes(matrices: Matrices, rank: int) -> int:
    """GV and GᵀU of every matrix, in fp32: what stands in a gradient's place, and what processes send."""
    return FP32 * sum(r * (m + n) for m, n, r in with_ranks(matrices, rank))


def projecting(matrices: Matrices, rank: int) -> Work:
    """Gradients into products, in one backward pass."""
    return (
        _added(
            [
                Operation("matrix", "no", 2.0 * m * n * r, FP32 * (m * n + r * (m + n)))
                for m, n, r in with_ranks(matrices, rank)
            ]
        )
        * 2
    )


def stepping(matrices: Matrices, rank: int) -> Work:
    """Two orthonormal bases of 2 r directions, a small decomposition, turning, and the weights."""
    total = NOTHING
    for m, n, r in with_ranks(matrices, rank):
        wide = 2 * r
        bases = [Operation("matrix", "no", 4.0 * side * wide**2, 3.0 * FP32 * side * wide) for side in (m, n)]
        turned = [Operation("matrix", "no", 2.0 * side * wide * r, FP32 * side * (wide + r)) for side in (m, n)]
        small = Operation("matrix", "no", DECOMPOSITION * 2.0 * wide**3, 3.0 * FP32 * wide**2)
        weights = Operation("matrix", "no", 2.0 * m * n * r, FP32 * (2 * m * n + r * (m + n)))
        total += _added([*bases, small, *turned, weights])
        # a norm of the products
        total += moving(FP32 * r * (m + n))
    return total


def _added(operations: Iterable[Operation]) -> Work:
    return sum((Work({operation: 1.0}) for operation in operations), NOTHING)
