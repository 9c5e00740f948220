"""Builds the native CPU library, where there is a C++ compiler; everything else is in pyproject.toml.

The library is an extension only in how it is built and shipped: it has a plain C interface and is loaded with
ctypes (kernels/native/library.py). It is optional: without a compiler the install succeeds, and torch does
the work.
"""

import hashlib
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("kernels/native")
COMMON = ["-O3", "-g0", "-std=gnu++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
COMMON += ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]


def sources_digest() -> str:
    """As in kernels/native/library.py, which refuses a library that was built from other sources."""
    files = sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


# The library picks one of the isa_* files when it is loaded, so each may assume its instruction set.
FLAGS: dict[str, list[str]] = {
    "library": [f'-DQUIRE_SOURCES="{sources_digest()}"'],
    "parallel": ["-std=gnu++20"],
    "isa_generic": [],
}
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS |= {
        "isa_avx2": AVX2,
        "isa_avx512": AVX512,
        "isa_avx512_vnni": [*AVX512, "-mavx512vnni"],
        "isa_avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
    }


class BuildNative(build_ext):
    """Compiles each file with its own flags, all at once."""

    def build_extension(self, ext: Extension) -> None:
        def compile_one(source: str) -> list[str]:
            flags = COMMON + FLAGS[Path(source).stem]
            return self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=flags)

        with ThreadPoolExecutor(4) as pool:
            objects = [o for objects in pool.map(compile_one, ext.sources) for o in objects]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), target_lang="c++", extra_postargs=["-pthread"]
        )


setup(
    ext_modules=[
        Extension(
            "kernels.native._quire",
            sources=[str(SOURCES / f"{name}.cpp") for name in FLAGS],
            depends=[str(path) for path in SOURCES.glob("*.h")],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
