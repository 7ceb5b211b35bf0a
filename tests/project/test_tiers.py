"""Every test belongs to a tier, and what the plain command runs stays cheap."""

import multiprocessing
import re
import time

import pytest

from tests.support.command import REPOSITORY
from tests.support.cpu_time import TIERS, CpuLimit, cpu_seconds
from tests.support.processes import IMPORTED_ONCE

pytest_plugins = ["pytester"]

SECONDS = 0.2
BURN = (
    "def burn():\n    end = time.process_time() + 0.3\n    while time.process_time() < end: pass\n"
)
BODIES = {
    "burns": "def test(): burn()",
    "burns in a child": "def test(): subprocess.run([sys.executable, '-c', BURN], check=True)",
    "burns in a fixture of its own": ("@pytest.fixture\ndef own(): burn()\ndef test(own): pass"),
}
FREE = {
    "sleeps": "def test(): time.sleep(0.4)",
    "sleeps in a child": "def test(): subprocess.run(['sleep', '0.4'], check=True)",
    "burns in a shared fixture": (
        "@pytest.fixture(scope='module')\ndef shared(): burn()\n"
        "@pytest.fixture\ndef own(request): request.getfixturevalue('shared')\n"
        "def test(own): pass"
    ),
    **{f"burns as {tier}": f"@pytest.mark.{tier}\ndef test(): burn()" for tier in TIERS},
}


def test_no_tier_is_left_out_by_both_the_plain_command_and_ci(pytestconfig):
    any_tier = " or ".join(TIERS)
    assert pytestconfig.getini("addopts")[-2:] == ["-m", f"not ({any_tier})"]
    declared = {line.partition(":")[0] for line in pytestconfig.getini("markers")}
    assert set(TIERS) <= declared
    commands = re.findall(r"python -m pytest(.*)", (REPOSITORY / ".ci/run").read_text())
    plain, others = (command for command in commands if "--doctest-modules" not in command)
    assert plain == ""
    assert f' -m "{any_tier}"' in others


def run(pytester, body):
    child = f"BURN = {'import time' + chr(10) + BURN + 'burn()'!r}"
    pytester.makepyfile("\n".join(["import subprocess, sys, time, pytest", BURN, child, body]))
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", plugins=[CpuLimit(SECONDS)])


@pytest.mark.parametrize("name", BODIES)
def test_processor_time_above_the_limit_fails_a_test_without_a_tier(pytester, name):
    result = run(pytester, BODIES[name])
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*s of processor time, above 0.2 s: *one of the markers e2e, *"])


@pytest.mark.parametrize("name", FREE)
def test_waiting_shared_fixtures_and_tiers_are_free(pytester, name):
    run(pytester, FREE[name]).assert_outcomes(passed=1)


def burn():
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass


def test_what_forked_ranks_take_counts_and_the_imports_of_their_server_do_not():
    multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
    before = cpu_seconds()
    process = multiprocessing.get_context("forkserver").Process(target=burn)
    process.start()
    process.join()
    assert 0.4 < cpu_seconds() - before < 3
