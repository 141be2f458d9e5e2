"""Which machine and which code a measured row is said to be of."""

from benchmarks.machine import Provenance, _processor

CPUINFO = """processor\t: 0
model name\t: A Processor: 2 GHz
flags\t\t: fpu avx2 avx512f

processor\t: 1
model name\t: A Processor: 2 GHz
flags\t\t: fpu avx2 avx512f
"""


def test_the_processor_is_the_kernels_name_of_it(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(CPUINFO)
    assert _processor(path) == ("A Processor: 2 GHz", {"fpu", "avx2", "avx512f"})
    assert _processor(tmp_path / "missing")[1] == frozenset()


def test_a_row_is_of_this_machine_and_day():
    now = Provenance.now()
    assert now.processor
    assert now.cores > 0
    assert len(now.date) == len("2026-11-29")
