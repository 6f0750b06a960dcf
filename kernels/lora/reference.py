"""The kernels' twins in plain PyTorch: the same arguments, the same mask, the same roundings, products in float32."""

from torch import Tensor

from ..philox import keep_mask, kept_scale


def shrink(x: Tensor, A: Tensor, scale: float, p: float, seed: Tensor | None) -> Tensor:
    """scale · dropout(x) Aᵀ, [M, rank] in the dtype of x."""
    h = _dropped(x, p, seed) @ _wide(A, x).t()
    return (h * (scale * kept_scale(p))).to(x.dtype)


def backward_x(x: Tensor, g: Tensor, A: Tensor, p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """dX = dropout'(g A), [M, K] in the dtype of x, and dA = gᵀ dropout(x), [rank, K] in A's."""
    dA = _wide(g, x).t() @ _dropped(x, p, seed) * kept_scale(p)
    return backward_x_only(g, A, p, seed), dA.to(A.dtype)


def backward_x_only(g: Tensor, A: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """The dX of `backward_x`, for an A that learns nothing: x is not needed."""
    dX = (g.float() @ _wide(A, g) * kept_scale(p)).to(g.dtype)
    return dX * _keep(dX, p, seed).to(g.dtype) if p else dX


def backward_y(dY: Tensor, B: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """g = scale · dY B, [M, rank] in the dtype of dY, and dB = dYᵀ h, [N, rank] in B's."""
    g = dY.float() @ _wide(B, dY) * scale
    return g.to(dY.dtype), (dY.float().t() @ _wide(h, dY)).to(B.dtype)


def expand(y: Tensor, h: Tensor, B: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """y + scale · h Bᵀ + bias, [M, N] in the dtype of y, rounded once."""
    total = y.float() + h.float() @ _wide(B, h).t() * scale
    return (total if bias is None else total + bias.float()).to(y.dtype)


def grouped_shrink(x: Tensor, A: Tensor, scales: Tensor, table: Tensor, rows: int) -> Tensor:  # noqa: ARG001
    """Block by block of `table`, of at most `rows` rows, scales[a] · x A[a]ᵀ; zero for rows of no adapter."""
    h = x.new_zeros(x.shape[0], A.shape[1])
    for adapter, first, last in table.tolist():
        if adapter >= 0:
            h[first:last] = (x[first:last].float() @ _wide(A[adapter], x).t() * scales[adapter]).to(x.dtype)
    return h


def grouped_expand(y: Tensor, h: Tensor, B: Tensor, table: Tensor, rows: int) -> Tensor:  # noqa: ARG001
    """Block by block of `table`, of at most `rows` rows, y + h B[a]ᵀ; y itself for rows of no adapter."""
    out = y.clone()
    for adapter, first, last in table.tolist():
        if adapter >= 0:
            out[first:last] = expand(y[first:last], h[first:last], B[adapter], 1.0, None)
    return out


def _wide(factor: Tensor, like: Tensor) -> Tensor:
    return factor.to(like.dtype).float()


def _dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return x.float() * _keep(x, p, seed) if p else x.float()


def _keep(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if seed is None:
        raise ValueError(f"dropout of {p} needs a seed: philox.new_seed(x.device) draws one")
    return keep_mask(x.shape[0], x.shape[1], p, seed)
