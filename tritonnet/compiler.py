"""The backend "tritonnet" of torch.compile: Dynamo captures a graph, and this fuses the patterns in it.

    torch.compile(model, backend="tritonnet")
    torch.compile(model, backend="tritonnet", options={"backend": "inductor"})

The rest of the graph runs as it is, or another backend compiles it. This file uses these private parts of Dynamo, from
torch 2.11 to 2.13, for `fuse` and TrainStep: the current translator (InstructionTranslator.current_tx), whether the
code asks if it is compiled (inconsistent_side_effects) or has side effects (output.side_effects, the two kinds of
mutation), SkipFrame, by which a backend makes a frame run as Python, and callbacks when a capture begins
(on_compile_start).
"""

import collections
import logging
import threading

import torch
from torch import fx
from torch._dynamo import config
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.callback import callback_handler, on_compile_start
from torch._dynamo.exc import SkipFrame
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.utils import counters
from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew
from torch.utils.checkpoint import checkpoint

from .patterns import fuse_patterns

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


class Faithful(threading.local):
    """A context in which captured code behaves as in eager: it follows hooks added later, and raises eager's errors.

    Code that cannot be captured, for example because of a wrong shape, runs as Python. Changing Dynamo's settings takes
    longer than a call of compiled code, so they are changed when a capture begins and restored after the call.
    """

    settings = {
        "skip_nnmodule_hook_guards": False, "suppress_errors": True, "trace_numpy": False,
        # A float that has changed once, such as a batch norm's eps, would become an input of the graph: patterns with
        # it would not be found.
        "specialize_float": True,
    }  # fmt: skip
    calls, before = 0, None

    def begin(self):
        if self.calls and self.before is None:
            self.before = {name: getattr(config, name) for name in self.settings}
            for name, value in self.settings.items():
                setattr(config, name, value)

    def __enter__(self):
        self.calls += 1
        if _begin not in callback_handler.start_callbacks:  # torch.compiler.reset() removes it
            on_compile_start(_begin)

    def __exit__(self, *_):
        self.calls -= 1
        if self.before is not None and not self.calls:
            for name, value in self.before.items():
                setattr(config, name, value)
            self.before = None


faithful = Faithful()


def _begin(_=None):
    faithful.begin()


def _is_news(record):
    """Whether to show a record of Dynamo's log: not an error of a capture whose code then runs as Python and raises."""
    # Dynamo's hints to raise a limit are shown.
    return not faithful.calls or "config." in str(record.msg)


for _logger in ("torch._dynamo.convert_frame", "torch._subclasses.fake_tensor"):
    logging.getLogger(_logger).addFilter(_is_news)


def asks_if_compiled():
    """Whether the code being captured asks if it is compiled, as by torch.compiler.is_compiling."""
    return InstructionTranslator.current_tx().inconsistent_side_effects


def only_computes():
    """Whether the code being captured has no side effects."""
    effects = InstructionTranslator.current_tx().output.side_effects
    modified = filter(effects.is_modified, effects.id_to_variable.values())
    # A new object is visible outside only if an existing object is changed to refer to it.
    kinds = [type(variable.mutation_type) for variable in modified]
    return not (set(kinds) - {AttributeMutationNew, ValueMutationNew} or effects.tensor_hooks)


def _assert(condition, message="", *_):
    if not condition:
        raise AssertionError(message)


def _checkpoint(given, body, *args, **options):
    """Runs a checkpoint as eager does, where Dynamo has a marker for the partitioners of other backends.

    Args:
        given: positions of the tensors to checkpoint. Parameters and buffers are not among them, because inputs of a
            checkpoint may not be written to.
    """
    if context_fn := body.meta.get("_checkpoint_context_fn"):
        options["context_fn"] = context_fn

    def function(*inputs):
        of_place = dict(zip(given, inputs))
        return body(*(of_place.get(i, arg) for i, arg in enumerate(args)))

    return checkpoint(function, *(args[i] for i in given), **{**options, "use_reentrant": False})


