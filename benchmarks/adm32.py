"""An ADM U-Net of 8.0M parameters at 32x32, batch 16: the larger of the two networks measured.

python -m benchmarks.run --configs=adm32

The shape of the data is CIFAR-10's; the benchmark makes its bytes up, and prepares nothing.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "dataset": {"name": "cifar10"},
            "model": {
                "name": "unet",
                "channels": 64,
                "channel_mult": (1, 2, 2),
                "num_res_blocks": 2,
                "attention_resolutions": (16, 8),
                "head_channels": 32,
                "dropout": 0.1,
            },
            "loss": {"name": "denoising", "p_uncond": 0.1},
            "optimizer": {"name": "adam", "learning_rate": 1e-4, "warmup_steps": 1000},
            "ema": {"decay": 0.9999},
            "train": {"batch_size": 16},
            "sample": {"sampler": {"name": "ancestral", "v": 0.3}, "steps": 4, "batch_size": 16},
        }
    )
