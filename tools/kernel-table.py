#!/usr/bin/env python3
"""Prints the kernels of a profile as a table: launches, median time, percentage of the time, and, if bytes are known,
GB/s and the percentage of a ceiling.

Reads the reports cuda_gpu_kern_sum and cuda_gpu_trace of `nsys stats`, and the pages raw and details of `ncu --csv`,
from a file or stdin (-). ncu counts bytes. For nsys, --launches (`dflash-gen --plan --launches --json` of the pair) and
--record (`dflash-bench roofline --json` of it) give the weights that each launch reads, a lower bound of its bytes.

Exit codes: 0 done, 2 a flag or a file is wrong.
"""

import argparse
import csv
import io
import json
import re
import statistics
import sys

# Nanoseconds and bytes of a unit; older ncu has longer names.
NANOSECONDS = {"ns": 1, "us": 1e3, "ms": 1e6, "s": 1e9, "nsecond": 1, "usecond": 1e3, "msecond": 1e6, "second": 1e9}
BYTES = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
TIME, READ, WRITTEN = "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"
# The matrix that a kernel reads. The first `project` of a layer reads `o`, the second reads `down`.
MATRICES = {"qkv": "qkv", "swiglu": "gate_up", "project": "o", "head": "lm_head", "inject": "fc"}


class Wrong(Exception):
    """A flag or a file is wrong; the message is one line."""


class Kernel:
    """The launches of a kernel: number, total and median time (ns), and bytes if known."""

    def __init__(self, times, launches=None, total=None):
        self.launches = launches or len(times)
        self.total = total or sum(times)
        self.median = statistics.median(times)
        self.bytes = None


