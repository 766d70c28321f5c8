"""JSON files of results that are complete at any moment, and a hash of the code that was measured."""

import hashlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def write_json(path, value):
    """Write a file atomically: it holds the old value or the new one, even if this process is killed."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_json(path):
    """The object in the file; {} if there is no file, or, with a message, if it holds something else."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # also for bytes that are not text
        found = None
    if not isinstance(found, dict):
        print(f"{path} is ignored: it holds no JSON object", file=sys.stderr)
        return {}
    return found


def put(path, section, key, value):
    """Set one entry of a section of the object in the file."""
    found = read_json(path)
    found.setdefault(section, {})[key] = value
    write_json(path, found)


def sources():
    """A hash of the code that is measured, the files of kernels/ and tritonnet/."""
    digest = hashlib.sha256()
    for path in sorted(p for folder in ("kernels", "tritonnet") for p in (ROOT / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
