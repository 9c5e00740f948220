"""Finds, loads and configures the native CPU library, and says what it found.

Knows files, symbols, threads and instruction sets; not what the ops compute. The C side is `library.cpp`; its
signatures are repeated in `_SIGNATURES`, one letter per argument, because ctypes cannot read them.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_LETTERS = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}
_SIGNATURES = {
    "quire_set_threads": "i",
    "quire_set_level": "i",
    "quire_level_name": "i",
    "quire_paged_attention": "ippppppl" + "ll" + "iiiiiii" + "ff" + "i",
    "quire_write_kv": "ipppp" + "lllll" + "iiii",
    "quire_copy_blocks": "pppll",
    "quire_rms_norm": "ipppp" + "lllll" + "ff",
    "quire_rotary": "ipppp" + "lllll" + "iii",
    "quire_gate_mul": "iippll",
    "quire_pack_linear": "ippll",
    "quire_linear": "ipppp" + "llll",
    "quire_pack_quantized": "ippll",
    "quire_round_bf16": "ppplll",
    "quire_quantize_weights": "iippp" + "lll",
    "quire_linear_quantized": "ipppppp" + "lllll" + "ii",
    "quire_decoder": "pp",
    "quire_sample": "pppppppp" + "ll" + "ii",
    "quire_penalize": "ppppppp" + "ll",
    "quire_mask_tokens": "ppplll",
    "quire_logprobs": "ppppp" + "lll",
}


class _State:
    """What the process decided. `library` is None where torch does the work; `reason` says why."""

    library: ctypes.CDLL | None = None
    reason: str = ""
    loaded: bool = False


def library() -> ctypes.CDLL | None:
    """Returns the library, or None: then the caller uses torch. Loaded on first use, with torch's threads."""
    if not _State.loaded:
        _State.library, _State.reason = _load()
        _State.loaded = True
        set_threads(torch.get_num_threads())
    return _State.library


def describe() -> str:
    """One line for the start-up log: which CPU kernels run, and why."""
    lib = library()
    if lib is None:
        return f"torch fallback: {_State.reason}"
    bf16 = "" if multiplies_bf16() else "; bf16 weights as 12-bit integers"
    return f"native ({_level_name(lib, lib.quire_level())}, {lib.quire_threads()} threads{bf16})"


def multiplies_bf16() -> bool:
    """Whether the instruction set in use has products of bf16."""
    lib = library()
    return lib is not None and "BF16" in _level_name(lib, lib.quire_level())


def set_threads(threads: int) -> None:
    """Sets the number of threads of the native ops, the caller's included."""
    lib = library()
    if lib is not None:
        lib.quire_set_threads(threads)


def use_threads(threads: int) -> None:
    """For a process that serves a model on the CPU: so many threads compute, and they are the native ops'.

    Torch keeps its idle OpenMP threads spinning, on cores that the next op needs; its few small ops in a step
    gain less from a second thread than that costs. Without the library, or where oneDNN multiplies (AMX),
    torch gets as many.
    """
    set_threads(threads)
    own = library() is not None and not torch.cpu._is_amx_tile_supported()
    torch.set_num_threads(1 if own else threads)


def levels() -> list[str]:
    """Names of the instruction sets this machine can run, slowest first."""
    lib = library()
    if lib is None:
        return []
    current, names = lib.quire_level(), []
    for level in range(lib.quire_levels()):
        if lib.quire_set_level(level) == 0:
            names.append(_level_name(lib, level))
    lib.quire_set_level(current)
    return names


@contextmanager
def using(level: str | None = None, threads: int | None = None) -> Iterator[None]:
    """For tests and benchmarks: an instruction set by name, or "torch" for the fallback, and a thread count.

    KV memory written under one choice may be read under another instruction set, but not by the fallback.
    """
    before, lib = _State.library, library()
    old_level = lib.quire_level() if lib else 0
    old_threads = lib.quire_threads() if lib else 1
    try:
        if level == "torch":
            _State.library, _State.reason = None, "asked for"
        elif level is not None and (lib is None or lib.quire_set_level(_level_index(lib, level)) != 0):
            raise ValueError(f"no instruction set {level!r} here: {levels()}")
        if threads is not None and lib is not None:
            lib.quire_set_threads(threads)
        yield
    finally:
        _State.library = before if before is not None else lib
        if lib is not None:
            lib.quire_set_level(old_level)
            lib.quire_set_threads(old_threads)


def _level_name(lib: ctypes.CDLL, level: int) -> str:
    name: bytes = lib.quire_level_name(level)
    return name.decode()


def _level_index(lib: ctypes.CDLL, name: str) -> int:
    return [_level_name(lib, level) for level in range(lib.quire_levels())].index(name)


def _load() -> tuple[ctypes.CDLL | None, str]:
    paths = [Path(__file__).parent / f"_quire{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        hint = "run `make install`" if shutil.which("g++") else "no g++ here"
        return None, f"library not built ({hint})"
    try:
        lib = ctypes.CDLL(str(path))
        lib.quire_sources.restype = ctypes.c_char_p
        if lib.quire_sources() != _sources_digest(path.parent):
            return None, "library built from other sources (run `make install`)"
        for name, letters in _SIGNATURES.items():
            function = getattr(lib, name)
            function.argtypes = [_LETTERS[letter] for letter in letters]
            function.restype = None
    except (OSError, AttributeError) as error:
        return None, f"library not usable ({error})"
    lib.quire_set_level.restype = ctypes.c_int
    lib.quire_level_name.restype = ctypes.c_char_p
    return lib, ""


def _sources_digest(folder: Path) -> bytes:
    """As in setup.py. Another library may have other structs under the same names."""
    files = sorted([*folder.glob("*.h"), *folder.glob("*.cpp")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16].encode()
