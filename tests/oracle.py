"""Known answers for whole chains, written in float64 NumPy from the paper and not from the code.

Ancestral sampling, Algorithm 2, in the limit of many steps. For a step h of lambda, eq. (3) with
d log(alpha) / dlambda = sigma^2 / 2 gives, to first order in h,

    mean = z + h [(sigma^2 / 2 - 1) z + alpha x(z)],    variance = h sigma^2,

the latter for every v, as both variances of eq. (4) agree to that order. So the chain tends to

    dz = [(sigma^2 / 2 - 1) z + alpha x(z, lambda)] dlambda + sigma dW,   z ~ N(0, I) at lambda_min,

read off as x(z) at lambda_max. (For data N(m, s^2) it carries N(alpha m, alpha^2 s^2 + sigma^2), as
it must: the variance V moves by sigma^2 (V - 1).) For a guided x that is affine in z the moments
close; for mixtures the equation is run by stochastic Heun, of weak order 2, as its noise is
additive.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp


def alpha(lam):
    return np.sqrt(1 / (1 + np.exp(-np.asarray(lam, np.float64))))


def sigma(lam):
    return np.sqrt(1 / (1 + np.exp(np.asarray(lam, np.float64))))


# The targets: two Gaussians of unequal spreads, as (mean, std), so that guidance depends on z ...
CONDITIONAL, UNCONDITIONAL = (0.5, 0.35), (-0.2, 0.7)
# ... and a mixture, as in the paper's figure 2: a class is an isotropic Gaussian in the plane. Here
# the classes overlap, and differ in weight and spread.
MEANS = np.array([[0.7, 0.1], [-0.3, 0.5], [-0.2, -0.4]])
STDS = np.array([0.35, 0.22, 0.45])
WEIGHTS = np.array([0.5, 0.3, 0.2])


def likely_class(x):
    """The class that the exact classifier of clean points reads in x [B, 2], of (c)."""
    square = np.sum((x[:, None, :] - MEANS) ** 2, axis=-1)
    return np.argmax(np.log(WEIGHTS) - 2 * np.log(STDS) - 0.5 * square / STDS**2, axis=-1)


def drift(z, x, lam, share=1.0):
    """The reverse equation's drift per unit of lambda, given the clean estimate x of z."""
    return -0.5 * (alpha(lam) ** 2 + share) * z + 0.5 * (1 + share) * alpha(lam) * x


def gaussian_x(lam, m, s):
    """E[x|z] = on_z z + rest for data N(m, s^2), by conditioning the pair (x, z)."""
    on_z = alpha(lam) * s**2 / (alpha(lam) ** 2 * s**2 + sigma(lam) ** 2)
    return on_z, m - on_z * alpha(lam) * m


def guided_moments(conditional, unconditional, w, low=-20.0, high=20.0, *, breaks=(), share=1.0):
    """Mean and standard deviation of the guided image in the limit of many steps.

    conditional and unconditional are the pairs (mean, std) of the two Gaussians; w is a number, or
    a function of lambda, smooth but for jumps at `breaks`.
    """

    def guided_x(lam):
        s = w(lam) if callable(w) else w
        on_z, rest = gaussian_x(lam, *conditional)
        on_z_without, rest_without = gaussian_x(lam, *unconditional)
        return (1 + s) * on_z - s * on_z_without, (1 + s) * rest - s * rest_without

    def move(lam, moments):
        mean, variance = moments
        on_z, rest = guided_x(lam)
        slope, push = drift(1.0, on_z, lam, share), drift(0.0, rest, lam, share)
        return [slope * mean + push, 2 * slope * variance + share * sigma(lam) ** 2]

    end, places = [0.0, 1.0], [low, *breaks, high]
    for start, stop in itertools.pairwise(places):
        last = np.nextafter(stop, start)  # at `stop` itself w is that of the next piece
        end = solve_ivp(
            lambda lam, moments, last=last: move(min(lam, last), moments),
            (start, stop),
            end,
            "DOP853",
            rtol=1e-11,
            atol=1e-13,
        ).y[:, -1]
    on_z, rest = guided_x(high)
    return on_z * end[0] + rest, abs(on_z) * np.sqrt(end[1])


