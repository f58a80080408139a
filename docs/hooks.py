"""The site shows pictures that lie outside docs/: pages name them as files of the repository."""

from pathlib import Path

from mkdocs.structure.files import File

HERE, THERE = "../benchmarks/pictures/", "pictures/"


def on_files(files, config):
    folder = Path(config.docs_dir).parent / "benchmarks/pictures"
    for path in sorted(folder.glob("*.png")):
        files.append(File.generated(config, THERE + path.name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, **_):
    return markdown.replace(HERE, THERE)
