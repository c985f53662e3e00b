"""The student of digits: one pass a step, for any w from 0 to 4 (Meng et al., 2023, stage one).

    python -m cfg_jax.train --config=digits --workdir=runs/digits
    python -m cfg_jax.train --config=digits_distilled --teacher=runs/digits \\
        --workdir=runs/digits_distilled
    python -m cfg_jax.sample --workdir=runs/digits_distilled --w=0,1,4

docs/distillation.md has what came of it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "dataset": {"name": "digits"},
            "model": {  # its teacher's; dropout would only hide what the teacher says
                "name": "unet",
                "channels": 16,
                "channel_mult": (1, 2),
                "num_res_blocks": 1,
                "attention_resolutions": (4,),
                "head_channels": 16,
                "dropout": 0.0,
            },
            "loss": {"name": "distillation", "w_min": 0.0, "w_max": 4.0, "stratified": True},
            "optimizer": {"name": "adam", "learning_rate": 1e-3, "warmup_steps": 100},
            "ema": {"decay": 0.995},
            "train": {
                "steps": 1500,
                "batch_size": 128,
                "log_every": 50,
                "checkpoint_every": 500,
                "sample_every": 500,
            },
            "sample": {
                "guidance": {"name": "distilled"},
                "sampler": {"name": "ancestral", "v": 0.3},
                "steps": 256,
            },
        }
    )
