"""Write the CLIP tokenizer's vocab.json and merges.txt from the list in open_clip's wheel (MIT).

Usage: pip download --no-deps open_clip_torch==3.3.0 -d WHEELS
       python -m tools.checkpoint_assets WHEELS/open_clip_torch-*.whl sdlora/assets/sd1/tokenizer

The vocabulary follows from the merges (Radford et al. 2021): 256 bytes, the same ending a word, one
token a merge, and the two end marks.
"""

from __future__ import annotations

import gzip
import json
import sys
import zipfile
from pathlib import Path

NUM_MERGES = 49152 - 256 - 2


def byte_characters() -> list[str]:
    """Return the printable character that stands for each byte, in the order of the vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]


def main() -> None:
    """Read the wheel named first, write into the folder named second."""
    wheel, folder = Path(sys.argv[1]), Path(sys.argv[2])
    with zipfile.ZipFile(wheel) as archive:
        packed = archive.read("open_clip/bpe_simple_vocab_16e6.txt.gz")
        licence = next(name for name in archive.namelist() if name.endswith("licenses/LICENSE"))
        licence_text = archive.read(licence).decode("utf-8")
    merges = gzip.decompress(packed).decode("utf-8").split("\n")[1 : NUM_MERGES + 1]
    characters = byte_characters()
    tokens = [*characters, *(character + "</w>" for character in characters)]
    tokens += ["".join(merge.split()) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":"))
    (folder / "vocab.json").write_text(text + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "LICENSE").write_text(licence_text, encoding="utf-8")
    print(f"{len(vocabulary)} tokens, {len(merges)} merges")


if __name__ == "__main__":
    main()
