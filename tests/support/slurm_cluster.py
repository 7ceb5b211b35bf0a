"""A real SLURM on one machine: slurmctld, and a slurmd for each of several logical nodes.

Nodes are called 127.0.0.1, 127.0.0.2, ..., so that what the first node is called can be reached
without touching /etc/hosts. They claim more CPUs and GPUs than there are; the GPUs are copies of
/dev/null. Ports and folders belong to one cluster alone: several can run side by side.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.support.command import REPOSITORY, environment
from tests.support.processes import LIMIT_SECONDS

_PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue", "scancel")
# After TERM, seconds until KILL: SLURM's default, in which a run saves on a busy machine, too.
# After the last sign of a node, seconds until it counts as lost: a busy machine delays a sign.
KILL_WAIT_SECONDS, NODE_LOST_SECONDS = 30, 20

# The record of a job that has ended is kept for as long as SLURM can (MinJobAge), however late a
# test looks at it; by default for five minutes.
_CONFIGURATION = """\
ClusterName=sandbox
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=1,sched_interval=1,bf_interval=1,sched_min_interval=10000
PriorityType=priority/basic
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
KillWait={kill_wait}
SlurmdTimeout={node_lost}
MessageTimeout=60
TCPTimeout=10
BatchStartTimeout=60
MinJobAge=65533
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=90
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Say why there can be no cluster here; None if there can."""
    absent = [name for name in _PROGRAMS if shutil.which(name, path=_search_path()) is None]
    if absent:
        return (
            f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge "
            "slurm-wlm-basic-plugins"
        )
    return None if os.geteuid() == 0 else "slurmd starts the tasks of others: only root can"


def _search_path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class SlurmCluster:
    """Started on entry, gone with all its processes on exit.

    Args:
        num_nodes: logical nodes.
        gpus_per_node: GPUs each claims to have.
    """

    def __init__(self, num_nodes: int = 2, gpus_per_node: int = 2) -> None:
        self.nodes = [f"127.0.0.{number + 1}" for number in range(num_nodes)]
        self._gpus_per_node = gpus_per_node

    def __enter__(self) -> "SlurmCluster":
        # A socket's path may have 107 letters; pytest's folders have more.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        try:
            self._configure()
            self._call(
                "munged",
                f"--key-file={self.folder}/munge/key",
                f"--socket={self.folder}/munge/socket",
                f"--pid-file={self.folder}/munged.pid",
                f"--log-file={self.folder}/munge/log",
                f"--seed-file={self.folder}/munge/seed",
            )
            self._call("slurmctld")
            for node in self.nodes:
                self.start_node(node)
            wait_until(lambda: self.states_of_nodes() == {"idle"}, self._complaints)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _configure(self) -> None:
        for name in ("state", "munge", "devices", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        devices = [self.folder / "devices" / f"nvidia{i}" for i in range(self._gpus_per_node)]
        for device in devices:
            os.mknod(device, 0o20666, os.makedev(1, 3))
        host = socket.gethostname().split(".")[0]
        with ExitStack() as open_ports:
            ports = [_free_port(open_ports) for _ in range(len(self.nodes) + 1)]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 "
            f"RealMemory=4000 Gres=gpu:{self._gpus_per_node} State=UNKNOWN"
            for node, port in zip(self.nodes, ports[1:], strict=True)
        )
        (self.folder / "slurm.conf").write_text(
            _CONFIGURATION.format(
                folder=self.folder,
                port=ports[0],
                nodes=nodes,
                kill_wait=KILL_WAIT_SECONDS,
                node_lost=NODE_LOST_SECONDS,
            )
        )
        (self.folder / "gres.conf").write_text(
            "AutoDetect=off\n"
            + "".join(
                f"NodeName={node} Name=gpu File={device}\n"
                for node in self.nodes
                for device in devices
            )
        )

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, the first time or after ``kill_node``."""
        self._call("slurmd", "-N", node, SANDBOX_NODE=node)

    def kill_node(self, node: str) -> None:
        """End a node as a power cut does: its slurmd, and all it has started."""
        for process in self._processes(node):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def environment(self) -> dict[str, str]:
        """The variables of somebody who calls sbatch, and what the jobs get."""
        return {
            **environment(),
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{_search_path()}",
        }

    def _call(self, *command: str, may_fail: bool = False, **variables: str) -> str:
        done = subprocess.run(
            command,
            env={**self.environment(), **variables},
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
        )
        assert may_fail or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, script: str, *arguments: object, options=(), **variables: str) -> "Job":
        """Submit a file of this repository, unchanged, with the working folder as its own."""
        path = REPOSITORY / "slurm" / script
        command = ["sbatch", "--parsable", *options, str(path), *map(str, arguments)]
        return Job(self, self._call(*command, **variables))

    def submit_command(self, command: str, *options: str) -> "Job":
        """Submit a command of the shell."""
        return Job(self, self._call("sbatch", "--parsable", *options, f"--wrap={command}"))

    def script_of(self, job: "Job") -> str:
        """Return the batch script as SLURM keeps it."""
        path = self.folder / f"script-{job.number}"
        self._call("scontrol", "write", "batch_script", job.number, str(path))
        return path.read_text()

    def rank(self, job: "Job", number: int) -> int | None:
        """Process id of a rank of a job's step; None if it is gone."""
        marks = {f"SLURM_JOB_ID={job.number}", f"SLURM_PROCID={number}", "SLURM_STEP_ID=0"}
        found = self._processes_with(marks)
        return min(found) if found else None

    def is_running(self, number: str) -> bool:
        """Whether any process of a job is there, or of SLURM for it."""
        title = f"slurmstepd: [{number}.".encode()
        return bool(self._processes_with({f"SLURM_JOB_ID={number}"})) or any(
            (Path("/proc") / str(process) / "cmdline").read_bytes().startswith(title)
            for process in self._processes()
        )

    def states_of_nodes(self) -> set[str]:
        """What sinfo says about the nodes: idle, allocated, down, ..."""
        return set(self._call("sinfo", "--noheader", "--partition=low", "--format=%T").split())

    def _processes(self, node: str | None = None) -> list[int]:
        """Process ids of the cluster, or of one node: the daemons and what they have started."""
        if node is None:
            return self._processes_with(set())
        marks = ({f"SANDBOX_NODE={node}"}, {f"SLURMD_NODENAME={node}"})
        return [process for mark in marks for process in self._processes_with(mark)]

    def _processes_with(self, marks: set[str]) -> list[int]:
        """Process ids of the cluster with all of some variables."""
        wanted = {f"SLURM_CONF={self.folder}/slurm.conf", *marks}
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                if wanted <= set(variables) and int(entry.name) != os.getpid():
                    found.append(int(entry.name))
        return found

    def _complaints(self) -> str:
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in logs)


