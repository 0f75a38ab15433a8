"""The table of launches, and the command that tunes it."""

import pytest
import torch
from hires_kernels import launches

from hires.cli import main
from hires.speed import tune

CPU = torch.device("cpu")


def test_the_table_is_written_as_it_stands():
    assert launches.PATH.read_text() == launches.text()


@pytest.mark.parametrize("kernel", launches.TABLE)
def test_every_kernel_has_a_launch_for_its_head_dims(kernel):
    dims = {"64", "128"} if kernel == "npa_gluon" else {"32", "64", "128"}
    columns = {"227"} if kernel == "npa_gluon" else {"99", "227"}
    assert set(launches.TABLE[kernel]) == columns
    assert all(set(column) == dims for column in launches.TABLE[kernel].values())


WALKED = {"local_forward": "keys", "local_query_gradient": "keys", "local_key_gradients": "queries"}


@pytest.mark.parametrize("kernel", WALKED)
def test_no_tile_that_is_walked_is_as_long_as_a_head_dim(kernel):
    """ptxas of Triton 3.6 then gives both products of a step the same registers for what they read, on Hopper."""
    launched = [(int(dim), launch) for dim, launch in launches.TABLE[kernel][str(launches.LARGE)].items()]
    tried = [(dim, launch) for dim, candidates in tune.CANDIDATES[kernel].items() for launch in candidates]
    assert all(launch[WALKED[kernel]] != dim for dim, launch in launched + tried)


def test_keys_and_values_given_back_together_have_as_many_stages():
    """One barrier of the Gluon kernel then stands for both."""
    column = launches.TABLE["npa_gluon"][str(launches.LARGE)]
    launched = [*column.values(), *(x for candidates in tune.CANDIDATES["npa_gluon"].values() for x in candidates)]
    assert all(launch["k_stages"] == launch["v_stages"] for launch in launched if launch["free_together"])


def test_candidates_have_the_fields_of_the_committed_launch():
    for kernel, dims in tune.CANDIDATES.items():
        for dim, candidates in dims.items():
            committed = launches.launch(kernel, dim, CPU)
            assert all(set(candidate) == set(committed) for candidate in candidates)
            assert (kernel, dim) in tune.MEASURED


def test_a_trial_ends_with_its_block():
    before = dict(launches.launch("qk_norm_rope", 32, CPU))
    with pytest.raises(ZeroDivisionError), launches.trying("qk_norm_rope", 32, CPU, {"elements": 7, "warps": 1}):
        assert launches.launch("qk_norm_rope", 32, CPU)["elements"] == 7
        _ = 1 / 0
    assert launches.launch("qk_norm_rope", 32, CPU) == before


def test_candidates_are_measured_and_compared(monkeypatch, tmp_path):
    fast, impossible = {"elements": 32, "warps": 1}, {"elements": 16, "warps": 1}  # less than a head: no heads at once
    monkeypatch.setitem(tune.CANDIDATES, "qk_norm_rope", {32: [fast, impossible]})
    monkeypatch.setattr(tune, "ROUNDS", 1)
    monkeypatch.setitem(tune.MEASURED, ("qk_norm_rope", 32), ("npa-tiny-0", "prologue"))
    committed, first, second = tune.tune(["qk_norm_rope"], 1, CPU)
    assert committed["launch"] == launches.launch("qk_norm_rope", 32, CPU)
    assert committed["right"] and first["right"] and first["ms"] >= first["fastest"] > 0
    assert "ms" not in second and second["reason"]
    assert all(name in tune.line(second) for name in ("qk_norm_rope", "elements=16", second["reason"]))

    first["ms"], committed["ms"] = 1.0, 1.005
    assert tune.better([committed, first, second]) == {}  # not worth other bits
    committed["ms"] = 1.1
    chosen = tune.better([committed, first, second])
    assert chosen == {("qk_norm_rope", 32): fast}
    assert tune.better([committed, first | {"right": False}, second]) == {}
    committed["ms"] = 0.5
    assert tune.better([committed | {"right": False}, first, second]) == chosen  # a wrong one is not fast

    monkeypatch.setattr(launches, "PATH", tmp_path / "launches.json")
    with launches.trying("qk_norm_rope", 32, CPU, {}):
        tune.write(chosen, CPU)
        assert launches.launch("qk_norm_rope", 32, CPU) == fast
        assert launches.PATH.read_text() == launches.text()


def test_bad_input_is_one_clear_line(capsys):
    assert main(["speed", "tune", "--kernels", "npa_glue"]) == 2
    assert "did you mean 'npa_gluon'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["speed", "tune"]) == 2
        assert "measures on a CUDA device: run it on a GPU" in capsys.readouterr().err
