"""From a config to objects: the only reader of configs."""

import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax

from cfg_jax import schema, sections, train_step
from cfg_jax.data import datasets, images
from cfg_jax.diffusion import guidance, logsnr, losses, samplers, schedules
from cfg_jax.models import network as networks
from cfg_jax.types import Array, Guidance, Network, Params, Sampler, Schedule, UsageError


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The objects of a config, wired. Building it computes nothing and reads no data."""

    config: Mapping[str, Any]  # complete
    dataset: Any
    network: Network
    dtypes: Callable[[], Params]  # in which precision the network reads each parameter
    features: Network | None  # a classifier's, before its last affine map; the same parameters
    schedule: Schedule
    reading: logsnr.Reading
    null_label: int | None  # None where no null row was trained
    teacher: "Experiment | None"  # of a student: the model that it learns to say guided
    loss: Callable  # (params, frozen, batch with uint8 images, key) -> (mean, metrics)
    optimizer: optax.GradientTransformation
    ema: train_step.Ema
    train: sections.Train
    evaluate: sections.Evaluate
    sample: sections.Sample
    guidance: Callable[..., Guidance]  # w -> Guidance
    sampler: Sampler
    lams: Callable[[], Array]  # the noise levels of the chain, [T]

    @property
    def is_classifier(self) -> bool:
        return self.features is not None

    @property
    def w_range(self) -> tuple[float, float] | None:
        """The strengths that a student was told of; None for any other model."""
        loss = self.config["loss"]
        return (loss["w_min"], loss["w_max"]) if self.teacher else None

    @property
    def cpu_devices(self) -> int | None:
        """The most XLA devices that a CPU should train it on: 1 for a small step, else all.

        Two devices sum their gradients with a meeting for each array, however small it is, and gain
        the more on two threads of one the more work a convolution is. They break even at batch x
        pixels x channels^2 = 2^23 (docs/speed.md).
        """
        height, width, _ = self.dataset.image_shape
        channels = self.config["model"]["channels"]
        small = self.train.batch_size * height * width * channels**2 <= 2**23
        return 1 if small and self.train.fsdp == 1 else None


# Rules stand around rules: sample.guidance.rule is the one inside, and so on down.
RULES = tuple("sample.guidance" + depth * ".rule" for depth in range(5))

SCHEMA = schema.Schema(
    tables={
        "dataset": datasets.DATASETS,
        "model": networks.MODELS,
        "schedule": schedules.SCHEDULES,
        "loss": losses.LOSSES,
        "optimizer": train_step.OPTIMIZERS,
        **dict.fromkeys(RULES, guidance.GUIDANCE),
        "sample.sampler": samplers.SAMPLERS,
        "sample.grid": schedules.GRIDS,
    },
    sections={
        "ema": train_step.Ema,
        "train": sections.Train,
        "evaluate": sections.Evaluate,
        "sample": sections.Sample,
    },
    scalars={"reading": "eps"},
    names={
        "schedule": "cosine",
        "loss": "denoising",
        "optimizer": "adam",
        **dict.fromkeys(RULES, "classifier_free"),
        "sample.sampler": "ancestral",
        # The paper's. With few levels its steps are long at the ends: see docs/samplers.md.
        "sample.grid": "uniform_u",
    },
    bound={
        # What the data set, and the loss, decide.
        "model": {
            "rngs",
            "image_size",
            "in_channels",
            "out_channels",
            "num_classes",
            "null_row",
            "w_embedding",
        },
        # What the jobs' flag --w gives.
        **{path: {"w"} for path in RULES},
        "sample.grid": {"schedule", "steps"},
    },
)


def config_file(name: str) -> Path:
    """The file of an experiment: a path to a .py file, or the name of one in configs/.

    Raises UsageError where there is none.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UsageError(f"--config={name}: there is no such file.")
        return Path(name)
    package = Path(__file__).parent
    # In a wheel the configs are inside the package, in a checkout beside it.
    folder = next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())
    known = {f.stem: f for f in folder.glob("*.py") if f.stem != "__init__"}
    if name not in known:
        raise schema.unknown("--config", name, known)
    return known[name]


def load_config(name: str) -> dict[str, Any]:
    """The dict that get_config() of an experiment's file returns.

    Raises UsageError for a file that is not there, fails, or has no get_config.
    """
    path = config_file(name)
    spec = importlib.util.spec_from_file_location(f"cfg_jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config().to_dict()
    except Exception as error:  # whatever a user's file does
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"--config={name}: {reason}") from error


def _options(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "name"}


def _module(model: Mapping[str, Any], told: Mapping[str, Any]) -> networks.Build:
    takes = inspect.signature(networks.MODELS[model["name"]]).parameters
    told = {name: value for name, value in told.items() if name in takes}
    return networks.make(model["name"], **_options(model), **told)


def rule(section: Mapping[str, Any], w: Any = 0.0) -> Guidance:
    """The rule of a complete section `guidance`, with its strength where the innermost one has it.

    w is a number, or one an image [B].
    """
    options = _options(section)
    if "rule" in options:
        inner = rule(options.pop("rule"), w)
        return guidance.GUIDANCE[section["name"]](inner, **options)
    return guidance.GUIDANCE[section["name"]](w, **options)


