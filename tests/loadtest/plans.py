"""Plans of short tests."""

from typing import Any

from loadtest.arrivals import ClosedLoop
from loadtest.plan import Plan

NOWHERE = "127.0.0.1:1"


def plan_of(**fields: Any) -> Plan:
    """Return a plan, closed loop where nothing else is said."""
    usual: dict[str, Any] = {
        "target": "classify",
        "address": NOWHERE,
        "pace": ClosedLoop(callers=2),
        "duration_seconds": 0.3,
        "warm_up_seconds": 0.1,
        "timeout_seconds": 10.0,
        "model": "mnist",
        "triton": NOWHERE,
        "triton_metrics": NOWHERE,
    }
    return Plan(**usual | fields)
