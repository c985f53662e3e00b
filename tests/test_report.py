"""The report as a reader sees it: in a browser, from the disk, without a network."""

import shutil

import numpy as np
import pytest
from etils import epath
from matplotlib import figure

from cfg_jax import curve, report


def point(rule, w, **scores):
    full = {name: {"value": value, "error": 0.1} for name, value in scores.items()}
    return {
        "guidance": rule,
        "w": w,
        "scale": 1 + w,
        "evaluations": 16,
        "classifier_evaluations": 0,
        "scores": full,
        "from_first_w": {name: {"difference": 0.0} for name in full},
    }


def sweep(dataset="imagenet64", rules=("classifier_free", "interval"), fd="fid"):
    """A sweep of two rules over three w, as evaluate.py describes one."""
    numbers = {0.0: (3.0, 50.0), 0.3: (2.5, 80.0), 4.0: (20.0, 250.0)}
    points = [
        point(rule, w, **{fd: a, "is": b, "precision": 0.7, "recall": 0.6, "kid": 0.001, "nn": 1.0})
        for rule in rules
        for w, (a, b) in numbers.items()
    ]
    look = {"name": "inception", "parameters": "abc"}
    reference = {"dataset": dataset, "split": "train", "images": 1000, "nn": 0.9}
    config = {"dataset": {"name": dataset}, "sample": {"steps": 8}}
    recipe = {
        "config": config,
        "num_samples": 40,
        "seed": 0,
        "features": [look],
        "reference": [reference],
        "held_out": None,
        "precision_recall": {"k": 3},
    }
    return {"recipe": recipe, "points": points}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = epath.Path(tmp_path_factory.mktemp("report"))
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (32, 320, 3), np.uint8) for _ in range(6)]
    grids = {"classifier_free": pictures[:3], "interval": pictures[3:]}
    report.write_pictures(out, sweep(), grids)
    return out


def test_the_papers_table_is_beside_ours_only_where_it_compares(written, monkeypatch):
    assert list(curve.of_paper(sweep())) == ["p_uncond=0.1", "p_uncond=0.2", "p_uncond=0.5"]
    assert curve.of_paper(sweep("digits")) == {}
    assert curve.of_paper(sweep(fd="fd_judge")) == {}, "no FID"
    assert "the paper's table" in (written / "report.html").read_text()
    panels, drawn = curve._panels, []

    def kept(names):
        made = panels(names)
        drawn.append(made[1])
        return made

    monkeypatch.setattr(curve, "_panels", kept)
    for dataset, count in (("imagenet64", 3), ("digits", 0)):
        curve.draw(sweep(dataset))
        axes = drawn.pop()
        dotted = {k: sum(line.get_linestyle() == ":" for line in a.lines) for k, a in axes.items()}
        wanted = dict.fromkeys(axes, 0) | dict.fromkeys(("curve", "fid", "is"), count)
        assert dotted == wanted, "a curve for each p_uncond"


def test_a_rule_is_a_curve_over_its_rising_w():
    points = sweep()["points"]
    for shuffled in (points, points[::-1], points[1::2] + points[::2]):
        rules = curve.by_rule(shuffled)
        assert {rule: [p["w"] for p in of_rule] for rule, of_rule in rules.items()} == {
            "classifier_free": [0.0, 0.3, 4.0],
            "interval": [0.0, 0.3, 4.0],
        }


def test_numbers_are_rounded_to_what_they_say():
    numbers = {0: "0.000", 12.34567: "12.346", 0.01: "0.010", -0.5: "-0.500", -0.0012: "-1.2e-03"}
    assert {value: report.number(value) for value in numbers} == numbers


def test_the_dashed_line_is_the_distance_in_the_reference_of_the_same_features():
    features = [{"name": "inception"}, {"name": "judge"}]
    recipe = {"features": features, "reference": [{"nn": 0.9}, {"nn": 0.4}], "held_out": None}
    heights = []
    for name in ("nn", "nn_judge"):
        axis = figure.Figure().subplots()
        curve._against_w(axis, name, [0.0, 4.0], recipe)
        heights += [set(line.get_ydata()) for line in axis.lines]
    assert heights == [{0.9}, {0.4}]


def test_bars_reach_from_the_lower_end_of_an_interval_to_the_upper():
    points = [point("classifier_free", w, fid=3.0) for w in (0.0, 1.0)]
    points[1]["scores"]["fid"] |= {"low": 2.5, "high": 4.5}
    value, (down, up) = curve._bars(points, "fid")
    assert (value - down).tolist() == [3.0, 2.5] and (value + up).tolist() == [3.0, 4.5]


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("NOT TESTED: apt-get install chromium chromium-driver brings the browser")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=400,900"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.mark.slow
def test_a_browser_shows_it(written, browser):
    """On a telephone's screen: no errors, no page wider than the screen, the slider works."""
    browser.get(f"file://{written / 'report.html'}")

    def run(script):
        return browser.execute_script(f"return {script}")

    assert [e for e in browser.get_log("browser") if e["level"] != "INFO"] == []
    assert run("document.images[0].naturalWidth") > 1000, "the curve is there"
    assert run("document.documentElement.scrollWidth") <= run("window.innerWidth")
    rule = "document.querySelectorAll('.rule')[1]"
    first = run(f"{rule}.querySelector('.shown').src")
    assert first == run(f"{rule}.querySelectorAll('.row img')[0].src")
    move = "s => { s.value = 2; s.dispatchEvent(new Event('input')) }"
    run(f"({move})({rule}.querySelector('input'))")
    assert run(f"{rule}.querySelector('.shown').src") == run(
        f"{rule}.querySelectorAll('.row img')[2].src"
    )
    assert run(f"{rule}.querySelector('output').textContent") == "w=4 (scale 5)"
    assert run("document.querySelector('.rule .shown').src") != run(
        f"{rule}.querySelector('.shown').src"
    ), "the other rule's slider is another"
    light = run("getComputedStyle(document.body).backgroundColor")
    scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    assert run("matchMedia('(prefers-color-scheme: dark)').matches")
    assert run("getComputedStyle(document.body).color") == "rgb(255, 255, 255)", light
