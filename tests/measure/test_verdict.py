"""The verdict from a history made to order."""

from torch_singlim.measure import verdict


def test_a_verdict_without_drift_is_a_table_still():
    history = {
        0: {"excess_loss": 1.0, "distance/nearest": 2.0, "quality/converged": 1.0},
        10: {
            "excess_loss": 0.5,
            "distance/nearest": 1.0,
            "quality/converged": 1.0,
            "window/steps": 10.0,
            "drift/measured": 0.1,
        },
    }
    assert "| 10 | 0.5 | 1 | - | - | - | - |" in verdict(history)
    assert "window" not in verdict(history)  # nothing to compare its motion with
    history[10]["drift/baseline_cosine"] = 0.4
    assert "| 0-10 | - | - | - | 0.4 | - | - | - |" in verdict(history)
