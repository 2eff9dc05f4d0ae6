"""What mkdocs is told beside mkdocs.yml: notebooks are pages."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

from notebook import markdown


class Notebook(File):
    """A page with a notebook's name, so that links to the notebook lead to it."""

    def is_documentation_page(self) -> bool:
        """It is."""
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put a Markdown page and its pictures in each notebook's place."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        text, pictures = markdown(json.loads(file.content_string), Path(file.src_uri).stem)
        files.remove(file)
        files.append(Notebook.generated(config, file.src_uri, content=text))
        for name, data in pictures.items():
            files.append(File.generated(config, name, content=data))
    return files
