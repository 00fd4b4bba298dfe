"""How often every fault test passes in a row: each of ``tests/e2e/test_faults.py`` many times, and the longest.

``python tests/benchmarks/faults.py [--repeat 20] [-k EXPRESSION] [--out RESULT.json]``

Exits with 1 if any of them failed.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import pytest
from common import circumstances, print_table, write

TESTS = Path(__file__).parents[1] / "e2e" / "test_faults.py"


class Repeated:
    """A pytest plugin that runs each test ``times`` times and notes how they went."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.passed: defaultdict[str, int] = defaultdict(int)
        self.missed: defaultdict[str, int] = defaultdict(int)  # failed or skipped
        self.longest_s: defaultdict[str, float] = defaultdict(float)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        metafunc.fixturenames.append("repetition")
        metafunc.parametrize("repetition", range(self.times))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.location[2].split("[")[0]
        self.longest_s[name] = max(self.longest_s[name], report.duration)
        if report.outcome != "passed":
            self.missed[name] += 1
        elif report.when == "call":
            self.passed[name] += 1


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--repeat", type=int, default=20)
    arguments.add_argument("-k", dest="expression", default="")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    repeated = Repeated(given.repeat)
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    code = pytest.main([*options, "-k", given.expression, str(TESTS)], plugins=[repeated])
    results = {
        name: {
            "passed": repeated.passed[name],
            "failed": repeated.missed[name],
            "longest_s": round(repeated.longest_s[name], 1),
        }
        for name in sorted(repeated.longest_s)
    }
    print_table("fault", ["passed", "failed", "longest s"], {n[5:33]: [*r.values()] for n, r in results.items()})
    write(circumstances(given) | {"results": results}, given.out)
    raise SystemExit(int(code))


if __name__ == "__main__":
    main()
