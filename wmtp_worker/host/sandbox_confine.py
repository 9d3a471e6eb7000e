"""Taking everything from the own process that strange code could do harm with. Linux; elsewhere only the limits hold.

Standard library only: this runs in the sandbox's processes, never in the worker's. Each means is applied where the
kernel has it, independently of the others, and reported by name:

    limits      rlimits: CPU time, memory, no file content, few descriptors
    user        as root: a user id nobody else has, if Python can still be read by it
    namespaces  a user, network and IPC namespace of its own: no interface, not even loopback
    privileges  no capabilities, and none to be gained (no_new_privs)
    landlock    of all files only Python's own can be read; other processes cannot be looked into
    seccomp     a list of harmless system calls; no sockets, no new processes or programs, no signals to others,
                no file opened for writing
"""

import contextlib
import ctypes
import errno
import os
import platform
import random
import resource
import signal
import stat
import struct
import sys
import sysconfig
from collections.abc import Callable

ALL = ("limits", "user", "namespaces", "privileges", "landlock", "seccomp")
LINUX = sys.platform == "linux"

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_CLONE_NEWUSER, _CLONE_NEWNET, _CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000
_CAPABILITY_VERSION_3 = 0x20080522
# systemd's range for users that exist only as long as a service runs
_USERS = range(61184, 65520)
_STACK = 64 << 20  # deep recursion is common in contest solutions
_DESCRIPTORS = 64
_THREADS = 256


def unobserved() -> None:
    """Nobody may look into this process or its children by /proc or ptrace; out of memory, they are the first to go."""
    if LINUX:
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        _libc().prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """This process ends when `parent` (its process id) does, however that ends."""
    if LINUX:
        _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def confine(cpu_seconds: int, memory: int, means: tuple[str, ...] = ALL) -> list[str]:
    """Apply the named means to this process, which must have one thread; return those that are in force."""
    parent = os.getppid()
    apply: dict[str, Callable[[], bool]] = {
        "limits": lambda: _limits(cpu_seconds, memory),
        "user": _become_nobody,
        "namespaces": _unshare,
        "privileges": _drop_privileges,
        "landlock": _landlock,
        "seccomp": _seccomp,
    }
    held = []
    for name in ALL:
        if name == "seccomp":  # a new user id forgets it, and seccomp would not allow it
            die_with_parent(parent)
        if name in means and apply[name]():
            held.append(name)
    return held


def missing(held: list[str]) -> list[str]:
    """What these means do not keep strange code from, in words; empty if they suffice."""
    found = []
    if "limits" not in held:
        found.append("use up CPU time and memory")
    if "seccomp" not in held and "namespaces" not in held:
        found.append("reach the network")
    if "seccomp" not in held:
        found.append("start processes")
    if not {"landlock", "user", "namespaces"}.intersection(held):
        found.append("read the worker's environment")
    return found


def _limits(cpu_seconds: int, memory: int) -> bool:
    limits = {
        "CPU": (cpu_seconds, cpu_seconds + 1),  # SIGXCPU, then SIGKILL
        "AS": (memory, memory),
        "STACK": (_STACK, _STACK),
        "FSIZE": (0, 0),
        "CORE": (0, 0),
        "NOFILE": (_DESCRIPTORS, _DESCRIPTORS),
        "MEMLOCK": (0, 0),
        "MSGQUEUE": (0, 0),
    }
    for name, (soft, hard) in limits.items():
        if (number := getattr(resource, f"RLIMIT_{name}", None)) is None:
            continue
        _, most = resource.getrlimit(number)
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        try:
            resource.setrlimit(number, (soft, hard))
        except (OSError, ValueError):
            if name == "CPU" or (name == "AS" and LINUX):  # macOS knows no limit of the address space
                return False
    return True


def _become_nobody() -> bool:
    if not LINUX or os.geteuid() != 0:
        return False
    user = random.SystemRandom().choice(_USERS)
    try:
        os.seteuid(user)
        try:
            with open(os.__file__):  # Python may lie in a folder that is root's alone
                pass
        finally:
            os.seteuid(0)
        resource.setrlimit(resource.RLIMIT_NPROC, (_THREADS, _THREADS))
        for descriptor in range(3):  # or programs could not open /dev/stdin, which is a pipe of root's
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                os.fchown(descriptor, user, user)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    except (OSError, ValueError):
        return False
    return True


def _unshare() -> bool:
    return LINUX and _libc().unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC) == 0


def _drop_privileges() -> bool:
    if not LINUX:
        return False
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    dropped: int = _libc().capset(header, bytes(24))
    return _no_new_privileges() and dropped == 0


def _no_new_privileges() -> bool:
    return bool(_libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0)


# --- landlock (https://docs.kernel.org/userspace-api/landlock.html)

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ = 1 << 2 | 1 << 3  # READ_FILE, READ_DIR


def _landlock() -> bool:
    if not LINUX or not _no_new_privileges():
        return False
    version = _syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    # what a version does not know it refuses: 13 rights, then REFER, TRUNCATE, IOCTL_DEV
    rights = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    network = 0b11 if version >= 4 else 0  # bind and connect of TCP
    scoped = 0b11 if version >= 6 else 0  # abstract unix sockets, signals
    attributes = struct.pack("=QQQ", rights, network, scoped)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    try:
        for path in _readable():
            _allow_reading(ruleset, path)
        return _syscall(_RESTRICT_SELF, ruleset, 0) == 0
    finally:
        os.close(ruleset)


def _allow_reading(ruleset: int, path: str) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = _READ if os.path.isdir(path) else 1 << 2
        _syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, descriptor), 0)
        os.close(descriptor)


