"""Builds csrc/: the routing kernels as ``steel_megatron._C``, the data layer's helpers as ``steel_megatron._index``.

Everything else is in pyproject.toml. The kernels are compiled against the torch of the environment that the package is
installed into, because a compiled extension fits one torch only; the helpers know numpy alone. Variables of the
environment:

    STEEL_NO_EXT=1   no extension at all: a package of Python files that computes with PyTorch and numpy
    STEEL_CUDA=0|1   leave the CUDA kernels out, or insist on them; by default they are built where torch has CUDA and
                     nvcc is found
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

OLDEST_TORCH = (2, 6)
OLDEST_PYTHON = (3, 11)
CUDA_ARCHITECTURES = "8.0;9.0+PTX"  # unless TORCH_CUDA_ARCH_LIST says otherwise
# Steps of a build that compile nothing, and must work where there is no torch.
WITHOUT_COMPILING = {"egg_info", "sdist", "clean", "--help", "--version", "--name"}


def switch(name: str) -> bool | None:
    """The variable ``name`` of the environment: 0, 1 or not set."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"error: {name} is {value!r}; it must be 0 or 1")
    return bool(int(value)) if value else None


def add_outer_environment() -> None:
    """Let the torch of the environment that is installed into be imported from within an isolated build.

    pip hides that environment's packages from a build, which so would find a second torch or none; the interpreter is
    still the environment's own and knows where they are. Other builders isolate with a whole environment of their own,
    and leave only the name of the active one. The folders go last, so that the build's own tools stay first.
    """
    folders = [sysconfig.get_path(kind) for kind in ("purelib", "platlib")]
    by_pip = "PIP_BUILD_TRACKER" in os.environ or "PIP_REQ_TRACKER" in os.environ
    for name in () if by_pip else ("VIRTUAL_ENV", "CONDA_PREFIX"):
        active = os.environ.get(name, sys.prefix)
        variables = {"base": active, "platbase": active}
        folders += [sysconfig.get_path(kind, "posix_prefix", variables) for kind in ("purelib", "platlib")]
    sys.path.extend(folder for folder in dict.fromkeys(folders) if folder not in sys.path)


def require_torch() -> None:
    """Make torch importable, or leave with what to do."""
    try:
        import torch
    except ModuleNotFoundError:
        add_outer_environment()
        try:
            import torch
        except ModuleNotFoundError as missing:
            sys.exit(
                "error: building steel-megatron needs torch in the environment that it is installed into, and "
                f"{missing.name} is not there ({sys.prefix}).\n"
                "  Install torch first:          pip install torch\n"
                "  and if it is there already:   pip install --no-build-isolation .\n"
                "  Or go without the kernels:    STEEL_NO_EXT=1 pip install ."
            )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        sys.exit(
            f"error: torch is {torch.__version__}; steel-megatron needs {'.'.join(map(str, OLDEST_TORCH))} or newer"
        )


def with_cuda() -> bool:
    """Whether to build the CUDA kernels."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    wanted = switch("STEEL_CUDA")
    missing = ""
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is built without CUDA (install a CUDA build of torch)"
    elif CUDA_HOME is None:
        missing = "nvcc was not found (install the CUDA toolkit and set CUDA_HOME to its folder)"
    if wanted and missing:
        sys.exit("error: STEEL_CUDA=1, but " + missing)
    return not missing if wanted is None else wanted


def index_helpers() -> Extension:
    """The data layer's helpers, as an extension for this version of Python: pybind11 knows no limited API."""
    from torch.utils.cpp_extension import include_paths

    return Extension(
        "steel_megatron._index",
        ["csrc/index_helpers.cpp", "csrc/documents.cpp", "csrc/texts.cpp"],
        depends=["csrc/arrays.h", "csrc/documents.h", "csrc/texts.h"],
        include_dirs=include_paths(),  # torch brings pybind11's headers, and nothing else of it is used
        language="c++",
        extra_compile_args=["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off"],
    )


def build_settings() -> dict[str, object]:
    """What setup() needs to compile the extensions; nothing where nothing is to be compiled."""
    if switch("STEEL_NO_EXT") or WITHOUT_COMPILING.intersection(sys.argv[1:]):
        return {}
    require_torch()
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    cuda = with_cuda()
    sources = [
        "csrc/bindings.cpp",
        "csrc/soft_moe_cpu.cpp",
        "csrc/combine_cpu.cpp",
        "csrc/cross_entropy.cpp",
        "csrc/rows.cpp",
    ]
    macros = [("Py_LIMITED_API", "0x{:02x}{:02x}0000".format(*OLDEST_PYTHON))]
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    # a * b + c in one rounding where the machine can, whatever the language standard's default
    compile_args = {"cxx": ["-O3", "-g0", "-ffp-contract=fast", *openmp]}
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        sources.append("csrc/soft_moe_cuda.cu")
        macros.append(("WITH_CUDA", "1"))
        compile_args["nvcc"] = ["-O3"]
    extension = (CUDAExtension if cuda else CppExtension)(
        "steel_megatron._C",
        sources,
        depends=[str(path) for path in sorted(Path("csrc").glob("*.h"))],
        define_macros=macros,
        extra_compile_args=compile_args,
        extra_link_args=openmp,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension, index_helpers()],
        "cmdclass": {"build_ext": BuildExtension},
    }


setup(**build_settings())
