"""Run commands in a fresh process, as from a shell; several share its imports.

Probes have few cells, and reports no UMAP, whose compilation takes ten seconds.
"""

import json
from typing import NamedTuple

import programs

PROGRAM = """
import contextlib, functools, io, json, sys
from selfflow.cli import main
from selfflow.registries import trial

commands = json.load(sys.stdin)
if {"metrics", "probe", "report"} & {arguments[0] for arguments in commands}:
    # imported before the trial, whose end removes the registrations made in it
    from selfflow.analysis import probing, sample_metrics
    from selfflow.report import sample_sections

    few = {"levels": (0.0, 0.5), "strengths": (0.1,)}
    probing.probe_run = functools.partial(probing.probe_run, **few)
    sample_sections._METHOD = "PCA"
answers = []
for arguments in commands:
    output, errors, status = io.StringIO(), io.StringIO(), 0
    redirected = contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors)
    with trial(), redirected[0], redirected[1]:
        try:
            main(arguments)
        except SystemExit as ended:
            status = ended.code or 0
    answers.append((status, output.getvalue(), errors.getvalue()))
print("ANSWERS", json.dumps(answers))
"""


class Answer(NamedTuple):
    "Exit status and printed text of a command."

    status: int
    output: str
    errors: str

    @property
    def refusal(self) -> str:
        "The error message; fails if the command succeeded or printed more lines."
        assert self.status == 2, self
        (line,) = self.errors.strip().splitlines()
        return line


def shell(folder, *commands):
    "Run commands, each a list of arguments, in a folder; return their Answers."
    texts = [[str(argument) for argument in command] for command in commands]
    done = programs.run("-c", PROGRAM, cwd=folder, text=json.dumps(texts))
    assert done.returncode == 0, done.stderr
    answers = done.stdout.rpartition("ANSWERS ")[2]
    return [Answer(*answer) for answer in json.loads(answers)]
