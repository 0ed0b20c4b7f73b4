"""Which tests `make test-fast` leaves out: told by what their code uses, never by a list."""

import subprocess

import outcomes
import pytest
import ranks
import runs
import small_tsm
from tiers import takes_long

from vitask_plugin import cli


def starts_a_process() -> None:
    subprocess.run(["true"], check=True)


def starts_one_by_a_helper() -> None:
    for _ in [1]:
        (lambda: starts_a_process())()


def trains_by_a_command() -> None:
    cli.main(["tsm", "train", "--arch", "test_vit"])


def imports_inside() -> None:
    from vitask_plugin.hf.tiny import make_tiny

    make_tiny("here", family="llava", texts=[], seed=0)


def does_little() -> None:
    cli.main(["tsm", "evaluate"])


@pytest.mark.parametrize(
    ("function", "long"),
    [
        (starts_a_process, True),
        (starts_one_by_a_helper, True),
        (trains_by_a_command, True),
        (imports_inside, True),
        (runs.train, True),
        (ranks.launch, True),
        (does_little, False),
        (small_tsm.make, False),
        (outcomes.draw, False),
    ],
)
def test_what_takes_long_is_seen_in_the_code(function, long: bool) -> None:
    assert takes_long(function) is long


def test_a_fixture_that_makes_a_model_makes_its_tests_slow(request: pytest.FixtureRequest) -> None:
    """`slow` stands on this very test once it asks for one."""
    own = request.node
    assert own.get_closest_marker("slow") is None
    for name in ("tiny_llava", "tiny_checkpoint"):
        (definition, *_) = request.session._fixturemanager.getfixturedefs(name, own)
        assert takes_long(definition.func), name
