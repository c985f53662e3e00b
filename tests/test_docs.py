"""The pages: every command on them is one that its job takes, and the tutorial works."""

import importlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cfg_jax import experiment

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "cfg_jax" / "trained" / "README.md",
    ROOT / "launch" / "models" / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
]
# Small enough for a test; what comes last on a command line holds.
NETWORK = "--config.model.channels=8 --config.model.num_res_blocks=1 --config.model.head_channels=8"
RUN = "--config.train.batch_size=16 --config.train.steps=4 --config.train.sample_every=0"
CHAIN = "--config.sample.steps=4 --config.sample.batch_size=16"
SMALL = {
    "train": f"{NETWORK} {RUN}",
    "sample": f"{CHAIN} --per_label=1",
    "evaluate": f"{CHAIN} --num_samples=40",
}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands of a page, in fenced blocks or indented ones, each in a line."""
    text = re.sub(r"\\\n\s*", "", text)
    fenced = "\n".join(blocks(text, "bash"))
    indented = re.findall(r"^    +((?:python (?!-c)|bash ).*)$", text, re.MULTILINE)
    lines = [line.split(" # ")[0].strip() for line in [*fenced.splitlines(), *indented]]
    return [line for line in lines if line]


def words(command: str) -> list[str]:
    """A command's words, without what a synopsis leaves open: [--labels=0,3] is read, [...] not."""
    command = re.sub(r"\[[^\]]*(?:\.\.\.|FIELD)[^\]]*\]", "", command)
    return shlex.split(re.sub(r"\[(--[^\]]*)\]", r"\1", command))


def job_of(argv: list[str]) -> tuple[str, list[str]] | None:
    """(job, its flags) of a command that runs one here or has it run elsewhere."""
    if argv[:2] == ["python", "-m"] and argv[2].startswith("cfg_jax."):
        return argv[2].removeprefix("cfg_jax."), argv[3:]
    if argv[0] == "bash" and "--" in argv:
        at = argv.index("--")
        own = dict(a.removeprefix("--").partition("=")[::2] for a in argv[:at])
        return own.get("job", "train"), argv[at + 1 :]
    return None


def test_what_is_taken_for_a_command():
    page = "\n".join(
        [
            "```bash",
            "python -m cfg_jax.sample --workdir=DIR \\",
            "    [--labels=0,3] [--config.FIELD=VALUE ...]  # a comment",
            "```",
            "as in",
            "",
            "    bash launch/tpu.sh run --name=x -- --config=digits --workdir=DIR",
        ]
    )
    first, second = map(words, commands(page))
    assert job_of(first) == ("sample", ["--workdir=DIR", "--labels=0,3"])
    assert job_of(second) == ("train", ["--config=digits", "--workdir=DIR"])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_job_takes_its_flags(page, cli):
    """Read by the job's own definitions and the config's schema; a workdir has what trained it."""
    configs, started = {}, []
    for command in commands(page.read_text()):
        job, args = job_of(words(command)) or (None, [])
        if job is None:
            continue
        flags = dict(a.removeprefix("--").partition("=")[::2] for a in args)
        workdir = flags.get("workdir")
        if job == "train":
            configs[workdir] = flags["config"]
        elif workdir is not None:
            configs.setdefault(workdir, Path(workdir).stem)
            if configs[workdir] not in {f.stem for f in ROOT.glob("configs/*.py")}:
                configs[workdir] = "digits"
        started.append((command, cli.start(job, *args, parse_only=dict(configs))))
    for command, running in started:
        result = running.wait()
        assert result.status == 0, f"{command}\n{result.err[-2000:]}"


def test_a_command_with_a_wrong_flag_is_found(cli):
    """Or the test above says nothing."""
    for args in (["--confg=digits"], ["--config.model.chanels=8", "--config=digits"]):
        assert cli("train", "--workdir=DIR", *args, parse_only={}).status != 0
    assert cli("sample", "--workdir=DIR", "--ww=1", parse_only={"DIR": "digits"}).status != 0


