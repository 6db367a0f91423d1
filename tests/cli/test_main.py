"""The command line as a whole: help, speed, errors, exit codes."""

import os
import signal
import subprocess
import sys
import time

import pytest
import typer

import kullback
from kullback import cli
from kullback.core.errors import ConfigError, Interrupted, MissingExtra

COMMAND = [sys.executable, "-m", "kullback"]


def execute(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.execute(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_help_is_quick_and_imports_no_torch():
    """In the best of three, as other work may go on beside the tests."""
    code = "import sys; from kullback import cli; cli.execute(['--help']); sys.exit('torch' in sys.modules)"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert "doctor" in done.stdout
    assert min(seconds) < 0.3


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["runs"], ["runs", "--help"], ["doctor", "-h"]])
def test_help_is_there_for_each_command(capsys, arguments):
    code, out, err = execute(capsys, *arguments)
    assert (code, err) == (0, "")
    assert out.startswith("Usage: kullback")


def test_every_command_has_a_sentence_and_every_option_a_help():
    app = typer.main.get_command(cli.application())
    waiting = [(name, command) for name, command in app.commands.items()]
    assert len(waiting) >= 2
    while waiting:
        name, command = waiting.pop()
        assert (command.help or "").rstrip().split("\n")[0].endswith("."), name
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"
        waiting += getattr(command, "commands", {}).items()


def test_the_version(capsys):
    assert execute(capsys, "--version") == (0, f"{kullback.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctr"], "no such command 'doctr'. Did you mean 'doctor'? (see kullback --help)"),
        (["runs", "lss"], "(see kullback runs --help)"),
        (["doctor", "--jsno"], "no such option --jsno: did you mean --json?"),
        (["doctor", "--zzz"], "no such option --zzz: see kullback doctor --help"),
        (["runs", "show"], "missing argument"),
        (["runs", "prune", "--keep", "many"], "--keep"),
        (["runs", "prune", "--keep", "-1"], "--keep"),
        (["runs", "ls", "no-such-directory"], "no-such-directory is not a directory"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, message):
    code, out, err = execute(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def with_command(monkeypatch: pytest.MonkeyPatch, function) -> None:
    """The command line with one command more."""
    app = cli.application()
    app.command("extra")(function)
    monkeypatch.setattr(cli, "application", lambda: app)


def raising(error: BaseException):
    def extra() -> None:
        raise error

    return extra


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("one\ntwo"), 2, "error: one two\n"),
        (
            MissingExtra("ray", extra="ray"),
            2,
            "error: ray is needed here and is not installed: pip install 'kullback[ray]'\n",
        ),
        (Interrupted("stopped after step 3"), 130, "error: stopped after step 3\n"),
        (KeyboardInterrupt(), 130, None),
        (typer.Exit(1), 1, ""),
    ],
)
def test_exit_codes(capsys, monkeypatch, error, code, line):
    with_command(monkeypatch, raising(error))
    found, out, err = execute(capsys, "extra")
    assert (found, out) == (code, "")
    assert line is None or err == line


def test_a_returned_number_is_the_exit_code(capsys, monkeypatch):
    def extra() -> int:
        return 1

    with_command(monkeypatch, extra)
    assert execute(capsys, "extra")[0] == 1


def test_a_bug_is_not_dressed_up(monkeypatch):
    with_command(monkeypatch, raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.execute(["extra"])


def test_the_process_exits_with_the_code():
    done = subprocess.run([*COMMAND, "runs", "ls", "no-such-directory"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1


def test_no_colour_when_piped():
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    for arguments in (["--help"], ["doctor"], ["doctor", "--jsn"]):
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, env=environment, check=False)
        assert b"\x1b" not in done.stdout + done.stderr


def test_a_reader_that_goes_away_is_no_error():
    done = subprocess.run(
        f"'{sys.executable}' -m kullback doctor | head -n 1", shell=True, capture_output=True, check=False
    )
    assert done.stdout.startswith(b"python")
    assert b"Traceback" not in done.stderr


def test_an_interrupt_exits_with_130():
    # a shell that starts the tests in the background has them ignore the signal, and this process after them
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "import time, sys; from kullback import cli; app = cli.application()\n"
    code += "app.command('wait')(lambda: (print('ready', flush=True), time.sleep(60)))\n"
    code += "cli.application = lambda: app; sys.exit(cli.execute(['wait']))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
