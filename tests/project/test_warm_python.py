"""The stand-in for ``python`` is, for whoever starts it, the process that it has forked."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.command import REPOSITORY
from tests.support.forked_runs import warm_python
from tests.support.processes import LIMIT_SECONDS

PROGRAM = """\
import json, os, signal, sys, time
heard = []
for name in ("SIGTERM", "SIGUSR1"):
    if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
        signal.signal(getattr(signal, name), lambda number, _: heard.append(number))
facts = {"pid": os.getpid(), "words": sys.argv[1:], "folder": os.getcwd(), "name": __name__}
facts |= {"parent": os.getppid()}
facts |= {"is_warm": "torch" in sys.modules, "main": sys.modules["__main__"].__spec__.name}
print(json.dumps(facts | {"HERE": os.environ["HERE"], "in": sys.stdin.read()}), flush=True)
while sys.argv[1] == "wait" and not heard:
    time.sleep(0.01)
if sys.argv[1] == "die":
    os.kill(os.getpid(), signal.SIGSEGV)
sys.exit("a reason" if sys.argv[1] == "reason" else int(sys.argv[2]) + len(heard))
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    started = []
    for number in (signal.SIGTERM, signal.SIGUSR1):  # ignored in a suite that runs detached
        signal.signal(number, signal.SIG_DFL)

    def start(*words, **more):
        process = subprocess.Popen(
            [warm_python(), "-m", "program", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "HERE": "there"},
            **more,
        )
        started.append(process)
        process.stdin.write("given")
        process.stdin.close()
        process.stdin = None
        return process, json.loads(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.communicate()


def is_there(pid):
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_it_has_the_words_the_folder_the_variables_the_files_and_the_code(start, tmp_path):
    process, facts = start("end", "7")
    assert process.wait(LIMIT_SECONDS) == 7
    assert facts.pop("pid") != process.pid
    assert facts == {
        "words": ["end", "7"],
        "parent": os.getpid(),
        "folder": str(tmp_path),
        "name": "__main__",
        "main": "program",
        "is_warm": True,
        "HERE": "there",
        "in": "given",
    }


def test_a_reason_is_said_and_a_signal_ends_both(start):
    process, _ = start("reason", "0")
    assert process.communicate()[1] == "a reason\n"
    assert process.returncode == 1
    process, _ = start("die", "0")
    assert process.wait(LIMIT_SECONDS) == -signal.SIGSEGV


def test_a_signal_is_handed_on_unless_it_was_ignored_from_the_start(start):
    process, _ = start("wait", "70")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(LIMIT_SECONDS) == 71
    deaf, _ = start("wait", "70", preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    deaf.terminate()
    time.sleep(0.1)
    assert deaf.poll() is None
    deaf.send_signal(signal.SIGUSR1)
    assert deaf.wait(LIMIT_SECONDS) == 71


def test_what_it_has_forked_is_killed_with_it(start):
    process, facts = start("wait", "0")
    assert is_there(facts["pid"])
    process.kill()
    deadline = time.monotonic() + LIMIT_SECONDS
    while is_there(facts["pid"]):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_anything_but_a_module_gets_the_real_one():
    done = subprocess.run(
        [warm_python(), "-c", "import sys; print('torch' in sys.modules)"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    assert done.stdout == "False\n"
