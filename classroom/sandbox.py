"""What submitted code may not do, and what keeps it from it.

- bubblewrap, where there is one: it sees Python, the libraries and the package, and nothing else;
  no network, no other process, nothing to write to.
- limits of processor time and memory; no byte of any file can be written.
- a filter of system calls (Linux): no new process or program, no socket, no other process touched.
"""

import ctypes
import os
import platform
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

from classroom import ROOT

SCRATCH = "/scratch"  # inside; /tmp may be where the repository lies
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin", "USER": "student", "LANG": "C.UTF-8", "PYTHONPATH": str(ROOT),
    "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1", "MPLBACKEND": "agg",
}  # fmt: skip
SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/alternatives")
LIBRARIES = ("site-packages", "dist-packages")
OWN = ("__init__", "child", "outcomes", "private", "sandbox")  # what the child imports
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def command(inner: list[str]) -> list[str]:
    """Return the command that runs another one inside bubblewrap."""
    libraries = [path for path in sys.path if Path(path).name in LIBRARIES]
    own: list[str | Path] = [
        ROOT / "dmd_tutorial",
        *(ROOT / "classroom" / f"{name}.py" for name in OWN),
    ]
    seen: list[str | Path] = [*SYSTEM, sys.prefix, sys.base_prefix, *libraries, *own]
    shown = [
        str(path)
        for path in dict.fromkeys(Path(each).absolute() for each in seen)
        # the repository and what it lies in may hold submissions and private exercises
        if path.exists() and not ROOT.is_relative_to(path)
    ]
    binds = [word for path in shown for word in ("--ro-bind", path, path)]
    devices = [word for path in DEVICES for word in ("--dev-bind", path, path)]
    return [
        "bwrap", "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534",
        "--cap-drop", "ALL", "--die-with-parent", "--new-session", "--as-pid-1",
        *binds, "--proc", "/proc", *devices, "--tmpfs", SCRATCH, "--remount-ro", "/",
        "--chdir", SCRATCH, "--", *inner,
    ]  # fmt: skip


def environment(folder: str = SCRATCH) -> dict[str, str]:
    """Return the environment of a process that may write to one folder."""
    return ENVIRONMENT | dict.fromkeys(("HOME", "TMPDIR", "MPLCONFIGDIR"), folder)


def missing() -> str | None:
    """Say why there is no sandbox here; None if there is one."""
    if not shutil.which("bwrap"):
        return "bubblewrap is not installed (apt-get install bubblewrap)"
    done = subprocess.run(command(["true"]), env=environment(), capture_output=True, text=True)
    return f"bubblewrap does not work here ({done.stderr.strip()})" if done.returncode else None


def used(process: int | str = "self") -> list[int]:
    """Return the bytes that a process has reserved, and those that it holds (Linux)."""
    pages = Path(f"/proc/{process}/statm")
    counts = pages.read_text().split()[:2] if pages.exists() else ["0", "0"]
    return [int(count) * resource.getpagesize() for count in counts]


def sleeps(process: int) -> bool:
    """Return whether a process waits for something else than the processor (Linux)."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "S"


def limit(seconds: float, memory: float) -> None:
    """Limit this process: processor time, gigabytes beyond what it has, and files to nothing."""
    wanted = {"CPU": int(seconds) + 1, "FSIZE": 0, "CORE": 0}
    if sys.platform == "linux":  # elsewhere it is not kept
        wanted["AS"] = used()[0] + int(memory * 2**30)
    for name, value in wanted.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


# The filter: https://www.kernel.org/doc/html/latest/userspace-api/seccomp_filter.html

CALLS = {  # by machine: its number, clone, prlimit64, and what is forbidden
    "x86_64": (0xC000003E, 56, 302, {
        "socket": 41, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "ptrace": 101,
        "rt_sigqueueinfo": 129, "tkill": 200, "tgkill": 234, "rt_tgsigqueueinfo": 297,
        "process_vm_readv": 310, "process_vm_writev": 311, "execveat": 322,
        "pidfd_send_signal": 424, "io_uring_setup": 425,
    }),
    "aarch64": (0xC00000B7, 220, 261, {
        "socket": 198, "execve": 221, "kill": 129, "ptrace": 117,
        "rt_sigqueueinfo": 138, "tkill": 130, "tgkill": 131, "rt_tgsigqueueinfo": 240,
        "process_vm_readv": 270, "process_vm_writev": 271, "execveat": 281,
        "pidfd_send_signal": 424, "io_uring_setup": 425,
    }),
}  # fmt: skip
CLONE3 = 435
LOAD, EQUAL, ANY_BIT, AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
ALLOW, DENY, UNKNOWN_CALL = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38
CLONE_THREAD = 0x10000
NO_NEW_PRIVILEGES, SECCOMP, DUMPABLE = 38, 22, 4  # for prctl


def forbid() -> bool:
    """Forbid this process, for good, the system calls named above; false where that cannot be."""
    if sys.platform != "linux" or platform.machine() not in CALLS:
        return False
    machine, clone, prlimit, forbidden = CALLS[platform.machine()]
    # (code, steps if true, steps if false, operand)
    steps = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, machine), (RETURN, 0, 0, DENY), (LOAD, 0, 0, 0)]
    steps += [(AT_LEAST, 0, 1, 0x40000000), (RETURN, 0, 0, DENY)]  # another table of calls
    for number in forbidden.values():
        steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, DENY)]
    # its flags are out of sight: libraries then take clone
    steps += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, UNKNOWN_CALL)]
    # limits are its own
    steps += [(EQUAL, 0, 4, prlimit), (LOAD, 0, 0, 16), (EQUAL, 0, 1, 0)]
    steps += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, DENY)]
    # a thread may be made, a process not
    steps += [(EQUAL, 0, 3, clone), (LOAD, 0, 0, 16), (ANY_BIT, 1, 0, CLONE_THREAD)]
    steps += [(RETURN, 0, 0, DENY), (RETURN, 0, 0, ALLOW)]
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    return libc.prctl(SECCOMP, 2, ctypes.create_string_buffer(program, len(program)), 0, 0) == 0


def hide() -> None:
    """Let no other process read or write this one's memory."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DUMPABLE, 0, 0, 0, 0)


def kill_all_others() -> None:
    """End what an answer has left running: as the first process of a sandbox, all others."""
    if os.getpid() == 1:
        try:
            os.kill(-1, 9)
        except ProcessLookupError:
            return
        try:
            while True:
                os.waitpid(-1, 0)
        except ChildProcessError:
            pass
