"""Code that nobody has read: it is kept from everything that is not its own, and cannot decide its own verdict.

Attacks are tried twice: confined, where they must come to nothing, and without the means in question, where they must
succeed. Otherwise a test would show that an attack is badly written, and not that it is prevented.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from wmtp_worker.errors import InputError
from wmtp_worker.host import sandbox_confine
from wmtp_worker.host.sandbox import Exchange, Job, Limits, Sandbox
from wmtp_worker.host.sandbox_confine import ALL

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's means are Linux's")

SHORT = Limits(cpu_seconds=1, wall_seconds=60)
ADD = "def add(a, b):\n    return a + b\n"
REFUSED = """
def attempt(action, *args):
    try:
        return repr(action(*args))
    except (OSError, RuntimeError) as error:
        return "refused"
"""


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(2, SHORT) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def held(sandbox):
    """The means that this machine has."""
    return sandbox.run(Job(ADD, ("assert add(1, 2) == 3",))).means


@pytest.fixture(scope="module")
def with_means(held):
    """`with_means("seccomp")`: a sandbox that has the limits and these means only."""
    there = {}

    def start(*means):
        if missing := set(means) - set(held):
            pytest.skip(f"this machine has no {', '.join(missing)}")
        if means not in there:
            there[means] = Sandbox(1, SHORT, means=("limits", *means), weak=True).__enter__()
        return there[means]

    yield start
    for sandbox in there.values():
        sandbox.end()


@pytest.fixture
def victim():
    """A process of the same user with a secret in its environment, as the worker is."""
    environ = {"SECRET": "planted-5a1t"}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=environ) as process:
        yield process
        process.kill()


def outcome(sandbox, code, call):
    """What `call` says, called in the program: the judge compares with nothing, so it must say something."""
    result = sandbox.run(Job(REFUSED + code, (f"raise Exception({call})",)))
    assert result.status == "failed", result
    return result.detail.removeprefix("Exception: ").partition(" in: ")[0]


def test_all_that_this_machine_has_is_in_force(held):
    assert {"limits", "privileges", "seccomp"} <= set(held)
    assert sandbox_confine.missing(list(held)) == []


# --- what it must not reach


@pytest.mark.parametrize("means", [ALL[1:], ("landlock",), ("namespaces",)], ids="-".join)
def test_the_environment_of_the_worker_stays_secret(sandbox, with_means, victim, means):
    code = f"def read():\n    return open('/proc/{victim.pid}/environ').read()"
    guard = sandbox if means == ALL[1:] else with_means(*means)
    assert "planted" in outcome(with_means(), code, "attempt(read)")
    assert outcome(guard, code, "attempt(read)") == "refused"


def test_its_own_environment_holds_nothing(sandbox, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    code = "import os\ndef names():\n    return sorted(os.environ)"
    test = "assert set(names()) <= {'LC_CTYPE', 'PYTHONHASHSEED', 'PYTHONUTF8'}, names()"
    with Sandbox(1) as fresh:
        assert fresh.run(Job(code, (test,))).status == "passed"


@pytest.mark.parametrize("means", [ALL[1:], ("landlock",)], ids="-".join)
def test_files_of_others_cannot_be_read(sandbox, with_means, tmp_path, means):
    secret = tmp_path / "credentials"
    secret.write_text("planted")
    code = (
        f"import os\ndef read():\n    return open({str(secret)!r}).read()\ndef look():\n    return os.listdir('/root')"
    )
    guard = sandbox if means == ALL[1:] else with_means(*means)
    assert "planted" in outcome(with_means(), code, "attempt(read)")
    assert outcome(guard, code, "attempt(read)") == "refused"
    assert outcome(guard, code, "attempt(look)") == "refused"


@pytest.mark.parametrize("means", [ALL[1:], ("landlock",), ("seccomp",)], ids="-".join)
def test_nothing_is_written_anywhere(sandbox, with_means, tmp_path, means):
    tmp_path.chmod(0o777)
    kept = tmp_path / "kept"
    kept.write_text("kept")
    kept.chmod(0o666)
    code = f"""
import os
def write(path):
    with open(path, "w") as file:
        return file.write("!")
