"""The order of the source: which module may import which, how long files and functions are, and what documents name.

Nothing is imported; the source is read with `ast`.
"""

import ast
import functools
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "tritonnet", "bench", "tests")
SOURCES = {p.relative_to(ROOT).as_posix(): p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")}
ANYTHING = None


class Group(NamedTuple):
    """Modules that may import each other, those of earlier rows of LAYERS, the standard library and `beside`."""

    name: str
    files: str
    """Patterns of paths. Where several groups match a path, the longest pattern decides."""
    beside: str | None = "torch"
    alone: bool = False
    """Imports nothing of earlier rows."""
    kernels: bool = False
    """May import those modules of kernels/ that need triton; all others only the ones that do not."""


# From the bottom up. Groups of the same row do not import each other.
LAYERS = [
    [Group("kernels", "kernels/*", "torch triton", True, True), Group("data", "tritonnet/data/*", alone=True)],
    [Group("reference", "tritonnet/reference.py"), Group("registration", "tritonnet/registration.py", alone=True)],
    [Group("dispatch", "tritonnet/dispatch.py", "torch triton", kernels=True)],
    [Group("operators", "tritonnet/ops.py")],
    [
        Group("FLOPs", "tritonnet/flops.py"),
        Group("decompositions", "tritonnet/decompositions.py"),
        Group("sharding", "tritonnet/sharding.py"),
        Group("imports", "tritonnet/imports.py", None, alone=True),
    ],
    [Group("derivatives", "tritonnet/autograd/*"), Group("vmap", "tritonnet/batching.py")],
    [Group("functions", "tritonnet/nn/functional.py tritonnet/nn/_[!_]*.py")],
    [Group("layers", "tritonnet/nn/*")],
    [Group("serving", "tritonnet/serving.py")],
    [Group("patterns", "tritonnet/calls.py tritonnet/patterns.py")],
    [Group("compiler", "tritonnet/compiler.py")],
    [Group("fusion", "tritonnet/fusion.py")],
    [Group("conversion", "tritonnet/conversion.py")],
    [Group("lenet", "tritonnet/lenet/*", kernels=True)],
    [Group("whole_step", "tritonnet/whole_step/*")],
    [Group("train_step", "tritonnet/train_step.py")],
    [Group("tritonnet", "tritonnet/__init__.py")],
    [
        Group("command line", "tritonnet/cli/* tritonnet/__main__.py tritonnet/train.py", "torch rich PIL matplotlib"),
        Group("examples", "tritonnet/examples/*"),
    ],
    [Group("bench", "bench/*", ANYTHING, kernels=True)],
    [Group("ptx", "tests/ptx/*", ANYTHING, kernels=True)],
    # bench/warm/tests.py is a plugin of pytest, which nothing imports.
    [Group("tests", "tests/* bench/warm/tests.py", ANYTHING, kernels=True)],
]
RANKS = {group: rank for rank, row in enumerate(LAYERS) for group in row}
WITHOUT_TRITON = "kernels/shapes.py", "kernels/linear_chain/layered.py", "kernels/cross_entropy/targets.py"


class Import(NamedTuple):
    line: int
    text: str
    path: str | None
    """Of the file, where it is one of this repository."""
    library: str
    """Otherwise the name of the library."""


def group_of(path):
    matching = [(len(p), group) for group in RANKS for p in group.files.split() if fnmatchcase(path, p)]
    return max(matching, key=lambda pair: pair[0])[1] if matching else None


def file_of(name, files):
    """Path of the module `name`, as an import in this repository finds it, or None."""
    for start, folder in (("tritonnet.kernels", "kernels"), ("", ""), ("", "tests/")):
        if name == start or name.startswith(f"{start}." if start else ""):
            base = folder + name[len(start) :].replace(".", "/")
            for path in (f"{base}.py", f"{base}/__init__.py"):
                if path in files:
                    return path
    return None


@functools.cache
def names_imported(path, source):
    """[(line, statement, module, name imported from it or None)], in functions and under conditions too."""
    package = path.split("/")[:-1]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, ast.unparse(node), alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(filter(None, [*above, node.module]))
            found += [(node.lineno, ast.unparse(node), module, alias.name) for alias in node.names]
    return found


def imports_of(path, source, files):
    """[Import] of everything that `source` imports."""
    found = []
    for line, text, module, name in names_imported(path, source):
        # A name may be a module of its own, or belong to the module that it is imported from.
        target = (name and file_of(f"{module}.{name}", files)) or file_of(module, files)
        found.append(Import(line, text, target, module.split(".")[0]))
    return found


def needing_triton(imports):
    """Paths in kernels/ that import triton, by themselves, by what they import or by the packages they belong to."""
    needing = set()
    while True:
        more = {
            path for path, found in imports.items()
            if path.startswith("kernels/") and path not in needing
            and (any(i.library == "triton" or i.path in needing for i in found) or needing & set(packages_of(path)))
        }  # fmt: skip
        if not more:
            return needing
        needing |= more


def packages_of(path):
    folders = path.split("/")[:-1]
    return ["/".join([*folders[:n], "__init__.py"]) for n in range(1, len(folders) + 1)]


def breaches(sources):
    """["file:line: import: why it may not"]. `sources`: {path: text}."""
    files = set(sources)
    imports = {path: imports_of(path, text, files) for path, text in sources.items()}
    needing = needing_triton(imports)
    found = [f"{path}: belongs to no group of LAYERS" for path in files if not group_of(path)]
    for path in filter(group_of, files):
        for one in imports[path]:
            if why := forbidden(group_of(path), one, needing):
                found.append(f"{path}:{one.line}: `{one.text}`: {why}")
    for path in sorted(needing):
        if path in WITHOUT_TRITON or path.endswith("/__init__.py"):
            found.append(f"{path}: needs triton, in what it imports if not by itself")
    return sorted(found)


def forbidden(group, one, needing):
    """Why a module of `group` may not import `one`, or None."""
    if one.path is None:
        known = one.library in sys.stdlib_module_names or one.library == "__future__"
        if known or group.beside is ANYTHING or one.library in group.beside.split():
            return None
        return f"{group.name} imports {group.beside.replace(' ', ', ')} and the standard library"
    other = group_of(one.path)
    if other is None or other == group:
        return None
    if group.alone:
        return f"{group.name} imports nothing else of this repository"
    if RANKS[other] >= RANKS[group]:
        return f"{group.name} comes before {other.name}, or beside it"
    if one.path in needing and not group.kernels:
        return f"{one.path} needs triton, and {group.name} has to work without"
    return None


@pytest.fixture(scope="module")
def sources():
    return {path: file.read_text(encoding="utf-8") for path, file in SOURCES.items()}


def test_who_imports_whom(sources):
    found = breaches(sources)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "path, source, why",
    [
        ("kernels/relu.py", "from ..tritonnet import ops", "kernels imports nothing else"),
        ("kernels/shapes.py", "import numpy", "kernels imports torch, triton"),
        ("kernels/shapes.py", "def f():\n    import triton", "kernels/shapes.py: needs triton"),
        ("kernels/linear_chain/layered.py", "from ..linear import forward", "layered.py: needs triton"),
        ("kernels/cross_entropy/__init__.py", "from .forward import forward", "targets.py: needs triton"),
        ("tritonnet/data/__init__.py", "from .. import nn", "data imports nothing else"),
        ("tritonnet/reference.py", "from .kernels import launchers", "has to work without"),
        ("tritonnet/reference.py", "if True:\n    from .kernels.conv2d import forward", "has to work without"),
        ("tritonnet/ops.py", "from . import autograd", "operators comes before derivatives"),
        ("tritonnet/autograd/conv2d.py", "def f():\n    from .. import batching", "derivatives comes before vmap"),
        ("tritonnet/autograd/conv2d.py", "from ..nn.functional import conv2d", "derivatives comes before functions"),
        ("tritonnet/nn/_plain.py", "import tritonnet.nn", "functions comes before layers"),
        ("tritonnet/patterns.py", "import triton", "patterns imports torch and"),
        ("tritonnet/lenet/model.py", "import tritonnet", "lenet comes before tritonnet"),
        ("tritonnet/lenet/model.py", "from ..train_step import TrainStep", "lenet comes before train_step"),
        ("tritonnet/cli/doctor.py", "from ..examples import tutorial_lenet", "command line comes before examples"),
        ("tritonnet/cli/bench.py", "from bench import run", "command line comes before bench"),
        ("bench/run.py", "import exact", "bench comes before tests"),
        ("tests/ptx/parse.py", "import conftest", "ptx comes before tests"),
        ("tritonnet/elsewhere.py", "", "belongs to no group"),
    ],
)
def test_an_import_in_the_wrong_direction_is_found(sources, path, source, why):
    found = breaches({**sources, path: source})
    assert any(why in line for line in found), found


