"""A user's mistake is one helpful line, exit status 2, no traceback, and nothing half-written."""

import json
import shutil

import pytest

CASES = {
    "mistyped field": (["--config.model.chanels=8"], ["model.chanels", "channels"]),
    "mistyped section": (["--config.modle.channels=8"], ["modle", "model"]),
    "unknown config": (["--config=digitz"], ["digitz", "digits"]),
    "config that is no file": (["--config=missing.py"], ["missing.py"]),
    "unknown model": (["--config.model.name=unett"], ["unett", "unet"]),
    "unknown sampler": (["--config.sample.sampler.name=ddimm"], ["ddimm", "ancestral"]),
    "unknown grid": (["--config.sample.grid=cubic"], ["cubic", "uniform_u"]),
    "unknown reading": (["--config.reading=score"], ["score", "velocity"]),
    "p_uncond above 1": (["--config.loss.p_uncond=1.5"], ["p_uncond=1.5", "[0, 1]"]),
    "v above 1": (["--config.sample.sampler.v=2.0"], ["v=2.0", "[0, 1]"]),
    "eta above 1": (
        ["--config.sample.sampler=ddim", "--config.sample.sampler.eta=2.0"],
        ["eta=2.0", "[0, 1]"],
    ),
    "dropout of 1": (["--config.model.dropout=1.0"], ["dropout"]),
    "lambda range reversed": (
        ["--config.schedule.lambda_min=5.0", "--config.schedule.lambda_max=-5.0"],
        ["lambda_min=5.0", "lambda_max=-5.0"],
    ),
    "no steps": (["--config.sample.steps=0"], ["sample.steps=0", "at least"]),
    "no training steps": (["--config.train.steps=0"], ["train.steps=0", "at least"]),
    "w below -1 in a grid": (["--config.train.sample_w=(0.0,-2.0)"], ["w=-2.0", ">= -1"]),
    "learning rate": (["--config.optimizer.learning_rate=0.0"], ["learning_rate=0.0"]),
    "ema": (["--config.ema.decay=1.0"], ["ema.decay=1.0"]),
    "image size and levels": (["--config.model.channel_mult=(1,1,1,1,1)"], ["8", "level"]),
    "fsdp and mesh": (["--config.train.fsdp=3"], ["fsdp=3", "devices"]),
    "batch and mesh": (["--config.train.batch_size=20"], ["batch_size=20", "8 devices", "try 16"]),
    "batch and its parts": (
        ["--config.train.batch_size=16", "--config.train.accumulate=3"],
        ["batch_size=16", "train.accumulate=3", "try "],
    ),
    "no parts": (["--config.train.accumulate=0"], ["train.accumulate=0", "at least"]),
    "unknown remat": (["--config.model.remat=all"], ["remat='all'", "products"]),
    "profile of nothing": (["--profile=9"], ["--profile=9", "100:110"]),
    "unknown data set": (["--config.dataset.name=imagnet"], ["imagnet", "cifar10"]),
    "data set that is not prepared": (
        ["--config.dataset.name=cifar10"],
        ["cifar10", "python -m cfg_jax.prepare --dataset=cifar10"],
    ),
    "unknown split": (["--config.dataset.split=trian"], ["trian"]),
    "start from nothing": (["--init_from=missing"], ["--init_from=missing", "no trained model"]),
    "a student without a teacher": (["--config=digits_distilled"], ["--teacher=DIR"]),
    "a teacher of no student": (["--teacher=missing"], ["--teacher=missing", "'denoising'"]),
    "pictures of w that no student knows": (
        ["--config=digits_distilled", "--config.loss.w_max=2.0", "--config.train.sample_every=5"],
        ["w=[4.0]", "from 0 to 2"],
    ),
    "unknown loss weight": (["--config.loss.weight=min_srn"], ["min_srn", "min_snr"]),
    "a length that is none": (["--config.ema.lengths=(0.05,0.5)"], ["ema.lengths=0.5", "below"]),
    "pictures of w that cannot be": (
        ["--config.loss.p_uncond=0.0", "--config.train.sample_every=5"],
        ["w=[1.0, 4.0]", "null label"],
    ),
    "pictures of nothing": (
        ["--config.train.sample_every=5", "--config.train.sample_w=()"],
        ["sample_w is empty"],
    ),
    "a name that is no table's": (["--config.name=x"], ["config.name", "dataset"]),
    "a name below a number": (["--config.train.steps.name=x"], ["config.train.steps.name"]),
    "a set of another name that is not prepared": (
        [
            "--config.dataset.name=tfds",
            "--config.dataset.builder=kmnist",
            "--config.dataset.pad=2",
        ],
        ["kmnist is not prepared", "python -m cfg_jax.prepare --dataset=kmnist"],
    ),
    "a required field left out": (["--config.dataset.name=tfds"], ["dataset.builder is missing"]),
    "numbers of another kind": (["--config.train.sample_w=('a',)"], ["sample_w", "float"]),
    "no channels": (["--config.model.channels=0"], ["channels=0"]),
    "odd channels": (["--config.model.channels=9"], ["channels=9"]),
    "no blocks": (["--config.model.num_res_blocks=-1"], ["num_res_blocks=-1"]),
    "seed": (["--config.train.seed=-1"], ["train.seed=-1"]),
    "loss of another model": (["--config.loss.name=classification"], ["'unet'", "classifier"]),
    "stray word": (["steps=3"], ["steps=3"]),
    "cluster of one that is not there": (["--distributed"], ["JAX_COORDINATOR_ADDRESS"]),
}