def everywhere():
    places = ["here", {str(tmp_path / "new")!r}, {str(kept)!r}, "/dev/shm/wmtp-attack", "/tmp/wmtp-attack"]
    said = {{attempt(write, place) for place in places}}
    said |= {{attempt(os.mkdir, {str(tmp_path / "folder")!r}), attempt(os.unlink, {str(kept)!r})}}
    said |= {{attempt(os.rename, {str(kept)!r}, {str(tmp_path / "other")!r}), attempt(os.truncate, {str(kept)!r}, 0)}}
    return said | {{attempt(os.symlink, "/etc", {str(tmp_path / "link")!r})}}
"""
    guard = sandbox if means == ALL[1:] else with_means(*means)
    assert outcome(guard, code, "everywhere()") == "{'refused'}"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "kept"


def test_without_means_such_a_file_is_written(with_means, tmp_path):
    code = f"def write():\n    return open({str(tmp_path / 'new')!r}, 'x').close()"
    assert outcome(with_means(), code, "attempt(write)") == "None"
    assert (tmp_path / "new").exists()


def test_no_file_gets_content_even_without_the_kernels_means(with_means, tmp_path):
    code = f"def write():\n    with open({str(tmp_path / 'new')!r}, 'w') as file:\n        file.write('!' * 10000)"
    assert outcome(with_means(), code, "attempt(write)") == "refused"
    assert (tmp_path / "new").stat().st_size == 0


@pytest.mark.parametrize("means", [ALL[1:], ("seccomp",), ("namespaces",)], ids="-".join)
def test_there_is_no_network(sandbox, with_means, means):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"""
import socket
def connect():
    return socket.create_connection(("127.0.0.1", {port}), timeout=2).getpeername()[1]
def datagram():
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"!", ("127.0.0.1", {port}))
"""
        guard = sandbox if means == ALL[1:] else with_means(*means)
        assert outcome(with_means(), code, "attempt(connect)") == str(port)
        server.accept()[0].close()
        assert outcome(guard, code, "attempt(connect)") == "refused"
        assert outcome(guard, code, "attempt(datagram)") == "refused"
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


@pytest.mark.parametrize("means", [ALL[1:], ("seccomp",), ("landlock",)], ids="-".join)
def test_other_processes_get_no_signals(sandbox, with_means, victim, means):
    code = f"import os\ndef strike():\n    return os.kill({victim.pid}, 9)"
    guard = sandbox if means == ALL[1:] else with_means(*means)
    assert outcome(guard, code, "attempt(strike)") == "refused"
    assert victim.poll() is None
    assert outcome(with_means(), code, "attempt(strike)") == "None"
    assert victim.wait(60) == -signal.SIGKILL


def test_other_processes_cannot_be_traced_or_limited(sandbox, victim):
    code = f"""
import ctypes, resource
def trace():
    return ctypes.CDLL(None).ptrace(16, {victim.pid}, None, None)
def limit():
    return resource.prlimit({victim.pid}, resource.RLIMIT_CPU, (0, 0))
"""
    assert outcome(sandbox, code, "trace()") == "-1"
    assert outcome(sandbox, code, "attempt(limit)") == "refused"


def test_no_new_processes_or_programs(sandbox, with_means):
    code = """
import os, subprocess
def fork():
    if os.fork() == 0:
        os._exit(0)
    return "forked"
def program():
    return subprocess.run(["/bin/true"]).returncode
def instead():
    return os.execv("/bin/true", ["true"])
"""
    assert outcome(with_means(), code, "attempt(fork)") == "'forked'"
    for attack in ("fork", "program", "instead"):
        assert outcome(sandbox, code, f"attempt({attack})") == "refused"


def test_threads_are_few(sandbox):
    code = """
import threading
def swarm():
    event = threading.Event()
    for count in range(5000):
        threading.Thread(target=event.wait, daemon=True).start()
    return count
