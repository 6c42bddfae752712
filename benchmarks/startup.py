"""How long it takes to start: `import vistok` on top of `import torch`, and `vistok --help`, which needs no torch.

    python benchmarks/startup.py

Each command runs in a fresh process, in turns, after one unmeasured round that fills the disk cache; the best of the
rounds counts. Starting is work of one thread, so the bars are held by processor time, which other programs on the
machine disturb less; wall time stands beside it. Writes results/startup.json. Bars: 0.3 s for the import, 0.5 s for
the help, no torch in the help.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = {
    "python": "pass",
    "torch": "import torch",
    "torch and vistok": "import torch, vistok",
    "torch, vistok and its contract": "import torch, vistok; vistok.load, vistok.Tokenizer, vistok.Tokens",
    "vistok alone": "import vistok",
}
HELP = "import sys; sys.argv = ['vistok', '--help']; from vistok.cli.main import main; main()"
BARS = {"import": 0.3, "help": 0.5}


def seconds(code: str) -> tuple[float, float]:
    """Processor time and wall time of a fresh interpreter that runs `code`."""
    before, begun = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begun, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu or wall, wall  # Windows does not tell the time of children


def imported(code: str) -> set[str]:
    """Names of the modules that are loaded once `code` has run, also where it ends in SystemExit."""
    lines = [
        "import sys",
        f"try: exec({code!r})",
        "except SystemExit: pass",
        "print('\\n' + ' '.join(sys.modules), file=sys.stderr)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, capture_output=True, text=True)
    return set(done.stderr.split("\n")[-2].split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "startup.json")
    args = parser.parse_args()
    codes = {**COMMANDS, "vistok --help": HELP}
    load = os.getloadavg()[0]
    for code in codes.values():
        seconds(code)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in codes}
    for _ in range(args.rounds):
        for name, code in codes.items():
            times[name].append(seconds(code))
    cpu = {name: min(found[0] for found in rounds) for name, rounds in times.items()}
    wall = {name: min(found[1] for found in rounds) for name, rounds in times.items()}
    with_torch = "torch" in imported(HELP)
    adds = cpu["torch and vistok"] - cpu["torch"]
    contract = cpu["torch, vistok and its contract"] - cpu["torch"]
    result = {
        "command": "python benchmarks/startup.py",
        "python": sys.version.split()[0],
        "load_before": load,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "import_adds": adds,
        "contract_adds": contract,
        "help_seconds": cpu["vistok --help"],
        "help_imports_torch": with_torch,
        "bars": BARS,
        "met": {"import": adds <= BARS["import"], "help": cpu["vistok --help"] <= BARS["help"] and not with_torch},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'':<32} {'cpu s':>8} {'wall s':>8}")
    for name in codes:
        print(f"{name:<32} {cpu[name]:8.3f} {wall[name]:8.3f}")
    print(f"import vistok adds {adds:.3f} s to import torch (bar {BARS['import']}), its contract {contract:.3f} s")
    print(f"vistok --help takes {cpu['vistok --help']:.3f} s (bar {BARS['help']}) and imports torch: {with_torch}")
    print(f"met: {result['met']} -> {args.out}")


if __name__ == "__main__":
    main()