@pytest.mark.parametrize("case", CASES)
def test_training(case, cli, tiny, tmp_path):
    extra, wanted = CASES[case]
    if any(a.startswith("--config=") for a in extra):
        tiny = tiny[1:]
    env = {
        "data set that is not prepared": {"TFDS_DATA_DIR": str(tmp_path / "data")},
        "a set of another name that is not prepared": {"TFDS_DATA_DIR": str(tmp_path / "data")},
        "batch and mesh": {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    }.get(case, {})
    result = cli("train", *tiny, f"--workdir={tmp_path / 'run'}", *extra, env=env)
    _is_one_helpful_line(result, wanted)
    assert not (tmp_path / "run").exists()


def _is_one_helpful_line(result, wanted):
    assert result.status == 2, result.err[-3000:]
    assert len(result.errors) == 1, result.err[-3000:]
    assert "Traceback" not in result.err
    for word in wanted:
        assert word in result.errors[0], result.errors[0]


SAMPLING = {
    "w below -1": (["--w=-1.5"], ["w=-1.5", ">= -1"]),
    "w not a number": (["--w=nan"], ["w=nan"]),
    "w not numbers": (["--w=a,b"], ["--w=a,b"]),
    "no labels": (["--labels="], ["--labels="]),
    "label outside": (["--labels=3,10"], ["[10]", "0 to 9"]),
    "negative label": (["--labels=-1"], ["[-1]"]),
    "seed": (["--seed=-3"], ["seed=-3"]),
    "a field that sampling has not": (["--config.sample.stepz=3"], ["stepz", "steps"]),
    "as many levels as steps": (
        ["--config.sample.grid=explicit", "--config.sample.grid.lams=(-5.0,0.0,5.0)"],
        ["3 levels", "steps=8", "give steps=3"],
    ),
    "a grid's option": (
        ["--config.sample.grid=edm", "--config.sample.grid.sigma_min=-1.0"],
        ["sigma_min=-1.0", "0.002"],
    ),
    "a rule without its classifier": (
        ["--config.sample.guidance.name=classifier"],
        ["classifier=DIR"],
    ),
    "a classifier that is none": (
        ["--config.sample.guidance.name=classifier", "--classifier=HERE"],
        ["no classifier"],
    ),
}


@pytest.mark.parametrize("case", SAMPLING)
def test_sampling(case, cli, trained, tmp_path):
    extra, wanted = SAMPLING[case]
    extra = [a.replace("HERE", str(trained)) for a in extra]
    result = cli("sample", f"--workdir={trained}", f"--out={tmp_path / 'out'}", *extra)
    _is_one_helpful_line(result, wanted)
    assert not (tmp_path / "out").exists()


def test_averages_that_were_not_kept(cli, trained, tmp_path):
    for extra, wanted in (
        (["--length=0.1"], ["holds no averages", "--config.ema.lengths"]),
        (["--length=0.4"], ["--length=0.4", "below"]),
        (["--length=long"], ["--length=long"]),
    ):
        result = cli("reconstruct", f"--workdir={trained}", f"--out={tmp_path / 'out'}", *extra)
        _is_one_helpful_line(result, wanted)
    assert not (tmp_path / "out").exists()


def test_a_config_file_that_fails(cli, tiny, tmp_path):
    file = tmp_path / "broken.py"
    for text, wanted in (("x = 1 +", "SyntaxError"), ("x = 1", "get_config")):
        file.write_text(text)
        result = cli("train", f"--config={file}", f"--workdir={tmp_path / 'run'}")
        _is_one_helpful_line(result, ["broken.py", wanted])
    _is_one_helpful_line(cli("train", f"--workdir={tmp_path / 'run'}"), ["--config", "digits"])
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_a_file(cli, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    _is_one_helpful_line(cli("train", *tiny, f"--workdir={tmp_path / 'file'}"), ["is a file"])


def test_a_workdir_that_is_not_there(cli, tmp_path):
    result = cli("sample", f"--workdir={tmp_path / 'none'}")
    _is_one_helpful_line(result, ["no trained model", "python -m cfg_jax.train"])
    assert not (tmp_path / "none").exists()


def test_a_workdir_without_a_checkpoint(cli, trained, tmp_path):
    shutil.copy(trained / "config.json", tmp_path)
    result = cli("sample", f"--workdir={tmp_path}")
    _is_one_helpful_line(result, ["no checkpoint"])
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_workdir_of_another_config(cli, tiny, trained):
    before = (trained / "config.json").read_text()
    result = cli("train", *tiny, f"--workdir={trained}", "--config.loss.p_uncond=0.2")
    _is_one_helpful_line(result, ["loss.p_uncond=0.2", "there 0.1"])
    assert (trained / "config.json").read_text() == before


def test_starting_from_another_network(cli, tiny, trained, tmp_path):
    result = cli(
        "train",
        *tiny,
        f"--workdir={tmp_path / 'run'}",
        "--config.model.channels=16",
        f"--init_from={trained}",
    )
    _is_one_helpful_line(result, ["another model"])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_model_without_a_null_label_samples_w_0_alone(cli, tiny, tmp_path):
    run = [*tiny, f"--workdir={tmp_path}", "--config.train.steps=2", "--config.loss.p_uncond=0.0"]
    assert cli("train", *run).status == 0
    _is_one_helpful_line(cli("sample", f"--workdir={tmp_path}", "--w=0,1"), ["null label"])
    assert cli("sample", f"--workdir={tmp_path}", "--w=0").status == 0


def test_a_weights_file_of_another_model(cli, trained, tmp_path):
    import cfg_jax
    from cfg_jax.models import weights

    path = tmp_path / "other.safetensors"
    cfg_jax.load(str(trained)).save(path)
    params, metadata = weights.load_safetensors(path)
    config = json.loads(metadata["config"])
    config["model"]["channels"] = 16
    weights.save_safetensors(path, params, metadata | {"config": json.dumps(config)})
    _is_one_helpful_line(cli("sample", f"--workdir={path}"), ["another model"])
    path.write_bytes(path.read_bytes()[:1000])
    _is_one_helpful_line(cli("sample", f"--workdir={path}"), ["not a whole .safetensors file"])


def test_absl_keeps_its_own_errors(cli, tiny, tmp_path):
    result = cli("train", *tiny, f"--workdir={tmp_path}", "--init_form=x")
    assert result.status == 1 and "init_from" in result.err


def test_preparing_a_set_that_is_not_known(cli, tmp_path):
    result = cli("prepare", "--dataset=kminst", f"--data_dir={tmp_path / 'data'}")
    _is_one_helpful_line(result, ["kminst", "kmnist"])
    assert not (tmp_path / "data").exists()


def test_preparing_once_and_again(cli, tmp_path):
    run = ["--dataset=digits", f"--data_dir={tmp_path}"]
    for _ in range(2):
        result = cli("prepare", *run)
        assert result.status == 0, result.err[-2000:]
        assert "1,415" in result.out + result.err or "1415" in result.out + result.err
