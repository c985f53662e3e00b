"""The model card of an exported model: what its config knows, and what only its maker can say."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

_CARD = """\
---
library_name: cfg_jax
tags: [jax, diffusion, classifier-free-guidance, image-generation]
---

# {title}

A diffusion model of {data} with {count} classes, {parameters:,} parameters, in the manner of
*Classifier-Free Diffusion Guidance* (Ho & Salimans, 2022). {guides}

```python
import cfg_jax

model = cfg_jax.load("{file}")
images = model.sample([0], w={w}, seed=0)  # uint8 {shape}
```

{training}

## To be said by who made it

- What it is for, and what it should not be used for.
- Where the training images come from, whose they are, and under which license the weights are.
- What was measured, how, and on how many samples.
- What it gets wrong, and whom that may hurt.

## Classes

{classes}

## The whole config

```json
{config}
```
"""


def text(
    file: str,
    config: Mapping[str, Any],
    *,
    step: int,
    classes: Sequence[str],
    image_shape: tuple[int, int, int],
    parameters: int,
    guided: bool,
) -> str:
    """The card of a denoiser in the .safetensors file of that name, in Markdown.

    `guided`: it has a null label, and so a w.
    """
    if guided:
        guides = (
            "w is the strength of guidance: 0 samples the conditional model, more trades diversity "
            "for fidelity. The guidance scale of other papers is 1 + w."
        )
    else:
        guides = "It has no null label, and is sampled at w = 0 or with another model's guidance."
    if step:
        batch_size, decay = config["train"]["batch_size"], config["ema"]["decay"]
        training = (
            f"Trained for {step:,} steps of {batch_size} images; these are the averaged weights "
            f"(EMA {decay:g})."
        )
    else:
        training = "Converted from published weights."
    return _CARD.format(
        title=file.removesuffix(".safetensors"),
        data=config["dataset"]["builder"],
        count=len(classes),
        parameters=parameters,
        guides=guides,
        file=file,
        w=int(guided),
        shape=[1, *image_shape],
        training=training,
        classes="\n".join(f"- {label}: {name}" for label, name in enumerate(classes)),
        config=json.dumps(config, indent=1),
    )
