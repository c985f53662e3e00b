"""The noisy classifier of Dhariwal & Nichol (2021) for 128x128: guidance's rival, their table 12.

    python -m cfg_jax.train --config=imagenet128_classifier --config.dataset.data_dir=DATA \\
        --workdir=GUIDE
    python -m cfg_jax.sample --workdir=DIR --classifier=GUIDE \\
        --config.sample.guidance.name=classifier --w=0.5

w = 0.5 is the gradient scale of their table 14. Theirs is trained on random crops; here, on the
central square and its mirror image, which is what `prepare` keeps.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "dataset": {"name": "imagenet128", "flip": True},
            "model": {
                "name": "classifier",
                "channels": 128,
                "channel_mult": (1, 1, 2, 3, 4),
                "num_res_blocks": 2,
                "attention_resolutions": (32, 16, 8),
                "head_channels": 64,
                "dropout": 0.0,
                "resblock_updown": True,
                "scale_shift_norm": True,
                "dtype": "bfloat16",
            },
            "schedule": {"name": "cosine", "lambda_min": -20.0, "lambda_max": 20.0},
            "loss": {"name": "classification", "noisy": True},
            "optimizer": {
                "name": "adam",
                "learning_rate": 3e-4,
                "warmup_steps": 0,
                "clip_norm": 0.0,
                "weight_decay": 0.05,
            },
            "ema": {"decay": 0.9999},
            "train": {
                "steps": 300_000,
                "batch_size": 256,
                "log_every": 100,
                "checkpoint_every": 2_000,
            },
        }
    )
