"""What compiled GPU code needs of the chip, asked of the tool that comes with Triton."""

import subprocess
from pathlib import Path


def assert_no_spills(cubin, stack=0):
    """stack: bytes that are known to lie there."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run(
        [str(tool), "--dump-resource-usage", str(cubin)], check=True, capture_output=True, text=True
    ).stdout
    assert "REG:" in report and "STACK:" in report, report
    found = {word for word in report.split() if word.startswith(("STACK:", "LOCAL:"))}
    assert found == {f"STACK:{stack}", "LOCAL:0"}, report
