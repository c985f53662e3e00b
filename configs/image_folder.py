"""Pictures of your own, one folder a class, at 64x64.

    python -m cfg_jax.prepare --dataset=image_folder --path=PICTURES --data_dir=DATA
    python -m cfg_jax.train --config=image_folder --config.dataset.data_dir=DATA --workdir=DIR
    python -m cfg_jax.sample --workdir=DIR --w=0,1,4

--size=32 fits as well; 128 wants --config.model.attention_resolutions="(32,16)" to train. The
network is that of cifar10 with fewer blocks, for some thousands of pictures up; for fewer, try
--config.model.channels=64 and more dropout. Nobody has trained this file to its end yet.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "dataset": {
                "name": "image_folder",
                "flip": True,  # unless left and right matter, as in letters
            },
            "model": {
                "name": "unet",
                "channels": 128,
                "channel_mult": (1, 2, 2, 2),
                "num_res_blocks": 2,
                "attention_resolutions": (16, 8),
                "head_channels": 64,
                "dropout": 0.1,
                "dtype": "bfloat16",
            },
            "loss": {"name": "denoising", "p_uncond": 0.1},
            "optimizer": {"name": "adam", "learning_rate": 1e-4, "warmup_steps": 1_000},
            "ema": {"decay": 0.9999},
            "train": {
                "steps": 200_000,
                "batch_size": 128,
                "log_every": 100,
                "checkpoint_every": 2_000,
                "sample_every": 5_000,
            },
            "sample": {"sampler": {"name": "ancestral", "v": 0.3}, "steps": 256, "batch_size": 128},
        }
    )
