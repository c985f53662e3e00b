"""Class-conditional CIFAR-10, 32x32: an ablation for one accelerator and a day.

    python -m cfg_jax.prepare --dataset=cifar10 --data_dir=DATA
    python -m cfg_jax.train --config=cifar10 --config.dataset.data_dir=DATA --workdir=DIR

Not in the paper. Network and training are those of Nichol & Dhariwal (2021) for CIFAR-10 with the
cosine schedule (128 channels, three blocks a level, attention at 16 and 8, dropout 0.3, batch 128,
learning rate 1e-4, 500,000 steps), in the layout of Dhariwal & Nichol (2021). Nobody has trained
this file to its end yet.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "dataset": {"name": "cifar10"},
            "model": {
                "name": "unet",
                "channels": 128,
                "channel_mult": (1, 2, 2, 2),
                "num_res_blocks": 3,
                "attention_resolutions": (16, 8),
                "num_heads": 4,
                "dropout": 0.3,
                "dtype": "bfloat16",
            },
            "loss": {"name": "denoising", "p_uncond": 0.1},
            "optimizer": {"name": "adam", "learning_rate": 1e-4, "warmup_steps": 1_000},
            "ema": {"decay": 0.9999},
            "train": {
                "steps": 500_000,
                "batch_size": 128,
                "log_every": 100,
                "checkpoint_every": 5_000,
                "sample_every": 50_000,
            },
            "sample": {"sampler": {"name": "ancestral", "v": 0.3}, "steps": 256, "batch_size": 512},
        }
    )
