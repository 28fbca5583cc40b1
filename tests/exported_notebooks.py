"""Copies of the notebooks that take what they export from the package instead of defining it.

A notebook's own cells are not lines of genre_nb/, so running it says nothing about which of those lines were run. Its copy
tests the package as others import it: `make coverage` runs the copies.
"""

import json
import re
import sys
from pathlib import Path

TAKEN = """import genre_nb.{module} as _exported
globals().update({{name: value for name, value in vars(_exported).items() if not name.startswith("__") or name == "__version__"}})"""


def copy_of(notebook: Path) -> str:
    "The copy as JSON; a notebook that exports nothing is copied as it is."
    content, module = json.loads(notebook.read_text(encoding="utf-8")), None
    for cell in content["cells"]:
        source = "".join(cell["source"])
        if named := re.search(r"^#\| default_exp (\w+)$", source, flags=re.M):
            module = named[1]
            cell["source"] = [TAKEN.format(module=module)]
        elif cell["cell_type"] == "code" and re.match(r"#\| export\b", source):
            cell["source"] = []
    return json.dumps(content)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for notebook in sorted((Path(__file__).parents[1] / "nbs").glob("*.ipynb")):
        (folder / notebook.name).write_text(copy_of(notebook), encoding="utf-8")