class Job:
    """A job of a cluster, or one task of an array (``number``: ``12`` or ``12_3``)."""

    def __init__(self, cluster: SlurmCluster, number: str) -> None:
        self.cluster = cluster
        self.number = number

    def task(self, number: int) -> "Job":
        """Return a task of this array."""
        return Job(self.cluster, f"{self.number}_{number}")

    def _show(self) -> dict[str, str]:
        shown = self.cluster._call("scontrol", "--oneliner", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    @property
    def state(self) -> str:
        """RUNNING, PENDING, COMPLETED, FAILED, CANCELLED, COMPLETING, ..."""
        return self._show()["JobState"]

    @property
    def restarts(self) -> int:
        """How often it was requeued."""
        return int(self._show()["Restarts"])

    @property
    def exit_code(self) -> int:
        """What its script ended with."""
        return int(self._show()["ExitCode"].split(":")[0])

    @property
    def output(self) -> str:
        """What its script and its ranks have printed."""
        path = Path(self._show()["StdOut"])
        return path.read_text() if path.exists() else ""

    def signal(self, name: str) -> None:
        """Send a signal to the ranks."""
        self.cluster._call("scancel", f"--signal={name}", self.number)

    def cancel(self) -> None:
        """End it for good, if it has not ended."""
        self.cluster._call("scancel", self.number)

    def wait_for(self, *states: str) -> None:
        """Wait until it is in one of the states."""
        wait_until(lambda: self.state in states, lambda: f"{self._show()}\n{self.output}")

    def wait_for_restart(self, restarts: int) -> None:
        """Wait until it runs or ran again after so many requeues, without the usual two minutes."""
        ended_at: float | None = None

        def runs_again() -> bool:
            nonlocal ended_at
            job = self._show()
            if job["Restarts"] != str(restarts) or job["JobState"] != "PENDING":
                has_begun = job["JobState"] in ("RUNNING", "COMPLETED", "FAILED")
                return job["Restarts"] == str(restarts) and has_begun
            # What is left of the last start is killed by the job's number: a new start with it. The
            # last credential is revoked by the whole second: one issued in it would be refused.
            if self.cluster.is_running(job["JobId"]):
                ended_at = None
            elif ended_at is None:
                ended_at = time.monotonic()
            elif time.monotonic() > ended_at + 2:
                self.cluster._call(
                    "scontrol", "update", f"jobid={self.number}", "starttime=now", may_fail=True
                )
            return False

        wait_until(runs_again, lambda: f"{self._show()}\n{self.output}")


def wait_until(is_so: Callable[[], bool], explain: Callable[[], str] = lambda: "") -> None:
    """Wait until something is so; say what was the case instead if it does not come."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, f"not within {LIMIT_SECONDS} s: {explain()}"
        time.sleep(0.2)


def _free_port(open_ports: ExitStack) -> int:
    """Return a port that is free, and not the same again while the stack is open."""
    listener = open_ports.enter_context(socket.socket())
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]
