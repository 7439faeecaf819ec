"""Worker processes: every item gets its own outcome, whatever hangs, crashes or is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hang import HANG

import grpo_fast.rewards.pool
from grpo_fast.rewards import WorkerPool

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="worker processes need POSIX process groups and alarms")

FUNCTION = """
import ctypes, os, signal, subprocess, sys, time

def act(item):
    match item:
        case "hang in C":  # holds the interpreter: no thread, no Python signal handler gets a turn
            ctypes.PyDLL(None).sleep(60)
        case "ignore signals":
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
                signal.signal(number, signal.SIG_IGN)
            time.sleep(60)
        case "raise":
            raise KeyError("on purpose")
        case "exit":
            os._exit(3)
        case "leave":
            sys.exit("on purpose")
        case "print":
            print("noise", flush=True)
        case "unpicklable":
            return lambda: None
        case "child":
            return subprocess.Popen(["sleep", "600"]).pid
        case "child, then hang":
            open(os.environ["CHILD_FILE"], "w").write(str(subprocess.Popen(["sleep", "600"]).pid))
            time.sleep(60)
        case "memory":
            return len(bytearray(4 << 30))
        case "pid":
            return os.getpid()
        case "torch":
            return "torch" in sys.modules
    return ("did", item)
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    path = tmp_path_factory.mktemp("pool") / "actions.py"
    path.write_text(FUNCTION)
    return str(path), "act"


@pytest.fixture(scope="module")
def pool(target):
    with WorkerPool(target, workers=2) as pool:
        yield pool


def test_outcomes_keep_their_places(pool):
    """Twenty items through two workers, those that fail between those that do not: no value moves to another item."""
    items: list = list(range(20))
    items[3], items[8], items[13] = "raise", "exit", "hang in C"
    outcomes = pool.map(items, timeout=1.5)
    assert len(outcomes) == 20
    for item, outcome in zip(items, outcomes, strict=True):
        if isinstance(item, int):
            assert outcome == (("did", item), None, False)
    assert "KeyError: 'on purpose'" in outcomes[3].error and "actions.py" in outcomes[3].error
    assert outcomes[8].error == "its worker process ended with exit status 3"
    assert outcomes[13].timed_out and outcomes[13].error == "it took longer than 1.5 s, and its worker process was killed"
    assert [o.timed_out for o in outcomes].count(True) == 1


def test_what_ignores_signals_is_killed_and_the_pool_goes_on(pool):
    begin = time.monotonic()
    late, fine = pool.map(["ignore signals", 1], timeout=0.5)
    assert late.timed_out and fine.value == ("did", 1)
    assert time.monotonic() - begin < 50  # not the minute that it sleeps
    assert pool.map([2], timeout=HANG)[0].value == ("did", 2)


def test_odd_behaviour_is_an_error_of_its_item(pool):
    leaves, prints, unpicklable = pool.map(["leave", "print", "unpicklable"], timeout=HANG)
    assert "ended with exit status" in leaves.error
    assert prints.value == ("did", "print")  # what it printed did not get between the results
    assert "its result cannot be sent back" in unpicklable.error


def test_workers_stay_and_do_not_import_torch(target):
    with WorkerPool(target) as pool:
        first = pool.map(["pid", "pid"], timeout=HANG)
        assert first[0].value == first[1].value == pool.map(["pid"], timeout=HANG)[0].value
        assert first[0].value != os.getpid()
        assert pool.map(["torch"], timeout=HANG)[0].value is False


def test_a_worker_that_died_while_idle_costs_no_item(target):
    with WorkerPool(target) as pool:
        pid = pool.map(["pid"], timeout=HANG)[0].value
        os.kill(pid, signal.SIGKILL)
        while pool._workers[0].process.poll() is None:
            time.sleep(0.01)
        assert pool.map([5], timeout=HANG)[0].value == ("did", 5)


def _gone(pid: int) -> bool:
    for _ in range(200):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_the_children_of_a_killed_worker_die_with_it(target, tmp_path, monkeypatch):
    monkeypatch.setenv("CHILD_FILE", str(tmp_path / "pid"))
    with WorkerPool(target) as pool:
        assert pool.map(["child, then hang"], timeout=1.0)[0].timed_out
        assert _gone(int((tmp_path / "pid").read_text()))
        pid = pool.map(["child"], timeout=HANG)[0].value
    assert _gone(pid)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS is not enforced everywhere")
def test_memory_limit(target):
    with WorkerPool(target, memory_limit=1 << 30) as pool:
        assert "MemoryError" in (pool.map(["memory"], timeout=HANG)[0].error or "")


def test_many_threads_take_turns_and_get_their_own(pool):
    results = {}

    def ask(name: int) -> None:
        results[name] = [outcome.value for outcome in pool.map([(name, i) for i in range(5)], timeout=HANG)]

    threads = [threading.Thread(target=ask, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: [("did", (name, i)) for i in range(5)] for name in range(4)}


def test_after_an_interrupt_no_late_result_is_taken_for_another(target, monkeypatch):
    with WorkerPool(target) as pool:
        pool.map([0], timeout=HANG)
        monkeypatch.setattr(pool, "_receive", lambda worker: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pool.map([1], timeout=HANG)
        monkeypatch.undo()
        assert pool.map([2], timeout=HANG)[0].value == ("did", 2)


def test_no_items_start_no_process(target):
    pool = WorkerPool(target)
    assert pool.map([], timeout=1.0) == []
    assert pool._workers == []


def test_what_cannot_start_is_an_error_at_once(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import a_module_that_is_not_there\n")
    with WorkerPool((str(broken), "act")) as pool, pytest.raises(RuntimeError, match="could not load what it is to call"):
        pool.map([1], timeout=HANG)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="workers is 0; expected at least 1"):
        WorkerPool(len, workers=0)


BY_PATH = f"""
import importlib.util, os, signal
spec = importlib.util.spec_from_file_location("pool", {grpo_fast.rewards.pool.__file__!r})
module = importlib.util.module_from_spec(spec)  # without torch, which takes seconds
spec.loader.exec_module(module)
print("once", flush=True)
pool = module.WorkerPool(len)
print([outcome.value for outcome in pool.map(["ab", "c"], timeout=1500)], flush=True)
"""


def run_script(tmp_path: Path, code: str) -> str:
    script = tmp_path / "script.py"
    script.write_text(BY_PATH + code)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=HANG)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_script_without_a_main_guard_can_use_it_and_its_workers_end_with_it(tmp_path):
    """Spawned workers of multiprocessing would run the script again."""
    first, second, pid = run_script(tmp_path, "print(pool._workers[0].process.pid)").splitlines()
    assert (first, second) == ("once", "[2, 1]")
    assert _gone(int(pid))


def test_the_workers_end_with_a_program_that_is_killed(tmp_path):
    code = "print(pool._workers[0].process.pid, flush=True)\nif os.fork() == 0: os.kill(os.getppid(), signal.SIGKILL)\nelse: signal.pause()"
    script = tmp_path / "script.py"
    script.write_text(BY_PATH + code)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=HANG)
    assert run.returncode == -signal.SIGKILL
    assert _gone(int(run.stdout.split()[-1]))


def test_a_forked_child_has_workers_of_its_own(tmp_path):
    code = """
mine = pool._workers[0].process.pid
child = os.fork()
if child == 0:
    assert pool.map(["abc"], timeout=1500)[0].value == 3 and pool._workers[0].process.pid != mine
    pool.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert pool.map(["abcd"], timeout=1500)[0].value == 4 and pool._workers[0].process.pid == mine
print("both")
"""
    assert run_script(tmp_path, code).endswith("both\n")
