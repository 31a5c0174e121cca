"""Starts train.py in a process of its own for each line of standard input: [file for its output, arguments].

Prints the process's number and, when it has ended, its exit code (negative: the signal that killed it). A process is
forked from this one, which has done the imports; what runs is train.py as from a shell.
"""

import json
import os
import sys

import gptjax.hub.init_from  # noqa: F401
import gptjax.inference.language_model  # noqa: F401
import gptjax.loop  # noqa: F401
from gptjax.errors import LenientOutput, one_line_errors
from gptjax.train import main

for line in sys.stdin:
    output, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.stdin = open(os.devnull)  # noqa: SIM115
        with one_line_errors():
            sys.stdout = LenientOutput(sys.stdout)
            sys.exit(main(arguments))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