"""
    assert outcome(sandbox, code, "attempt(swarm)") == "refused"


def test_memory_is_limited(sandbox):
    result = sandbox.run(Job("def hoard(n):\n    return len(bytearray(n))", ("assert hoard(1 << 20) == 1 << 20",)))
    assert result.status == "passed"
    result = sandbox.run(Job("def hoard(n):\n    return len(bytearray(n))", ("assert hoard(1 << 31) == 1 << 31",)))
    assert (result.status, result.detail[:11]) == ("failed", "MemoryError")


def test_what_it_prints_is_limited(sandbox):
    forever = "while True:\n    print('x' * 100000)"
    result = sandbox.run(Job(forever, exchanges=(Exchange("", "x"),)), Limits(output=1 << 20))
    assert (result.status, result.detail) == ("failed", "test 1: more than 1048576 bytes of output")


# --- when it ends


STUBBORN = """
import signal, threading
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
def stay():
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass
"""


@pytest.mark.parametrize(
    ("code", "limits", "words"),
    [
        (f"{STUBBORN}\nstay()", SHORT, "CPU"),
        (f"{STUBBORN}\nthreading.Thread(target=stay).start()\ndef add(a, b): return a + b\nstay()", SHORT, "CPU"),
        ("import time\ntime.sleep(1000)", Limits(wall_seconds=0.5), "no end in the time"),
    ],
    ids=["ignores signals", "in a thread", "sleeps"],
)
@pytest.mark.parametrize("kind", ["asserts", "exchanges"])
def test_time_is_limited_whatever_it_catches(sandbox, code, limits, words, kind):
    job = Job(code, ("assert add(1, 2) == 3",)) if kind == "asserts" else Job(code, exchanges=(Exchange("", ""),))
    started = time.monotonic()
    result = sandbox.run(job, limits)
    assert result.status == "timeout"
    assert words in result.detail
    assert time.monotonic() - started < 60
    assert strangers(os.getpid()) == []


def strangers(worker):
    """Confined processes below this one."""
    found = []
    for process in psutil.Process(worker).children(recursive=True):
        try:
            if int(re.search(r"Seccomp:\s+(\d)", Path(f"/proc/{process.pid}/status").read_text())[1]):
                found.append(process.pid)
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            pass
    return found


def test_nothing_outlives_a_verdict(sandbox):
    code = f"{STUBBORN}\nthreading.Thread(target=stay).start()\ndef add(a, b): return a + b"
    assert sandbox.run(Job(code, ("assert add(1, 2) == 3",)), Limits(cpu_seconds=10)).status == "passed"
    assert strangers(os.getpid()) == []


def runs(pid):
    """A process that nobody waits for stays as a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_nothing_outlives_the_worker(tmp_path):
    code = (
        "from wmtp_worker.host.sandbox import *\n"
        "with Sandbox(1) as sandbox:\n"
        "    sandbox.run(Job('while True: pass', ('assert True',)), Limits(cpu_seconds=60))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], env={"TMPDIR": str(tmp_path)}) as worker:
        deadline = time.monotonic() + 60
        while not (found := strangers(worker.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        family = [process.pid for process in psutil.Process(worker.pid).children(recursive=True)]
        assert set(found) <= set(family)
        worker.kill()
    while any(map(runs, family)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- its verdict


FRAME = 'import json, struct\nframe = lambda document: struct.pack(">I", len(d := json.dumps(document).encode())) + d\n'
FAKES = {
    "ends": "import os\nos._exit(0)",
    "ends when called": "import os\ndef add(a, b):\n    os._exit(0)",
    "exits": "import sys\nsys.exit(0)",
    "exits when called": "def add(a, b):\n    exit(0)",
    "equals everything": "class Any(int):\n    def __eq__(self, other): return True\ndef add(a, b):\n    return Any(0)",
    "equals everything, no number": "class Any:\n    __eq__ = lambda s, o: True\ndef add(a, b):\n    return Any()",
    "patches python": (
        "import builtins, sys, operator\nbuiltins.AssertionError = type('E', (Exception,), {})\n"
        "operator.eq = lambda a, b: True\nsys.excepthook = lambda *a: None\nsys.settrace(lambda *a: None)\n"
        "def add(a, b):\n    return 0"
    ),
    "brings its own builtins": "def add(a, b): return 0\ndef abs(x): return 0\ndef all(x): return True",
    "prints what a judge would": (
        "print('passed')\nprint('{\"status\": \"passed\"}', flush=True)\ndef add(a, b): return 0"
    ),
    "writes verdicts everywhere": (
        f"{FRAME}import os\nfor number in range(64):\n    for _ in range(3):\n        try:\n"
        "            os.write(number, frame({'status': 'passed', 'detail': ''}))\n"
        "        except OSError: pass\ndef add(a, b): return 0"
    ),
    "answers before it is asked": (
        f"{FRAME}import os\nos.write(4, frame({{'values': {{'add': 3}}}}) + frame({{'value': 3, 'changed': {{}}}}) * 9)"
    ),
    "answers nonsense": f"{FRAME}import os\nos.write(4, frame({{'values': []}}) + frame([]) * 9)",
    "answers endlessly": "import os\nwhile True:\n    os.write(4, b'\\xff' * 60000)",
    "closes everything": "import os\nos.closerange(0, 64)\ndef add(a, b): return 0",
    "strikes its judge": (
        "import os, signal\nfor number in (os.getppid(), os.getpid() + 1):\n    try:\n        os.kill(number, 9)\n"
        "    except OSError: pass\ndef add(a, b): return 0"
    ),
    "changes what is asked": (
        "import gc\nfor one in gc.get_objects():\n    if isinstance(one, dict) and 'tests' in one: one.clear()\n"
        "def add(a, b): return 0"
    ),
    "takes the place of its server": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n    for name in ('send', 'receive', 'encode'):\n"
        "        frame.f_globals[name] = lambda *a, **k: {'value': True, 'changed': {}}\n    frame = frame.f_back\n"
        "def add(a, b): return 0"
    ),
    "raises": "def add(a, b): raise AssertionError",
    "is nothing": "",
}


@pytest.mark.parametrize("code", FAKES.values(), ids=FAKES)
def test_no_program_decides_its_own_verdict(sandbox, code):
    tests = ("assert add(1, 2) == 3", "assert abs(add(2, 2) - 4) < 1", "assert all([add(5, 5) == 10])")
    result = sandbox.run(Job(code, tests))
    assert result.status in ("failed", "timeout"), result
    # and the next one is judged as if nothing had been
    assert sandbox.run(Job(ADD, tests)).status == "passed"


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(0)",
        "print('passed')",
        "import sys\nsys.exit(0)",
        "print(2)\nimport os, signal\nos.kill(os.getpid(), 9)",
        "print(2)\nraise ValueError",
        "print(2)\nexit(3)",
        f"{FRAME}import os\nfor n in range(64):\n    try:\n        os.write(n, frame({{'status': 'passed'}}))\n"
        "    except OSError: pass",
    ],
)
def test_nor_a_program_that_prints(sandbox, code):
    assert sandbox.run(Job(code, exchanges=(Exchange("1\n", "2\n"),))).status in ("failed", "error")


@pytest.mark.parametrize(
    ("tests", "status"),
    [
        (("import sys\nsys.exit(0)",), "failed"),
        (("import os\nos._exit(0)",), "error"),
        (("try:\n    add(1)\nexcept:\n    pass\nassert add(1, 1) == 3",), "failed"),
        (("assert add(1, 1) == 2", "assert add(1,"), "error"),
        ((), "error"),
    ],
    ids=["exit", "end", "catch all", "do not parse", "are none"],
)
def test_tests_that_end_early_pass_nobody(sandbox, tests, status):
    assert sandbox.run(Job(ADD, tests)).status == status


def test_a_test_that_catches_everything_hides_no_end(sandbox):
    code = "import os\ndef add(a, b):\n    os._exit(0)"
    test = "try:\n    add(1, 1)\nexcept:\n    pass"
    assert sandbox.run(Job(code, (test,))).status == "failed"
    assert sandbox.run(Job("def add(a, b):\n    import numpy", (test,))).status == "error"


# --- right programs pass


VALUES = (
    "[(1, 2.5), {'a': {1, 2}}, frozenset([3]), None, True, 'é\\ud800', b'\\xff', 1j, range(3), 10 ** 5000]",
    "[float('inf'), -0.0, {(1, 2): [3]}, bytearray(b'a'), int, []]",
    "__import__('collections').Counter('aab')",
    "__import__('collections').deque([1])",
    "__import__('collections').OrderedDict(a=1)",
    "__import__('decimal').Decimal('1.10')",
    "__import__('fractions').Fraction(1, 3)",
    "__import__('datetime').datetime(2020, 1, 2, 3)",
    "__import__('datetime').timedelta(1, 2, 3)",
    "__import__('array').array('i', [1, 2])",
)


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_plain_values_go_both_ways(sandbox, value):
    test = f"x = {value}\nassert same(x) == x and type(same(x)) is type(x)"
    assert sandbox.run(Job("def same(x):\n    return x", (test,))).status == "passed"


RIGHT = {
    "a class, used in the setup": (
        "class Node:\n    def __init__(self, x):\n        self.x, self.left = x, None\n"
        "def depth(n):\n    return 0 if n is None else 1 + depth(n.left)",
        "root = Node(1)\nroot.left = Node(2)",
        "assert depth(root) == 2 and root.left.x == 2",
    ),
    "changes its argument": ("def f(x):\n    x.sort()\n    x[0] = [9]", "", "x = [3, 1]\nf(x)\nassert x == [[9], 3]"),
    "a generator": ("def f():\n    yield from (1, 2)", "", "g = f()\nassert next(g) == 1 and list(g) == [2]"),
    "raises what is expected": (
        "def f():\n    raise ValueError('no')",
        "",
        "try:\n    f()\nexcept ValueError as error:\n    assert str(error) == 'no'\nelse:\n    assert False",
    ),
    "a module that tests use": (
        "import math as m\ndef f():\n    return m.pi",
        "",
        "assert m.isclose(f(), 3.14159265359)",
    ),
    "named as a builtin": ("def sum(a, b):\n    return a + b", "", "assert sum(1, 2) == 3"),
    "named tuples": ("from collections import namedtuple as n\nf = n('P', 'x y')", "", "assert f(1, 2) == (1, 2)"),
    "the same set in the same order": (
        "def f():\n    return list({'a', 'b', 'c', 'd', 'e'})",
        "",
        "assert f() == ['c', 'e', 'd', 'a', 'b'] or f() == f()",
    ),
    "prints and asks": ("print('hello')\ntry:\n    input()\nexcept EOFError:\n    f = len", "", "assert f([1]) == 1"),
}


@pytest.mark.parametrize(("code", "setup", "test"), RIGHT.values(), ids=RIGHT)
def test_right_programs_pass(sandbox, code, setup, test):
    result = sandbox.run(Job(code, (test,), setup))
    assert result.status == "passed", result


PROGRAMS = {
    "reads and prints": "print(sum(map(int, input().split())))",
    "reads all": "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
    "opens descriptor 0": "print(sum(map(int, open(0).read().split())))",
    "opens the device": "print(sum(map(int, open('/dev/stdin').read().split())))",
    "exits": "print(5)\nexit()",
    "prints at its end": "import atexit\natexit.register(print, 5)",
    "in a thread with a deep stack": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 26)\n"
        "def deep(n):\n    return 5 if n == 0 else deep(n - 1)\n"
        "threading.Thread(target=lambda: print(deep(50000))).start()"
    ),
    "spaces are no matter": "print('  5 ')\nprint()",
    "is a main program": "if __name__ == '__main__':\n    print(5)",
    "reads nothing": "print(5)",
}