def _readable() -> set[str]:
    """Python's standard library, and the shared libraries that its modules are linked with."""
    stdlib = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    libraries = {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", os.path.join(sys.base_prefix, "lib")}
    others = {"/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/dev/null", "/dev/urandom", "/dev/zero"}
    return {path for path in stdlib | libraries | others if os.path.exists(path)}


# --- seccomp: what is not listed is refused

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_NONE = -1  # arm64 has only its newer form
# name, number on x86-64, on arm64
_HARMLESS = """
    read 0 63; write 1 64; close 3 57; stat 4 -; fstat 5 80; lstat 6 -; poll 7 -; lseek 8 62; mmap 9 222;
    mprotect 10 226; munmap 11 215; brk 12 214; rt_sigaction 13 134; rt_sigprocmask 14 135;
    rt_sigreturn 15 139; pread64 17 67; readv 19 65; writev 20 66; access 21 -; pipe 22 -; select 23 -;
    sched_yield 24 124; mremap 25 216; madvise 28 233; dup 32 23; dup2 33 -; nanosleep 35 101;
    getitimer 36 102; alarm 37 -; setitimer 38 103; getpid 39 172; exit 60 93; wait4 61 260; uname 63 160;
    getcwd 79 17; readlink 89 -; umask 95 166; gettimeofday 96 169; getrlimit 97 163; getrusage 98 165;
    sysinfo 99 179; times 100 153; getuid 102 174; getgid 104 176; geteuid 107 175; getegid 108 177;
    getppid 110 173; getpgrp 111 -; getgroups 115 158; getpgid 121 155; getsid 124 156; sigaltstack 131 132;
    statfs 137 43; fstatfs 138 44; gettid 186 178; time 201 -; futex 202 98; sched_getaffinity 204 123;
    getdents64 217 61; set_tid_address 218 96; restart_syscall 219 128; fadvise64 221 223;
    clock_gettime 228 113; clock_getres 229 114; clock_nanosleep 230 115; exit_group 231 94; epoll_wait 232 -;
    epoll_ctl 233 21; waitid 247 95; newfstatat 262 79; readlinkat 267 78; faccessat 269 48; pselect6 270 72;
    ppoll 271 73; set_robust_list 273 99; get_robust_list 274 100; epoll_pwait 281 22; eventfd2 290 19;
    epoll_create1 291 20; dup3 292 24; pipe2 293 59; getcpu 309 168; getrandom 318 278; membarrier 324 283;
    statx 332 291; rseq 334 293; faccessat2 439 439
"""
SYSCALLS = {
    name: (int(x86), _NONE if arm == "-" else int(arm))
    for name, x86, arm in (item.split() for item in _HARMLESS.split(";"))
}
_OPEN_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | 0o20000000  # O_TMPFILE
_CLONE_THREAD = 0x00010000
_TERMINAL = (0x5401, 0x5450, 0x5451)  # TCGETS (isatty), FIONCLEX, FIOCLEX
_DESCRIPTOR_FLAGS = (0, 1, 2, 3, 4, 1030)  # duplicate, get and set flags; not whom to send signals
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_ARGUMENT = 16  # offset in seccomp_data; 8 bytes each, the lower half first


def _seccomp() -> bool:
    if not LINUX or not (program := _filter()) or not _no_new_privileges():
        return False
    code = ctypes.create_string_buffer(program)
    prog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    return bool(_libc().prctl(_PR_SET_SECCOMP, 2, prog, 0, 0) == 0)


def _filter() -> bytes | None:
    """The BPF program for this machine; None for one whose numbers are not known here."""
    if (machine := _MACHINES.get(platform.machine())) is None or sys.byteorder != "little":
        return None
    column, architecture = machine

    def load(offset: int) -> bytes:
        return struct.pack("=HBBI", 0x20, 0, 0, offset)

    def end(action: int) -> bytes:
        return struct.pack("=HBBI", 0x06, 0, 0, action)

    def unless_equal(value: int, skip: int) -> bytes:
        return struct.pack("=HBBI", 0x15, 0, skip, value)

    def unless_any_bit(mask: int, skip: int) -> bytes:
        return struct.pack("=HBBI", 0x45, 0, skip, mask)

    def case(x86: int, arm: int, body: bytes) -> bytes:
        number = (x86, arm)[column]
        return b"" if number == _NONE else unless_equal(number, len(body) // 8) + body

    allow, refuse = end(_ALLOW), end(_REFUSE | errno.EPERM)

    def one_of(argument: int, values: tuple[int, ...]) -> bytes:
        return load(_ARGUMENT + 8 * argument) + b"".join(unless_equal(value, 1) + allow for value in values) + refuse

    def to_read(argument: int) -> bytes:
        return load(_ARGUMENT + 8 * argument) + unless_any_bit(_OPEN_TO_WRITE, 1) + refuse + allow

    return b"".join(
        [
            *(load(4), unless_equal(architecture, 1), struct.pack("=HBBI", 0x05, 0, 0, 1), end(_KILL)),
            load(0),
            *(case(x86, arm, allow) for x86, arm in SYSCALLS.values()),
            case(257, 56, to_read(2)),  # openat
            case(2, _NONE, to_read(1)),  # open
            case(56, 220, load(_ARGUMENT) + unless_any_bit(_CLONE_THREAD, 1) + allow + refuse),  # clone
            case(435, 435, end(_REFUSE | errno.ENOSYS)),  # clone3, whose flags are in memory: clone is tried next
            case(16, 29, one_of(1, _TERMINAL)),  # ioctl
            case(72, 25, one_of(1, _DESCRIPTOR_FLAGS)),  # fcntl
            case(302, 261, one_of(0, (0,))),  # prlimit64, of oneself
            refuse,
        ]
    )


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    # a plain int would be passed as 32 bits
    words = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result: int = _libc().syscall(ctypes.c_long(number), *words)
    return result
