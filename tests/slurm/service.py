"""A real Slurm with one node of two cores, in a temporary folder: python -m tests.slurm.service COMMAND ...

Needs root, and Debian's slurm-wlm and munge, which it installs where apt-get can. The command is run with SLURM_CONF
set; its exit status is returned, and everything is stopped afterwards.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
# cred_expire is also the time that passes before a requeued job starts: two minutes, unless told otherwise.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def main(command: Sequence[str]) -> int:
    problem = missing()
    if problem:
        print(f"no Slurm can be set up here: {problem}", file=sys.stderr)
        return 2
    with running() as configuration:
        environment = {**os.environ, "SLURM_CONF": str(configuration), "SPARSE_ROBUST_TEST_SLURM": "1"}
        return subprocess.run(command, env=environment, check=False).returncode


def missing() -> str | None:
    """What stands in the way, after an attempt to install what is absent."""
    if os.geteuid() != 0:
        return "it needs root"
    if not all(map(shutil.which, PROGRAMS)):
        if shutil.which("apt-get") is None:
            return f"install {' and '.join(PACKAGES)}"
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], env=environment, check=False)
        subprocess.run(["apt-get", "install", "-y", "-qq", *PACKAGES], env=environment, check=False, stdin=-3)
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"there is no {', '.join(absent)}" if absent else None


@contextmanager
def running() -> Iterator[Path]:
    """Start munge, the controller and the node; give the configuration file, and stop all of them afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for name in ("munge", "state", "spool"):
            (folder / name).mkdir()
        (folder / "munge" / "key").write_bytes(secrets.token_bytes(1024))
        for path in (folder / "munge", folder / "munge" / "key"):
            shutil.chown(path, "munge", "munge")
        (folder / "munge").chmod(0o755)
        (folder / "munge" / "key").chmod(0o400)
        ports = [free_port(), free_port()]
        configuration = folder / "slurm.conf"
        configuration.write_text(
            CONFIGURATION.format(host=socket.gethostname().split(".")[0], folder=folder, ports=ports)
        )
        munge = folder / "munge"
        own = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed")]
        start = ["runuser", "-u", "munge", "--", "munged", "--foreground", *own, f"--socket={munge}/socket"]
        processes.append(subprocess.Popen(start))
        wait_for((munge / "socket").exists, "munged")
        processes.append(subprocess.Popen(["slurmctld", "-D", "-f", str(configuration)]))
        processes.append(subprocess.Popen(["slurmd", "-D", "-f", str(configuration)]))
        environment = {**os.environ, "SLURM_CONF": str(configuration)}

        def idle() -> bool:
            state = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True)
            return state.stdout.strip() == "idle"

        wait_for(idle, "the node")
        yield configuration
    except BaseException:
        for log in folder.glob("slurm*.log"):
            print(f"--- {log.name}\n{log.read_text()[-3000:]}", file=sys.stderr)
        raise
    finally:
        subprocess.run(["scancel", "--user=root"], env={**os.environ, "SLURM_CONF": str(folder / "slurm.conf")})
        time.sleep(1)
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(condition: object, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not start within {seconds:g} s")
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
