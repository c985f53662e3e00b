"""Published checkpoints of Dhariwal & Nichol (2021) -> folders that the other jobs read.

    python -m cfg_jax.convert --checkpoint=64x64_diffusion.pt --workdir=DIR
    python -m cfg_jax.sample --workdir=DIR --w=0 --labels=0,230

The file's name says which network it holds, or --published does where it was renamed. PyTorch is
not needed, and what the file asks to run is not run. Class-conditional networks have no null label:
they sample at w = 0, or guided by --classifier=DIR, of a converted 64x64_classifier.pt.
"""

from typing import Any

import jax
from absl import flags
from etils import epath

from cfg_jax import command, experiment, schema
from cfg_jax.models import torch_files, weights
from cfg_jax.runtime import checkpoint
from cfg_jax.types import UsageError

# Dhariwal & Nichol (2021), tables 11 and 12, and the flags that their files were published with.
_BLOCKS = {"resblock_updown": True, "scale_shift_norm": True, "attention_resolutions": (32, 16, 8)}
_64 = {**_BLOCKS, "channel_mult": (1, 2, 3, 4), "head_channels": 64}
_128 = {**_BLOCKS, "channel_mult": (1, 1, 2, 3, 4), "num_res_blocks": 2}
_256 = {**_BLOCKS, "channel_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2, "head_channels": 64}


def _unet(side: int, betas: str, *, labels: bool = True, **model) -> dict[str, Any]:
    return {
        "dataset": {"name": f"imagenet{side}"},
        "model": {"name": "unet", **model},
        "schedule": {"name": "discrete", "betas": betas},
        "reading": "eps_and_v",
        "loss": {"name": "denoising", "p_uncond": 0.0 if labels else 1.0},
        "sample": {"sampler": {"name": "ancestral", "learned_v": True}, "steps": 250},
    }


def _classifier(side: int, betas: str, **model) -> dict[str, Any]:
    return {
        "dataset": {"name": f"imagenet{side}"},
        "model": {"name": "classifier", "channels": 128, "head_order": "legacy", **model},
        "schedule": {"name": "discrete", "betas": betas},
        "loss": {"name": "classification", "noisy": True},
    }


PUBLISHED = {
    "64x64_diffusion.pt": _unet(
        *(64, "cosine"), channels=192, num_res_blocks=3, head_order="new", dropout=0.1, **_64
    ),
    "128x128_diffusion.pt": _unet(
        *(128, "linear"), channels=256, num_heads=4, head_order="legacy", dropout=0.0, **_128
    ),
    "256x256_diffusion.pt": _unet(
        *(256, "linear"), channels=256, head_order="legacy", dropout=0.0, **_256
    ),
    "256x256_diffusion_uncond.pt": _unet(
        *(256, "linear"), labels=False, channels=256, head_order="legacy", dropout=0.0, **_256
    ),
    "64x64_classifier.pt": _classifier(64, "cosine", num_res_blocks=4, **_64),
    "128x128_classifier.pt": _classifier(128, "linear", head_channels=64, **_128),
    "256x256_classifier.pt": _classifier(256, "linear", **_256),
}


def published_config(typed: dict[str, str]) -> dict[str, Any]:
    """The config of the network that the flags as typed name. Raises UsageError for another."""
    name = typed.get("published") or epath.Path(typed.get("checkpoint", "")).name
    flag = "--published" if "published" in typed else "--checkpoint"
    return schema.entry(flag, PUBLISHED, name)


def convert(config: dict[str, Any], path: str, workdir: str) -> None:
    """Makes the training folder of step 0 whose EMA is the published weights at path.

    Raises UsageError for a file that cannot be read or holds another network, and for a folder that
    is in use.
    """
    if checkpoint.read_config(workdir) is not None or checkpoint.has_checkpoint(workdir):
        raise UsageError(f"--workdir={workdir} holds a run already: give a new folder.")
    state = torch_files.read_state_dict(path)
    model = experiment.build(config)
    params = weights.from_adm(state, jax.eval_shape(model.network.init, jax.random.key(0)))
    try:
        checkpoints = checkpoint.Checkpoints(workdir)
        checkpoints.save(0, ema=params)
        checkpoints.close()
        checkpoint.write_config(workdir, model.config)  # last: without it there is no run
    except (checkpoint.NotSaved, OSError) as error:
        raise UsageError(f"--workdir={workdir} cannot be written: {error}") from error
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{path}: {count:,} parameters, now in {workdir}")


FLAGS = flags.FLAGS


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "The published .pt file.", required=True)
    flags.DEFINE_string("workdir", None, "The folder to make.", required=True)
    flags.DEFINE_string("published", None, "The name that the file was published under.")


def main(config: dict[str, Any]) -> None:
    """Converts what the flags name."""
    # Nothing is computed: an accelerator is left to the run that may be using it.
    jax.config.update("jax_platforms", "cpu")
    convert(config, FLAGS.checkpoint, FLAGS.workdir)


if __name__ == "__main__":
    _define_flags()
    command.run(main, config=published_config)
