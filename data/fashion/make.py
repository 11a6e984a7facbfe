"""Write the part of Fashion-MNIST that comes with the project.

make.py [FOLDER OF THE ORIGINAL FILES]

The originals are checked by the sha256 of their content before anything is written;
SHA256 lists the files of the project (another zlib may compress the same content anew).
"""

import hashlib
import sys
from pathlib import Path

from selfflow.data.fashion import PART, rank_in_class, read_original, write_idx

HERE = Path(__file__).parent


def main(path: str = "") -> None:
    for split, count in PART.items():
        images, labels = read_original(split, path)
        chosen = rank_in_class(labels) < count
        write_idx(HERE / f"{split}-images-idx3-ubyte.gz", images[chosen])
        write_idx(HERE / f"{split}-labels-idx1-ubyte.gz", labels[chosen])
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in sorted(HERE.glob("*.gz"))
    ]
    (HERE / "SHA256").write_text("".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
