"""``doctor --gpu``: the acceptance run on one GPU, one JSON and one page.

Every part runs in a process of its own (``python -m dist_siglip.doctor.gpu NAME REQUEST RESULT``)
and has a limit of time; what fails or hangs is recorded, and the others run. Without a GPU there is
one line, and exit code 2.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dist_siglip.doctor.gpu_loss import (
    profile_loss,
    share_one_device,
    time_hops,
    time_losses,
    use_companions,
)
from dist_siglip.doctor.gpu_sizes import LARGE, SMALL, PartError, Sizes
from dist_siglip.doctor.gpu_training import (
    fit_without_waiting,
    rank_candidates,
    run_tests,
    time_training,
)
from dist_siglip.doctor.page import Finding, Status, render
from dist_siglip.errors import UserError
from dist_siglip.report.page import (
    render_details,
    render_missing,
    render_page,
    render_section,
    render_table_card,
)
from dist_siglip.runs.provenance import installed_versions
from dist_siglip.system.atomic import write_atomically

_LARGE_BYTES = 64 * 2**30  # memory of a GPU that gets the large sizes
Part = Callable[[torch.device, Sizes], dict[str, Any]]

PARTS: dict[str, Part] = {
    "tests": run_tests,
    "loss": time_losses,
    "profile": profile_loss,
    "hops": time_hops,
    "companions": use_companions,
    "ranks": share_one_device,
    "strict fit": fit_without_waiting,
    "training": time_training,
    "retrieval": rank_candidates,
}
# Seconds of each part on a large GPU: ten minutes together. A smaller one has half.
LIMITS: dict[str, float] = {
    "tests": 100,
    "loss": 90,
    "profile": 30,
    "hops": 40,
    "companions": 30,
    "ranks": 50,
    "strict fit": 80,
    "training": 140,
    "retrieval": 40,
}
_TITLE = "Acceptance run on one GPU"


class Outcome(NamedTuple):
    """What one part said.

    Attributes:
        name: of the part.
        status: "ok", "failed", "out of time" or "skipped".
        seconds: it took.
        limit_seconds: it might have taken.
        text: a sentence.
        found: its values.
    """

    name: str
    status: str
    seconds: float
    limit_seconds: float
    text: str
    found: dict[str, Any]


Runner = Callable[[str, torch.device, Sizes, float, Path], dict[str, Any] | None]


def accept(folder: str) -> int:
    """Run all parts on the first GPU, write the folder and show a line for each.

    Args:
        folder: for gpu.json, gpu.html and the log of each part.

    Returns:
        0; 1 if a part failed or ran out of time.

    Raises:
        UserError: without a GPU.
    """
    if not torch.cuda.is_available():
        raise UserError(
            f"gpu ({folder}) needs a CUDA device, and torch {torch.__version__} finds none; run it "
            "where there is one"
        )
    device = torch.device("cuda", 0)
    properties = torch.cuda.get_device_properties(device)
    is_large = properties.total_memory >= _LARGE_BYTES
    machine = {
        "device": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": str(torch.version.cuda),
        "cores": len(os.sched_getaffinity(0)),
        **{name: str(version) for name, version in installed_versions().items() if version},
    }
    sizes, share = (LARGE, 1.0) if is_large else (SMALL, 0.5)
    limits = {name: share * seconds for name, seconds in LIMITS.items()}
    return run_parts(Path(folder), device, sizes, limits, machine)


def run_parts(
    folder: Path,
    device: torch.device,
    sizes: Sizes,
    limits: Mapping[str, float],
    machine: Mapping[str, Any],
    run: Runner | None = None,
) -> int:
    """Run parts one after another and write what they said.

    Args:
        folder: made if missing.
        device: of all parts.
        sizes: of all parts.
        limits: seconds of each part, in their order.
        machine: values for the head of the page.
        run: starts a part and returns its values; None where it ran out of time.

    Returns:
        0; 1 if a part failed or ran out of time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    outcomes: list[Outcome] = []
    for name, limit in limits.items():
        begun = time.monotonic()
        left = min(limit, sum(limits.values()) - (begun - started))
        found = (run or run_in_process)(name, device, sizes, max(1.0, left), folder)
        outcomes.append(_judge(name, found, time.monotonic() - begun, left))
        # After each part: a machine that is taken away leaves what was found.
        _write(folder, machine, outcomes, time.monotonic() - started)
    findings = [_as_finding(outcome) for outcome in outcomes]
    title = f"dist-siglip doctor --gpu on {machine['device']}"
    said = render(title, findings)
    sys.stdout.write(f"{said}\n{folder / 'gpu.json'}\n{folder / 'gpu.html'}\n")
    return int(any(outcome.status in ("failed", "out of time") for outcome in outcomes))


