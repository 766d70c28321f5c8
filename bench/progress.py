"""A progress bar, where tqdm is installed."""

import importlib.util
import sys


def progress(cases):
    """The cases of a list one by one, with a bar that names the one that runs."""
    if not importlib.util.find_spec("tqdm"):
        print(f"{len(cases)} cases; no progress bar, because tqdm is not installed", file=sys.stderr)
        yield from cases
        return
    from tqdm import tqdm

    with tqdm(cases, unit="case", leave=False) as bar:
        for case in bar:
            bar.set_description(case.name)
            yield case
