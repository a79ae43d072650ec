"""Processes for tests that start in milliseconds: forked from a server that has imported torch, timm and the package.

A fresh interpreter takes seconds of a core for its imports alone, and there are hundreds of processes in the tests.
What runs in a forked one is what a fresh one would run: `python -m MODULE ARGUMENTS` (by runpy, as Python itself does),
or a function of a test module, in a process of its own with its own environment, folder, standard streams and signals.
It has no threads but its own, as the server has none.

The server is a child of the test process, one for all tests, and ends with it.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import pickle
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

PRELOADED = ("torch.distributed.tensor", "triscale.runs", "triscale.verification", "ranks")
"""What the server imports before it forks."""


class Forked:
    """A process forked from the server, as `subprocess.Popen` has one; what it writes goes to files.

    Args:
        task: {"module": NAME, "arguments": [...]}, or {"call": the file of a pickled function and its arguments}.
        environment: of the process; None: this one's.
    """

    def __init__(self, task: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        self._server = _server()
        self._out, self._err = self._server.new_file(), self._server.new_file()
        environment = dict(os.environ) if environment is None else environment
        place = {"cwd": os.getcwd(), "path": sys.path, "environment": environment}
        self.pid = self._server.fork({**task, **place, "out": str(self._out), "err": str(self._err)})

    @property
    def returncode(self) -> int | None:
        """As `subprocess` gives it; None while it runs."""
        return self._server.statuses.get(self.pid)

    def poll(self) -> int | None:
        """The exit status, if there is one by now."""
        self._server.hear(0.0)
        return self.returncode

    def wait(self, timeout: float = 240.0) -> int:
        """The exit status. Raises subprocess.TimeoutExpired, and kills the process, where it comes too late."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self._server.hear(0.5)
        return status

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def said(self) -> tuple[str, str]:
        """What it has written to stdout and stderr."""
        return self._out.read_text(encoding="utf-8"), self._err.read_text(encoding="utf-8")


def start(arguments: Sequence[str | Path], environment: dict[str, str] | None = None) -> Forked:
    """Begin `python -m triscale ARGUMENTS`."""
    return Forked({"module": "triscale", "arguments": [str(argument) for argument in arguments]}, environment)


def run(arguments: Sequence[str | Path], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m triscale ARGUMENTS` to its end, as `subprocess.run` gives it."""
    process = start(arguments, environment)
    status = process.wait()
    return subprocess.CompletedProcess(list(arguments), status, *process.said())


def call(function: Callable[..., Any], *arguments: Any) -> Forked:
    """Begin `function(*arguments)`; `function` stands at the top of a module."""
    file = _server().new_file()
    file.write_bytes(pickle.dumps((function, arguments)))
    return Forked({"call": str(file)})


class _Server:
    """This process's end of the pipes: lines of JSON."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, json.dumps(sys.path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._answers = _Lines(self._process.stdout.fileno())  # type: ignore[union-attr]
        self._begun: list[int] = []
        self._folder = Path(tempfile.mkdtemp(prefix="forked"))
        self._numbers = itertools.count()
        self.statuses: dict[int, int] = {}
        atexit.register(self._close)

    def _close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()  # type: ignore[union-attr]
        self._process.wait()
        shutil.rmtree(self._folder)

    def new_file(self) -> Path:
        """The path of a file that is not there yet, and will not be when the tests have ended."""
        return self._folder / str(next(self._numbers))

    def fork(self, task: dict[str, Any]) -> int:
        """The number of a new process."""
        assert self._process.stdin is not None
        data = json.dumps(task).encode() + b"\n"
        while data:
            data = data[self._process.stdin.write(data) :]
        while not self._begun:
            self.hear(1.0)
        pid = self._begun.pop()
        self.statuses.pop(pid, None)  # a number that was another's
        return pid

    def hear(self, seconds: float) -> None:
        """Take in what the server says, for which it has so long."""
        for answer in self._answers.come(seconds):
            if "pid" in answer:
                self._begun.append(answer["pid"])
            else:
                self.statuses[answer["ended"]] = answer["status"]
        assert self._process.poll() is None, "the server that forks processes is gone"


@cache
def _server() -> _Server:
    return _Server()


class _Lines:
    """JSON values, a line each, as they come from a pipe."""

    def __init__(self, pipe: int) -> None:
        self.pipe, self._rest, self.ended = pipe, b"", False

    def come(self, seconds: float) -> list[dict[str, Any]]:
        """What is there, waited for so long if there is nothing."""
        if not select.select([self.pipe], [], [], seconds)[0]:
            return []
        data = os.read(self.pipe, 1 << 16)
        self.ended = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


def _serve() -> dict[str, Any]:
    """Fork a process for each task that comes; returns, in such a process alone, its task."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the tests
    tasks, children = _Lines(0), set()
    while not tasks.ended:
        ready = select.select([tasks.pipe, woken], [], [])[0]
        if woken in ready:
            os.read(woken, 1 << 16)
            for child in list(children):
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    children.remove(child)
                    _say({"ended": pid, "status": os.waitstatus_to_exitcode(status)})
        for task in tasks.come(0.0) if tasks.pipe in ready else ():
            child = os.fork()
            if child == 0:
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGCHLD, signal.SIGINT):
                    signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else signal.default_int_handler)
                os.close(woken)
                os.close(wake)
                return task
            children.add(child)
            _say({"pid": child})
    for child in children:
        os.kill(child, signal.SIGKILL)
    os._exit(0)


def _say(answer: dict[str, int]) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


def _work(task: dict[str, Any]) -> None:
    """In a forked process: become what was asked for."""
    for descriptor, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, task["out"], os.O_WRONLY | os.O_CREAT),
        (2, task["err"], os.O_WRONLY | os.O_CREAT),
    ):
        file = os.open(name, flags, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(task["cwd"])
    os.environ.clear()
    os.environ.update(task["environment"])
    if "OMP_NUM_THREADS" in os.environ:  # its library has read the server's
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if "call" in task:
        sys.path[:] = task["path"]
        function, arguments = pickle.loads(Path(task["call"]).read_bytes())
        function(*arguments)
        return
    # As python -m has it.
    sys.path[:] = [task["cwd"], *[folder for folder in task["path"] if Path(folder) != Path(__file__).parent]]
    sys.argv = [task["module"], *task["arguments"]]
    runpy.run_module(task["module"], run_name="__main__", alter_sys=True)


def _main() -> None:
    sys.path[:] = json.loads(sys.argv[1])
    for name in PRELOADED:
        __import__(name)
    _work(_serve())


if __name__ == "__main__":
    _main()