def _is_of_module(node):
    """Whether a node is a parameter or a buffer."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = source.name() if callable(getattr(source, "name", None)) else str(getattr(source, "name", ""))
    return "._parameters[" in name or "._buffers[" in name


def _is_asserted(node):
    """Whether a node comes from an assert statement, not from a call of the function that Dynamo turns it into."""
    return node.target == torch._assert_async and "_assert_async" not in (node.stack_trace or "")


def graphs_of(graph_module):
    """The GraphModule and those inside it, such as the body of a checkpoint."""
    return [module for module in graph_module.modules() if isinstance(module, fx.GraphModule)]


def _as_eager_does(graph_module):
    for node in graph_module.graph.nodes:
        if node.target == _CHECKPOINT:
            given = [i for i, arg in enumerate(node.args[1:]) if not (isinstance(arg, fx.Node) and _is_of_module(arg))]
            node.target, node.args = _checkpoint, (given, *node.args)
        elif _is_asserted(node):
            node.target = _assert


class Backend:
    """A backend of torch.compile that fuses patterns.

    Args:
        name: of the model, for the report.
        report: function that is called with a line for each graph, or None.
        faithful: run code as Python if torch.compile would give results other than eager's.
        captured: function that is called when a graph is compiled.
    """

    __name__ = "tritonnet"

    def __init__(self, name="", report=None, faithful=False, captured=lambda: None):
        self.name, self.report, self.faithful, self.captured = name, report, faithful, captured
        self._graphs, self._breaks, self.failure = 0, collections.Counter(counters["graph_break"]), None

    def __call__(self, *arguments, **options):
        """See `compile`. An exception is kept in `failure`, as Dynamo may be set to suppress it and run as Python."""
        try:
            return self.compile(*arguments, **options)
        except SkipFrame:
            raise
        except Exception as e:
            self.failure = e
            raise

    def compile(self, graph_module, example_inputs, *, mode=None, options=None):
        """Compile a graph.

        Args:
            mode: as for torch.compile; any but the default selects the inductor.
            options: as for torch.compile: "backend", which compiles the resulting graph, and that backend's options.

        Raises:
            ValueError: options without a backend.
        """
        self.captured()
        self._report_breaks()
        options = dict(options or {})
        inner = options.pop("backend", None if mode is None else "inductor")
        if options and inner is None:
            raise ValueError(f"tritonnet: options must be 'backend' or those of that backend, got {list(options)}")
        graphs = graphs_of(graph_module)
        if self.faithful:
            self._leave_to_python(graphs)
        self._graphs += 1
        found, left = [], []
        for module in graphs:
            of_module = fuse_patterns(module.graph, elementwise=inner is None)
            found, left = found + of_module[0], left + of_module[1]
            if inner is None:
                _as_eager_does(module)
            module.graph.lint()
            module.recompile()
        self._say(f"graph {self._graphs}: {_in_words(found, left)}")
        if inner is None:
            return graph_module.forward
        if inner == "inductor" and mode is not None:
            options = {**torch._inductor.list_mode_options(mode), **options}
        given = {"config_patches" if inner == "inductor" else "options": options} if options else {}
        return lookup_backend(inner)(graph_module, example_inputs, **given)

    def _leave_to_python(self, graphs):
        """Raise SkipFrame if the captured code may not compute what it does in eager."""
        reason = None
        if asks_if_compiled():
            reason = "it asks whether it is compiled"
        for node in (node for module in graphs for node in module.graph.nodes):
            if node.target == _CHECKPOINT and node.kwargs.get("use_reentrant", True) is not False:
                reason = "it has a reentrant checkpoint"
        if reason:
            self._say(f"left to Python: {reason}")
            raise SkipFrame(reason)

    def _report_breaks(self):
        new = collections.Counter(counters["graph_break"]) - self._breaks
        self._breaks += new
        for reason in new:
            self._say(f"graph break: {reason.strip().splitlines()[0]}")

    def _say(self, line):
        if self.report:
            self.report(f"{self.name}, {line}")


def _in_words(found, left):
    of_reason = collections.defaultdict(list)
    for name, why in left:
        of_reason[why].append(name)
    parts = [f"fused: {'; '.join(found)}" if found else "nothing to fuse"]
    parts += [f"not {', '.join(names)}: {why}" for why, names in of_reason.items()]
    return ". ".join(parts)


def compile_graph(graph_module, example_inputs, *, mode=None, options=None):
    """The backend "tritonnet" of torch.compile; see Backend.compile."""
    return Backend()(graph_module, example_inputs, mode=mode, options=options)