def impulses(lams):
    """Draws whose trajectory 0 has no noise, and trajectory b a unit impulse in draw b - 1 alone.

    With an affine denoiser a chain is affine in its draws, so that its moments follow without Monte
    Carlo: see `impulse_moments`. Draw T, which the last level has no use for, is listened to too.
    """
    trajectories = jnp.arange(lams.shape[0] + 2)
    return lambda i: (trajectories == i + 1).astype(lams.dtype)[:, None]


def impulse_moments(x):
    """Mean, standard deviation and the response to draw T, of a chain x [T + 2, 1] of `impulses`.

    The mean is the output without noise, the variance the sum of the squared responses.
    """
    x = np.asarray(x[:, 0], np.float64)
    responses = x[1:] - x[0]
    return x[0], np.sqrt(np.sum(responses**2)), responses[-1]


def mixture_x(z, lam, means, stds, weights):
    """E[x|z] for points z [B, D] of the mixture, weights [K] or [B, K]; by Bayes' rule."""
    variance = alpha(lam) ** 2 * stds**2 + sigma(lam) ** 2
    offset = z[:, None, :] - alpha(lam) * means
    exponent = -0.5 * np.sum(offset**2, axis=-1) / variance
    joint = weights * variance ** (-0.5 * z.shape[-1])
    joint = joint * np.exp(exponent - exponent.max(axis=-1, keepdims=True))
    share = joint / joint.sum(axis=-1, keepdims=True)
    return np.sum(
        share[..., None] * (means + (alpha(lam) * stds**2 / variance)[:, None] * offset), axis=1
    )


def heun(x_of, start, normals, lams, share=1.0):
    """The reverse equation by stochastic Heun on lams [N + 1]: start [B, D], normals [N, B, D]."""
    z = start
    for lam, after, normal in zip(lams[:-1], lams[1:], normals, strict=True):
        h = after - lam
        kick = sigma(lam + 0.5 * h) * np.sqrt(share * h) * normal
        first = drift(z, x_of(z, lam), lam, share)
        guess = z + h * first + kick
        z = z + 0.5 * h * (first + drift(guess, x_of(guess, after), after, share)) + kick
    return x_of(z, lams[-1])


def flow(x_of, start, lams):
    """The probability flow by Runge and Kutta's fourth-order rule on lams: start [B, D]."""
    move = lambda z, lam: drift(z, x_of(z, lam), lam, 0.0)  # noqa: E731
    z = start
    for lam, after in itertools.pairwise(lams):
        h = after - lam
        first = move(z, lam)
        second = move(z + 0.5 * h * first, lam + 0.5 * h)
        third = move(z + 0.5 * h * second, lam + 0.5 * h)
        z = z + h / 6 * (first + 2 * second + 2 * third + move(z + h * third, after))
    return x_of(z, lams[-1])


def order(steps, errors):
    """The fitted p of errors ~ h^p, where a chain of T levels takes T - 1 steps h of lambda."""
    return np.polyfit(np.log(1 / (np.asarray(steps) - 1)), np.log(errors), 1)[0]


def energy_distance(one, other, *, splits, rng):
    """The energy distance between two samples [N, D], and its values for random splits of both.

    2 E|X - Y| - E|X - X'| - E|Y - Y'|: zero only for equal distributions (Szekely & Rizzo, 2013).
    """
    n = len(one)
    both = np.concatenate([one, other])
    square = np.sum(both**2, axis=-1)
    distance = np.sqrt(np.maximum(square[:, None] + square - 2 * both @ both.T, 0))
    sides = np.ones((2 * n, splits + 1))
    sides[n:] = -1
    for split in range(1, splits + 1):
        sides[:, split] = rng.permutation(sides[:, 0])
    values = -np.sum(sides * (distance @ sides), axis=0) / n**2
    return values[0], values[1:]


def by_kind(function):
    """jit, with a program for each structure of the first argument, and the rest as usual.

    jax.jit alone takes two dataclasses of as many fields for the same now and then (jax 0.10).
    """
    # A function of its own for each, and so a cache of its own.
    of_kind = functools.cache(lambda kind: jax.jit(lambda *args: function(*args)))
    return lambda first, *args: of_kind(str((type(first), jax.tree.structure(first))))(first, *args)