def number(text, where):
    """A number as either tool writes it: 1,205.00 or 1205."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise Wrong(f"{where} is {text!r}, expected a number from 0 on")
    return value


def scaled(text, unit, units, where):
    if unit not in units:
        raise Wrong(f"{where} is in {unit!r}, expected one of {', '.join(units)}")
    return number(text, where) * units[unit]


def plain(name):
    """The name without the parameters that a demangled name has."""
    return name.split("(")[0].strip()


def rows(text, source):
    """Header of the first table in a text, and [(place, {column: cell})] of its rows. Both tools print other text
    around the table."""
    lines = text.splitlines()
    heads = [i for i, line in enumerate(lines) if re.match(r'"?(Time \(%\)|Start \(|ID"?,)', line)]
    if not heads:
        raise Wrong(f"{source} has no table of nsys stats (cuda_gpu_kern_sum, cuda_gpu_trace) or of ncu --csv")
    table = csv.reader(io.StringIO("\n".join(lines[heads[0] :])))
    head, found = next(table), []
    for cells in table:
        if not cells or cells[0].startswith("=="):
            break
        where = f"{source}:{heads[0] + table.line_num}"
        if len(cells) != len(head):
            raise Wrong(f"{where} has {len(cells)} cells, its header has {len(head)}")
        found.append((where, dict(zip(head, cells))))
    if not found:
        raise Wrong(f"{source} has the header of a table and no rows: nothing ran in the profiler's window")
    return head, found


def column(head, name, source):
    """The column whose name ends in its unit, such as `Med (ns)`, and the unit."""
    for cell in head:
        if m := re.fullmatch(rf"{name} \((\w+)\)", cell):
            return cell, m[1]
    raise Wrong(f"{source} has no column {name!r} with a unit, only {', '.join(head)}")


def from_summary(head, table, source):
    (total, per_total), (median, per_median) = column(head, "Total Time", source), column(head, "Med", source)
    kernels = {}
    for where, row in table:
        if plain(row["Name"]) in kernels:
            raise Wrong(f"{where} is {row['Name']} again, expected one row per kernel, as in cuda_gpu_kern_sum")
        launches = number(row["Instances"], f"{where}, Instances")
        if launches < 1 or launches % 1:
            raise Wrong(f"{where}, Instances is {row['Instances']!r}, expected a whole number from 1 on")
        times = [scaled(row[median], per_median, NANOSECONDS, f"{where}, {median}")]
        all_times = scaled(row[total], per_total, NANOSECONDS, f"{where}, {total}")
        kernels[plain(row["Name"])] = Kernel(times, int(launches), all_times)
    return kernels


def from_trace(head, table, source):
    name, unit = column(head, "Duration", source)
    times, others = {}, 0
    for where, row in table:
        # Copies and fills have no grid.
        if not row.get("GrdX"):
            others += 1
            continue
        times.setdefault(plain(row["Name"]), []).append(scaled(row[name], unit, NANOSECONDS, f"{where}, {name}"))
    if others:
        print(f"kernel-table: {others} copies and fills are left out", file=sys.stderr)
    return {kernel: Kernel(all_times) for kernel, all_times in times.items()}


def from_ncu(head, table, source):
    """A launch is several rows of the page details, and one of the page raw, whose first row has the units."""
    launches = {}
    if "Metric Name" in head:
        for where, row in table:
            launch = launches.setdefault(row["ID"], (where, plain(row["Kernel Name"]), {}))
            launch[2][row["Metric Name"]] = (row["Metric Value"], row["Metric Unit"])
    else:
        (where, units), *table = table
        if units["ID"]:
            raise Wrong(f"{where} has no units, which the raw page has in the row below its header")
        for where, row in table:
            metrics = {name: (row[name], units[name]) for name in head if "__" in name}
            launches[row["ID"]] = (where, plain(row["Kernel Name"]), metrics)
    times, moved = {}, {}
    for where, kernel, metrics in launches.values():
        if TIME not in metrics:
            raise Wrong(f"{where} ({kernel}) has no {TIME}: expected --metrics {TIME},{READ},{WRITTEN}")
        times.setdefault(kernel, []).append(scaled(*metrics[TIME], NANOSECONDS, f"{where}, {TIME}"))
        # A GPU without the counter gives n/a.
        known = [metrics[name] for name in (READ, WRITTEN) if metrics.get(name, ("n/a",))[0] != "n/a"]
        counted = sum(scaled(*cell, BYTES, f"{where}, bytes") for cell in known) if len(known) == 2 else None
        moved.setdefault(kernel, []).append(counted)
    kernels = {kernel: Kernel(all_times) for kernel, all_times in times.items()}
    for kernel, counts in moved.items():
        kernels[kernel].bytes = None if None in counts else sum(counts)
    return kernels


def read_kernels(text, source):
    head, table = rows(text, source)
    if "Instances" in head and "Name" in head:
        return from_summary(head, table, source)
    if "CorrId" in head and "Name" in head:
        return from_trace(head, table, source)
    if "Kernel Name" in head and "ID" in head:
        return from_ncu(head, table, source)
    raise Wrong(f"{source} has a table with unknown columns: {', '.join(head)}")


def read_json(path, key):
    """Reads a JSON object with a list of objects at `key`."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
        if not all(isinstance(item, dict) for item in value[key]):
            raise TypeError
        return value
    except OSError as e:
        raise Wrong(f"{path} cannot be read: {e.strerror}") from e
    except (ValueError, KeyError, TypeError) as e:
        raise Wrong(f"{path} is not a JSON object with a list of {key}") from e


def weights_of_a_round(path, matrices):
    """{kernel: (launches, bytes of weights, or None if one of them is unknown)} from the list of a round's launches."""
    found = {}
    for section in read_json(path, "sections")["sections"]:
        try:
            for group in section["groups"]:
                model = (group["layers"] or {}).get("model")
                first = True
                for launch in group["launches"]:
                    kernel = launch["kernel"]
                    matrix = MATRICES.get(kernel.split("_")[0])
                    if matrix == "o":
                        matrix, first = ("o" if first else "down"), False
                    # The drafter has no head of its own.
                    owner = {"lm_head": "target", "fc": "drafter"}.get(matrix, model)
                    weights = matrices.get((owner, matrix))
                    launches, before = found.get(kernel, (0, 0))
                    known = before is not None and weights is not None
                    times = group["times"]
                    found[kernel] = (launches + times, before + weights * times if known else None)
        except (AttributeError, KeyError, TypeError) as e:
            raise Wrong(f"{path} is not a list of launches, as dflash-gen --plan --launches --json prints it") from e
    return found