def test_other_commands_name_what_there_is():
    known = set(re.findall(r'^    "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE))
    for page in PAGES:
        for command in commands(page.read_text()):
            argv = words(command)
            if argv[:4] == ["python", "-m", "pip", "install"]:
                extras = re.findall(r"\.\[([\w,]+)\]", command)
                assert {e for group in extras for e in group.split(",")} <= known, command
            elif argv[0] == "bash" or (argv[0] == "python" and argv[1].endswith(".py")):
                assert (ROOT / argv[1]).is_file(), f"{page.name}: {command}"
            elif argv[0] == "python" and argv[1] == "-m" and "." not in argv[2]:
                assert argv[2] in {"pip", "sphinx", "pytest"}, f"{page.name}: {command}"


@pytest.mark.parametrize("page", ["how_to.md"])
def test_launchers_print_what_they_would_run(page):
    launched = [c for c in commands((ROOT / "docs" / page).read_text()) if c.startswith("bash ")]
    assert len(launched) >= 6
    for command in launched:
        argv = words(command)
        verb = 3 if argv[1].endswith("tpu.sh") else 2
        told = subprocess.run(
            [*argv[:verb], "--dry_run", *argv[verb:]], cwd=ROOT, capture_output=True, text=True
        )
        assert told.returncode == 0 and told.stdout, f"{command}\n{told.stderr}"


def test_the_paper_in_code_names_what_says_so_itself():
    """Each row: the thing is in that file, and it, or its file, names that equation."""
    text = (ROOT / "docs" / "paper.md").read_text()
    rows = re.findall(
        r"^\| ([^|]+) \|.*\| `([\w/.]+)` \| \{py:obj\}`~([\w.]+)` \|$", text, re.MULTILINE
    )
    assert len(rows) == text.count("\n| ") - 1 == 15
    for equation, file, path in rows:
        module, _, name = path.rpartition(".")
        module = importlib.import_module(module)
        assert Path(module.__file__) == ROOT / "cfg_jax" / file
        said = f"{inspect.getdoc(getattr(module, name))}\n{module.__doc__}"
        number = re.fullmatch(r"eq\. (\(\d\))", equation)
        own_words = (number[1] if number else equation).lower()
        assert own_words in said.lower(), f"{path} does not say {equation}"


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("generated"))
    sphinx = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    built = subprocess.run([*sphinx, "docs", "html"], cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-5000:]
    paper = (tmp_path / "html" / "paper.html").read_text()
    assert 'href="generated/cfg_jax.diffusion.guidance.html#cfg_jax.diffusion' in paper
    modules = [f.relative_to(ROOT).with_suffix("") for f in (ROOT / "cfg_jax").rglob("[a-z]*.py")]
    for module in modules:
        page = tmp_path / "html" / "generated" / f"{'.'.join(module.parts)}.html"
        assert page.exists(), f"the reference lacks {module}"


@pytest.mark.slow
def test_the_tutorial_works(cli, tmp_path, monkeypatch):
    """Its commands in their order, and its Python, with less of everything."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "tutorial.md").read_text()
    done = set()
    for command in commands(text):
        job, args = job_of(words(command)) or (None, [])
        if job is None:
            continue
        result = cli(job, *args, *SMALL[job].split(), cwd=tmp_path)
        assert result.status == 0, f"{command}\n{result.err[-3000:]}"
        done.add(job)
    assert done == set(SMALL)
    for file in ("samples_w4.png", "samples.npz", "sweep/curve.png", "sweep/report.html"):
        assert (tmp_path / "runs" / "digits" / file).exists(), file
    told = {}
    exec("\n".join(blocks(text, "python")), told)
    assert told["images"].shape == told["stronger"].shape == (3, 8, 8, 1)
    assert experiment.SCHEMA.complete(told["model"].config) == told["model"].config
