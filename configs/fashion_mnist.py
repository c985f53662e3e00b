"""Fashion-MNIST, 28x28 padded to 32x32: half an hour on two cores.

python -m cfg_jax.prepare --dataset=fashion_mnist --data_dir=DATA
python -m cfg_jax.train --config=fashion_mnist --config.dataset.data_dir=DATA \\
    --workdir=runs/fashion_mnist
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "dataset": {"name": "fashion_mnist", "pad": 2},
            "model": {
                "name": "unet",
                "channels": 24,
                "channel_mult": (1, 2, 4),
                "num_res_blocks": 1,
                "attention_resolutions": (8,),
                "head_channels": 32,
                "dropout": 0.0,  # three epochs do not overfit
                "resblock_updown": False,
            },
            "loss": {"name": "denoising", "p_uncond": 0.1, "stratified": True},
            "optimizer": {"name": "adam", "learning_rate": 1e-3, "warmup_steps": 200},
            "ema": {"decay": 0.999},
            "train": {
                "steps": 3000,
                "batch_size": 64,
                "log_every": 50,
                "checkpoint_every": 500,
                "sample_every": 0,
            },
            # Fewer evaluations, by override: sampler dpmpp_2m or unipc, see docs/samplers.md.
            "sample": {"sampler": {"name": "ancestral", "v": 0.3}, "steps": 64},
        }
    )
