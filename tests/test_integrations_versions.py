"""The releases of trainers that the tests of attach and verify ran on, newest and oldest: named here alone."""

from importlib.metadata import PackageNotFoundError, version

import pytest

# What reaches into a trainer (its loops, its step, its loader) is held on both; releases between them share one of the
# two shapes that the code knows.
TESTED = {
    "transformers": ("4.50.0", "5.24.0"),
    "lightning": ("2.4.0", "2.6.6"),
    "accelerate": ("1.5.2", "1.15.0"),
    "peft": ("0.13.2", "0.21.2"),
    "trl": ("1.16.0", "1.16.0"),
    "deepspeed": ("0.19.8", "0.19.8"),
}


def numbers(release):
    return [int(part) for part in release.split(".")[:3] if part.isdigit()]


@pytest.mark.parametrize("name", TESTED)
def test_what_is_installed_is_not_older_than_the_oldest_that_was_tested(name):
    try:
        installed = version(name)
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    oldest, newest = TESTED[name]
    assert numbers(installed) >= numbers(oldest), f"{name} {installed}: run its tests with it, then name it here"
    assert numbers(oldest) <= numbers(newest)
