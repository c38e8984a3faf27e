"""Builds xccl._core: the cffi binding of csrc/xccl.h, all C files beside this one, and the module xccl._entry."""

import os
import re
from pathlib import Path

import numpy
from cffi import FFI

HERE = Path(__file__).parent


def declarations(header: str) -> str:
    """The header without comments and preprocessor lines, except integer constants."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.S)
    lines = []
    for line in text.splitlines():
        if not line.lstrip().startswith("#"):
            lines.append(line)
        elif re.fullmatch(r"#define XCCL_\w+ +\(?-?\d+\)?", line.strip()):
            lines.append(line.replace("(", "").replace(")", ""))
    return "\n".join(lines)


ffi = FFI()
ffi.cdef(declarations((HERE / "xccl.h").read_text()))
ffi.cdef('extern "Python" int xccl_python_interrupted(void);')
ffi.set_source(
    "xccl._core",
    '#include "xccl.h"',
    sources=sorted(os.path.relpath(path) for path in [*HERE.glob("*.c"), *HERE.glob("python/*.c")]),
    include_dirs=[os.path.relpath(HERE), numpy.get_include()],
    depends=sorted(os.path.relpath(path) for path in HERE.glob("*.h")),
    # -ffp-contract=off: the same bits from every SIMD variant, and from NumPy
    extra_compile_args=[
        "-std=gnu11",
        "-O3",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wshadow",
    ],
    extra_link_args=["-pthread", "-lrt"],  # librt: timer_create, before glibc 2.34
)
