"""How many examples are drawn, and how many were judged.

``--hypothesis-profile=long`` draws new ones at each run; the ordinary profile always the same few hundred.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

#: Examples of a property of share 1.
NORMAL, LONG = 60, 6000

# Examples are large on purpose.
_ALLOWED = (
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.large_base_example,
    HealthCheck.function_scoped_fixture,
)

judged: Counter[str] = Counter()


def register() -> None:
    """Makes the profiles known to hypothesis, and loads the ordinary one."""
    common: dict[str, Any] = {
        "deadline": None,
        "suppress_health_check": _ALLOWED,
        "print_blob": True,
    }
    settings.register_profile("normal", max_examples=NORMAL, derandomize=True, database=None, **common)
    settings.register_profile("long", max_examples=LONG, **common)
    settings.load_profile("normal")


def examples(share: float = 1.0) -> Callable[[Any], Any]:
    """Settings of a property that gets this share of the profile's examples."""
    profile = settings.default
    assert profile is not None
    return settings(max_examples=max(1, round(profile.max_examples * share)))


def count(name: str) -> None:
    """One example more was drawn and judged."""
    judged[name] += 1
