"""Weights & Biases: real runs, read from their files, and a server's troubles."""

import functools
import http.server
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from harness import ROOT, SMALL, Run, finish, run, start, wait_for
from test_processes import processes

import train_ppo

wandb_internal_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")


class WandbRun:
    """A W&B run, read from the file that it writes."""

    def __init__(self, path):
        self.rows, self.axes, self.summary = [], {}, {}
        for record in records(path):
            if record.HasField("run"):
                self.run = record.run
                self.config = values(record.run.config.update)
            elif record.HasField("history"):
                self.rows.append(values(record.history.item))
            elif record.HasField("metric"):
                self.axes[record.metric.name] = record.metric.step_metric
            elif record.HasField("summary"):
                self.summary.update(values(record.summary.update))


def values(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def records(path):
    """The records of such a file, which is a log like LevelDB's: blocks of 32768 bytes."""
    data, position, buffer = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if position % 32768 > 32768 - 7:  # too few are left for a header
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        buffer = b"" if kind in (1, 2) else buffer  # 1, 2: a record begins; 1, 4: it ends
        buffer += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(buffer)


def wandb_runs(done):
    """The W&B runs under a run folder, oldest first. A file may be complete a little after the end
    of a run that took place in this process."""
    files = sorted(done.folder.glob("wandb/*run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    wait_for(lambda: any(record.HasField("exit") for record in records(files[-1])))
    return [WandbRun(path) for path in files]


# A SERVER'S TROUBLES ==============================================================================
# Their runs are started first and looked at last, because they mostly wait.


class WandbServer(http.server.ThreadingHTTPServer):
    """As much of a W&B server as its client needs, and what may be wrong with it."""

    daemon_threads = True

    def __init__(self, trouble):
        super().__init__(("127.0.0.1", 0), Handler)
        self.trouble = trouble
        self.in_trouble = trouble in ("errors", "silent")
        self.rows = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()
        if trouble == "refused":
            self.shutdown()
            self.server_close()

    def handle_error(self, *_): ...  # clients may hang up at any time


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.server.in_trouble and "silent" in self.server.trouble:
            time.sleep(600)
        data = {}
        if self.path == "/graphql":
            data = self.answer_query(json.loads(body))
        elif self.path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            self.server.rows += [json.loads(row) for row in history.get("content", ())]
        self.send_response(500 if self.server.trouble == "errors" else 200)
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())

    do_GET = do_POST = do_PUT = answer

    def answer_query(self, query):
        names = query.get("variables", {})
        wanted = query["query"].split("(")[0].split("{")[0].split()[-1]
        project = {"id": "p", "name": names.get("project"), "entity": {"id": "e", "name": "e"}}
        bucket = {"id": "b", "name": names.get("name"), "displayName": "r", "project": project}
        paths = [{"name": x, "uploadUrl": f"{self.server.url}/{x}"} for x in names.get("files", ())]
        files = {"runID": "b", "uploadHeaders": [], "files": paths}
        answers = {"UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        answers.update(RunResumeStatus={"model": None}, CreateRunFiles={"createRunFiles": files})
        answers["ServerFeaturesQuery"] = {"serverInfo": {"features": []}}
        if wanted == "UpsertBucket" and self.server.trouble == "silent later":
            self.server.in_trouble = True
        return {"data": answers.get(wanted, {})}

    def log_message(self, *_): ...


OFFLINE = "recording offline, upload later: wandb sync "
TROUBLES = dict(none=None, refused=OFFLINE, errors=OFFLINE, silent=OFFLINE)  # and the warning
TROUBLES["silent later"] = "W&B is too slow: upload the rest later by wandb sync "
# The whole program, whose exit hooks must not wait either; it waits for W&B 3 seconds at most.
IMPATIENT = """
import threading, train_ppo
join = threading.Thread.join
threading.Thread.join = lambda self, timeout=None: join(self, timeout and min(timeout, 3))
train_ppo.main()
"""


@pytest.fixture(scope="module", autouse=True)
def troubled(tmp_path_factory):
    """trouble -> (server, function that waits for the end and returns the Run)."""
    started = {}
    for trouble in TROUBLES:
        folder, server = tmp_path_factory.mktemp("wandb"), WandbServer(trouble)
        environ = dict(HOME=str(folder), WANDB_MODE="online", WANDB_API_KEY="0" * 40)
        environ.update(WANDB_BASE_URL=server.url, WANDB_SILENT="true")
        environ["WANDB_INIT_TIMEOUT"] = "3" if TROUBLES[trouble] == OFFLINE else "60"
        environ["WANDB_ERROR_REPORTING"] = "false"  # W&B would wait for its telemetry
        flags = (*SMALL, "--track", "--experiment=r")
        if trouble != "silent later":
            process = start(*flags, environ=environ, cwd=folder)
            started[trouble] = (server, functools.partial(finish, process, cwd=folder))
            continue
        environ = {**os.environ, **environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", IMPATIENT, *flags]
        with open(str(folder / "err"), "w") as err:
            process = subprocess.Popen(command, cwd=str(folder), env=environ, stderr=err)

        def wait(process=process, folder=folder):
            assert process.wait(150) == 0
            return Run("", (folder / "err").read_text(), 0, folder / "runs" / "r")

        started[trouble] = (server, wait)
    yield started
    for server, _ in started.values():
        server.server_close()


# WHAT IS SENT =====================================================================================


class Writes(train_ppo.AlgoObserver):
    def after_print_stats(self, frame, epoch_num, total_time):
        self.writer.add_scalar("mine/time", 2.0, frame)
        self.writer.add_scalar("mine/a*b", 3.0, epoch_num)

    def close(self):
        self.writer.add_scalar("mine/at the end", 4.0, self.algo.frame)


AXES = {"mine/time": "global_step", "Episode/time": "epoch", "lap/time": "time"}
AXES.update({"lap/frame": "global_step", "lap/iter": "epoch", "rewards/step": "global_step"})
AXES.update({"rewards/iter": "epoch", "rewards/time": "time", "info/kl": "global_step"})
AXES.update({"performance/step_time": "global_step", "mine/a*b": None})


def test_every_scalar_is_there_over_its_x_axis_in_one_run(here):
    env = dict(lengths=4, infos={"episode": {"time": 5.0}, "lap": 6.0})
    flags = ("--track", "--experiment=r", "--save-best-after=2", "--games-to-track=8")
    run(*SMALL, *flags, env=env, observers=[Writes()])
    done = run("--checkpoint=runs/r", "--max-epochs=6", env=env, observers=[Writes()])
    assert done.err == ""
    runs = wandb_runs(done)
    assert [part.run.run_id for part in runs] == [done.state()["wandb_run_id"]] * 2
    rows = runs[0].rows + runs[1].rows
    ends = [row for row in rows if "mine/at the end" in row]
    assert [(row["epoch"], row["global_step"]) for row in ends] == [(4, 1024), (6, 1536)]
    rows = [row for row in rows if row not in ends]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["global_step"] for row in rows] == [256 * i for i in range(1, 7)]

    curves = done.curves
    assert [value for _, value in curves.pop("mine/at the end")] == [4.0, 4.0]
    sent = set().union(*rows) - {"epoch", "global_step", "time"}
    assert {tag for tag in sent if not tag.startswith("_")} == set(curves)
    for part in runs:
        assert {tag: part.axes.get(tag) for tag in AXES} == AXES
        assert set(curves) - set(part.axes) == {"mine/a*b"}
    for tag, points in curves.items():
        found = [row for row in rows if tag in row]
        assert [np.float32(row[tag]) for row in found] == [np.float32(v) for _, v in points], tag
        axis = runs[0].axes.get(tag, "epoch")
        assert [int(row[axis]) for row in found] == [step for step, _ in points], tag

    arguments = json.loads((done.folder / "config.json").read_text())["args"]
    assert arguments.items() <= runs[0].config.items()
    best = done.state("best.pth")
    assert runs[1].summary["best_reward"] == best["last_mean_rewards"]
    assert runs[1].summary["best_epoch"] == best["best_epoch"]


def test_wandbs_own_variables_win(here):
    mine = dict(WANDB_RUN_ID="mine1234", WANDB_PROJECT="theirs", WANDB_NAME="named")
    mine.update(WANDB_ENTITY="team", WANDB_TAGS="x", WANDB_RUN_GROUP="g")
    flags = ("--track", "--wandb-project-name=ours", "--wandb-entity=us", "--experiment=r")
    done = finish(start(*SMALL, "--max-epochs=1", *flags, environ=mine))
    (part,) = wandb_runs(done)
    assert (part.run.run_id, part.run.project, part.run.entity) == ("mine1234", "theirs", "team")
    assert (part.run.display_name, list(part.run.tags), part.run.run_group) == ("named", ["x"], "g")
    assert done.state()["wandb_run_id"] == "mine1234"


def test_a_file_turns_nothing_on_and_begins_a_run_of_its_own(here):
    flags = ("--track", "--wandb-project-name=ours", "--wandb-entity=us", "--experiment=r")
    first = run(*SMALL, *flags, "--max-epochs=1")
    (part,) = wandb_runs(first)
    assert (part.run.project, part.run.entity, part.run.display_name) == ("ours", "us", "r")
    shutil.copy(str(first.folder / "nn" / "last.pth"), "strangers.pth")
    untracked = run("--checkpoint=strangers.pth", "--max-epochs=2")
    args = untracked.state()["args"]
    assert (args["track"], args["wandb_project_name"]) == (False, "train_ppo")
    assert args["wandb_entity"] == ""
    assert not (untracked.folder / "wandb").exists()
    (part,) = wandb_runs(run("--checkpoint=strangers.pth", "--max-epochs=2", "--track"))
    assert part.run.run_id != first.state()["wandb_run_id"]
    assert [row["epoch"] for row in part.rows] == [2]


def test_a_missing_wandb_is_one_warning_with_track_and_nothing_without(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # which makes the import fail
    done = run(*SMALL, "--track")
    assert done.err.count("warning: ") == 1 and "without WandbAlgoObserver" in done.err
    assert [value for _, value in done.curves["info/epochs"]] == [1, 2, 3, 4]
    assert run(*SMALL, "--max-epochs=1").err == ""


def test_only_rank_0_imports_wandb(here):
    for rank in "01":
        Path(rank).mkdir()
    Path("1/wandb.py").write_text("open('imported', 'w')")  # what the second process would import
    flags = (*SMALL, "--device=cpu", "--max-epochs=1", "--track", "--experiment=r")
    processes(2, *flags, "--env-id=Cartpole", codes=(0, 0), folders="01")
    assert len(wandb_runs(Run("", "", 0, Path("0/runs/r")))) == 1
    assert os.listdir("1") == ["wandb.py"]


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_servers_trouble_ends_no_training_and_is_named(trouble, troubled):
    server, wait = troubled[trouble]
    done = wait()
    assert done.state()["epoch"] == 4
    assert done.err.count("warning: ") == (trouble != "none"), done.err
    assert (TROUBLES[trouble] or "") in done.err
    if TROUBLES[trouble] == OFFLINE:
        run = wandb_runs(done)[-1]
        assert [row["epoch"] for row in run.rows] == [1, 2, 3, 4]
        assert list(done.folder.glob("wandb/offline-run-*")) != []
    if trouble == "none":
        assert [row["global_step"] for row in server.rows] == [256, 512, 768, 1024]