def run_in_process(
    name: str, device: torch.device, sizes: Sizes, limit: float, folder: Path
) -> dict[str, Any] | None:
    """Run a part in a process group of its own, which ends with its time.

    Returns:
        Its values, or an error; None if it did not come back in time.
    """
    log = folder / f"{name.replace(' ', '-')}.log"
    with tempfile.TemporaryDirectory() as place, open(log, "w", encoding="utf-8") as said:
        request, result = Path(place, "request.json"), Path(place, "result.json")
        request.write_text(json.dumps({"device": str(device), "sizes": sizes._asdict()}))
        process = subprocess.Popen(
            [sys.executable, "-m", "dist_siglip.doctor.gpu", name, request, result],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):  # whatever it started ends, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if result.exists():
            values: dict[str, Any] = json.loads(result.read_text())
            return values
    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return {"error": f"ended with code {code}: {(last or ['it said nothing'])[-1][:300]}"}


def _judge(name: str, found: dict[str, Any] | None, seconds: float, limit: float) -> Outcome:
    if found is None:
        text = f"did not come back within {limit:.0f} s"
        return Outcome(name, "out of time", seconds, limit, text, {})
    for key, status in (("error", "failed"), ("skipped", "skipped"), ("summary", "ok")):
        if key in found:
            rest = {other: value for other, value in found.items() if other != key}
            return Outcome(name, status, seconds, limit, str(found[key]), rest)
    return Outcome(name, "failed", seconds, limit, "said nothing", found)


def _as_finding(outcome: Outcome) -> Finding:
    status: Status = "FAIL"
    if outcome.status in ("ok", "skipped"):
        status = "ok" if outcome.status == "ok" else "-"
    text = f"{outcome.text} ({outcome.seconds:.0f} s)"
    remedy = "the JSON, the page and the log of the part say more" if status == "FAIL" else ""
    return Finding(status, outcome.name, text, remedy)


def _write(
    folder: Path, machine: Mapping[str, Any], outcomes: Sequence[Outcome], seconds: float
) -> None:
    """Write gpu.json and gpu.html."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    record = {
        "machine": dict(machine),
        "written": now,
        "seconds": round(seconds, 1),
        "parts": [outcome._asdict() for outcome in outcomes],
    }
    write_atomically(folder / "gpu.json", json.dumps(record, indent=2))
    rows = [
        (o.name, o.status, o.text, f"{o.seconds:.0f} of {o.limit_seconds:.0f} s") for o in outcomes
    ]
    facts = [(name, str(value)) for name, value in machine.items()]
    sections = [
        render_section(
            "Parts",
            render_table_card("What was found", ("part", "", "", "time"), rows),
            render_table_card("Machine", (), facts, is_wordy=True),
            key="parts",
        )
    ]
    links = [("parts", "Parts")]
    for outcome in outcomes:
        key = outcome.name.replace(" ", "-")
        links.append((key, outcome.name))
        sections.append(render_section(outcome.name, *_show(outcome), key=key))
    subtitle = f"{machine['device']}, {now}, {seconds:.0f} s"
    page = render_page(_TITLE, subtitle, links, sections)
    write_atomically(folder / "gpu.html", page)


def _show(outcome: Outcome) -> list[str]:
    """HTML of the values of a part: numbers in one table, each list of rows in its own."""
    if not outcome.found:
        return [render_missing(outcome.text)]
    single, parts = [], []
    for name, value in outcome.found.items():
        if name == "details":
            parts.append(render_details("Traceback", str(value)))
        elif isinstance(value, list):
            if value:
                columns = tuple(dict.fromkeys(key for row in value for key in row))
                rows = [[_cell(row.get(key)) for key in columns] for row in value]
                parts.append(render_table_card(name, columns, rows))
        else:
            single.append((name, _cell(value)))
    return ([render_table_card(outcome.text, (), single)] if single else []) + parts


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(each)}" for name, each in value.items())
    return "" if value is None else str(value)


def run_part(name: str, device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Run one part; what goes wrong is a value, with "error" a line and "details" the rest."""
    try:
        return PARTS[name](device, sizes)
    except PartError as error:
        return {**error.found, "error": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever it is, the page tells it
        text = " ".join(f"{type(error).__name__}: {error}".split())[:600]
        return {"error": text, "details": traceback.format_exc()[-4000:]}


if __name__ == "__main__":
    part, request, result = sys.argv[1:]
    asked = json.loads(Path(request).read_text())
    shapes = tuple(tuple(shape) for shape in asked["sizes"].pop("loss_shapes"))
    told = run_part(
        part, torch.device(asked["device"]), Sizes(loss_shapes=shapes, **asked["sizes"])
    )
    Path(result).write_text(json.dumps(told))
