"""Run by a test in a process of its own: the command lines that a JSON file lists, one after the other.

huggingface_hub reads its settings from the environment when it is imported, so a process has one hub; several commands
in one process import everything once. Prints a JSON object for each: its exit code and what it said.
"""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout

from lightning_drm.cli.main import main

if __name__ == "__main__":
    for words in json.load(sys.stdin):
        output, code = io.StringIO(), 0
        with redirect_stdout(output), redirect_stderr(output):
            try:
                main(words)
            except SystemExit as end:
                code = end.code
        print(json.dumps({"code": code, "said": output.getvalue()}), flush=True)