def test_the_message_names_file_line_and_import(sources):
    why = "operators comes before derivatives, or beside it"
    found = breaches({**sources, "tritonnet/ops.py": "def f():\n    from . import autograd"})
    assert found == [f"tritonnet/ops.py:2: `from . import autograd`: {why}"]


def functions_of(source):
    return [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def is_jit(function):
    decorators = (d.func if isinstance(d, ast.Call) else d for d in function.decorator_list)
    return any(ast.unparse(d) in ("triton.jit", "jit") for d in decorators)


def too_long(sources):
    found = []
    for path, source in sources.items():
        lines = source.count("\n")
        if path.startswith("kernels/") and lines > 350:
            found.append(f"{path}: {lines} lines; at most 350 in a file of kernels/")
        for function in [] if path.startswith("tests/") else functions_of(source):
            lines = function.end_lineno - function.lineno + 1
            if lines > 70 and not is_jit(function):
                found.append(f"{path}:{function.lineno}: {function.name} has {lines} lines; at most 70")
    return sorted(found)


def test_no_file_of_kernels_and_no_function_is_too_long(sources):
    found = too_long(sources)
    assert not found, "\n".join(found)


def test_a_long_file_and_function_are_found():
    function = "{}def f():\n" + "    pass\n" * 70
    jit = "@triton.jit(do_not_specialize=['M'])\n"
    assert too_long({"kernels/a.py": "\n" * 351, "bench/b.py": "\n" * 351, "kernels/c.py": function.format(jit)}) == [
        "kernels/a.py: 351 lines; at most 350 in a file of kernels/"
    ]
    assert too_long({"bench/a.py": function.format("")}) == ["bench/a.py:1: f has 71 lines; at most 70"]


DOCUMENTS = ["CONTRIBUTING.md", "README.md", "tritonnet/README.md", "bench/README.md", "tests/README.md"]
PATH = re.compile(r"(?:kernels|tritonnet|bench|tests|\.ci|\.github)/(?:[\w./-]*\.(?:py|toml|md|sh|jpg)|(?:[\w.-]+/)*)")


def missing_names(text, folder=""):
    """What `text` names in backticks, or in a block of commands, and is not there.

    That is paths of this repository, and what they define: `path.py:name`, or in a table's row names after `path.py`
    and a colon, or in the cell beside it. `folder`: has the files whose names stand alone, at any depth.
    """
    found = []
    prose = without_blocks(text)
    commands = " ".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).split()
    for name in [*re.findall(r"`([^`\n]+)`", prose), *commands]:
        path, _, function = name.partition(":")
        if folder and re.fullmatch(r"\w+\.(py|sh)", path):
            below = next((ROOT / folder).rglob(path), ROOT / folder / path)
            path = below.relative_to(ROOT).as_posix()
        if not PATH.fullmatch(path) or "NAME" in path:
            continue
        if not (ROOT / path).exists():
            found.append(f"{path} is not there")
        elif function.isidentifier() and function not in defined_in(path):
            found.append(f"{path} defines no {function}")
    rows = "".join(re.findall(r"^\|.*\n", prose, re.MULTILINE))
    for path, names in re.findall(r"`([^`\n]+\.py)`(?::| *\|)((?:,? *`\w+`)+)", rows):
        path = path if (ROOT / path).is_file() else f"{folder}/{path}"
        if (ROOT / path).is_file():
            found += [f"{path} defines no {name}" for name in re.findall(r"\w+", names) if name not in defined_in(path)]
    return found


