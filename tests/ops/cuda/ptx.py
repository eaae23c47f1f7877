"""PTX, what nvcc makes of the CUDA kernels, as C++ for the emulation. Usage: ptx.py FILE.ptx > FILE.cpp

A register becomes a variable, an instruction a statement with a function of ptx.h, an entry a function that a thread of
a block runs. What is not known is an error, so that nothing is passed over.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

REGISTERS = {"pred": "bool", "b16": "uint16_t", "b32": "uint32_t", "b64": "uint64_t", "f32": "float", "f64": "double"}
TYPES = {f"{kind}{size}": f"{'int' if kind == 's' else 'uint'}{size}_t" for kind in "sub" for size in (8, 16, 32, 64)}
TYPES |= {"f32": "float", "f64": "double", "pred": "bool"}
SPECIAL = {"%tid.x": "threadIdx.x", "%ntid.x": "blockDim.x", "%ctaid.x": "blockIdx.x", "%nctaid.x": "gridDim.x"}
SIGNS = {"add": "+", "add.rn": "+", "sub": "-", "sub.rn": "-", "and": "&", "or": "|", "xor": "^"}
ORDERS = {"eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
PRODUCTS = {
    "m16n8k8.row.col.f32.tf32.tf32": "kProduct",
    "m16n8k16.row.col.f32.bf16.bf16": "kProductOfBfloat16",
    "m16n8k16.row.col.f32.f16.f16": "kProductOfHalf",
}

# What an instruction leaves in its first operand. {0}, {1}, ...: the others, of the type in which its name ends, here
# left out; u: without a sign, so that sums wrap; w: a word; l: a long one; p: a predicate; s, m: the word at an address
# of shared or other memory. {at}: the place in the source.
RESULTS = {
    **dict.fromkeys(("mov", "cvta.to.global"), "{0}"),
    **{name: f"{{0u}} {sign} {{1u}}" for name, sign in SIGNS.items()},
    **dict.fromkeys(("mul", "mul.rn", "mul.lo"), "{0u} * {1u}"),
    "mad.lo": "{0u} * {1u} + {2u}",
    "mul.wide": "wide({0}) * wide({1})",
    "mad.wide": "wide({0}) * wide({1}) + {2l}",
    "mul.hi": "high_product({0}, {1})",
    "fma.rn": "fused({0}, {1}, {2})",
    **dict.fromkeys(("div", "div.rn"), "quotient({0}, {1})"),
    "rem": "remainder({0}, {1})",
    "min": "least({0}, {1})",
    "max": "most({0}, {1})",
    "abs": "absolute({0})",
    "neg": "-{0}",
    "not": "inverted({0})",
    "sqrt.rn": "sqrt({0})",
    "rcp.rn": "1 / {0}",
    "ex2.approx.ftz": "srcgcnn::device::exp2({0})",
    "rcp.approx.ftz": "srcgcnn::device::reciprocal({0})",
    "shl": "shifted_left({0}, {1w})",
    "shr": "shifted_right({0}, {1w})",
    "popc": "uint32_t(__popc({0}))",
    "brev": "reversed({0})",
    "bfi": "inserted({0}, {1}, {2w}, {3w})",
    "bfind.shiftamt": "leading_zeros({0})",
    "selp": "{2p} ? {0} : {1}",
    **{f"setp.{name}": f"{{0}} {sign} {{1}}" for name, sign in ORDERS.items()},
    "setp.neu": "{0} != {1}",
    **{f"setp.{name}u": f"!ordered({{0}}, {{1}}) || {{0}} {sign} {{1}}" for name, sign in ORDERS.items()},
    "setp.ne": "different({0}, {1})",
    "setp.num": "ordered({0}, {1})",
    "setp.nan": "!ordered({0}, {1})",
    "cvt.rn.bf16x2.f32": "srcgcnn::device::to_bfloat16({1}, {0})",
    "cvt.rn.f16x2.f32": "srcgcnn::device::to_half({1}, {0})",
    "shfl.sync.idx": "shuffled({0}, {1w}, {2w}, {3w}, {at})",
    "shfl.sync.bfly": "shuffled({0}, {1w} ^ emulation::lane(), {2w}, {3w}, {at})",
    "vote.sync.ballot": "ballot({0p}, {1w}, {at})",
    **{f"redux.sync.{name}": f"reduced_{name}({{0}}, {{1w}}, {{at}})" for name in ("min", "max", "or")},
    "atom.shared.add": "uint32_t(atomicAdd((int*){0s}, int({1})))",
    "atom.global.add": "uint32_t(atomicAdd((int*){0m}, int({1})))",
    "atom.shared.cas": "atomicCAS({0s}, {1}, {2})",
    **{f"mma.sync.aligned.{factors}.f32": f"product<emulation::{kind}>({{0w}}, {{1w}}, {{2}}, {{at}})"
       for factors, kind in PRODUCTS.items()},
}  # fmt: skip
# The others. a: an address, n: a number or name as it is written.
STATEMENTS = {
    "bar.sync": "block_barrier({0w}, {at})",
    "bar.warp.sync": "warp_barrier({0w}, {at})",
    **dict.fromkeys(("cp.async.ca.shared.global", "cp.async.cg.shared.global"), "copy({0a}, {1a}, {2w}, {3w}, {at})"),
    "cp.async.commit_group": "srcgcnn::device::commit_copies()",
    "cp.async.wait_group": "srcgcnn::device::wait_for_copies<{0n}>()",
    "prefetch.global.L2": "(void)({0a})",
    **dict.fromkeys(("bra", "bra.uni"), "goto {0n}"),
    "ret": "return",
}
ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)\s*((?:\.\w+[^{\n]*\n)*)\{\n(.*?)\n\}\n", re.DOTALL)
# A brace, a label, an instruction.
TOKEN = re.compile(r"\s*(?:(\{(?=\s*\.reg)|\})|\$(\w+):|((?:[^;:{}]|\{(?!\s*\.reg)[^}]*\})+);)")


class Entry:
    """A kernel: its name, parameters, bounds of its blocks and instructions; names of shared memory and of sources."""

    def __init__(self, entry: tuple[str, ...], shared: set[str], files: dict[str, str]) -> None:
        self.name, parameters, bounds, self.body = entry
        self.shared, self.files, self.place = shared, files, "of nowhere"
        threads = re.search(r"\.maxntid (\d+)", bounds)
        self.most_threads = int(threads[1]) if threads else 1024
        self.offsets, self.size = {}, 0
        pattern = r"\.param (?:\.align (\d+) )?\.[a-z](\d+) (\w+)(?:\[(\d+)\])?"
        for align, bits, parameter, count in re.findall(pattern, parameters):
            align = int(align or int(bits) // 8)
            self.offsets[parameter] = self.size = -(-self.size // align) * align
            self.size += int(bits) // 8 * int(count or 1)

    def value(self, operand: str, kind: str) -> str:
        """An operand as a type of C++; several in braces as a vector."""
        if operand.startswith("{"):
            several = [self.value(x, kind) for x in named(operand)]
            return f"Vector<{kind}, {len(several)}>{{{{{', '.join(several)}}}}}"
        if operand in SPECIAL:
            return f"{kind}({SPECIAL[operand]})"
        if number := re.fullmatch(r"0([fd])([0-9A-F]+)", operand):
            return f"as<{kind}>({'uint32_t' if number[1] == 'f' else 'uint64_t'}(0x{number[2]}))"
        if re.fullmatch(r"-?\d+|0x[0-9A-Fa-f]+", operand):
            return f"{kind}({operand if operand != str(-(2**63)) else 'INT64_MIN'})"
        if operand in self.offsets:
            return f"{kind}(uint64_t(given) + {self.offsets[operand]})"
        if operand in self.shared:
            return f"{kind}(0)"
        name = register(operand)
        of = type_of(name)
        return name if of == kind else f"{kind}({name})" if "int" in of and "int" in kind else f"as<{kind}>({name})"

    def address(self, operand: str) -> str:
        """Of [register], [register+number], [name], [name+number]."""
        base, _, offset = operand.strip("[]").partition("+")
        known = base in self.offsets or base in self.shared
        return f"{self.value(base, 'uint64_t') if known else f'uint64_t({register(base)})'} + uint64_t({offset or 0})"

    def at(self, space: str, kind: str, count: int, operand: str) -> str:
        return f'{space}<{kind}, {count}>({self.address(operand)}, "{self.place}")'

    def filled(self, text: str, operands: Sequence[str], kind: str) -> str:
        """With the operands in their places, each of which has one."""
        if {int(x) for x in re.findall(r"\{(\d)", text)} != set(range(len(operands))):
            raise ValueError("other operands than it takes")

        def operand(found: re.Match[str]) -> str:
            if found[0] == "{at}":
                return f'"{self.place}"'
            x, how = operands[int(found[1])], found[2]
            if how == "n":
                return x.removeprefix("$")
            if how == "a":
                return self.address(x)
            if how in ("s", "m"):
                return self.at("shared" if how == "s" else "memory", "uint32_t", 1, x)
            without_sign = kind if kind in ("float", "double", "bool") else "u" + kind.lstrip("u")
            return self.value(x, {"u": without_sign, "w": "uint32_t", "p": "bool", "l": "uint64_t"}.get(how, kind))

        return re.sub(r"\{(?:(\d)(\w?)|at)\}", operand, text)

    def statement(self, instruction: str) -> str:
        if guard := re.match(r"@(!?)%(p\d+) ", instruction):
            return f"if ({guard[1]}{guard[2]}) {{ {self.statement(instruction[guard.end() :])} }}"
        code, _, rest = instruction.partition(" ")
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        if code in STATEMENTS:
            return self.filled(STATEMENTS[code], operands, "") + ";"
        kind = TYPES.get(code.rpartition(".")[2], "")
        if access := re.fullmatch(r"(ld|st)(\.global|\.shared|\.param|)(?:\.wb)?(\.v[24])?\.\w\d+", code):
            to, of = operands
            space = {".shared": "shared", ".param": "parameters"}.get(access[2], "memory")
            count = len(named(to if access[1] == "ld" else of))
            if access[1] == "st":
                return f"store({self.at(space, kind, count, to)}, {self.value(of, kind)});"
            result = f"load<{count}>({self.at(space, kind, count, of)})"
        else:
            result = self.result(code, kind, *operands)
        to = named(operands[0].partition("|")[0])  # the predicate of a shuffle is not read
        if len(to) == 1:
            return f"put({register(to[0])}, {result});"
        parts = " ".join(f"put({register(x)}, all.x[{k}]);" for k, x in enumerate(to))
        return f"{{ const auto all = {result}; {parts} }}"

    def result(self, code: str, kind: str, to: str, *operands: str) -> str:
        if found := re.fullmatch(r"cvt(?:\.rn)?\.(\w\d+)\.(\w\d+)", code):
            text = "srcgcnn::device::of_half({0})" if found[2] == "f16" else f"{TYPES[found[1]]}({{0}})"
            return self.filled(text, operands, TYPES.get(found[2], "uint16_t"))
        if found := re.fullmatch(r"cvt\.rzi\.(s\d+)\.f\d+", code):
            return self.filled(f"toward_zero<{TYPES[found[1]]}>({{0}})", operands, kind)
        if found := re.fullmatch(r"mov\.b(\d+)", code):
            if to.startswith("{"):
                return self.filled("halves({0})", operands, kind)
            if operands[0].startswith("{"):
                return self.filled("joined({0})", operands, f"uint{int(found[1]) // 2}_t")
        name = code if code in RESULTS else code.rpartition(".")[0]
        if name not in RESULTS:
            raise ValueError("an unknown instruction")
        text = self.filled(RESULTS[name], operands, kind)
        return f"{kind}({text})" if "u}" in RESULTS[name] else text

    def translated(self) -> str:
        lines, source, sources = [], self.name, {}
        body = re.sub(r"(?m)^\s*(\.loc\s.*)$", r"\1;", self.body)
        if left := TOKEN.sub("", body).strip():
            raise ValueError(f"{self.name}: {left}")
        for number, (brace, label, text) in enumerate(TOKEN.findall(body)):
            text = re.sub(r"\s+", " ", text.strip())
            # No other instruction's, so that lanes that meet at two are told apart.
            self.place = f"{source} (instruction {number} of {self.name})"
            if brace:
                lines.append(brace)
            elif label and not re.match("L__(tmp|func)", label):  # which no instruction names
                lines.append(f"{label}:")
            elif declaration := re.fullmatch(r"\.reg \.(\w+) (?:%([a-z]+)<(\d+)>|([\w, ]+))", text):
                kind, letters, count, given = declaration.groups()
                names = named(given) if given else [f"{letters}{k}" for k in range(int(count))]
                if any(type_of(x) != REGISTERS[kind] for x in names):
                    raise ValueError(f"{self.name}: {text}")
                text = ", ".join(f"{x} = nothing<{REGISTERS[kind]}>()" for x in names)
                lines.append(f"[[maybe_unused]] {REGISTERS[kind]} {text};")
            elif found := re.fullmatch(r"\.loc (\d+ \d+ \d+)(?:, function_name \S+, inlined_at (\d+ \d+ \d+))?", text):
                line, caller = found.groups()
                file, number_of_line, _ = line.split()
                source = f"{self.files[file]}:{number_of_line}"
                if caller:
                    source += f" < {sources.get(caller, 'elsewhere')}"
                sources[line] = source
            elif text and not re.fullmatch(r'\.pragma "[^"]*"', text):
                try:
                    lines.append(self.statement(text))
                except (ValueError, LookupError) as problem:
                    raise ValueError(f"{self.name}, instruction {number}, {text!r}: {problem}") from problem
        text = "\n  ".join(lines)
        about = f'("{self.name}", {self.size}, {self.most_threads}, {self.name})'
        told = f"static const emulation::Translated of_{self.name}{about};"
        return f"static void {self.name}([[maybe_unused]] const char* given) {{\n  {text}\n}}\n{told}\n"


def named(operand: str) -> list[str]:
    return re.findall(r"[^{},\s]+", operand)


def type_of(name: str) -> str:
    """Of a register, whose letters tell it; our own assembly has some of one letter, of 16 bits."""
    letters = name.rstrip("0123456789")
    declared = {"p": "pred", "rs": "b16", "r": "b32", "rd": "b64", "f": "f32", "fd": "f64"}
    return REGISTERS[declared.get(letters, "b16")]


def register(operand: str) -> str:
    if not re.fullmatch(r"%[a-z]+\d+|[a-z]", operand):
        raise ValueError(f"{operand} is no register")
    return operand.lstrip("%")


def translated(text: str) -> str:
    """C++ with all entries, each of which the emulation finds by its name."""
    text = re.sub(r"//.*", "", text)
    files = {number: Path(name).name for number, name in re.findall(r'\.file\s+(\d+) "(.*)"', text)}
    memory = r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\];"
    entries = [Entry(entry, set(re.findall(memory, text)), files) for entry in ENTRY.findall(text)]
    if len(entries) != text.count(".entry ") or re.search(r"\.(func|local|const|shared) ", re.sub(memory, "", text)):
        raise ValueError("something else than entries, or memory of another kind")
    return '#include "ptx.h"\nusing namespace ptx;\n' + "".join(entry.translated() for entry in entries)


if __name__ == "__main__":
    print(translated(Path(sys.argv[1]).read_text()))