@pytest.mark.parametrize("code", PROGRAMS.values(), ids=PROGRAMS)
def test_programs_that_print_pass(sandbox, code):
    result = sandbox.run(Job(code, exchanges=(Exchange("2 3\n", "5\n"), Exchange("1 4" + " 0" * 200_000, "5"))))
    assert result.status == "passed", result


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [("1.0000001", "1.0", True), ("1.1", "1.0", False), ("1", "1.0", True), ("1.0", "1", False), ("a b", "a", False)],
)
def test_numbers_with_a_fraction_are_compared_as_such(sandbox, output, expected, same):
    result = sandbox.run(Job(f"print({output!r})", exchanges=(Exchange("", expected),)))
    assert result.status == ("passed" if same else "failed")


UNDECIDED = {
    "another package": ("import numpy", "assert f()", "needs the module numpy"),
    "a file": ("def f():\n    return open('data.txt', 'w')", "assert f()", "does not allow"),
    "a function as argument": ("def f(g):\n    return g(1)", "assert f(lambda x: x) == 1", "hands a function"),
    "objects compared": ("class f: pass", "assert f() != f()", "only the program can compare"),
}


@pytest.mark.parametrize(("code", "test", "words"), UNDECIDED.values(), ids=UNDECIDED)
def test_what_cannot_be_judged_here_is_neither_right_nor_wrong(sandbox, code, test, words):
    result = sandbox.run(Job(code, (test,)))
    assert result.status == "error"
    assert words in result.detail


