"""Compiles every kernel for Hopper, without a GPU, and prints what fails: the interpreter knows no types.

python -m tests.parallel.kernels.triton.compile_all [NAME …]      modules of the package; none: all
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pentad.parallel.kernels import triton as kernels
from tests.parallel.kernels.triton.signatures import SIGNATURES

TYPES = {"h": "*bf16", "s": "*fp32", "d": "*fp64", "l": "*i64", "w": "*i32", "i": "i32", "f": "fp32"}


def kernels_of(module: str) -> dict[str, Any]:
    """Its kernels by name, those that launches start."""
    found = vars(importlib.import_module(f"{kernels.__name__}.{module}"))
    return {name: each for name, each in found.items() if isinstance(each, triton.JITFunction) and "_kernel" in name}


def compile_one(kernel: Any, types: str, constants: dict[str, Any]) -> None:
    """Raises what the compiler raises."""
    given = iter(types.split())
    signature = {name: "constexpr" if name in constants else TYPES[next(given)] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32))


def main() -> int:
    warnings.simplefilter("ignore")
    wrong = 0
    for module in sys.argv[1:] or [each.name for each in pkgutil.iter_modules(kernels.__path__)]:
        for name, kernel in kernels_of(module).items():
            cases = SIGNATURES.get((module, name))
            if not cases:
                print(f"{module}.{name}: no signature")
                wrong += 1
            for types, constants in cases or ():
                try:
                    compile_one(kernel, types, constants)
                    print(f"{module}.{name}: compiled")
                except Exception as error:
                    print(f"{module}.{name} {constants}: {type(error).__name__}: {error}")
                    wrong += 1
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
