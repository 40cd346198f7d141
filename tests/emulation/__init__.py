"""CUDA kernels on the CPU: `build` compiles a .cu file as C++. machine.h says what is modelled.

library = Emulator(build(Path("kernel.cu"), "name::of_a_function", folder))
library.configure(order="random", seed=1)
library.declare(tensor.data_ptr(), 4 * len(tensor), writable=True)
library(tensor.data_ptr(), len(tensor))
"""

import ctypes
import re
import shutil
import subprocess
from ast import literal_eval
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
COMPILER = "g++"
FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-Wall", "-U_FORTIFY_SOURCE"]
# For kernels: every access calls machine.cpp. No multiply-adds are fused, so that results depend on the source alone.
KERNEL_FLAGS = ["-fsanitize=thread,alignment", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
KERNEL_FLAGS += ["-fno-tree-loop-distribute-patterns", "-D__CUDA_ARCH__=900"]
TYPES = dict(i="int", j="uint", l="int64", m="uint64", d="double", f="float", b="bool")
ORDERS = ("random", "in turn", "last first")


def read(source):
    """The text of a .cu file, headers beside it in their places: they may hold what only `translate` makes C++."""
    lines = []
    for number, line in enumerate(source.read_text().splitlines(), 1):
        if found := re.fullmatch(r'#include "(\w+\.h)"', line):
            header = source.parent / found[1]
            text = header.read_text().replace("#pragma once", "")
            line = f'#line 1 "{header}"\n{text}\n#line {number + 1} "{source}"'
        lines.append(line)
    return "\n".join(lines)


def translate(source):
    """CUDA C++ -> C++, line by line: launches, shared variables, the built-in indices, and PTX."""
    source = re.sub(r"(\w+(?:<[^<>;]*>)?)<<<(.*?)>>>\(", r"::emulation::launch(\1, \2)(", source)
    source = re.sub(r"(?<![.>\w])(threadIdx|blockIdx|blockDim|gridDim)\b", r"::emulation::\1()", source)
    source = re.sub(
        r"extern __shared__ __align__\((\d+)\) (\w+) (\w+)\[\];",
        r"\2* const \3 = static_cast<\2*>(::emulation::dynamic_shared(\1));",
        source,
    )
    source = re.sub(r"__shared__ (\w[\w ]*?) ((?:\w+(?:\[[^];]*\])*(?:, )?)+);", _shared, source)
    source = re.sub(r'\basm(?: volatile)?\(\s*((?:"[^"]*"\s*)+)(.*?)\);', _ptx, source, flags=re.S)
    if left := re.search(r"<<<|__shared__|\basm\b", source):
        raise ValueError(f"can't translate {source[left.start() :].splitlines()[0]!r}")
    return source


def _shared(found):
    type_name, names = found.groups()
    return " ".join(
        f"auto& {name} = ::emulation::shared<{type_name}{size}>(__COUNTER__);"
        for name, size in re.findall(r"(\w+)((?:\[[^]]*\])*)", names)
    )


def _ptx(found):
    text = "".join(map(literal_eval, re.findall(r'"[^"]*"', found[1])))
    operands = list(_operands(found[2]))
    lines = []
    for instruction in filter(None, (x.strip(" \n\t{}") for x in re.split("[;\n]", text))):
        name, rest = re.fullmatch(r"(\S+)\s*(.*)", instruction).groups()
        if name == ".reg":
            lines.append(re.sub(r"^\.pred\b", "bool", rest) + ";")
            continue
        taken = [x.strip(" []") for x in rest.split(",")]
        arguments = [operands[int(x[1:])] if x[:1] == "%" else x for x in taken if x not in ("", "_")]
        lines.append(f"::emulation::ptx::{re.sub('[.]|::', '_', name)}({', '.join(arguments)});")
    return "{ " + " ".join(lines) + " }" + "\n" * found[0].count("\n")


def _operands(text):
    """The expressions of `"r"(expression), …`, in order."""
    for start in re.finditer(r'"[=+]?[a-z]"\s*\(', text):
        end, depth = start.end(), 1
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        yield " ".join(text[start.end() : end - 1].split())


def build_machine(folder):
    """What all emulators share."""
    folder.mkdir()
    subprocess.run([COMPILER, *FLAGS, "-c", HERE / "machine.cpp", "-o", folder / "machine.o"], check=True)


def build(machine, folder, source, entry, text=None):
    """The library, made in `folder`, whose function `entry` an Emulator calls; `text` replaces what is in `source`."""
    folder.mkdir()
    text = translate(read(source) if text is None else text)
    translated, compiled, library = (folder / f"kernel.{suffix}" for suffix in ("cpp", "o", "so"))
    translated.write_text(f'#line 1 "{source}"\n{text}\nEMULATION_ENTRY({entry})\n')
    include = [f"-I{HERE / 'include'}", f"-I{source.parent}"]
    subprocess.run([COMPILER, *FLAGS, *KERNEL_FLAGS, *include, "-c", translated, "-o", compiled], check=True)
    subprocess.run([COMPILER, "-shared", "-Wl,-Bsymbolic", compiled, machine / "machine.o", "-o", library], check=True)
    return library


@dataclass(frozen=True)
class Launch:
    """What a kernel was launched with; bytes are of shared memory a block."""

    blocks: int
    cluster: int
    threads: int
    dynamic_bytes: int
    static_bytes: int


class Emulator:
    """A built kernel and the machine that it runs on. A fault raises RuntimeError."""

    def __init__(self, library):
        self.library, self.path = ctypes.CDLL(str(library)), library
        signature = ctypes.c_char_p.in_dll(self.library, "emulation_signature").value.decode()
        types = [getattr(ctypes, f"c_{TYPES[letter]}") for letter in re.fullmatch("Fv(.*)E", signature)[1]]
        entry = ctypes.c_void_p.in_dll(self.library, "emulation_entry").value
        self.entry = ctypes.CFUNCTYPE(ctypes.c_char_p, *types)(entry)
        self.library.emulation_launches.restype = ctypes.c_char_p
        self.configure()

    def configure(self, order="random", seed=0, capability=9, shared_limit=227 * 1024):
        """The order in which threads run, and what the device says of itself."""
        self.library.emulation_configure(ORDERS.index(order), ctypes.c_uint64(seed), capability, shared_limit)

    def forget(self):
        """No memory is the kernel's any more."""
        self.library.emulation_forget_memory()

    def declare(self, address, size, readable=True, writable=False):
        """The kernel may use `size` bytes from `address`; pieces don't overlap."""
        self.library.emulation_declare_memory(ctypes.c_uint64(address), ctypes.c_uint64(size), readable, writable)

    def launches(self):
        """The launches since the last call."""
        return [Launch(*map(int, line.split())) for line in self.library.emulation_launches().decode().splitlines()]

    def __call__(self, *arguments):
        if error := self.entry(*arguments):
            raise RuntimeError(re.sub(r"\[code (\w+)\]", self._line, error.decode()))

    def _line(self, code):
        if not shutil.which("addr2line"):
            return code[0]
        found = subprocess.run(["addr2line", "-se", self.path, code[1]], capture_output=True, text=True)
        return f"[{found.stdout.strip()}]"
