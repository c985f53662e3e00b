"""What numbers cost: seconds of each metric at the paper's 50,000 images, beside the network's own.

    python -m benchmarks.metrics [--images=50000] [--real=10000] [--side=64] [--looked=128]

Features are random, of the sizes of the Inception graph's, and each metric is timed once at the
full number; so are all of them, as the evaluation job asks for them where labels are of 1,000
classes. The network has the weights of the tests' recipe; it looks at `looked` images, and its
time is scaled to all of them. Memory is the process's peak while a metric ran, its inputs included.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks import run, turns
from cfg_jax import features, scores, sweep
from cfg_jax.metrics import frechet, inception_score, kid, neighbours, precision_recall
from cfg_jax.models import inception
from cfg_jax.runtime import mesh as meshes

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

POOL3, PLACES, CLASSES = 2048, 2023, 1008


def seconds(function) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def network(side: int, count: int) -> float:
    """Seconds an image of the Inception graph, as the evaluation job runs it."""
    import recipe

    batch = 32
    meshes.split_cpu(batch)
    look = features.Extractor(
        name="inception",
        names={},
        look=features.FEATURES["inception"].keywords["look"],
        params=inception.from_published(recipe.inception_state()),
        mesh=meshes.make_mesh(),
        recipe={"parameters": "recipe"},
        batch_size=batch,
    )
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    look(images[:batch])
    return seconds(lambda: look(images)) / count


def metrics(images: int, real: int) -> dict[str, tuple[float, float]]:
    """{metric: (seconds, peak MiB)}."""
    rng = np.random.default_rng(0)

    def rows(count, width):
        return rng.standard_normal((count, width), np.float32)

    ours, theirs, logits = rows(images, POOL3), rows(real, POOL3), 3 * rows(images, CLASSES)
    of_real, places = frechet.moments(theirs), rows(images, PLACES)
    of_places, few = frechet.moments(rows(real, PLACES)), scores.WIDE_REPLICATES
    seen = {"features": ours, "logits": logits, "spatial": places}
    labels = sweep.balanced_labels(images, 1000)
    of_all = scores.Reference(theirs, of_real, of_places)
    calls = {
        "FID": lambda: frechet.distance(frechet.moments(ours), of_real),
        "sFID": lambda: frechet.distance(frechet.moments(places), of_places),
        "inception score": lambda: inception_score.inception_score(logits),
        "its bootstrap": lambda: inception_score.resampled(logits, replicates=few),
        "precision and recall": lambda: precision_recall.inside(ours, theirs, k=scores.K),
        "KID": lambda: kid.kid(ours, theirs),
        "nearest reference image": lambda: neighbours.nearest(ours, theirs),
        "all, with resamples": lambda: scores.score(seen, labels, of_all),
    }
    out = {}
    for name, call in calls.items():
        turns.reset_peak()
        out[name] = (seconds(call), turns.resident_mib())
        print(f"{name}: {out[name][0]:.1f} s, {out[name][1]:.0f} MiB", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--real", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--looked", type=int, default=128)
    options = parser.parse_args()
    each = network(options.side, options.looked)
    made = run.machine()
    print(f"{made['cpu']}, {made['cores']} cores ({made['vectors']})")
    total = each * options.images
    print(f"the network: {1 / each:.1f} images/s, so {total:.0f} s for {options.images:,} (scaled)")
    for name, (spent, mib) in metrics(options.images, options.real).items():
        print(f"| {name} | {spent:.1f} s | {spent / total:.1%} of the network's | {mib:.0f} MiB |")


if __name__ == "__main__":
    main()