def add_weights(kernels, per_round, path):
    rounds = {}
    for name, kernel in kernels.items():
        launches, weights = per_round.get(name, (0, None))
        if launches and kernel.launches % launches == 0:
            rounds.setdefault(kernel.launches // launches, []).append(name)
            if kernel.bytes is None and weights:
                kernel.bytes = weights * kernel.launches / launches
        else:
            what = f"{name} ran {kernel.launches} times, and {launches} times in a round of {path}"
            print(f"kernel-table: {what}", file=sys.stderr)
    if len(rounds) > 1:
        counts = " or ".join(map(str, sorted(rounds)))
        raise Wrong(f"{path} does not fit the profile, whose kernels ran in {counts} such rounds")


def table_text(kernels, ceiling, markdown):
    whole = sum(kernel.total for kernel in kernels.values())
    if not whole:
        raise Wrong("the total time of the kernels is 0")
    lines = [["kernel", "launches", "median us", "% of time"]]
    if known := any(kernel.bytes is not None for kernel in kernels.values()):
        lines[0] += ["GB/s", "% of ceiling"] if ceiling else ["GB/s"]
    for name, kernel in sorted(kernels.items(), key=lambda item: -item[1].total):
        line = [name, str(kernel.launches), f"{kernel.median / 1e3:.2f}", f"{100 * kernel.total / whole:.1f}"]
        if known and kernel.bytes is not None and kernel.total:
            rate = kernel.bytes / kernel.total
            line += [f"{rate:.0f}", f"{100 * rate / ceiling:.1f}"] if ceiling else [f"{rate:.0f}"]
        lines.append(line + [""] * (len(lines[0]) - len(line)))
    launches = sum(kernel.launches for kernel in kernels.values())
    lines.append(["all", str(launches), "", "100.0"] + [""] * (len(lines[0]) - 4))
    if markdown:
        lines.insert(1, ["---"] + ["---:"] * (len(lines[0]) - 1))
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    numbers = ([cell.rjust(width) for cell, width in zip(line[1:], widths[1:])] for line in lines)
    padded = ("  ".join([line[0].ljust(widths[0]), *cells]) for line, cells in zip(lines, numbers))
    return "".join(line.rstrip() + "\n" for line in padded)


def above_zero(text):
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", metavar="CSV", help="output of nsys stats or ncu; -: stdin")
    add = parser.add_argument
    add("--ceiling", type=above_zero, metavar="GB/s", help="GB/s that are 100 %% [default: read ceiling of the records]")
    add("--record", action="append", default=[], metavar="JSON", help="record of dflash-bench; repeatable")
    add("--launches", metavar="JSON", help="launches of a round, for nsys; needs --record of dflash-bench roofline")
    add("--markdown", action="store_true", help="a table in Markdown")
    flags = parser.parse_args()
    ceiling, matrices = flags.ceiling, {}
    for path in flags.record:
        for row in read_json(path, "rows")["rows"]:
            name, value = row.get("name"), row.get("median")
            if name == "read ceiling" and not flags.ceiling:
                if not isinstance(value, (int, float)) or value <= 0:
                    raise Wrong(f"{path} has the read ceiling {value}, expected GB/s above 0")
                ceiling = value
            m = re.fullmatch(r"(target|drafter): (\w+)( of a layer)?", str(name))
            if m and row.get("unit") == "MB" and isinstance(value, (int, float)):
                matrices[m[1], m[2]] = value * 1e6
    if flags.launches and not matrices:
        raise Wrong("--launches needs the sizes of the weights: --record with output of dflash-bench roofline --json")
    try:
        file = sys.stdin if flags.profile == "-" else open(flags.profile, encoding="utf-8")
        with file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as e:
        raise Wrong(f"{flags.profile} cannot be read: {getattr(e, 'strerror', 'it is not UTF-8')}") from e
    kernels = read_kernels(text, flags.profile)
    if not kernels:
        raise Wrong(f"{flags.profile} has no kernels")
    if flags.launches:
        add_weights(kernels, weights_of_a_round(flags.launches, matrices), flags.launches)
    sys.stdout.write(table_text(kernels, ceiling, flags.markdown))


try:
    main()
except Wrong as e:
    print(f"kernel-table: {e}", file=sys.stderr)
    sys.exit(2)
