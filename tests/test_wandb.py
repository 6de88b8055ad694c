"""Weights & Biases: real runs, read from their files, and a server's troubles."""

import json
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from harness import SMALL, finish, run, start, wait_for

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

OFFLINE = "recording offline, upload later: wandb sync "
LATER = "W&B is too slow: upload the rest later by wandb sync "
TROUBLES = {"none": "", "refused": OFFLINE, "silent": OFFLINE, "silent later": LATER}
PROJECT = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
ANSWERS = {  # of a server, to all that W&B's client asks
    "serverInfo": {"features": []},
    "upsertBucket": {"bucket": {"id": "b", "name": "r", "project": PROJECT}, "inserted": True},
    "createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []},
}
# With exit hooks, which must not wait either, and ten seconds of patience with W&B.
WHOLE_PROGRAM = """
import atexit, threading, train_ppo
join = threading.Thread.join
threading.Thread.join = lambda self, timeout=None: join(self, timeout and min(timeout, 10))
train_ppo.main()
atexit._run_exitfuncs()
"""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if server.silent:
            time.sleep(600)
        server.silent |= server.trouble == "silent later" and b"UpsertBucket" in body
        if self.path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            server.rows += [json.loads(row) for row in history.get("content", ())]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": ANSWERS}).encode())


@pytest.fixture(scope="module", autouse=True)
def troubled(tmp_path_factory):
    """{trouble: (server, process, its folder)}"""
    started = {}
    for trouble, warning in TROUBLES.items():
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.trouble, server.silent, server.rows = trouble, trouble == "silent", []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = 9 if trouble == "refused" else server.server_port
        folder = tmp_path_factory.mktemp("wandb")
        (folder / "program.py").write_text(WHOLE_PROGRAM)
        environ = dict(WANDB_MODE="online", WANDB_API_KEY="0" * 40, WANDB_SILENT="true")
        environ.update(WANDB_BASE_URL=f"http://127.0.0.1:{port}", HOME=str(folder))
        environ["WANDB_INIT_TIMEOUT"] = "3" if warning == OFFLINE else "60"
        environ["WANDB_ERROR_REPORTING"] = "false"  # W&B would wait for its telemetry
        process = start(*SMALL, "--track", environ=environ, cwd=folder, script="program.py")
        started[trouble] = (server, process, folder)
    return started


# WHAT IS SENT =====================================================================================


class Writes(train_ppo.AlgoObserver):
    def after_print_stats(self, frame, epoch_num, total_time):
        self.writer.add_scalar("mine/a*b", 3.0, epoch_num)

    def close(self):
        self.writer.add_scalar("mine/at the end", 4.0, self.algo.frame)


def test_every_scalar_is_there_over_its_x_axis_in_one_run(here):
    env = dict(lengths=4, infos={"episode": {"time": 5.0}, "lap": 6.0})
    flags = ("--track", "--experiment=r", "--save-best-after=2", "--games-to-track=8")
    run(*SMALL, *flags, env=env, observers=[Writes()])
    done = run("--checkpoint=runs/r", "--max-epochs=6", env=env, observers=[Writes()])
    first, second = wandb_runs(done)
    assert first.run.run_id == second.run.run_id == done.state()["wandb_run_id"]
    rows, curves = first.rows + second.rows, done.curves
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 4, 5, 6, 6], "and what close() writes"
    sent = {tag for row in rows for tag in row if not tag.startswith("_")}
    assert sent == {*curves, "epoch", "global_step", "time"}
    axes = first.axes
    assert second.axes == axes and set(curves) - set(axes) == {"mine/a*b"}
    for tag, points in curves.items():
        found = [row for row in rows if tag in row]
        assert [np.float32(row[tag]) for row in found] == [np.float32(v) for _, v in points], tag
        steps = [int(row[axes.get(tag, "epoch")]) for row in found]
        assert steps == [step for step, _ in points], tag

    arguments = json.loads((done.folder / "config.json").read_text())["args"]
    assert arguments.items() <= first.config.items() and "warning: " not in done.err
    best, summary = done.state("best.pth"), second.summary
    assert summary["best_reward"] == best["last_mean_rewards"]
    assert summary["best_epoch"] == best["best_epoch"]


def test_wandbs_own_variables_win_and_a_file_begins_a_run_of_its_own(here):
    mine = dict(WANDB_RUN_ID="mine1234", WANDB_PROJECT="theirs", WANDB_NAME="named")
    mine.update(WANDB_ENTITY="team", WANDB_TAGS="x", WANDB_RUN_GROUP="g")
    flags = ("--track", "--wandb-project-name=ours", "--wandb-entity=us")
    done = finish(start(*SMALL, "--max-epochs=1", *flags, "--experiment=r", environ=mine))
    (part,) = wandb_runs(done)
    assert (part.run.run_id, part.run.project, part.run.entity) == ("mine1234", "theirs", "team")
    assert (part.run.display_name, list(part.run.tags), part.run.run_group) == ("named", ["x"], "g")
    assert done.state()["wandb_run_id"] == "mine1234"

    flags = ("--checkpoint=runs/r/nn/last.pth", "--max-epochs=2", *flags, "--experiment=s")
    (part,) = wandb_runs(run(*flags))
    assert (part.run.project, part.run.entity, part.run.display_name) == ("ours", "us", "s")
    assert part.run.run_id != "mine1234" and [row["epoch"] for row in part.rows] == [2]


def test_a_missing_wandb_is_one_warning_with_track_and_nothing_without(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # which makes the import fail
    done = run(*SMALL, "--track")
    assert done.err.count("warning: ") == 1 and "without WandbAlgoObserver" in done.err
    assert done.state()["epoch"] == 4
    assert "warning: " not in run(*SMALL, "--max-epochs=1").err


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_servers_trouble_ends_no_training_and_is_named(trouble, troubled):
    server, process, folder = troubled[trouble]
    done = finish(process, cwd=folder)
    assert done.state()["epoch"] == 4
    assert done.err.count("warning: ") == (trouble != "none"), done.err
    assert TROUBLES[trouble] in done.err
    if TROUBLES[trouble] == OFFLINE:
        (path,) = done.folder.glob("wandb/offline-run-*/*.wandb")
        assert [row["epoch"] for row in WandbRun(path).rows] == [1, 2, 3, 4]
    if trouble == "none":
        assert [row["global_step"] for row in server.rows] == [256, 512, 768, 1024]
