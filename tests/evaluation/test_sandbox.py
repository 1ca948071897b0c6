"""Programs of a model that behave, hang, hoard, lie or look outside."""

import pytest

from looplm.evaluation.sandbox import network_wall, run_program


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert 1 + 1 == 2", "passed"),
        ("assert 1 + 1 == 3", "AssertionError"),
        ("raise ValueError('no')", "ValueError: no"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit(0)", "exit code 0"),
        ("import os; os._exit(0)", "exit code 0"),
        ("x = bytearray(3 << 30)", "MemoryError"),
        ("open('big', 'wb').write(b'x' * (4 << 20))", "OSError: [Errno 27] File too large"),
    ],
)
def test_programs(source, reason):
    outcome = run_program(source)
    assert outcome.reason == reason and outcome.passed == (reason == "passed")


@pytest.mark.parametrize("source", ["while True: pass", "import time; time.sleep(60)"])
def test_a_program_that_does_not_end(source):
    assert run_program(source, seconds=1.0).reason == "timeout"


def test_children_end_with_their_program(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    source = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])\nwhile True: pass"
    assert run_program(source, seconds=1.0).reason == "timeout"
    import time

    time.sleep(1.8)
    assert not mark.exists()


def test_it_starts_in_an_empty_folder_with_a_bare_environment(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    source = "import os\nassert os.listdir('.') in (['program.py', 'said'], ['said', 'program.py']), os.listdir('.')\n"
    assert run_program(source + "assert 'SECRET_TOKEN' not in os.environ").passed


def test_the_network_is_out_of_reach():
    if not network_wall():
        pytest.skip("this system has no namespaces for unprivileged processes")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        source = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)"
        assert "Error" in run_program(source).reason
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
