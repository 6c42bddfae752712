"""What a measurement ran on, to be written beside its numbers."""

import platform
from pathlib import Path


def environment() -> dict[str, str | int]:
    """Versions of vistok, torch and Python, the system, the processor or GPU, and the threads that torch uses."""
    import torch

    import vistok

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "vistok": vistok.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": gpu or processor(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        for line in facts.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
