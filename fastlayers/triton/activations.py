"""The activations in Triton: value and gradient side by side, by the numbers of fastlayers/activations.py.

``gradient(g, z)`` is ``g * act'(z)``; where torch selects instead of multiplying, so that 0 * NaN stays 0, so does
this. Where the derivative takes only two values, it is ``gradient_if(g, flat(z))``, and one bit per element is all that
backward needs. Comparisons are written so that a NaN comes out wherever torch lets it out. Nothing of libdevice beyond
what `triton.language` offers: that runs on every GPU, and in the interpreter.
"""

import triton
import triton.language as tl

# The numbers as the kernels know them: what a kernel reads of its module has to be a constexpr.
RELU = tl.constexpr(1)
RELU6 = tl.constexpr(2)
LEAKY_RELU = tl.constexpr(3)
ELU = tl.constexpr(4)
SILU = tl.constexpr(5)
MISH = tl.constexpr(6)
GELU = tl.constexpr(7)
GELU_TANH = tl.constexpr(8)
SIGMOID = tl.constexpr(9)
TANH = tl.constexpr(10)
HARDSWISH = tl.constexpr(11)
HARDSIGMOID = tl.constexpr(12)
SOFTPLUS = tl.constexpr(13)


@triton.jit
def _clamp(z, low: tl.constexpr, high: tl.constexpr):
    return tl.where(z < low, low, tl.where(z > high, high, z))


@triton.jit
def _at_most(z, high: tl.constexpr):
    return tl.where(z > high, high, z)


@triton.jit
def _logistic(z):
    """sigmoid(z) and its derivative, by exp(-|z|): neither overflows, and no digits of the small ones cancel."""
    e = tl.exp(-tl.abs(z))
    d = 1.0 / (1.0 + e)
    return tl.where(z < 0, e * d, d), e * d * d


@triton.jit
def _expm1(t):
    """exp(t) - 1 for t <= 0; near 0, where digits cancel, by its series (float32)."""
    if t.dtype == tl.float64:
        return tl.exp(t) - 1.0
    series = 1 / 120 + t * (1 / 720 + t * (1 / 5040 + t * (1 / 40320)))
    series = t * (1.0 + t * (0.5 + t * (1 / 6 + t * (1 / 24 + t * series))))
    return tl.where(t > -0.5, series, tl.exp(t) - 1.0)


@triton.jit
def _log1p(e):
    """log(1 + e) for 0 <= e <= 1; near 0 by its series (float32)."""
    if e.dtype == tl.float64:
        return tl.log(1.0 + e)
    return tl.where(e < 0.03125, e * (1.0 + e * (-0.5 + e * (1 / 3 + e * (-0.25 + e * 0.2)))), tl.log(1.0 + e))


@triton.jit
def _relu(z):
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def _relu_flat(z):
    return z <= 0


@triton.jit
def _relu6(z):
    return _clamp(z, 0.0, 6.0)


@triton.jit
def _relu6_flat(z):
    return (z <= 0) | (z >= 6)


@triton.jit
def _leaky_relu(z, negative_slope: tl.constexpr):
    return tl.where(z <= 0, z * negative_slope, z)


@triton.jit
def _leaky_relu_flat(z):
    return (z > 0) == 0


@triton.jit
def _elu(z, positive: tl.constexpr, negative: tl.constexpr, inner: tl.constexpr):
    """Also selu and celu: scaled on both sides, and along z below zero."""
    # inner may be negative, so that celu's exponent is positive below zero.
    t = _at_most(z, 0.0) * inner
    if inner > 0:
        below = _expm1(t)
    else:
        below = tl.exp(t) - 1.0
    return tl.where(z > 0, z * positive, below * negative)


@triton.jit
def _elu_gradient(g, z, positive: tl.constexpr, negative: tl.constexpr, inner: tl.constexpr):
    below = tl.exp(_at_most(z, 0.0) * inner) * (negative * inner)
    return g * tl.where(z > 0, positive, below)


@triton.jit
def _silu(z):
    return z / (1.0 + tl.exp(-z))


@triton.jit
def _silu_gradient(g, z):
    value, derivative = _logistic(z)
    return g * (value + z * derivative)


@triton.jit
def _mish(z):
    """z * tanh(softplus(z)) without a logarithm: with e = exp(z), w = e (e + 2): tanh(log(1 + e)) = w / (w + 2)."""
    # From 20 on the quotient is 1, and w stays finite.
    e = tl.exp(_at_most(z, 20.0))
    w = e * (e + 2.0)
    return z * (w / (w + 2.0))


@triton.jit
def _mish_gradient(g, z):
    near = _at_most(z, 20.0)
    e = tl.exp(near)
    w = e * (e + 2.0)
    inverse = 1.0 / (w + 2.0)
    return g * (w * inverse + near * (4.0 * e * (1.0 + e) * inverse) * inverse)


@triton.jit
def _normal_cdf(z):
    return 0.5 + 0.5 * tl.erf(z * 0.70710678118654752440)


@triton.jit
def _gelu(z):
    return z * _normal_cdf(z)


@triton.jit
def _gelu_gradient(g, z):
    density = tl.exp(z * z * -0.5) * 0.39894228040143267794
    return g * (_normal_cdf(z) + z * density)


# Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415, section 2, with 0.5 (1 + tanh(u)) = sigmoid(2 u). From 30
# on the sigmoid is 0 or 1 and its derivative 0 in both precisions, and nothing overflows.
@triton.jit
def _gelu_tanh(z):
    near = _clamp(z, -30.0, 30.0)
    value, _ = _logistic(1.59576912160573071176 * (near + 0.044715 * near * near * near))
    return z * value


@triton.jit
def _gelu_tanh_gradient(g, z):
    near = _clamp(z, -30.0, 30.0)
    value, derivative = _logistic(1.59576912160573071176 * (near + 0.044715 * near * near * near))
    slope = 1.59576912160573071176 * (1.0 + 0.134145 * near * near)
    return g * (value + near * slope * derivative)


@triton.jit
def _sigmoid(z):
    value, _ = _logistic(z)
    return value


@triton.jit
def _sigmoid_gradient(g, z):
    _, derivative = _logistic(z)
    return g * derivative


@triton.jit
def _tanh(z):
    """By exp(-2 |z|); near 0, where digits cancel, by Cephes' polynomial (float32)."""
    e = tl.exp(-2.0 * tl.abs(z))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(z < 0, -far, far)
    if z.dtype == tl.float64:
        return far
    s = z * z
    p = 2.06390887954e-2 + s * -5.70498872745e-3
    p = -3.33332819422e-1 + s * (1.33314422036e-1 + s * (-5.37397155531e-2 + s * p))
    return tl.where(tl.abs(z) < 0.625, z + z * s * p, far)


@triton.jit
def _tanh_gradient(g, z):
    # 1 - tanh(z)^2 = 4 sigmoid'(2 z)
    _, derivative = _logistic(z + z)
    return g * (4.0 * derivative)


@triton.jit
def _hardswish(z):
    return z * _clamp(z + 3.0, 0.0, 6.0) * (1 / 6)


@triton.jit
def _hardswish_gradient(g, z):
    return tl.where(z <= -3, 0.0, tl.where(z >= 3, g, g * (z * (1 / 3) + 0.5)))


@triton.jit
def _hardsigmoid(z):
    return _clamp(z + 3.0, 0.0, 6.0) * (1 / 6)


@triton.jit
def _hardsigmoid_flat(z):
    return ((z > -3) & (z < 3)) == 0


@triton.jit
def _softplus(z, beta: tl.constexpr, threshold: tl.constexpr):
    t = z * beta
    soft = (tl.where(t < 0, 0.0, t) + _log1p(tl.exp(-tl.abs(t)))) * (1 / beta)
    return tl.where(t > threshold, z, soft)


@triton.jit
def _softplus_gradient(g, z, beta: tl.constexpr, threshold: tl.constexpr):
    t = z * beta
    value, _ = _logistic(t)
    return tl.where(t > threshold, g, g * value)


@triton.jit
def value(z, ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """The activation of number `ACT`, with its parameters A, B, C."""
    if ACT == RELU:
        return _relu(z)
    elif ACT == RELU6:
        return _relu6(z)
    elif ACT == LEAKY_RELU:
        return _leaky_relu(z, A)
    elif ACT == ELU:
        return _elu(z, A, B, C)
    elif ACT == SILU:
        return _silu(z)
    elif ACT == MISH:
        return _mish(z)
    elif ACT == GELU:
        return _gelu(z)
    elif ACT == GELU_TANH:
        return _gelu_tanh(z)
    elif ACT == SIGMOID:
        return _sigmoid(z)
    elif ACT == TANH:
        return _tanh(z)
    elif ACT == HARDSWISH:
        return _hardswish(z)
    elif ACT == HARDSIGMOID:
        return _hardsigmoid(z)
    elif ACT == SOFTPLUS:
        return _softplus(z, A, B)
    else:
        return z


@triton.jit
def flat(z, ACT: tl.constexpr):
    """Where the derivative, of two values, takes the smaller one."""
    if ACT == RELU:
        return _relu_flat(z)
    elif ACT == RELU6:
        return _relu6_flat(z)
    elif ACT == LEAKY_RELU:
        return _leaky_relu_flat(z)
    else:
        tl.static_assert(ACT == HARDSIGMOID)
        return _hardsigmoid_flat(z)


@triton.jit
def gradient_if(g, is_flat, ACT: tl.constexpr, A: tl.constexpr):
    """The gradient from what `flat` said."""
    if ACT == LEAKY_RELU:
        return tl.where(is_flat, g * A, g)
    elif ACT == HARDSIGMOID:
        return tl.where(is_flat, 0.0, g * (1 / 6))
    else:
        return tl.where(is_flat, 0.0, g)


@triton.jit
def gradient(g, z, ACT: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """`g` times the derivative at z."""
    if ACT == RELU or ACT == RELU6 or ACT == LEAKY_RELU or ACT == HARDSIGMOID:
        return gradient_if(g, flat(z, ACT), ACT, A)
    elif ACT == ELU:
        return _elu_gradient(g, z, A, B, C)
    elif ACT == SILU:
        return _silu_gradient(g, z)
    elif ACT == MISH:
        return _mish_gradient(g, z)
    elif ACT == GELU:
        return _gelu_gradient(g, z)
    elif ACT == GELU_TANH:
        return _gelu_tanh_gradient(g, z)
    elif ACT == SIGMOID:
        return _sigmoid_gradient(g, z)
    elif ACT == TANH:
        return _tanh_gradient(g, z)
    elif ACT == HARDSWISH:
        return _hardswish_gradient(g, z)
    elif ACT == SOFTPLUS:
        return _softplus_gradient(g, z, A, B)
    else:
        return g
