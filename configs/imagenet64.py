"""The paper's class-conditional ImageNet 64x64: table 1, and figures 1 and 6.

    python -m cfg_jax.prepare --dataset=imagenet64 --data_dir=DATA --manual_dir=ARCHIVES
    python -m cfg_jax.train --config=imagenet64 --config.dataset.data_dir=DATA --workdir=DIR
    python -m cfg_jax.sample --workdir=DIR --w=0,1,3

The paper's three models are --config.loss.p_uncond=0.1, 0.2 and 0.5. It reports, of 50,000
samples at p_uncond = 0.1: FID 1.55 and IS 66.11 at w = 0.1 (the best FID), 1.80 and 53.71 at w = 0,
26.22 and 260.2 at w = 4. Nobody has trained this file to its end yet.

Sources: [P] the paper, section 4; [A] Dhariwal & Nichol (2021), table 11, whose networks and
hyperparameters the paper says that it takes; [C] the configs of google-research's
ddpm_w_distillation, by authors of the paper, where the paper is silent.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "dataset": {
                "name": "imagenet64",  # central square, resized by area [P: "area downsampled"]
                "flip": True,  # [C]
            },
            "model": {
                "name": "unet",  # 295,900,035 parameters, null row included
                "channels": 192,  # [A]
                "channel_mult": (1, 2, 3, 4),  # [A]
                "num_res_blocks": 3,  # [A]
                "attention_resolutions": (32, 16, 8),  # [A]
                "head_channels": 64,  # [A]
                "dropout": 0.1,  # [A]
                "resblock_updown": True,  # [A]
                "scale_shift_norm": True,  # [A] AdaGN
                "dtype": "bfloat16",  # TPU; parameters, norms and softmax stay float32
            },
            "schedule": {"name": "cosine", "lambda_min": -20.0, "lambda_max": 20.0},  # [P]
            "reading": "eps",  # [P] eq. (5)
            "loss": {
                "name": "denoising",
                "p_uncond": 0.1,  # [P] one of 0.1, 0.2, 0.5
                "stratified": False,  # [P] u ~ U[0, 1], each image for itself
            },
            "optimizer": {
                "name": "adam",
                "learning_rate": 3e-4,  # [A, C]
                "warmup_steps": 10_000,  # [C] "used to be 1k, but 10k helps with stability"
                "clip_norm": 1.0,  # [C]
            },
            "ema": {"decay": 0.9999},  # [A, C]
            "train": {
                "steps": 400_000,  # [P]
                "batch_size": 2048,  # [A, C]; the paper does not say
                "log_every": 100,
                "checkpoint_every": 2_000,
                "sample_every": 20_000,
            },
            "sample": {
                "sampler": {"name": "ancestral", "v": 0.3},  # [P]
                "steps": 256,  # [C] T; the paper does not say for 64x64; 128 and 1024 by override
                "clip": True,  # [C]
                "batch_size": 1024,
            },
        }
    )
