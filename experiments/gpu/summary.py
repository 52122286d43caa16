"""The report in Markdown, from the lines that its cases wrote. Needs nothing but Python."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from experiments.gpu.plan import STAGES
from experiments.gpu.predictions import COMPILED, OURS, ledger, predictions
from experiments.gpu.records import Record, latest, of_kind

BUSY = 0.25
"""Load a core, before the start, from which on no time is to be trusted."""


def summary_text(records: Iterable[Record]) -> str:
    """The whole summary: what each stage found, and what it could not."""
    records = list(records)
    cases = latest(records)
    sections = [_told(_opening, records), _told(_stages, cases)]
    tellers: dict[str, Callable[[list[Record]], str]] = {
        "attention": _contests,
        "encoders": _encoders,
        "ops": _contests,
        "tuning": lambda lines: "\n\n".join(filter(None, (_tuning(lines), _contests(lines)))),
        "tests": _tests,
        "sanitizer": _sanitizer,
    }
    for stage in STAGES:
        lines = [line for case in stage.cases for line in cases.get(case.name, ())]
        if told := _told(tellers[stage.name], lines) if stage.name in tellers else _told(_predictions, records):
            sections.append(f"## {stage.name}: {stage.question}\n\n{told}")
    return "\n\n".join(sections) + "\n"


def _told(teller: Callable[[Any], str], found: Any) -> str:
    # What nobody expected to find must not cost what is told of the rest.
    try:
        return teller(found)
    except Exception as error:
        return f"cannot be told, results.jsonl has it: {error!r}"


def status_of(lines: Sequence[Record]) -> str:
    """How a case ended: "ok", what went wrong, or that it never did end."""
    ended = of_kind(lines, "end")
    return ended[-1]["status"] if ended else "did not end"


def wrong_of_ours(lines: Sequence[Record]) -> list[str]:
    """What of ours a case found wrong; what peers cannot do, or what is not installed, is nothing wrong."""
    judged = [line for line in of_kind(lines, "judged") if line.get("problem") and _is_ours(line)]
    sanitized = [line for line in of_kind(lines, "sanitized") if line["problem"] and line["tool"] != "none"]
    failed = [line for line in of_kind(lines, "test") if line["outcome"] not in ("passed", "skipped")]
    tuned = [line for line in of_kind(lines, "tuned") if line["problem"] and not line["lacks"]]
    return [str(line["problem"]) for line in (*judged, *sanitized, *failed, *tuned, *of_kind(lines, "error"))]


def _is_ours(judged: Record) -> bool:
    return judged["form"] == OURS or ("encoder" in judged and not judged["form"].startswith("transformers"))


def _opening(records: list[Record]) -> str:
    around = of_kind(records, "environment")
    if not around:
        return "# No GPU report: the first process did not say what it runs on"
    found = around[-1]["environment"]
    device = found["devices"][0]["name"] if found["devices"] else "no GPU"
    commit = found["git"] or {"commit": "unknown", "dirty": False}
    versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
    lines = [
        f"# {device}, {found['date']}",
        "",
        f"- commit {commit['commit']}{', with changes' if commit['dirty'] else ''}",
        f"- Python {found['python']}, CUDA {found['cuda']}, {versions}",
    ]
    lines += [
        f"- a large copy reaches {x['GB/s']:.0f} GB/s, a large product {x['TFLOP/s']:.0f} TFLOP/s"
        for x in of_kind(records, "ceilings")[-1:]
    ]
    if around[-1]["rehearsal"]:
        lines.append("- **A rehearsal: tiny shapes in Triton's interpreter. No time here means anything.**")
    load = max((run["load"] for run in of_kind(records, "run")), default=0.0)
    if load > BUSY * found["cpu"]["cores"]:
        lines.append(
            f"- Other work ran on the machine (load {load:.1f} before a start): no time here is to be trusted."
        )
    return "\n".join(lines)


def _stages(cases: dict[str, list[Record]]) -> str:
    rows = []
    for stage in STAGES:
        for case in stage.cases:
            if lines := cases.get(case.name):
                ended = of_kind(lines, "end")
                seconds = f"{ended[-1]['seconds']:.0f}" if ended else "-"
                rows.append([stage.name, case.name, status_of(lines), seconds, _complaint(lines)])
            else:
                rows.append([stage.name, case.name, "not begun", "-", ""])
    return "## Cases\n\n" + table(["stage", "case", "ended", "s", "what was wrong"], rows)


def _complaint(lines: Sequence[Record]) -> str:
    if status_of(lines) == "ok":
        return _wrong(lines)
    said = [line["problem"] for line in of_kind(lines, "error")]
    doing = [line["what"] for line in of_kind(lines, "doing")]
    at = f"; last tried: {doing[-1]}" if doing else ""
    return f"{'; '.join(said)}{at}".removeprefix("; ")


def _wrong(lines: Sequence[Record]) -> str:
    kinds = ("judged", "error", "sanitized", "replayed", "tuned")
    problems = [line for line in of_kind(lines, *kinds) if line.get("problem") and not line.get("lacks")]
    failed = [line for line in of_kind(lines, "test") if line["outcome"] not in ("passed", "skipped")]
    named = [f"{line.get('form') or line.get('op') or ''}: {line['problem']}".removeprefix(": ") for line in problems]
    return "; ".join(dict.fromkeys(named))[:600] + (f"{len(failed)} tests failed" if failed else "")


def _contests(lines: Sequence[Record]) -> str:
    rows = []
    timed, replayed, traced = (_by_form(lines, kind) for kind in ("timed", "replayed", "kernels"))
    for judged in of_kind(lines, "judged"):
        key = _key(judged)
        time, replay, trace = timed.get(key), replayed.get(key, {}), traced.get(key, {})
        us = replay.get("us") or (time or {}).get("us")
        rows.append(
            [
                str(judged["case"]),
                str(judged.get("workload") or judged["sizes"]),
                str(judged["form"]),
                _right(judged),
                spread((time or {}).get("us")),
                spread(replay.get("us")),
                f"{time['host_us']:.0f}" if time else "-",
                f"{time['flops'] / statistics.median(us) / 1e6:.0f}" if time and us and time["flops"] else "-",
                f"{time['nbytes'] / statistics.median(us) / 1e3:.0f}" if time and us else "-",
                str(trace.get("launches", "-")),
                ", ".join(name[:60] for name in list(trace.get("names", {}))[:2]),
            ]
        )
    rows += [
        [str(line["case"]), str(line.get("workload") or line["sizes"]), str(line["form"]), line["problem"], *["-"] * 7]
        for line in of_kind(lines, "absent")
        if line["problem"] != "rehearsal"
    ]
    if not rows:
        return ""
    header = ["case", "sizes", "form", "right", "us, median (range)", "us as CUDA graph", "host us", "TFLOP/s", "GB/s"]
    text = (
        "Right: no more than twice PyTorch's error against fp64, and for ours the same bits in a second call. Times "
        "are the device's, from a cold L2 cache; rates are of useful FLOPs and compulsory bytes, by the graph's time "
        "where there is one. Launches and kernels: as the profiler saw one call."
    )
    return f"{text}\n\n{table([*header, 'launches', 'kernels'], rows)}"


def _by_form(lines: Sequence[Record], kind: str) -> dict[tuple[str, ...], Record]:
    return {_key(line): line for line in of_kind(lines, kind)}


def _key(line: Record) -> tuple[str, ...]:
    return tuple(str(line.get(name)) for name in ("case", "workload", "encoder", "sizes", "form"))


def _right(judged: Record) -> str:
    if judged["problem"]:
        return str(judged["problem"])[:200]
    ours, theirs = (max(each["rms"] for each in judged[name]) for name in ("errors", "eager_errors"))
    bits = {True: ", same bits", False: ", other bits", None: ""}[judged.get("same_bits")]
    return f"RMS {ours:.2e} (PyTorch {theirs:.2e}){bits}"


def _encoders(lines: Sequence[Record]) -> str:
    rows = []
    timed, traced = _by_form(lines, "timed"), _by_form(lines, "kernels")
    for judged in of_kind(lines, "judged"):
        time, trace = timed.get(_key(judged), {}), traced.get(_key(judged), {})
        sizes = str(judged.get("sizes", "-"))
        expected = _ledgers_launches(judged["encoder"], sizes) if judged["form"] in COMPILED else None
        rows.append(
            [
                judged["encoder"],
                judged["form"],
                sizes,
                _right(judged),
                f"{judged['first_call_seconds']:.2f}" if "first_call_seconds" in judged else "-",
                spread(time.get("wall_ms"), "{:.2f}"),
                spread(time.get("device_ms"), "{:.2f}"),
                f"{trace['us'] / 1e3:.2f}" if "us" in trace else "-",
                f"{trace.get('launches', '-')}" + (f" (ledger: {expected:g})" if expected else ""),
                f"{time['peak_bytes'] / 2**30:.2f}" if time.get("peak_bytes") else "-",
                str(judged.get("graphs", "-")),
            ]
        )
    rows += [[line["encoder"], line["form"], "-", line["problem"], *["-"] * 7] for line in of_kind(lines, "absent")]
    if not rows:
        return ""
    header = ["encoder", "form", "batch", "right", "first call, s", "ms by the clock", "ms between events"]
    text = (
        "Right: no more than twice the error against fp64 of the same encoder on PyTorch's implementations. The "
        "kernels' milliseconds are their sum, as the profiler saw one call."
    )
    columns = [*header, "ms in kernels", "launches", "peak GiB", "graphs"]
    return f"{text}\n\n{table(columns, rows)}"


def _ledgers_launches(encoder: str, sizes: str) -> float | None:
    parts = ledger(encoder, sizes) if sizes != "-" else None
    return sum(part["launches"] * times for part, times in parts) if parts else None


def _tuning(lines: Sequence[Record]) -> str:
    rows = [
        [
            line["kernel"],
            str(line["head_dim"]),
            "x".join(map(str, line["configuration"].values())),
            spread(line["us"]),
            "chosen" if line["chosen"] else (line["problem"] or "").partition("\n")[0],
        ]
        for line in of_kind(lines, "tuned")
    ]
    header = ["kernel", "head_dim", "BLOCK_M x BLOCK_N x warps x stages", "us, median (range)", ""]
    text = "The first of each is the default. A gradient's time is that of the whole backward pass."
    return f"{text}\n\n{table(header, rows)}" if rows else ""


def _tests(lines: Sequence[Record]) -> str:
    tests = of_kind(lines, "test")
    counts: dict[str, int] = {}
    for line in tests:
        counts[line["outcome"]] = counts.get(line["outcome"], 0) + 1
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    bad = [[line["test"], line["outcome"], line["problem"] or ""] for line in tests if line["outcome"] != "passed"]
    absent = "; ".join(line["problem"] for line in of_kind(lines, "absent"))
    return "\n\n".join(filter(None, (told, absent, table(["test", "", "what it says"], bad) if bad else "")))


def _sanitizer(lines: Sequence[Record]) -> str:
    rows = [
        [x["tool"], x["op"], x["problem"] or "nothing found", x.get("summary") or ""]
        for x in of_kind(lines, "sanitized")
    ]
    absent = "; ".join(f"{line['form']}: {line['problem']}" for line in of_kind(lines, "absent"))
    return "\n\n".join(filter(None, (absent, table(["tool", "op", "", "its summary"], rows) if rows else "")))


def _predictions(records: list[Record]) -> str:
    rows = [
        [
            each.name,
            each.sizes,
            f"{each.low:.1f} to {each.high:.1f}",
            f"{each.measured:.1f}",
            each.verdict,
            f"{each.launches[0]:g} and {each.launches[1]:g}" if each.launches else "-",
        ]
        for each in predictions(records)
    ]
    header = ["what", "sizes", "us predicted", "us measured", "", "launches by the ledger and the profiler"]
    text = "The prediction is the roofline model's, made without a GPU; of an encoder its kernels one after the other."
    return f"{text}\n\n{table(header, rows)}" if rows else ""


def spread(values: Sequence[float | None] | None, form: str = "{:.1f}") -> str:
    """Median and range, or a dash."""
    known = [value for value in values or () if value is not None]
    if not known:
        return "-"
    low, middle, high = (form.format(pick(known)) for pick in (min, statistics.median, max))
    return f"{middle} ({low} to {high})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(_lines(header, rows))


def _lines(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(str(cell).replace('|', '/').replace(chr(10), ' ') for cell in row)} |"
