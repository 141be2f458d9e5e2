"""Splits large files into parts that any transfer takes: `python -m training.smollm2.parts`."""

import argparse
import hashlib
from pathlib import Path

PART_BYTES = 15 << 20


def split(path: Path, folder: Path, part_bytes: int = PART_BYTES) -> list[Path]:
    """Writes NAME.part-00, ... and NAME.sha256 to the folder, in place of older ones; gives the parts'
    paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in _parts(folder, path.name):
        old.unlink()
    parts: list[Path] = []
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(part_bytes):
            part = folder / f"{path.name}.part-{len(parts):02d}"
            part.write_bytes(piece)
            digest.update(piece)
            parts.append(part)
    (folder / f"{path.name}.sha256").write_text(digest.hexdigest() + "\n")
    return parts


def join(folder: Path, name: str, target: Path) -> None:
    """Joins the parts. Raises ValueError where one is missing or damaged, and leaves the target as it was."""
    digest = hashlib.sha256()
    unfinished = target.with_name(target.name + ".tmp")
    with unfinished.open("wb") as file:
        for part in _parts(folder, name):
            piece = part.read_bytes()
            digest.update(piece)
            file.write(piece)
    checksum = folder / f"{name}.sha256"
    if not checksum.is_file() or digest.hexdigest() != checksum.read_text().strip():
        unfinished.unlink()
        raise ValueError(f"{folder} has not all parts of {name} as they were written, or no {checksum.name}")
    unfinished.replace(target)


def _parts(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}.part-*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    splitting = commands.add_parser("split", help="FILE into parts in FOLDER")
    splitting.add_argument("file", type=Path)
    splitting.add_argument("folder", type=Path)
    joining = commands.add_parser("join", help="the parts of NAME in FOLDER into FILE")
    joining.add_argument("folder", type=Path)
    joining.add_argument("name")
    joining.add_argument("file", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "split":
        print(*split(arguments.file, arguments.folder), sep="\n")
        return
    try:
        join(arguments.folder, arguments.name, arguments.file)
    except ValueError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