def check_pair(guided: Guidance, sampler: Sampler) -> None:
    """Raises UsageError for a rule that breaks the pair of x and eps where the sampler needs it."""
    if sampler.needs_pair and not guided.keeps_pair:
        able = [name for name, entry in samplers.SAMPLERS.items() if not entry.needs_pair]
        raise UsageError(
            f"guidance 'cfg_plus_plus' with sampler {type(sampler).__name__}: the rule re-adds "
            "another noise than its x leaves of z, and this sampler takes that one; DDIM takes the "
            f"eps that it is told. sample.sampler.name can be: {', '.join(able)}."
        )


def build(config: Mapping[str, Any]) -> Experiment:
    """The objects of a config. Raises UsageError for a field or value that is wrong, naming it."""
    config = SCHEMA.complete(config)
    dataset = datasets.DATASETS[config["dataset"]["name"]](**_options(config["dataset"]))
    config["dataset"] |= dataset.described()
    loss = losses.LOSSES[config["loss"]["name"]](**_options(config["loss"]))
    schedule = schedules.SCHEDULES[config["schedule"]["name"]](**_options(config["schedule"]))
    reading = schema.entry("config.reading", logsnr.READINGS, config["reading"])
    # What nothing trains is not there: at p_uncond = 0 the null row, at 1 all labels.
    p_uncond = getattr(loss, "p_uncond", 0)
    null_row = 0 < p_uncond < 1
    is_classifier = config["loss"]["name"] == "classification"
    if is_classifier != (config["model"]["name"] == "classifier"):
        raise UsageError(
            f"model.name={config['model']['name']!r} with loss.name={config['loss']['name']!r}: a "
            "classifier is trained by classification, and nothing else is."
        )
    is_student = config["loss"]["name"] == "distillation"
    if is_student != (config["sample"]["guidance"]["name"] == "distilled"):
        raise UsageError(
            f"loss.name={config['loss']['name']!r} with sample.guidance.name="
            f"{config['sample']['guidance']['name']!r}: a student, trained by distillation, has "
            "its guidance inside: it is sampled by 'distilled', and nothing else is."
        )
    teacher = None
    if is_student:  # the same network without w, trained as the paper's
        sampled = {**config["sample"], "guidance": {"name": "classifier_free"}}
        teacher = build({**config, "loss": {"name": "denoising"}, "sample": sampled})
    height, size, channels = dataset.image_shape
    if height != size:
        raise UsageError(
            f"images of {dataset.name} are {height}x{size}: the networks want squares."
        )
    module = _module(
        config["model"],
        {
            "image_size": size,
            "in_channels": channels,
            "out_channels": channels * reading.outputs,
            "num_classes": dataset.num_classes if p_uncond < 1 else None,
            "null_row": null_row or is_student,  # a student has all that its teacher has
            "w_embedding": is_student,
        },
    )
    make_network = functools.partial(
        networks.network,
        module,
        sinusoid_input=getattr(schedule, "sinusoid_input", schedules.sinusoid_input),
    )
    network = make_network()
    bound_loss = functools.partial(
        loss,
        network=network,
        schedule=schedule,
        reading=reading,
        null_label=dataset.num_classes,
        **({"teacher": teacher.network} if teacher else {}),
    )

    def loss_of_bytes(params, frozen, batch, key):
        return bound_loss(params, frozen, {**batch, "image": images.to_float(batch["image"])}, key)

    sample = sections.Sample(**config["sample"])
    classes = dataset.num_classes
    if outside := [c for c in sample.negative if not 0 <= c < classes]:
        raise UsageError(f"sample.negative={outside}: the classes are 0 to {classes - 1}.")
    sampler = samplers.SAMPLERS[sample.sampler["name"]](**_options(sample.sampler))
    check_pair(rule(sample.guidance), sampler)
    if getattr(sampler, "learned_v", False) and reading.outputs == 1:
        raise UsageError(
            f"sample.sampler.learned_v=True with reading={config['reading']!r}: this network tells "
            "no variance; published ones do (reading='eps_and_v')."
        )
    lams = functools.partial(
        schedules.GRIDS[sample.grid["name"]], schedule, sample.steps, **_options(sample.grid)
    )
    jax.eval_shape(lams)  # raises what is wrong with the grid, and computes nothing
    return Experiment(
        config=config,
        dataset=dataset,
        network=network,
        dtypes=functools.partial(networks.dtypes, module),
        features=make_network(method="features") if is_classifier else None,
        schedule=schedule,
        reading=reading,
        null_label=dataset.num_classes if null_row else None,
        teacher=teacher,
        loss=loss_of_bytes,
        optimizer=train_step.OPTIMIZERS[config["optimizer"]["name"]](
            **_options(config["optimizer"])
        ),
        ema=train_step.Ema(**config["ema"]),
        train=sections.Train(**config["train"]),
        evaluate=sections.Evaluate(**config["evaluate"]),
        sample=sample,
        guidance=functools.partial(rule, sample.guidance),
        sampler=sampler,
        lams=lams,
    )