def without_blocks(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def defined_in(path):
    """Names of the functions, classes, arguments and variables of a file; of an __init__.py also what it imports."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.alias) and path.endswith("__init__.py"):
            names.add(node.asname or node.name)
    return names


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_names_is_there(document):
    folder = Path(document).parent.as_posix().removeprefix(".")
    found = missing_names((ROOT / document).read_text(encoding="utf-8"), folder)
    assert not found, "\n".join(found)


def test_what_the_docstring_of_a_family_of_kernels_names_is_there(sources):
    found = []
    for path in sources:
        if fnmatchcase(path, "kernels/*/__init__.py"):
            docstring = ast.get_docstring(ast.parse(sources[path])) or ""
            found += [f"{path}: {what}" for what in missing_names(docstring, Path(path).parent.as_posix())]
    assert not found, "\n".join(found)


def test_a_name_that_is_not_there_is_found():
    text = "`kernels/no.py` `tests/ptx/` `kernels/relu.py:forward` `kernels/relu.py:backwards` `elsewhere/no.py`\n"
    table = "| `kernels/relu.py` | `forward`, `other`: a |\n| 2 | `tritonnet/ops.py`: `conv2d`, `conv4d` | b |\n"
    block = "```bash\npython tests/no.py --help\n```\n"
    assert missing_names(text + table + block) == [
        "kernels/no.py is not there", "kernels/relu.py defines no backwards", "tests/no.py is not there",
        "kernels/relu.py defines no other", "tritonnet/ops.py defines no conv4d",
    ]  # fmt: skip
    assert missing_names("`padding.py`, `no.py`", "kernels/conv2d") == ["kernels/conv2d/no.py is not there"]


def markdown():
    found = [*ROOT.glob("*.md"), *(p for folder in (*FOLDERS, ".github") for p in (ROOT / folder).rglob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in found}


def anchors_of(text):
    """The anchors that GitHub gives the headings of a page."""
    anchors = set()
    for heading in re.findall(r"^#+ +(.+?) *$", without_blocks(text), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = first = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        times = 0
        while anchor in anchors:
            times += 1
            anchor = f"{first}-{times}"
        anchors.add(anchor)
    return anchors


def dead_links(pages):
    found = []
    for page, text in pages.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(text)):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
            name = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
            if not target.exists() or anchor and anchor not in anchors_of(pages.get(name, "")):
                found.append(f"{page}: {link}")
    return found


def test_links_resolve():
    found = dead_links(markdown())
    assert not found, "\n".join(found)


def test_a_dead_link_is_found():
    pages = {
        "README.md": "# A `b`, c\n# A `b`, c\n[1](#a-b-c-1) [2](tests/ptx/) [3](bench/no.md) [4](https://e.f/g)\n",
        "bench/x.md": "# D\n[1](../README.md#a-b-c) [2](#e) [3](no.md) [4](../LICENSE#f) [5](../../../outside.md)\n",
    }
    dead = [f"bench/x.md: {link}" for link in ("#e", "no.md", "../LICENSE#f", "../../../outside.md")]
    assert dead_links(pages) == ["README.md: bench/no.md", *dead]
