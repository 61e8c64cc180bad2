"""Rows and records that follow benches/schema.json, for the tools in Python. Needs nothing but Python 3.10."""

import argparse
import re


def quantile(samples, q):
    """The q-quantile of samples, interpolated linearly as by numpy's default."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def row(name, parameters, samples, rounds, unit="ms", better="lower", numbers=None):
    """A measured row. rounds: the number of samples of each round."""
    return {
        "name": name, "parameters": parameters, "kind": "measured", "unit": unit, "better": better,
        "samples": samples, "rounds": rounds, "throttled": None, "median": quantile(samples, 0.5),
        "p10": quantile(samples, 0.1), "p90": quantile(samples, 0.9), "numbers": numbers or {}, "verdict": None,
    }


def rates(rows, acceptance):
    """Rows of tokens per second: for AR steps, and for rounds at assumed acceptance lengths."""
    more = []
    for step in rows:
        at = step["parameters"]
        names = {
            "AR step": [("autoregressive decoding", 1, at)],
            "round": [("DFlash, synthetic acceptance", tokens, {**at, "acceptance": tokens}) for tokens in acceptance],
        }
        for name, tokens, parameters in names.get(step["name"], []):
            samples = [at["batch"] * tokens / ms * 1e3 for ms in step["samples"]]
            more.append(row(name, parameters, samples, step["rounds"], "tok/s", "higher"))
    return more


def merged(records):
    """One record from those of several runs of one command, with the samples of all runs in order."""
    whole = records[0]
    for first in whole["rows"]:
        key = (first["name"], first["parameters"])
        same = [row for record in records for row in record["rows"] if (row["name"], row["parameters"]) == key]
        if any(row["samples"] is None for row in same):
            continue
        before, throttled = 0, None
        for row in same:
            if row.get("throttled") is not None:
                throttled = (throttled or []) + [before + place for place in row["throttled"]]
            before += len(row["rounds"] or row["samples"])
        rounds = [row["rounds"] for row in same]
        first["throttled"], first["rounds"] = throttled, None if None in rounds else sum(rounds, [])
        first["samples"] = sum((row["samples"] for row in same), [])
        for name, q in (("median", 0.5), ("p10", 0.1), ("p90", 0.9)):
            first[name] = quantile(first["samples"], q)
        for name in first["numbers"]:
            found = [row["numbers"].get(name) for row in same]
            first["numbers"][name] = None if None in found else quantile(found, 0.5)
    whole["machine"]["after"] = records[-1]["machine"].get("after")
    return whole


def number(text):
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number: expected for example 4,8 or 1-8 or 512-4096*2")
    return float(text)


def numbers(text):
    """A LIST as dflash-bench reads it: 4,8  1-8  1-16+5  512-4096*2."""
    found = []
    for part in text.split(","):
        first, dash, rest = part.partition("-")
        by = "*" if "*" in rest else "+"
        last, given, step = rest.partition(by) if dash else (first, "", "")
        first, last, step = number(first), number(last), number(step) if given else 1.0
        if last < first or step <= 0 or (by == "*" and (step <= 1 or first == 0)):
            raise argparse.ArgumentTypeError(f"{part!r} does not end: expected FIRST-LAST+STEP or FIRST-LAST*FACTOR")
        while first <= last:
            found.append(first)
            first = first * step if by == "*" else first + step
            if len(found) > 1000:
                raise argparse.ArgumentTypeError(f"{text!r}: more than 1000 numbers")
    if not all(n > 0 for n in found):
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers above 0")
    return [int(n) if n == int(n) else n for n in found]


def wholes(text):
    """A LIST of whole numbers."""
    found = numbers(text)
    if any(n != int(n) for n in found):
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers")
    return found
