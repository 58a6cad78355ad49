"""The feed-forward block in NumPy, with forward and backward derived by hand: an oracle without torch.

For one token x:

    z = W x + b                a = f(z)         the activation
    u = U x + c                h = a u          the gated form; the plain one has h = a
    k = n h                                     dropout's factors: 0 or 1 / (1 - p)
    y = V k + d

Backward by the chain rule, from dy = dL/dy:

    dk = V^T dy                dV = dy k^T      dd = dy
    dh = n dk
    da = dh u,  du = dh a      dU = du x^T      dc = du      (plain: da = dh)
    dz = da f'(z)              dW = dz x^T      db = dz
    dx = W^T dz + U^T du

In the code tokens are rows, so sums over tokens are matmuls.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy import ndarray

erf = np.vectorize(math.erf, otypes=[np.float64])
ROOT_2, ROOT_2PI = math.sqrt(2.0), math.sqrt(2.0 * math.pi)


def logistic(z: ndarray) -> ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * z))


def softplus(z: ndarray) -> ndarray:
    return np.logaddexp(0.0, z)


def swish(z: ndarray, beta: float = 1.0) -> ndarray:
    return z * logistic(beta * z)


def dswish(z: ndarray, beta: float = 1.0) -> ndarray:
    s = logistic(beta * z)
    return s + beta * z * s * (1.0 - s)


def normal_cdf(z: ndarray) -> ndarray:
    return 0.5 * (1.0 + erf(z / ROOT_2))


def gelu_tanh(z: ndarray) -> ndarray:
    return 0.5 * z * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))


def dgelu_tanh(z: ndarray) -> ndarray:
    t = np.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3))
    return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * math.sqrt(2.0 / math.pi) * (1.0 + 3 * 0.044715 * z**2)


def dmish(z: ndarray) -> ndarray:
    t = np.tanh(softplus(z))
    return t + z * (1.0 - t * t) * logistic(z)


# f and its derivative.
ACTIVATIONS = {
    "identity": (lambda z: z, lambda z: np.ones_like(z)),
    "relu": (lambda z: np.maximum(z, 0.0), lambda z: (z > 0.0).astype(z.dtype)),
    "leaky_relu": (lambda z: np.where(z > 0.0, z, 0.01 * z), lambda z: np.where(z > 0.0, 1.0, 0.01)),
    "relu2": (lambda z: np.maximum(z, 0.0) ** 2, lambda z: 2.0 * np.maximum(z, 0.0)),
    "gelu": (
        lambda z: z * normal_cdf(z),
        lambda z: normal_cdf(z) + z * np.exp(-0.5 * z * z) / ROOT_2PI,
    ),
    "gelu_tanh": (gelu_tanh, dgelu_tanh),
    "quick_gelu": (lambda z: swish(z, 1.702), lambda z: dswish(z, 1.702)),
    "silu": (swish, dswish),
    "sigmoid": (logistic, lambda z: logistic(z) * logistic(-z)),
    "tanh": (np.tanh, lambda z: 1.0 - np.tanh(z) ** 2),
    "mish": (lambda z: z * np.tanh(softplus(z)), dmish),
    "softplus": (softplus, logistic),
}
GATES = {
    "glu": "sigmoid",
    "bilinear": "identity",
    "reglu": "relu",
    "geglu": "gelu",
    "geglu_tanh": "gelu_tanh",
    "swiglu": "silu",
}


class Weights(NamedTuple):
    """up, gate (H, D); down (O, H); the biases (H), (O), (H); None for absent ones."""

    up: ndarray
    down: ndarray
    gate: ndarray | None = None
    up_bias: ndarray | None = None
    down_bias: ndarray | None = None
    gate_bias: ndarray | None = None


def affine(x: ndarray, weight: ndarray, bias: ndarray | None) -> ndarray:
    return x @ weight.T + (0.0 if bias is None else bias)


def forward(x: ndarray, w: Weights, activation: str, noise: ndarray | float = 1.0) -> ndarray:
    """Return y (N, O) for x (N, D); noise (N, H) holds dropout's factors."""
    f, _ = ACTIVATIONS[GATES.get(activation, activation)]
    if activation in GATES:
        h = f(affine(x, w.gate, w.gate_bias)) * affine(x, w.up, w.up_bias)
    else:
        h = f(affine(x, w.up, w.up_bias))
    return affine(noise * h, w.down, w.down_bias)


def backward(
    dy: ndarray, x: ndarray, w: Weights, activation: str, noise: ndarray | float = 1.0
) -> tuple[ndarray, Weights]:
    """Return (dx, gradients of the weights), where dy (N, O) is dL/dy."""
    f, df = ACTIVATIONS[GATES.get(activation, activation)]
    dh = noise * (dy @ w.down)
    if activation in GATES:
        u, z = affine(x, w.up, w.up_bias), affine(x, w.gate, w.gate_bias)
        k = noise * f(z) * u
        du, dz = dh * f(z), dh * u * df(z)
        dx = dz @ w.gate + du @ w.up
        dup, dup_bias, dgate, dgate_bias = du.T @ x, du.sum(0), dz.T @ x, dz.sum(0)
    else:
        z = affine(x, w.up, w.up_bias)
        k = noise * f(z)
        dz = dh * df(z)
        dx = dz @ w.up
        dup, dup_bias, dgate, dgate_bias = dz.T @ x, dz.sum(0), None, None
    return dx, Weights(dup, dy.T @ k, dgate, dup_bias, dy.sum(0), dgate_bias)
