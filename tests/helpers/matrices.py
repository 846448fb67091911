"""Matrices of known singular values."""

import torch


def matrix(m, n, dtype=torch.float64, decay=0.0):
    g = torch.Generator().manual_seed(m * n)
    U = torch.linalg.qr(torch.randn(m, min(m, n), generator=g, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, min(m, n), generator=g, dtype=torch.float64))[0]
    S = torch.logspace(0, -decay, min(m, n), dtype=torch.float64)
    return (U * S @ V.T).to(dtype), S
