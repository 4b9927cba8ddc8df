"""The ensembles of one system from end to end at a small size."""

import dataclasses

from recipes import time_scales


def test_time_scales(tmp_path, capsys, monkeypatch):
    quick = [dataclasses.replace(sweep, slow_time=0.002, runs=1) for sweep in (time_scales.SWEEPS[1],)]
    monkeypatch.setattr(time_scales, "SWEEPS", quick)
    time_scales.main(replicas=4, alphas=[0.02, 0.04], out=tmp_path, check=False)
    printed = capsys.readouterr().out
    assert "| DropConnect |" in printed
    assert "minibatches alone: distance" in printed
    assert (tmp_path / "time_scales.png").stat().st_size > 10_000
    assert list(tmp_path.glob("events*"))
