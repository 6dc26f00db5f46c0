"""Starts MindSpore and MindFormers for inference, once per process, without their noise.

MindSpore and MindFormers read their log level, log folder and run mode from the environment when they are first imported,
so this module must run before either is: nothing outside network/, backends/ and their callers imports them.
"""

from __future__ import annotations

import atexit
import gc
import io
import logging
import mmap
import os
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout

from ms_pangu_quant.errors import BackendError
from ms_pangu_quant.job import ranks
from ms_pangu_quant.suggestion import did_you_mean

DEVICES = ("cpu", "ascend")
MODES = ("graph", "pynative")
_ADDRESS_SPACE = 3 << 30  # with less, MindSpore fails in its own ways when it allocates; it can hang for ever
_ONEDNN_KERNELS = 128  # it keeps 1024, one for each size of each matrix product: 0.5 to 1 MiB for every prompt length
_started: tuple[str, str] | None = None
_tensor_parallel = 1
_verbose = False
_folder: str | None = None  # of the frameworks' logs


# As MindFormers sets it for prediction; without infer_boost PagedAttention takes no int8 cache.
JIT_CONFIG = {"cpu": {"jit_level": "O0"}, "ascend": {"jit_level": "O0", "infer_boost": "on"}}


def start(device: str = "cpu", mode: str = "graph", *, tensor_parallel: int = 1) -> None:
    """Prepare this process for `device` in `mode`; one that msrun has started joins its job.

    tensor_parallel  ranks that hold one network together, each a slice of its layers: those numbered from a multiple of it.
    A process keeps its first device, and its networks their first cut; the mode may change between networks.
    Raises BackendError for an unknown name, when the device is not there, if the ranks cannot be grouped so, and when the
    process may not allocate what the frameworks need.
    """
    global _started
    if device not in DEVICES:
        raise BackendError(f"device is {device!r}{did_you_mean(device, DEVICES)}, wanted one of {', '.join(DEVICES)}")
    if mode not in MODES:
        raise BackendError(f"mode is {mode!r}, wanted one of {', '.join(MODES)}")
    if _started is not None and _started[0] != device:
        raise BackendError(f"this process already runs on {_started[0]!r}; start another one for {device!r}")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < _ADDRESS_SPACE:
        raise BackendError(
            f"address space is limited to {limit / 2**30:.1f} GiB, and MindSpore needs {_ADDRESS_SPACE >> 30} GiB before "
            "any model is loaded; raise the limit (ulimit -v)"
        )
    os.environ["RUN_MODE"] = "predict"
    os.environ["ENFORCE_EAGER"] = "true" if mode == "pynative" else "false"  # MindFormers' own switch for PyNative
    if _started is None:
        with _interrupt_held():
            _import_frameworks()
    import mindspore as ms

    if _started is None or _started[1] != mode:
        ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
    if _started is None:
        try:
            ms.set_device("CPU" if device == "cpu" else "Ascend")
        except (RuntimeError, ValueError) as error:
            raise BackendError(f"device {device!r} is not available on this machine: {_first_line(error)}") from None
        ms.set_context(jit_config=JIT_CONFIG[device])
        if _folder is not None:
            ms.set_context(save_graphs_path=_folder)  # a graph that does not compile is written to ./rank_0
        from mindformers.core.context.build_context import build_mf_context

        build_mf_context({"run_mode": "predict", "use_legacy": False})  # the registry looks up legacy names otherwise
        with _quiet_file_descriptor():
            ranks.join()
            (ms.Tensor(1.0) + ms.Tensor(1.0)).asnumpy()  # the allocator announces itself when the first operator runs
    _started = (device, mode)
    _cut_networks(tensor_parallel, device, mode)


