"""Takes the study's pages, pictures and tables into the site from where the study writes them, examples/study."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

SHOWN = {".md", ".svg", ".csv", ".html"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds them under study/, so that their links to each other hold."""
    folder = Path(config.config_file_path).parent / "examples" / "study"
    for path in sorted(folder.iterdir()):
        if path.suffix in SHOWN:
            files.append(File.generated(config, f"study/{path.name}", abs_src_path=str(path)))
    return files
