"""A private SLURM of two nodes on this machine: real daemons, real jobs, nothing of it outside of one folder.

Each node is a namespace of processes, mounts, names and shared memory. So it has its own name and its own /dev/shm,
and ending the one process that holds it is a power loss. All daemons end with the process that started them.
"""

import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "setpriv")
NODES = ("node1", "node2")
MORTAL = ("setpriv", "--pdeathsig", "KILL", "--")
NODE = """
hostname "$1" && mount --bind "$2/hosts" /etc/hosts && mount -t tmpfs -o mode=1777 tmpfs /dev/shm || exit 97
slurmd -N "$1" -D &
sleep infinity & wait $!
"""
"""The first process of a node reaps what slurmd leaves; it lives until it is killed."""
OVER = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL"}


def lacking() -> str:
    """Why no cluster can be had here; nothing if it can."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    trial = ["unshare", "--fork", "--pid", "--mount-proc", "--mount", "--uts", "--ipc", "true"]
    if subprocess.run(trial, capture_output=True).returncode:
        return "this machine allows no namespaces"
    return ""


class Cluster:
    """Two nodes of SLURM. `environment` is what sbatch, srun and the launcher need to find it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path has 107 bytes at most
        self.folder.chmod(0o755)
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_"))}
        self.environment: Mapping[str, str] = {**outer, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._configure()
            self._start("munged", "munged", "--force", "--foreground", *self._munge_files())
            wait_for(lambda: not self._call("munge", "-S", f"{self.folder}/munge.sock", "-n").returncode, 10)
            self._start("slurmctld", "slurmctld", "-D")
            # A slurmd that finds no controller tries again only after a second.
            wait_for(lambda: "is UP" in self._call("scontrol", "ping").stdout, 10)
            for node in NODES:
                self.power_on(node)
        except BaseException:
            self.stop()
            raise

    def _munge_files(self) -> list[str]:
        names = {"socket": "munge.sock", "key-file": "munge.key", "log-file": "munged.log"}
        names |= {"pid-file": "munged.pid", "seed-file": "munge.seed"}
        return [f"--{option}={self.folder / name}" for option, name in names.items()]

    def _configure(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        for name in ("state", "dev"):
            (folder / name).mkdir()
        (folder / "plugstack.conf").touch()
        # slurmd loads a cgroup plugin whatever tracks the processes; this one asks nothing of the machine at its start.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        addresses = [f"127.0.0.{place + 1} {node}" for place, node in enumerate(NODES)]
        (folder / "hosts").write_text("\n".join([f"127.0.0.1 localhost {host}", *addresses, ""]))
        for number in range(2):
            os.mknod(folder / "dev" / f"nvidia{number}", 0o20666, os.makedev(1, 3))
        gres = [f"NodeName={node} Name=gpu File={folder}/dev/nvidia[0-1]" for node in NODES]
        (folder / "gres.conf").write_text("\n".join([*gres, ""]))
        control, *ports = unused_ports(1 + len(NODES))
        nodes = [
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=16000 Gres=gpu:2"
            for node, port in zip(NODES, ports, strict=True)
        ]
        keys = CONFIGURATION | {
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": str(control),
            "AuthInfo": f"socket={folder}/munge.sock,cred_expire=5",  # a requeued job waits so long, 120 s by default
            "StateSaveLocation": f"{folder}/state",
            "SlurmdSpoolDir": f"{folder}/spool.%n",
            "SlurmctldPidFile": f"{folder}/slurmctld.pid",
            "SlurmdPidFile": f"{folder}/slurmd.%n.pid",
            "SlurmctldLogFile": f"{folder}/slurmctld.log",
            "SlurmdLogFile": f"{folder}/slurmd.%n.log",
            "PlugStackConfig": f"{folder}/plugstack.conf",
        }
        lines = [f"{key}={value}" for key, value in keys.items()]
        lines += [*nodes, "PartitionName=main Nodes=ALL Default=YES DefaultTime=60 MaxTime=INFINITE State=UP"]
        (folder / "slurm.conf").write_text("\n".join([*lines, ""]))

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("a") as out:
            self._daemons[name] = subprocess.Popen(
                [*MORTAL, *command], env=self.environment, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def power_on(self, node: str) -> None:
        """Boot a node and wait until it takes jobs."""
        apart = ("--fork", "--pid", "--mount-proc", "--mount", "--uts", "--ipc", "--kill-child=KILL")
        self._start(node, "unshare", *apart, "bash", "-c", NODE, "_", node, str(self.folder))
        wait_for(lambda: self._state(node) in ("idle", "mixed", "allocated"), 30)

    def power_off(self, node: str) -> None:
        """The node dies with all that runs on it, and SLURM is told at once, which else finds out by silence."""
        self._end(node)
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power")

    def _state(self, node: str) -> str:
        return self._call("sinfo", "-h", "-n", node, "-o", "%T").stdout.strip()

    def _end(self, name: str) -> None:
        process = self._daemons.pop(name, None)
        if process:
            process.kill()
            process.wait(10)

    def stop(self) -> None:
        """End all daemons and what they run, and remove the folder."""
        for name in reversed([*self._daemons]):  # nodes first: nothing writes to a controller that has gone
            self._end(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _call(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True)

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """What a command says; raises AssertionError with its errors if it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, cwd=cwd)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job, by its own words."""
        shown = self.call("scontrol", "-o", "show", "job", job)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, job: str, timeout: float = 400) -> dict[str, str]:
        """The job when it is over."""
        wait_for(lambda: self.job(job)["JobState"] in OVER, timeout, lambda: str(self.job(job)))
        return self.job(job)


CONFIGURATION = {
    "ClusterName": "private",
    "SlurmUser": "root",
    "SlurmdUser": "root",
    "AuthType": "auth/munge",
    "CredType": "cred/munge",
    "MailProg": "/bin/true",
    "ProctrackType": "proctrack/linuxproc",  # signals reach the loaders' workers too: harsher than by cgroup
    "TaskPlugin": "task/none",
    "JobAcctGatherType": "jobacct_gather/none",
    "AccountingStorageType": "accounting_storage/none",
    "MpiDefault": "none",
    "SwitchType": "switch/none",
    "SlurmdParameters": "config_overrides",  # believe CPUs and RealMemory, whatever the machine has
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_CPU_Memory",
    "DefMemPerCPU": "100",
    "EnforcePartLimits": "ALL",
    "GresTypes": "gpu",
    "SchedulerType": "sched/backfill",
    "SchedulerParameters": "batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1",
    "KillWait": "2",
    "CompleteWait": "0",
    "InactiveLimit": "0",
    "MinJobAge": "3600",
    "MessageTimeout": "5",
    "TCPTimeout": "2",
    "SlurmctldTimeout": "10",
    "SlurmdTimeout": "10",
    "UnkillableStepTimeout": "20",
    "ReturnToService": "2",
    "TreeWidth": "65533",  # the controller talks to each node itself, not through one that may be dead
    "JobRequeue": "1",
}


def unused_ports(count: int) -> list[int]:
    """Ports of this machine that nothing listens on, below those that the system gives away."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(10000, 20000)
        with socket.socket() as probe:
            if port not in found and probe.connect_ex(("127.0.0.1", port)):
                found.append(port)
    return found


def wait_for(condition: Callable[[], bool], seconds: float, told: Callable[[], str] = str) -> None:
    """Wait until `condition` holds; raises AssertionError, with what `told` says, after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing happened for {seconds} s: {told()}"
        time.sleep(0.1)
