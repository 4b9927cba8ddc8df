"""A recipe at the shell: options from the signature of its main, and an exit status that says whether theory holds."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from inspect import signature

from jsonargparse import ArgumentParser

from torch_singlim import SingularLimitMonitor, Window

# options without a value
FLAGS = {
    "quick": "a smaller experiment, minutes on two cores",
    "full": "the experiments of the docs, hours on two cores",
}


def command(main: Callable[..., None]) -> None:
    """Run a recipe with an option for each argument of its main, spelled with - or _; --quick and --full are flags."""
    parser = ArgumentParser(description=(main.__doc__ or "").splitlines()[0])
    parser.add_function_arguments(main, as_group=False, skip=set(FLAGS))
    for flag in FLAGS.keys() & signature(main).parameters:
        parser.add_argument(f"--{flag}", action="store_true", help=FLAGS[flag])
    options = [re.sub(r"^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), arg) for arg in sys.argv[1:]]
    main(**parser.instantiate_classes(parser.parse_args(options)))


def compared_window(monitor: SingularLimitMonitor) -> Window:
    """The monitor's last window; where there is none, or theory has no prediction for it, exit with the reasons."""
    window = monitor.last_window
    if window is not None and (window.drift is not None or window.diffuses):
        return window
    reasons = [str(reason) for reason in monitor.reasons]
    if window is None:
        reasons.append("no window was completed: make it shorter, or train longer")
    raise SystemExit(f"nothing was compared with the theory: {'; '.join(reasons)}")


def require(promises: Mapping[str, bool]) -> None:
    """Print what theory promises where all of it holds; else exit and name what does not."""
    missed = [promise for promise, held in promises.items() if not held]
    if missed:
        raise SystemExit(f"disagreement with the theory; missed: {'; '.join(missed)}")
    print("agreement with the theory: " + "; ".join(promises))
