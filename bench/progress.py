"""A progress bar in a terminal, where tqdm is installed, and lines elsewhere."""

import importlib.util
import sys


def progress(cases):
    """The cases of a list one by one, with a bar that names the one that runs."""
    if not (sys.stderr.isatty() and importlib.util.find_spec("tqdm")):
        for i, case in enumerate(cases, 1):
            print(f"{i} of {len(cases)}: {case.name}", file=sys.stderr, flush=True)
            yield case
        return
    from tqdm import tqdm

    with tqdm(cases, unit="case", leave=False) as bar:
        for case in bar:
            bar.set_description(case.name)
            yield case
