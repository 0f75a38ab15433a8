"""`hires speed orders`: times on the CPU, the reading of Nsight Compute's report."""

import pytest
import torch
from hires_kernels.orders import ORDERS

from hires.cli import main
from hires.speed import orders
from hires.speed.inputs import make
from hires.speed.shapes import SHAPES

REPORT = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","_forward","lts__t_bytes.sum","byte","8,400,000,000"
"0","7","_forward","dram__bytes_read.sum","byte","1200000000"
"0","7","_forward","dram__bytes_write.sum","byte","400000000"
"1","7","_combine","lts__t_bytes.sum","byte","100000000"
"""


def test_every_order_is_timed_and_gives_the_same(capsys):
    assert main(["speed", "orders", "--shapes", "local-tiny-0", "--device", "cpu", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[1] for line in lines] == list(ORDERS)
    assert all(float(line.split()[2]) > 0 for line in lines)
    shape = SHAPES["local-tiny-0"]
    inputs = make(shape, torch.device("cpu"), seed=0)
    first, *others = (orders.call(shape, inputs, order) for order in ORDERS)
    for other in others:
        torch.testing.assert_close(other, first)


def test_the_counters_of_all_kernels_are_added():
    assert orders.gigabytes(REPORT) == {"l2_gb": 8.5, "dram_gb": 1.6}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "npa-tiny-0"], "neighborhood patch attention has no order: allowed: local-flux-2048"),
        (["--shapes", "local-tiny-0", "--traffic"], "put ncu on the PATH"),
        ([], "--device cpu measures --shapes tiny only"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--shapes", "nothing"], "no shape fits 'nothing'"),
    ],
)
def test_bad_input_is_one_clear_line(options, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["speed", "orders", "--device", "cpu", *options]) == 2
    assert message in capsys.readouterr().err
