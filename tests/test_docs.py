"""README.md and docs/: what they say is so, and their commands work as printed."""

import importlib.util
import inspect
import os
import re
import shlex
import shutil

import pytest
import torch
from harness import ROOT, SMALL, run

import train_ppo
from benchmarks import results

PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
TEXT = "\n".join(PAGES.values())
TEST_FILES = (*ROOT.glob("test_*.py"), *ROOT.glob("tests/test_*.py"))
TESTS = {x for path in TEST_FILES for x in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}

# Commands that are not run as they are printed, and why.
NOT_RUN = {
    r"(pip|git|python\S* -m venv|\. \S*activate)\b.*": "installs or downloads: .ci/run does so",
    r"python -m pytest .*|\.ci/run": "runs these tests",
    r"python train_ppo\.py --env-id Ant .*": "needs Isaac Gym, or its stand-in in test_isaacgym.py",
    r"python tools/from_rl_games\.py .*": "needs a file of rl_games: test_rl_games.py",
    r"torchrun --nproc-per-node=2 train_ppo\.py": "several processes: test_processes.py",
    r"python benchmarks/\w+\.py.*": "minutes or hours",
    r"srun .*": "needs SLURM",
    r"tensorboard .*": "serves until it is stopped",
    r"wandb sync.*": "needs an account",
    r"export .*": "sets a variable of the shell",
}
PROGRAM = r"(?:[A-Z_]+=\S+ )*(?:python|pip|git|torchrun|tensorboard|wandb|srun|export) |\.ci/run"


def documented_commands():
    """All commands of the pages, `a && b` apart: the lines of their bash blocks but for scripts,
    and `code` that starts with a program."""
    blocks = re.findall(r"```bash\n(?!#!)(.*?)```", TEXT, re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    code = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S))
    lines += [piece for piece in code if re.match(PROGRAM, piece)]
    parts = [" ".join(part.split()) for x in lines for part in x.split("#")[0].split("&&")]
    return [command for command in dict.fromkeys(parts) if command]


COMMANDS = documented_commands()
RUN = [x for x in COMMANDS if not any(re.fullmatch(pattern, x, re.S) for pattern in NOT_RUN)]
assert len(RUN) > 10, "the pages' commands are found"


@pytest.mark.parametrize("command", RUN)
def test_documented_command_works_as_printed(command, here):
    """Trainings are shortened: to two epochs, or to one more where a run goes on."""
    if "NAME" in command:
        run(*SMALL, "--experiment=NAME")
        shutil.copy("runs/NAME/nn/last.pth", "runs/NAME/nn/best.pth")
        shutil.copy("runs/NAME/nn/last.pth", "runs/NAME/nn/epoch_50.pth")
    for name in ("train_ppo.py", "examples", "tools"):
        os.symlink(str(ROOT / name), name)
    program, script, *words = shlex.split(command)
    if re.search("mujoco_|gymnasium_env", command):
        pytest.importorskip("mujoco", minversion="3.3.3")
    if "go1" in command and not importlib.util.find_spec("mjlab"):
        pytest.skip("needs mjlab's files")
    assert program == "python", f"{command}: say in NOT_RUN why it is not run"
    if script.startswith(("train_ppo", "examples/")):
        words += ["--max-epochs", "5" if "--checkpoint" in words else "2"]
    done = run(*words, script=script)
    assert not re.search("^(warning|error|Traceback)", done.out + done.err, re.M), done.err


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_page_is_true_where_it_names_things(page):
    """Its links, their anchors, and tests."""
    text = PAGES[page]
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
            assert anchor in anchors, link
    assert set(re.findall(r"`(test_\w+)`", text)) <= TESTS


def test_flags_that_pages_name_exist():
    text = TEXT.replace(PAGES[ROOT / "docs" / "changelog.md"], "")  # it names what is gone
    named = re.findall(r"`(--[a-z][a-z-]*)", text)
    for line in re.findall(r"(?:train_ppo|own_observer|record_video|evaluate)\.py +(.*)", text):
        named += re.findall(r"(?<!\S)--[a-z][a-z-]*", re.split("[#`]", line)[0])
    for sweep in re.findall(r"^parameters:\n((?: +.*\n)+)", text, re.M):
        named += [f"--{name}" for name in re.findall(r"^ +([\w-]+):", sweep, re.M)]
    scripts = [*ROOT.glob("tools/*.py"), *ROOT.glob("benchmarks/*.py")]
    code = "".join(path.read_text() for path in scripts)
    flags = re.findall('"--([a-z-]+)"', code) + re.findall(r"^    (\w+): .+ = ", code, re.M)
    flags = {f"--{name.replace('_', '-')}" for name in flags}
    flags |= set(re.findall(r"--[a-z][a-z-]*", run("--help").out))
    assert len(named) > 50 and set(named) - flags == set()


def test_results_and_readme_say_what_the_kept_runs_say():
    assert results.check() == []


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
