"""Nothing outlives the tests, however pytest ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from patience import PATIENCE, wait_for
from processes import lives

# A test that starts a process, and one in a session of its own whose parent ends, and then waits for its end.
TEST = '''
import os, subprocess, sys
from pathlib import Path

NAP = [sys.executable, "-c", "import time; time.sleep(3600)"]
DETACHED = f"""
import subprocess
print(subprocess.Popen({NAP}, stdout=subprocess.DEVNULL, start_new_session=True).pid)
"""

def test_that_starts_processes():
    child = subprocess.Popen(NAP)
    asked = subprocess.run([sys.executable, "-c", DETACHED], stdout=subprocess.PIPE, text=True, check=True)
    Path("pids.new").write_text(f"{os.getpid()} {child.pid} {asked.stdout}")
    Path("pids.new").rename("pids")
    child.wait()
'''


@pytest.mark.long
@pytest.mark.parametrize(
    ("workers", "which", "number"),
    [
        pytest.param(0, "pytest", "SIGKILL", id="killed"),
        pytest.param(1, "pytest", "SIGKILL", id="killed over its worker"),
        pytest.param(1, "worker", "SIGKILL", id="worker killed"),
        pytest.param(0, "pytest", "SIGINT", id="Ctrl-C"),
        pytest.param(0, "child", "SIGKILL", id="the test fails"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="no such signals there")
def test_nothing_is_left_of_a_run_that_is_ended(
    tmp_path: Path, processes_end: None, workers: int, which: str, number: str
) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(TEST)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-n", str(workers), "--max-worker-restart=0"]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))
    } | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with (tmp_path / "said").open("wb") as output:
        run = subprocess.Popen(
            # a shell starts what is to run in the background with Ctrl-C ignored, and children inherit that
            command,
            **{"cwd": tmp_path, "env": environment, "stdout": output, "stderr": output},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    wait_for(lambda: (tmp_path / "pids").exists() or run.poll() is not None, "the test inside")
    assert run.returncode is None, (tmp_path / "said").read_text()
    worker, child, detached = map(int, (tmp_path / "pids").read_text().split())
    processes = [psutil.Process(pid) for pid in (run.pid, worker, child, detached)]
    processes += processes[0].children(recursive=True)
    assert all(map(lives, processes)) and len(set(processes)) == (6 if workers else 4)
    os.kill({"pytest": run.pid, "worker": worker, "child": child}[which], getattr(signal, number))
    run.wait(PATIENCE)
    wait_for(lambda: not any(map(lives, processes)), f"the end of {processes}")
