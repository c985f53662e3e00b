"""The paper's class-conditional ImageNet 128x128: table 2, and figures 3, 7 and 8.

    python -m cfg_jax.prepare --dataset=imagenet128 --data_dir=DATA --manual_dir=ARCHIVES
    python -m cfg_jax.train --config=imagenet128 --config.dataset.data_dir=DATA --workdir=DIR
    python -m cfg_jax.sample --workdir=DIR --w=0,1,4 --config.sample.steps=1024

The paper samples with T = 128, 256 and 1024. It reports, of 50,000 samples at T = 256: FID 2.43 and
IS 158.47 at w = 0.3 (the best FID), 7.27 and 82.45 at w = 0, 7.86 and 297.98 at w = 1. Nobody has
trained this file to its end yet.

Sources as in imagenet64.py: [P] the paper, [A] Dhariwal & Nichol (2021), [C] google-research.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "dataset": {
                "name": "imagenet128",  # central square, resized by area [P]
                "flip": True,  # [C]
            },
            "model": {
                "name": "unet",  # 421,523,715 parameters, null row included
                "channels": 256,  # [A]
                "channel_mult": (1, 1, 2, 3, 4),  # [A]
                "num_res_blocks": 2,  # [A]
                "attention_resolutions": (32, 16, 8),  # [A]
                "num_heads": 4,  # [A]
                "head_order": "legacy",  # as the published network of 128x128 has it
                "dropout": 0.0,  # [A]
                "resblock_updown": True,  # [A]
                "scale_shift_norm": True,  # [A]
                "dtype": "bfloat16",
            },
            "schedule": {"name": "cosine", "lambda_min": -20.0, "lambda_max": 20.0},  # [P]
            "reading": "eps",  # [P]
            "loss": {
                "name": "denoising",
                "p_uncond": 0.1,  # [C]; the paper does not say for 128x128
                "stratified": False,  # [P]
            },
            "optimizer": {
                "name": "adam",
                "learning_rate": 1e-4,  # [A, C]
                "warmup_steps": 1_000,  # [C]
                "clip_norm": 1.0,  # [C]
            },
            "ema": {"decay": 0.9999},  # [A, C]
            "train": {
                "steps": 2_700_000,  # [P]
                "batch_size": 256,  # [A, C]; the paper does not say
                "log_every": 100,
                "checkpoint_every": 5_000,
                "sample_every": 50_000,
            },
            "sample": {
                "sampler": {"name": "ancestral", "v": 0.2},  # [P]
                "steps": 256,  # [P] T, one of 128, 256, 1024
                "clip": True,  # [C]
                "batch_size": 256,
            },
        }
    )
