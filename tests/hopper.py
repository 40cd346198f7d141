"""What compiled GPU code needs of the chip, asked of the tool that comes with Triton."""

import subprocess
from pathlib import Path


def assert_no_spills(cubin):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run(
        [str(tool), "--dump-resource-usage", str(cubin)], check=True, capture_output=True, text=True
    ).stdout
    assert "REG:" in report and "STACK:" in report, report
    assert all(word.split(":")[1] == "0" for word in report.split() if word.startswith(("STACK:", "LOCAL:"))), report
