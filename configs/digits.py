"""Handwritten digits, 8x8: the demo.

python -m cfg_jax.train --config=digits --workdir=runs/digits
python -m cfg_jax.sample --workdir=runs/digits --w=0,1,4
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "dataset": {"name": "digits"},
            "model": {
                "name": "unet",
                "channels": 16,
                "channel_mult": (1, 2),
                "num_res_blocks": 1,
                "attention_resolutions": (4,),
                "head_channels": 16,
                "dropout": 0.1,
            },
            "loss": {"name": "denoising", "p_uncond": 0.1, "stratified": True},
            "optimizer": {"name": "adam", "learning_rate": 1e-3, "warmup_steps": 100},
            "ema": {"decay": 0.995},
            "train": {
                "steps": 1500,
                "batch_size": 128,
                "log_every": 50,
                "checkpoint_every": 500,
                "sample_every": 500,
            },
            "sample": {"sampler": {"name": "ancestral", "v": 0.3}, "steps": 256},
        }
    )
