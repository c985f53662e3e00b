"""The noisy classifier of digits that guides (Dhariwal & Nichol, 2021): the paper's rival.

    python -m cfg_jax.train --config=digits_classifier --workdir=runs/digits_classifier
    python -m cfg_jax.sample --workdir=runs/digits --classifier=runs/digits_classifier \\
        --config.sample.guidance.name=classifier --w=0,1,4
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "dataset": {"name": "digits"},
            "model": {
                "name": "classifier",
                "channels": 16,
                "channel_mult": (1, 2),
                "num_res_blocks": 1,
                "attention_resolutions": (4,),
                "head_channels": 16,
                "dropout": 0.1,
            },
            "loss": {"name": "classification", "noisy": True, "stratified": True},
            "optimizer": {"name": "adam", "learning_rate": 1e-3, "warmup_steps": 100},
            "ema": {"decay": 0.995},
            "train": {
                "steps": 1000,
                "batch_size": 128,
                "log_every": 50,
                "checkpoint_every": 500,
            },
        }
    )
