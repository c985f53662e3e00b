"""The pages: every command on them is one that its program takes, and they build.

Their commands and their Python are run by test_commands.py.
"""

import importlib
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pages
import pytest

ROOT = pages.ROOT
each_page = pytest.mark.parametrize(
    "page", pages.PAGES, ids=lambda page: str(page.relative_to(ROOT))
)


def test_what_is_taken_for_a_command():
    page = "\n".join(
        [
            "```bash",
            "python -m cfg_jax.sample --workdir=DIR \\",
            "    [--labels=0,3] [--config.FIELD=VALUE ...]  # a comment",
            "```",
            "as in `pip",
            "install x`, `python` and",
            "",
            "    bash launch/tpu.sh run --name=x -- --config=digits --workdir=DIR",
            '    python -c "import cfg_jax',
            '        print(1)"',
            "    images = 3",
        ]
    )
    first, second, third, fourth = pages.commands(page)
    assert pages.job_of(pages.words(first)) == ("sample", ["--workdir=DIR", "--labels=0,3"])
    assert pages.job_of(pages.words(second)) == ("train", ["--config=digits", "--workdir=DIR"])
    assert pages.words(third) == ["python", "-c", "import cfg_jax\n        print(1)"]
    assert fourth == "pip install x"


@each_page
def test_every_command_is_seen_to_work(page):
    for command in pages.commands(page.read_text()):
        assert pages.kind(command), f"nobody runs {command}: tests/pages.py says who runs what"


def test_a_command_that_nobody_runs_is_found():
    for command in ("python tests/cli.py", "bash launch/other.sh", "python -m http.server"):
        assert pages.kind(command) is None


@each_page
def test_every_job_takes_its_flags(page, cli):
    """Read by the job's own definitions and the config's schema; a workdir has what trained it."""
    configs, started = {}, []
    for command in pages.commands(page.read_text()):
        job, args = pages.job_of(pages.words(command)) or (None, [])
        if job is None or "--help" in args:
            continue
        flags = pages.flags(args)
        workdir = flags.get("workdir")
        if job == "train":
            configs[workdir] = flags["config"]
        elif workdir is not None:
            configs.setdefault(workdir, pages.config_of(workdir))
        started.append((command, cli.start(job, *args, parse_only=dict(configs))))
    for command, running in started:
        result = running.wait()
        assert result.status == 0, f"{command}\n{result.err[-2000:]}"


def test_a_command_with_a_wrong_flag_is_found(cli):
    """Or the test above says nothing."""
    for args in (["--confg=digits"], ["--config.model.chanels=8", "--config=digits"]):
        assert cli("train", "--workdir=DIR", *args, parse_only={}).status != 0
    assert cli("sample", "--workdir=DIR", "--ww=1", parse_only={"DIR": "digits"}).status != 0


@each_page
def test_what_is_installed_is_there(page):
    known = set(re.findall(r'^    "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE))
    for command in pages.commands(page.read_text()):
        if pages.kind(command) == "pip":
            extras = re.findall(r"\.\[([\w,]+)\]", command)
            assert {e for group in extras for e in group.split(",")} <= known, command
            assert all((ROOT / c).is_file() for c in re.findall(r" -c (\S+)", command)), command


# As the pages call them, but that each says what it would do.
DRY = """
set -euo pipefail
bash() {
  case $1 in
    launch/tpu.sh) command bash "$1" "$2" --dry_run "${@:3}" ;;
    launch/slurm.sh | launch/jobset.sh) command bash "$1" --dry_run "${@:2}" ;;
    launch/pack.sh) command bash "$@" ;;
  esac
}
docker() { case $1 in build) wc -c ;; *) echo docker "$@" ;; esac; }
"""


@each_page
def test_launchers_print_what_they_would_run(page):
    functions = DRY
    for command in pages.commands(page.read_text()):
        if command.startswith("tpu()"):
            functions += command + "\n"
        elif pages.kind(command) == "launcher":
            script = ["bash", "-c", functions + command]
            told = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
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
