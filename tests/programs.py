"""Python programs that start at once, forked from a process that has imported torch.

Each is a process of its own, as from a shell: arguments, folder, environment, streams,
signals and exit status are its own. As a script this file is the process from which
they are forked: importing torch and half of the package takes it four seconds, once.
"""

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from functools import cache
from pathlib import Path

_MESSAGE = 1_000_000  # bytes of a request at most


@cache
def _server() -> socket.socket:
    "Start the process from which programs are forked; it ends with this one."
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGE)
    root = str(Path(__file__).parents[1])
    subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        env={**os.environ, "PYTHONPATH": root},
        start_new_session=True,
    )
    theirs.close()
    return ours


class Program:
    """A running Python program: `python *args`.

    args: as Python takes them: a file, -c and code or -m and a module, then arguments.
    cwd: its folder; by default this process's.
    env: its environment; by default this process's.
    text: what it reads from its standard input.
    """

    def __init__(self, *args, cwd=None, env=None, text=""):
        self.args = [str(arg) for arg in args]
        self.returncode = None
        self._streams = [tempfile.TemporaryFile() for _ in range(3)]
        self._streams[0].write(text.encode())
        self._streams[0].seek(0)
        self._status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {
            "args": self.args,
            "cwd": os.fspath(cwd or os.getcwd()),
            "env": dict(os.environ if env is None else env),
        }
        files = [stream.fileno() for stream in self._streams]
        with theirs:
            socket.send_fds(
                _server(), [json.dumps(request).encode()], [*files, theirs.fileno()]
            )
        self.pid = int(self._receive(300))  # the server may have to start

    def _receive(self, timeout):
        self._status.settimeout(timeout)
        message = self._status.recv(100)
        assert message, "the process from which programs are forked has ended"
        return message

    def poll(self):
        "Return the exit status, None while the program runs."
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout=600):
        """Return the exit status, negative for a signal.

        Raises subprocess.TimeoutExpired if it still runs after `timeout` seconds.
        """
        if self.returncode is None:
            try:
                self.returncode = int(self._receive(timeout))
            except (TimeoutError, BlockingIOError) as error:
                raise subprocess.TimeoutExpired(self.args, timeout) from error
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def _text(self, stream):
        # not from where the program's own position is: it shares that with this process
        size = os.fstat(stream.fileno()).st_size
        return os.pread(stream.fileno(), size, 0).decode()

    @property
    def stdout(self):
        "Its output so far."
        return self._text(self._streams[1])

    @property
    def stderr(self):
        "Its error output so far."
        return self._text(self._streams[2])


def run(*args, timeout=600, **options):
    "Return a Program that has ended; it is killed after `timeout` seconds."
    program = Program(*args, **options)
    try:
        program.wait(timeout)
    finally:
        program.kill()
    return program


def _next_request(server):
    """Return the request of a program in that program's process.

    The server itself stays in here until its client ends.
    """
    while True:
        message, files, _, _ = socket.recv_fds(server, _MESSAGE, 4)
        if not message:
            sys.exit()  # the client has ended
        if os.fork():
            for file in files:
                os.close(file)
            continue
        # a process for each program, which waits for it
        server.close()
        status = socket.socket(fileno=files.pop())
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        pid = os.fork()
        if not pid:
            status.close()
            os.setsid()  # as in a shell: a signal to its group reaches its processes
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            return json.loads(message)
        status.send(str(pid).encode())
        _, ended = os.waitpid(pid, 0)
        status.send(str(os.waitstatus_to_exitcode(ended)).encode())
        os._exit(0)


def _become(args, cwd, env):
    "Run a program in this process and end it."
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    status = 0
    try:
        _run(args)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            raise
        status = ended.code or 0
    # As an interpreter ends, but without a second spent on freeing what was imported.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(args):
    first, *rest = args
    if first == "-m":
        module, *rest = rest
        sys.argv = [module, *rest]
        sys.path[0] = os.getcwd()
        sys.modules.pop(module, None)  # it runs as __main__
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif first == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        sys.path[0] = ""
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(code, "<string>", "exec"), main.__dict__)
    else:
        sys.argv = args
        sys.path[0] = str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    import torch._dynamo  # noqa: F401, the first optimiser of a process imports it

    import selfflow.cli  # noqa: F401
    import selfflow.report.report  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    connection = socket.socket(fileno=int(sys.argv[1]))
    _become(**_next_request(connection))
