"""The judge of digits: a classifier of clean images that scores samples and never guides them.

Its seed and width are its own, so that guiding by `digits_classifier` cannot flatter the samples.

    python -m cfg_jax.train --config=digits_judge --workdir=runs/digits_judge
    python -m cfg_jax.evaluate --workdir=runs/digits --judge=runs/digits_judge --w=0,1,4
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "dataset": {"name": "digits"},
            "model": {
                "name": "classifier",
                "channels": 32,
                "channel_mult": (1, 2),
                "num_res_blocks": 1,
                "attention_resolutions": (4,),
                "head_channels": 32,
                "dropout": 0.3,
            },
            "loss": {"name": "classification", "noisy": False},
            "optimizer": {"name": "adam", "learning_rate": 1e-3, "warmup_steps": 100},
            "ema": {"decay": 0.995},
            "train": {
                "steps": 500,
                "batch_size": 128,
                "seed": 1,
                "log_every": 50,
                "checkpoint_every": 500,
            },
        }
    )
