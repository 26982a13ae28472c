"""The same rows in every format that is read."""

import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet

ROWS = [
    {"question": f"What is {n}\u2028plus, 1?\n“{n}”", "answer": str(n + 1), "other": "x"} for n in range(20)
]
PROBLEMS = [(f"Q: {row['question']}\nA:", f" {row['answer']}") for row in ROWS]
GOOD = {"question": "q", "answer": "a"}


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".gz":
        plain = write(path.with_suffix(""), rows)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
        return path
    match path.suffix:
        case ".jsonl" | ".ndjson":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case ".csv" | ".tsv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        case "":
            datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path
