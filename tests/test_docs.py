"""README.md and docs/: what they say is so, and their commands work as printed."""

import ast
import dataclasses
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from harness import ROOT, SMALL, finish, run, start

import train_ppo

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
TEST_FILES = (*ROOT.glob("test_*.py"), *ROOT.glob("tests/test_*.py"))
TESTS = {x for path in TEST_FILES for x in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}

# Commands that are not run as they are printed, and why. A new command is run, unless a line here
# covers it.
NOT_RUN = {
    r"(pip|git|python\S* -m venv|\. \S*activate)\b.*": "installs or downloads: .ci/run does so",
    r"python -m pytest .*|\.ci/run": "runs these tests",
    r"python train_ppo\.py --env-id Ant .*": "needs Isaac Gym, or its stand-in in test_isaacgym.py",
    r"python tools/from_rl_games\.py .*": "needs a file of rl_games: test_rl_games.py",
    r"torchrun --nproc-per-node=2 train_ppo\.py": "several processes: test_processes.py",
    r"python benchmarks/\w+\.py.*": "minutes or hours",
    r"#!/bin/bash.*|srun .*": "needs SLURM; only its syntax is checked",
    r"wandb sync.*": "needs an account",
    r"export .*": "sets a variable of the shell",
}
PROGRAM = r"(?:[A-Z_]+=\S+ )*(?:python|pip|git|torchrun|tensorboard|wandb|srun|export) |\.ci/run"


def documented_commands():
    """All commands of the pages, `a && b` apart: the lines of their bash blocks, of which a script
    counts as one, and `code` that starts with a program."""
    lines, scripts = [], []
    for text in PAGES.values():
        for block in re.findall(r"```bash\n(.*?)```", text, re.S):
            is_script = block.startswith("#!")
            scripts += [block] if is_script else []
            lines += [] if is_script else block.replace("\\\n", " ").splitlines()
        code = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
        lines += [piece for piece in code if re.match(PROGRAM, piece)]
    parts = [" ".join(part.split()) for x in lines for part in x.split("#")[0].split("&&")]
    return scripts + [command for command in dict.fromkeys(parts) if command]


COMMANDS = documented_commands()
RUN = [x for x in COMMANDS if not any(re.fullmatch(pattern, x, re.S) for pattern in NOT_RUN)]


@pytest.fixture(scope="module")
def name_run(tmp_path_factory):
    """A short run that the commands know as runs/NAME, with the files that they name."""
    folder = tmp_path_factory.mktemp("docs")
    finish(start(*SMALL, "--experiment=NAME", cwd=folder), cwd=folder)
    nn = folder / "runs" / "NAME" / "nn"
    shutil.copy(str(nn / "last.pth"), str(nn / "best.pth"))
    shutil.copy(str(nn / "last.pth"), str(nn / "epoch_50.pth"))
    return folder / "runs"


@pytest.mark.parametrize("command", RUN)
def test_documented_command_works_as_printed(command, name_run, here):
    """Trainings are shortened: to two epochs, or to one more where a run goes on."""
    shutil.copytree(str(name_run), "runs")
    for name in ("train_ppo.py", "examples", "tools"):
        os.symlink(str(ROOT / name), name)
    program, *words = shlex.split(command)
    if "examples.mujoco_ant:make_env" in words:
        pytest.importorskip("mujoco", minversion="3.3")
    if program == "tensorboard":
        command = [sys.executable, "-m", "tensorboard.main", *words, "--port=0"]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as server:
            assert any(b"http://" in line for line in server.stderr), "it does not serve"
            server.terminate()
        return
    assert program == "python", f"{command}: say in NOT_RUN why it is not run"
    if words[0].startswith(("train_ppo", "examples/")):
        words += ["--max-epochs", "5" if "--checkpoint" in words else "2"]
    done = finish(start(*words[1:], script=words[0]))
    assert not re.search("^(warning|error|Traceback)", done.out + done.err, re.M), done.err


def test_list_of_commands_that_are_not_run_is_true():
    assert len(RUN) > 10, "the pages' commands are found"
    for pattern, reason in NOT_RUN.items():
        assert [x for x in COMMANDS if re.fullmatch(pattern, x, re.S)], f"is gone: {pattern}"
        named = set(re.findall(r"\btest_\w+\.py", reason))
        assert named <= {path.name for path in TEST_FILES}, reason
    (script,) = [x for x in COMMANDS if x.startswith("#!")]
    subprocess.run(["bash", "-n"], input=script.encode(), check=True)


