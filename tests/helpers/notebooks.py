"""Runs notebooks: with other constants, for tests; or as they are, and then stores what they show.

python tests/helpers/notebooks.py examples/*.ipynb
"""

import json
import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

# Bars would be stored as they were drawn.
_ENVIRONMENT = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def run(path: Path, folder: Path, wanted: str, environment: dict[str, str], **constants: object) -> Any:
    """Runs a notebook, and returns what an expression is worth at its end.

    Args:
        path: The notebook.
        folder: Where it runs.
        wanted: An expression in the notebook's names, whose value JSON can hold.
        environment: Further environment variables.
        constants: By name, the value of a constant of the first cell with code, in place of the one there.
    """
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in constants.items():
        first.source, count = re.subn(rf"^{name} = [^#\n]+", f"{name} = {value!r}  ", first.source, flags=re.MULTILINE)
        assert count == 1, f"{path.name} sets {name} {count} times in its first cell with code"
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\n\nprint(json.dumps({wanted}))"))
    _execute(notebook, folder, environment)
    return json.loads(notebook.cells[-1].outputs[-1].text)


def store(path: Path) -> None:
    """Runs a notebook as it is, and writes its outputs into it; hints of libraries on standard error are left out."""
    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:
        _execute(notebook, Path(folder), {})
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    nbformat.write(notebook, path)


def _execute(notebook: NotebookNode, folder: Path, environment: dict[str, str]) -> None:
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", resources=resources, record_timing=False)
    client.execute(env={**os.environ, **_ENVIRONMENT, **environment})


if __name__ == "__main__":
    for name in sys.argv[1:]:
        store(Path(name))
