"""Compile recorded launches for GPUs that are not present, and read the machine code."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from van_deploy.kernels.launch import Launch

TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def compile_launch(launch: Launch, capability: int = 90) -> tuple[int, set[str]]:
    """Compile a launch; return the stack bytes per thread and the instructions."""
    kernel, tile = launch.kernel, dict(launch.tile)
    options = {k: tile.pop(k) for k in ("num_warps", "num_stages") if k in tile}
    names = list(kernel.arg_names)
    values: dict[str, Any] = dict(zip(names, launch.arguments, strict=False)) | tile
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values.get(parameter.name, 0)  # PDL, which only some tiles have
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        words = [str(tool), "-sass", "-res-usage", file.name]
        text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"REG:\d+ STACK:(\d+) SHARED:\d+", text)
    return int(stack), set(re.findall(r"\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", text))