def arguments():
    """All flags of train_ppo.py and of the scripts."""
    scripts = [*ROOT.glob("tools/*.py"), *ROOT.glob("benchmarks/*.py")]
    text = "".join(path.read_text() for path in scripts)
    names = re.findall('"--([a-z-]+)"', text) + re.findall(r"^    (\w+): .+ = ", text, re.M)
    for field in dataclasses.fields(train_ppo.Args):
        names += [field.name, f"no-{field.name}"] if field.type is bool else [field.name]
    return {"--help"} | {f"--{name.replace('_', '-')}" for name in names}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_page_is_true_where_it_names_things(page):
    """Its links and anchors, tests, arguments and tables."""
    text = PAGES[page]
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not link.startswith(("http://", "https://")):
            assert target.exists(), link
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.M) if anchor else []
            anchors = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
            assert not anchor or anchor in anchors, link
    assert set(re.findall(r"`(test_\w+)`", text)) <= TESTS
    for part in re.findall(r"pytest[^`\n]* -k (\w+)", text):
        assert [test for test in TESTS if part in test], part
    named = re.findall(r"`(--[a-z][a-z-]*)", text)
    for line in re.findall(r"(?:train_ppo|own_observer|record_video|evaluate)\.py +(.*)", text):
        named += re.findall(r"(?<!\S)--[a-z][a-z-]*", re.split("[#`]", line)[0])
    for sweep in re.findall(r"^parameters:\n((?: +.*\n)+)", text, re.M):
        named += [f"--{name}" for name in re.findall(r"^ +([\w-]+):", sweep, re.M)]
    if page.name != "changelog.md":  # it names what is gone
        assert set(named) <= arguments()
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert len(set(cells)) == 1, f"a | in a cell must be \\|: {table}"


PICTURES = [*ROOT.glob("docs/*.gif"), *ROOT.glob("docs/*.png")]


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_page_with_a_picture_describes_it_and_says_what_made_it(picture):
    shown = rf"!\[[^\]]{{20,}}\]\((docs/)?{picture.name}\)"
    pages = [text for text in PAGES.values() if re.search(shown, text)]
    assert pages, "no page shows it, with what it shows in words"
    for text in pages:
        assert f"`python benchmarks/pictures.py {picture.stem}`" in text
    assert f"\ndef {picture.stem}(" in (ROOT / "benchmarks" / "pictures.py").read_text()


def test_metrics_md_explains_all_tags_and_no_others(here):
    ones = torch.ones(32)
    infos = dict(episode={"key": ones}, episode_cumulative={"key": ones}, key=1.0)
    curves = run(*SMALL, env=dict(infos=infos, lengths=5)).curves
    text = PAGES[ROOT / "docs" / "metrics.md"]
    tables = re.findall(r"^\|(.*\| tag| tag) \|.*\n((?:\|.*\n)+)", text, re.M)
    explained = set()
    for header, rows in tables:
        column = header.count("|") + 1
        for row in rows.splitlines()[1:]:
            explained |= set(re.findall(r"`([^`]+)`", row.split("|")[column]))
    episodes = r"^(rewards|shaped_rewards|episode_lengths)/(step|iter|time)$"
    logged = {re.sub(episodes, r"\1", tag.replace("key", "<key>")) for tag in curves}
    assert logged == explained


def test_version_and_number_of_lines_are_those_that_pages_say():
    latest = re.search(r"^## (\S+) ", PAGES[ROOT / "docs" / "changelog.md"], re.M).group(1)
    assert train_ppo.__version__ == latest
    assert f"version: {latest}\n" in (ROOT / "CITATION.cff").read_text()
    lines, first = inspect.getsourcelines(train_ppo.PPOAgent.train)
    assert "in the first 600 lines" in PAGES[ROOT / "README.md"] and first + len(lines) <= 601


@pytest.mark.parametrize("path", sorted(ROOT.glob("**/*.py")), ids=lambda path: path.name)
def test_file_has_no_syntax_newer_than_python_3_8(path):
    ast.parse(path.read_text(), filename=str(path), feature_version=(3, 8))
