"""One process that has imported and set up, and a fork of it for each piece of code that needs a process of its own.

An import of torch costs four seconds of processor time, a fork none. What is set up must not have started threads.
"""

import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

SERVER = """
import json, os, sys, tempfile

setup, *_ = sys.argv[1:]
names = {"__name__": "__main__"}
exec(compile(setup, "setup", "exec"), names)
print("ready", flush=True)
for line in sys.stdin:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            code = 1
            try:
                exec(compile(json.loads(line), "code", "exec"), names)
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        print(json.dumps([code, out.read().decode(), err.read().decode()]), flush=True)
"""


class Forks:
    """Runs code in forks of a process that ran `setup`, one after another; to be closed, as a context manager is."""

    def __init__(self, setup, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, textwrap.dedent(setup)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n", "the set-up failed: its error stands above"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.communicate()

    def run(self, *lines):
        """What became of `lines` of code in a fork: its `returncode`, `stdout` and `stderr`."""
        self.process.stdin.write(json.dumps("\n".join(lines)) + "\n")
        self.process.stdin.flush()
        code, out, err = json.loads(self.process.stdout.readline())
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)
