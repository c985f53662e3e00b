"""Tables 1 and 2 of the paper: FID and inception score of 50,000 samples over w."""

import csv
import importlib.resources
from collections.abc import Mapping
from typing import Any, NamedTuple

TABLES = {"imagenet64": "1_imagenet64", "imagenet128": "2_imagenet128"}


class Row(NamedTuple):
    """What a table says at one w."""

    w: float
    fid: float
    inception_score: float


def curves(config: Mapping[str, Any]) -> dict[str, list[Row]]:
    """{"p_uncond=0.1": rows by w, ...} of the paper's table for a config's data set; {} if none.

    Table 1 (64 x 64) varies p_uncond, Table 2 (128 x 128) the number of steps T.
    """
    table = TABLES.get(config["dataset"]["name"])
    found = {}
    with importlib.resources.files("cfg_jax").joinpath("paper.csv").open() as file:
        for row in csv.DictReader(file):
            if row["table"] == table:
                values = Row(float(row["w"]), float(row["FID"]), float(row["IS"]))
                found.setdefault(row["setting"], []).append(values)
    return found
