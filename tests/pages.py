"""What stands on the pages: their commands and their Python, and who runs each of them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "cfg_jax" / "trained" / "README.md",
    ROOT / "launch" / "models" / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
]
PROGRAMS = r"(?:[A-Z_]+=\S+ )*(?:python|bash|pip|sphinx-build|tpu|ssh-add|apt-get)"
# What a command begins with -> who sees that it works. One that begins otherwise is seen by nobody,
# and fails a test.
KINDS = {
    r"python -m cfg_jax\.": "job",  # run
    r"python -c ": "python",  # run
    # Minutes or hours of measuring; their own tests run them in small. Here: their parser.
    r"python (-m benchmarks\.|benchmarks/|tests/faults\.py)": "parsed",
    r"bash launch/(tpu|slurm|jobset|pack)\.sh |tpu": "launcher",  # dry runs: they rent machines
    r"(python -m )?pip install ": "pip",  # from the network: what they name is there
    r"bash launch/demo\.sh": "demo",  # run, but for the environment that it makes
    r"bash launch/test\.sh": "test",  # runs this
    r"(ssh-add|apt-get) ": "system",  # changes the machine: nobody
    r"sphinx-build ": "pages",  # test_the_pages_build_without_a_warning
}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands of a page: of fenced blocks, then indented ones, then those within prose."""
    text = re.sub(r"\\\n\s*", "", text)
    lines = "\n".join(blocks(text, "bash")).splitlines()
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    # Quotes may hold lines.
    lines += re.findall(rf'^    +((?:{PROGRAMS})\b(?:[^"\n]|"[^"]*")*)$', rest, re.MULTILINE)
    within = re.findall(rf"`((?:{PROGRAMS})\s[^`]+)`", rest)
    lines += [" ".join(command.split()) for command in within]
    lines = [line.split(" # ")[0].strip() for line in lines]
    return [line for line in lines if line]


def kind(command: str) -> str | None:
    """Of KINDS; None for a command that nobody runs."""
    return next((kind for start, kind in KINDS.items() if re.match(start, command)), None)


def words(command: str) -> list[str]:
    """A command's words, without what a synopsis leaves open: [--labels=0,3] is read, [...] not."""
    command = re.sub(r"\[[^\]]*(?:\.\.\.|FIELD)[^\]]*\]", "", command)
    return shlex.split(re.sub(r"\[(--[^\]]*)\]", r"\1", command))


def flags(args: list[str]) -> dict[str, str]:
    """{"workdir": "DIR"} of ["--workdir=DIR"]."""
    return dict(a.removeprefix("--").partition("=")[::2] for a in args)


def job_of(argv: list[str]) -> tuple[str, list[str]] | None:
    """(job, its flags) of a command that runs one here or has it run elsewhere."""
    if argv[:2] == ["python", "-m"] and argv[2].startswith("cfg_jax."):
        return argv[2].removeprefix("cfg_jax."), argv[3:]
    if argv[0] in ("bash", "tpu") and "--" in argv:
        at = argv.index("--")
        return flags(argv[:at]).get("job", "train"), argv[at + 1 :]
    return None


def config_of(workdir: str) -> str:
    """What trained the folder of that name, where no command says it."""
    name = Path(workdir).stem
    return name if (ROOT / "configs" / f"{name}.py").is_file() else "digits"
