"""The paper's figure 2: what guidance would do to a mixture of three Gaussians, a class each.

    python -m cfg_jax.figure2 [--w=0,1,2,4,8] [--out=figure2.png]

Draws the marginal, and beside it for each w the mixture of the guided conditionals, each of which
is normalised by itself:

    sum_c p(c) p(z|c) p(c|z)^w / Z_c

Nothing is sampled: the densities are computed on a grid. The paper gives neither the centres nor
the spread nor the w of its figure; those here are chosen to look like it. What the guided reverse
chain samples is something else: launch/colab/guidance_in_2d.ipynb has both.
"""

import io
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath, epy

from cfg_jax import command, sample
from cfg_jax.diffusion import guidance
from cfg_jax.diffusion.mixture import Mixture
from cfg_jax.types import Array, UsageError

with epy.lazy_imports():
    from matplotlib import figure as figures

FLAGS = flags.FLAGS
EXTENT, SIZE = 3.5, 256  # of the square drawn, from -EXTENT to EXTENT, and its cells on a side


def three_classes(spread: float = 0.65) -> Mixture:
    """Three equally likely isotropic Gaussians with centres on the unit circle: [K=3, D=2].

    `spread` is their standard deviation; the centres are 1.73 from one another.
    """
    angles = jnp.pi * jnp.array([1 / 2, 7 / 6, 11 / 6])
    centres = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return Mixture(centres, jnp.full(3, spread), jnp.zeros(3))


def plane(extent: float = EXTENT, size: int = SIZE) -> tuple[Array, float]:
    """The middles [size * size, 2] of square cells that fill [-extent, extent]^2, and their area.

    Row by row, from the lower left.
    """
    middles = extent * ((2 * jnp.arange(size) + 1) / size - 1)
    x, y = jnp.meshgrid(middles, middles)
    return jnp.stack([x.ravel(), y.ravel()], axis=-1), (2 * extent / size) ** 2


def guided_conditionals(mixture: Mixture, w: Array, points: Array, area: float) -> Array:
    """p(z|c) p(c|z)^w / Z_c for each class c, [K, N] at points [N, D]: sums times area are one.

    Section 3.1 of the paper, at lam = infinity, where the data are; component c of the mixture is
    class c. The points are to cover all that has density.
    """

    def of_class(member: Array) -> Array:
        log_prob = mixture.log_prob(member)(points, jnp.inf)
        log_density = mixture.given(member).log_density(points, jnp.inf) + w * log_prob
        return jax.nn.softmax(log_density) / area

    return jax.vmap(of_class)(jnp.eye(len(mixture.stds), dtype=bool))


def guided_mixture(mixture: Mixture, w: Array, points: Array, area: float) -> Array:
    """The guided conditionals mixed by the classes' priors, [N]: the marginal p(z) at w = 0."""
    priors = jax.nn.softmax(mixture.log_weights)
    return priors @ guided_conditionals(mixture, w, points, area)


def draw(mixture: Mixture, w: Sequence[float]) -> bytes:
    """The figure as PNG: a panel for each w, each dark where its own density is highest."""
    points, area = plane()
    figure = figures.Figure(figsize=(2.4 * len(w), 2.7), layout="constrained")
    for axes, strength in zip(figure.subplots(1, len(w), squeeze=False)[0], w, strict=True):
        density = guided_mixture(mixture, strength, points, area).reshape(SIZE, SIZE)
        axes.imshow(density, origin="lower", extent=(-EXTENT, EXTENT) * 2, cmap="Blues", vmin=0)
        axes.plot(*np.asarray(mixture.means).T, "+", color="0.4", markersize=5)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"w = {strength:g}" if strength else "marginal (w = 0)", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def main() -> None:
    """Draws the figure."""
    strengths = sample.parse_numbers("w", FLAGS.w, float)
    w = list(dict.fromkeys([0.0, *map(guidance.check_w, strengths)]))
    out = epath.Path(FLAGS.out)
    if out.suffix != ".png":
        raise UsageError(f"--out={out}: the figure is a PNG file; give a name that ends in .png.")
    sample.make_folder(out.parent)
    out.write_bytes(draw(three_classes(), w))
    print(f"{', '.join(map(sample.name_w, w))}: {out}")


if __name__ == "__main__":
    flags.DEFINE_string("w", "0,1,2,4,8", "Guidance strengths; the marginal, w = 0, comes first.")
    flags.DEFINE_string("out", "figure2.png", "The file to write.")
    command.run(main)
