"""A SLURM of several nodes on this machine: the daemons of Debian's packages, with state and ports of their own."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

_CONFIG = """
ClusterName=pentad
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
KillWait=30
SlurmdTimeout=10
MinJobAge=600
NodeName=n[0-{last}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_port}-{last_port}] CPUs={cpus} RealMemory=1000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_WAIT_S = 60.0


def can_run() -> str:
    """Why there can be no cluster here; empty: there can."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    missing = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} is not installed (make test-slurm does that)"
    return "" if os.access("/etc/hosts", os.W_OK) else "/etc/hosts cannot be written, where the nodes' names go"


class Cluster:
    """The daemons.

    Args:
        folder: an empty one, for their state.
        nodes: how many.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, nodes
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Returns when all nodes wait for jobs.

        Raises:
            TimeoutError: they do not come up.
        """
        port, self.folder = 17000 + os.getpid() % 1000 * 10, self.folder.resolve()
        facts = {"host": socket.gethostname(), "folder": self.folder, "port": port, "last": self.nodes - 1}
        ports = {"first_port": port + 1, "last_port": port + self.nodes}
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(_CONFIG.format(**facts, **ports, cpus=os.cpu_count()))
        self._munge()
        self._names(add=True)
        self._run("slurmctld", "-f", str(self.folder / "slurm.conf"))
        for node in range(self.nodes):
            self.start_node(node)
        until = time.monotonic() + _WAIT_S
        while self.ask("sinfo", "-h", "-t", "idle", "-o", "%D") != str(self.nodes):
            if time.monotonic() > until:
                raise TimeoutError((self.folder / "slurmctld.log").read_text()[-2000:])
            time.sleep(0.25)

    def start_node(self, node: int) -> None:
        """Starts a node's daemon, the first time or after it was killed."""
        (self.folder / f"spool.n{node}").mkdir(exist_ok=True)
        self._run("slurmd", "-N", f"n{node}", "-f", str(self.folder / "slurm.conf"))

    def kill_node(self, node: int) -> None:
        """What a power cut does: the node's daemons, and all that they run."""
        roots = [process for process in _processes() if f"-N n{node} " in process[2] or f"n{node}]" in process[2]]
        roots += [p for p in _processes() if p[2].startswith("slurmstepd") and _node_of(p[0]) == f"n{node}"]
        doomed = {pid for pid, _, _ in roots}
        for _ in range(8):  # and the children of those
            doomed |= {pid for pid, parent, _ in _processes() if parent in doomed}
        for number in (signal.SIGSTOP, signal.SIGKILL):  # at once: none of them sees another one end
            for pid in doomed:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def stop(self) -> None:
        """Ends all of it."""
        self.ask("scancel", "--user=root")
        time.sleep(1.0)
        for file in self.folder.glob("*.pid"):
            with suppress(OSError, ValueError):
                os.kill(int(file.read_text()), signal.SIGKILL)
        self._names(add=False)

    def ask(self, *command: str) -> str:
        """What a command of SLURM's answers."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=_WAIT_S
        )
        return done.stdout.strip()

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        names = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{option}={self.folder / name}" for option, name in (*names.items(), ("seed-file", "munge.seed"))]
        self._run("munged", "--force", *options)

    def _names(self, *, add: bool) -> None:
        """The nodes' names, which SLURM gives to whoever looks for rank 0."""
        mark = "  # of a test of SLURM"
        hosts = Path("/etc/hosts")
        kept = [line for line in hosts.read_text().splitlines() if not line.endswith(mark)]
        own = [f"127.0.0.1 n{node}{mark}" for node in range(self.nodes)] if add else []
        hosts.write_text("\n".join([*kept, *own]) + "\n")  # in place: a container's is a mount

    def _run(self, *command: str) -> None:
        subprocess.run(command, env=self.environment, check=True, timeout=_WAIT_S)


def _processes() -> list[tuple[int, int, str]]:
    """Process, parent and command line of every process."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append((int(folder.name), parent, line))
    return found


def _node_of(pid: int) -> str:
    """The node whose step a process serves, from the variables of what it runs."""
    for child, parent, _ in _processes():
        if parent == pid:
            with suppress(OSError):
                for entry in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                    if entry.startswith(b"SLURMD_NODENAME="):
                        return entry.partition(b"=")[2].decode()
    return ""