def check_address_space(needed: int) -> None:
    """Raises BackendError where the process may not map so many more bytes (ulimit -v).

    Asked before a network is made: MindSpore can hang for ever when one of its threads is refused memory.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return
    try:
        mmap.mmap(-1, needed, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ).close()  # takes no memory
    except OSError:
        raise BackendError(
            f"address space is limited to {limit / 2**30:.1f} GiB, and {needed / 2**30:.1f} GiB more are needed for this "
            "model; raise the limit (ulimit -v)"
        ) from None


def _cut_networks(wanted: int, device: str, mode: str) -> None:
    """Let every network built from now on be cut over groups of `wanted` ranks."""
    global _tensor_parallel
    size = ranks.current().size
    if wanted < 1 or size % wanted:
        raise BackendError(f"tensor_parallel: got {wanted}, wanted a divisor of the job's {size} ranks")
    if wanted > 1 and device == "cpu" and (wanted != size or mode == "pynative"):
        raise BackendError(
            f"tensor_parallel {wanted} of {size} ranks in {mode} mode: on the CPU MindSpore's collectives work over all "
            "ranks, in graph mode, or not at all"
        )
    if wanted == _tensor_parallel:
        return
    if _tensor_parallel > 1:
        raise BackendError(f"this process cuts its networks over {_tensor_parallel} ranks; start another one for {wanted}")
    from mindformers.parallel_core.inference import parallel_state
    from mindspore.communication import GlobalComm

    # Groups of ranks work on their own: to MindFormers they are separate instances, not data parallel ones.
    parallel_state.initialize_model_parallel(wanted, num_virtual_instance=size // wanted)
    if device == "cpu":
        parallel_state.get_tensor_model_parallel_group()._group = GlobalComm.WORLD_COMM_GROUP
    _tensor_parallel = wanted


def tensor_parallel() -> int:
    """Ranks over which each network is cut."""
    return _tensor_parallel


def show_output() -> None:
    """Let MindSpore and MindFormers print; to be called before the process is started."""
    global _verbose
    _verbose = True


def ensure_started() -> None:
    """start() on the CPU in graph mode, unless the process has been started: for functions that are called from Python."""
    if _started is None:
        start()


def schedule() -> None:
    """The whole life of the process that msrun starts beside the ranks: it lets them in, and ends with them."""
    with _interrupt_held():
        _set_environment(verbose=False)
        import mindspore as ms

    ms.set_device("CPU")
    from mindspore.communication import init

    init()


def job() -> ranks.Ranks:
    """The job this process belongs to; joins it if msrun has started the process."""
    if ranks.in_job():
        ensure_started()
    return ranks.current()


def _import_frameworks() -> None:
    """Import both with their logs sent to a folder that goes away with the process."""
    _set_environment(_verbose)
    if not _verbose:
        # MindFormers warns while it is being imported, through loggers that do not exist before.
        logging.disable(logging.WARNING)
    show_warning = warnings.showwarning
    from mindformers.tools.logger import get_logger

    _forget_failed_imports()
    warnings.showwarning = show_warning  # MindFormers sends every warning of the process to its log
    logging.disable(logging.NOTSET)
    if not _verbose:
        get_logger().setLevel(logging.ERROR)


def _forget_failed_imports() -> None:
    """Some packages keep the ImportError of what they would have liked to import. Its traceback keeps all functions that
    were under way then from giving up their variables, ours included, which may be gigabytes."""
    for each in gc.get_objects():
        if issubclass(type(each), ImportError):
            each.__traceback__ = None


def _set_environment(verbose: bool) -> None:
    """What both frameworks read when they are imported."""
    if not verbose:
        os.environ.setdefault("GLOG_v", "3")  # MindSpore: errors only
        os.environ.setdefault("TQDM_DISABLE", "1")  # MindFormers shows a bar for each weight file
        warnings.filterwarnings("ignore", module=r"mind(spore|formers)(\.|$)")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_ONEDNN_KERNELS))
    global _folder
    if "LOCAL_DEFAULT_PATH" not in os.environ:
        _folder = tempfile.mkdtemp(prefix="ms_pangu_quant-")  # they would write ./output/log
        os.environ["LOCAL_DEFAULT_PATH"] = _folder
        atexit.register(remove_logs)


@contextmanager
def _interrupt_held() -> Iterator[None]:
    """Hold Ctrl-C back: interrupted halfway through their import, MindSpore's libraries abort the process."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def remove_logs() -> None:
    """Remove the folder the frameworks log to; done at exit, and by whoever ends the process without one."""
    if _folder is not None:
        shutil.rmtree(_folder, ignore_errors=True)


def mode() -> str:
    """ "graph" or "pynative", as the process was started last."""
    if _started is None:
        raise BackendError("network.runtime.start() has not been called")
    return _started[1]


def quiet() -> AbstractContextManager[object]:
    """Keeps what a library prints off the terminal, unless the process was started verbosely."""
    return nullcontext() if _verbose else redirect_stdout(io.StringIO())


@contextmanager
def _quiet_file_descriptor() -> Iterator[None]:
    """Like quiet(), for what C++ code writes to the standard output."""
    if _verbose:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
