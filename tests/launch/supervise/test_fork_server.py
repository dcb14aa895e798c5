"""A guardian and what it has forked: one process to whoever started it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pentad.launch.supervise.fork_protocol import open_wire
from pentad.parallel.comm.process_ids import ProcessId

ROOT = Path(__file__).resolve().parents[3]
_WHO = """
import json, os, signal, sys, threading
about = {
    "argv": sys.argv[1:], "cwd": os.getcwd(), "colour": os.environ.get("COLOUR"),
    "cpus": sorted(os.sched_getaffinity(0)),
    "torch": "torch" in sys.modules, "threads": threading.active_count(), "name": __name__, "pid": os.getpid(),
    "fds": len(os.listdir("/proc/self/fd")), "term": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    "int": signal.getsignal(signal.SIGINT) == signal.default_int_handler,
    "hup": signal.getsignal(signal.SIGHUP) == signal.SIG_DFL,
}
print(json.dumps(about), flush=True)
print("to stderr", file=sys.stderr)
line = sys.stdin.readline().strip()
if line == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if line == "raise":
    raise ArithmeticError("as python says it")
if line == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(21))
    print("ready", flush=True)
    while True:
        signal.pause()
sys.exit(int(line))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of a job whose fork server listens, with modules that can be run."""
    folder = tmp_path_factory.mktemp(
        "a folder whose name is longer than what an address of a socket may have " + "x" * 60
    )
    (folder / "who.py").write_text(_WHO)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "pentad.launch.supervise.fork_server", str(folder), str(os.getpid())]
    server = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
    (folder / "server").write_text(str(server.pid))
    yield folder
    server.kill()
    server.wait()


@pytest.fixture
def guardian(folder: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a guardian, as a launcher does."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pentad.launch.supervise.guardian", str(folder), "who", *arguments]
        environment = {**os.environ, "COLOUR": "green"}
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen(command, env=environment, cwd=tmp_path, text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def _about(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def _say(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


def test_it_is_as_if_python_had_been_started_but_that_torch_is_there(
    guardian: Callable[..., subprocess.Popen[str]], tmp_path: Path, folder: Path
) -> None:
    process = guardian("a", "b c")
    about = _about(process)
    assert about["argv"] == ["a", "b c"] and about["name"] == "__main__"
    assert (about["cwd"], about["colour"]) == (str(tmp_path), "green")
    assert about["cpus"] == sorted(os.sched_getaffinity(0))
    assert about["torch"] and about["threads"] == 1
    assert about["term"] and about["int"] and about["hup"] and about["fds"] <= 4
    server = int((folder / "server").read_text())
    assert len(list(Path(f"/proc/{server}/task").iterdir())) == 1, "a thread would not survive the fork"
    _say(process, "7")
    _, errors = process.communicate()
    assert (process.returncode, errors) == (7, "to stderr\n")


def test_it_ends_by_the_signal_or_with_the_traceback_of_what_it_stands_for(
    guardian: Callable[..., subprocess.Popen[str]],
) -> None:
    killed, failed = guardian(), guardian()
    for process, word in ((killed, "kill"), (failed, "raise")):
        _about(process)
        _say(process, word)
    killed.communicate()
    _, errors = failed.communicate()
    assert (killed.returncode, failed.returncode) == (-signal.SIGKILL, 1)
    assert errors.splitlines()[-1] == "ArithmeticError: as python says it"


def test_signals_are_passed_on_and_a_guardian_that_is_killed_is_a_rank_that_is_stopped(
    guardian: Callable[..., subprocess.Popen[str]],
) -> None:
    told, lost = guardian(), guardian()
    forked = {process: ProcessId(_about(process)["pid"]) for process in (told, lost)}
    for process in (told, lost):
        _say(process, "wait")
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    told.send_signal(signal.SIGTERM)
    told.communicate()
    assert told.returncode == 21
    lost.kill()
    until = time.monotonic() + 20
    while forked[lost].alive and time.monotonic() < until:
        time.sleep(0.01)
    assert not forked[lost].alive


def test_a_guardian_that_is_told_to_end_before_there_is_a_server_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pentad.launch.supervise.guardian", str(tmp_path), "who"]
    process = subprocess.Popen(command)
    while b"guardian" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
        time.sleep(0.01)
    time.sleep(0.2)
    process.terminate()
    assert process.wait(20) == -signal.SIGTERM


def test_what_is_no_request_is_refused_and_the_server_goes_on(
    folder: Path, guardian: Callable[..., subprocess.Popen[str]]
) -> None:
    while True:
        try:
            wires = [open_wire(folder) for _ in range(3)]
            break
        except OSError:
            time.sleep(0.05)
    wires[0].connection.sendall(b"no JSON\n")
    wires[1].send(run="who", env={}, cwd="/", cpus=[])
    wires[2].send(signal=1000)
    for wire in wires:
        with pytest.raises(ConnectionError):
            list(wire.read())
        wire.close()
    process = guardian()
    _about(process)
    _say(process, "0")
    process.communicate()
    assert process.returncode == 0


def test_a_guardian_imports_little() -> None:
    names = "import sys, json, pentad.launch.supervise.guardian; print(json.dumps(sorted(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", names], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    modules = json.loads(found)
    assert "pentad.launch.supervise.fork_protocol" in modules
    assert not {name.partition(".")[0] for name in modules} & {"torch", "numpy", "omegaconf", "yaml"}


def test_a_server_without_a_launcher_ends_after_its_ranks_and_removes_what_they_shared(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    start = """if True:
        import os, subprocess, sys
        nowhere = subprocess.DEVNULL
        command = [sys.executable, "-m", "pentad.launch.supervise.fork_server", sys.argv[1], str(os.getpid())]
        print(subprocess.Popen(command, stdout=nowhere, stderr=nowhere).pid)
    """
    command = [sys.executable, "-c", start, str(folder)]
    started = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    server = ProcessId(int(started.stdout))
    until = time.monotonic() + 60
    while (folder.exists() or server.alive) and time.monotonic() < until:
        time.sleep(0.05)
    assert not folder.exists() and not server.alive
