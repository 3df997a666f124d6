"""Runs nvcc with `-Xptxas -v` and fails if any kernel spills registers: no_spills.py NVCC ARGUMENTS…"""

import re
import subprocess
import sys

result = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
kernels = re.findall(
    r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers",
    result.stdout,
    re.DOTALL,
)
if result.returncode or not kernels:
    sys.exit(f"{result.stdout}\nnvcc failed or reported no kernel")
spilled = [kernel for kernel in kernels if kernel[2] != "0"]
for name, architecture, stores, registers in spilled:
    print(f"{architecture} {name}: {stores} bytes of spills, {registers} registers")
most = max(int(registers) for *_, registers in kernels)
print(f"{len(kernels)} kernels, {len(spilled)} with spills, at most {most} registers")
sys.exit(bool(spilled))