# --- the worker's side


def test_a_machine_that_cannot_confine_runs_nothing(tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'x')"
    for job in (Job(code, ("assert True",)), Job(code, exchanges=(Exchange("", ""),))):
        with Sandbox(1, means=("limits",)) as unsafe, pytest.raises(InputError, match="reach the network") as caught:
            unsafe.run(job)
        assert caught.value.where == "in force: limits"
        assert "--weak-sandbox" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_lost_sandbox_is_an_error_and_the_next_job_has_a_new_one():
    with Sandbox(1) as sandbox:
        results = []
        job = Job("import time\ntime.sleep(1000)", ("assert True",))
        thread = threading.Thread(target=lambda: results.append(sandbox.run(job)))
        thread.start()
        while not strangers(os.getpid()):
            time.sleep(0.02)
        sandbox._all[0]._process.kill()
        thread.join(30)
        assert [(one.status, one.detail) for one in results] == [("error", "the sandbox was lost")]
        assert sandbox.run(Job(ADD, ("assert add(1, 2) == 3",))).status == "passed"


def test_map_keeps_the_order_and_draws_as_it_goes(sandbox):
    drawn = []

    def jobs():
        for number in range(40):
            drawn.append(number)
            yield Job(f"def f():\n    return {number}", (f"assert f() == {number} and f() % 3",))

    answers = sandbox.map(lambda job: sandbox.run(job).status, jobs())
    assert next(answers) == "failed"
    assert len(drawn) < 20
    assert list(answers) == ["passed" if number % 3 else "failed" for number in range(1, 40)]


