"""The judge of Fashion-MNIST: a classifier of clean images, with a seed and width of its own.

python -m cfg_jax.train --config=fashion_mnist_judge --config.dataset.data_dir=DATA \\
    --workdir=runs/fashion_mnist_judge
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "dataset": {"name": "fashion_mnist", "pad": 2},
            "model": {
                "name": "classifier",
                "channels": 8,
                "channel_mult": (1, 2, 4, 8),
                "num_res_blocks": 1,
                "attention_resolutions": (4,),
                "head_channels": 32,
                "dropout": 0.1,
                "resblock_updown": False,
            },
            "loss": {"name": "classification", "noisy": False},
            "optimizer": {"name": "adam", "learning_rate": 2e-3, "warmup_steps": 100},
            "ema": {"decay": 0.995},
            "train": {
                "steps": 1500,
                "batch_size": 128,
                "seed": 1,
                "log_every": 50,
                "checkpoint_every": 500,
            },
        }
    )
