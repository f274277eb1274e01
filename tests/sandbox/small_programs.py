"""A program and its test, and the tiers that this machine gives."""

from sandbox import judge

HONEST = "def solve(x):\n    return x + 1\n"
TEST = "def check(candidate):\n    assert candidate(1) == 2\n"


def available(tier: str) -> bool:
    try:
        with judge.Sandbox(workers=1, tier=tier):
            return True
    except ValueError:
        return False


TIERS = [tier for tier in judge.TIERS if available(tier)]