def test_a_stop_ends_what_runs():
    class Stop(Exception):
        pass

    def poll():
        if strangers(os.getpid()):
            raise Stop

    job = Job("import time\ntime.sleep(1000)", ("assert True",))
    started = time.monotonic()
    with Sandbox(1) as sandbox, pytest.raises(Stop):
        list(sandbox.map(sandbox.run, [job] * 9, poll))
    assert time.monotonic() - started < 30
    assert strangers(os.getpid()) == []


def test_as_root_it_runs_as_nobody_where_python_can_be_read(monkeypatch, tmp_path):
    if os.geteuid() != 0 or not Path("/usr/bin/python3").exists():
        pytest.skip("not root, or no Python that everybody can read")
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    secret = tmp_path / "secret"
    secret.write_text("planted")
    secret.chmod(0o600)
    code = (
        f"import os\ndef read():\n    return open({str(secret)!r}).read()\ndef who():\n    return os.getuid() > 61000"
    )
    with Sandbox(1, SHORT, means=("limits", "user", "seccomp"), weak=True) as sandbox:
        assert outcome(sandbox, code, "attempt(who)") == "True"
        assert outcome(sandbox, code, "attempt(read)") == "refused"


def test_the_numbers_of_system_calls_are_the_kernels():
    headers = [Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm-generic/unistd.h")]
    if not all(header.exists() for header in headers):
        pytest.skip("the kernel's headers are not installed")
    for column, header in enumerate(headers):
        found = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text()))
        if column:  # the two that the generic table calls otherwise
            found["newfstatat"] = found["fstatat"]
        wanted = {name: numbers[column] for name, numbers in sandbox_confine.SYSCALLS.items()}
        assert {name: found.get(name) for name, number in wanted.items() if number >= 0} == {
            name: str(number) for name, number in wanted.items() if number >= 0
        }
