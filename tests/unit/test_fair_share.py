"""What tenants get beside each other, on a real scheduler with modelled step times."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.engine.counters import AHEAD
from server.engine.messages import Prices
from tests.modelled import Load, run

FLOODS = {
    "long": Load("flood", prompt=512, out=512, flood=500),
    "prompts": Load("flood", prompt=1024, out=32, flood=500),
    "outputs": Load("flood", prompt=64, out=1024, flood=500),
}
OTHERS = {
    "one client": Load("other", prompt=256, out=64, clients=1),
    "4 clients": Load("other", prompt=256, out=64, clients=4),
    "16 clients": Load("other", prompt=128, out=128, clients=16),
    "16 clients with pauses": Load("other", prompt=128, out=64, clients=16, pause=5.0),
    "one a second": Load("other", prompt=200, out=64, rate=1.0),
    "two short a second": Load("other", prompt=64, out=32, rate=2.0),
}


def fresh(load: Load, **changes: object) -> Load:
    return replace(load, firsts=[], made=0, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def alone() -> dict[str, Load]:
    loads = {name: fresh(load) for name, load in (FLOODS | OTHERS).items()}
    for load in loads.values():
        run(load)
    return loads


@pytest.mark.parametrize("flood", FLOODS)
@pytest.mark.parametrize("other", OTHERS)
def test_a_flood_leaves_the_other_tenant_its_share(other: str, flood: str, alone: dict[str, Load]) -> None:
    """The aim is 45 % of what it gets alone and twice its p99 to the first token; the flood keeps its share as well."""
    one, many = fresh(OTHERS[other]), fresh(FLOODS[flood])
    run(many, one)
    assert one.made >= 0.47 * alone[other].made
    assert many.made >= 0.45 * alone[flood].made
    assert one.p99() <= 1.75 * alone[other].p99()


@pytest.mark.parametrize("flood", FLOODS)
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize(("weight", "least", "wait"), [(0.01, 0.5, 2.6), (1.0, 0.36, 6.0)])
def test_a_third_tenant_with_one_stream_takes_its_share_and_no_more(
    other: str, flood: str, weight: float, least: float, wait: float
) -> None:
    """However little it weighs, and though it is always the one that is furthest behind where it weighs as much."""
    quiet, one, many = fresh(OTHERS[other]), fresh(OTHERS[other]), fresh(FLOODS[flood])
    third = Load("third", prompt=64, out=4000, clients=1, weight=weight)
    run(quiet, warm=6)
    run(many, one, third, warm=6)
    assert one.made >= least * quiet.made
    assert one.p99() <= wait * quiet.p99()
    assert third.made > 0


def parts(*loads: Load) -> list[float]:
    """What each has of its completion tokens alone, all beside each other."""
    together = [fresh(load) for load in loads]
    run(*together)
    quiet = [fresh(load) for load in loads]
    for load in quiet:
        run(load)
    return [one.made / other.made for one, other in zip(together, quiet, strict=True)]


@pytest.mark.parametrize(
    ("one", "flood"),
    [
        (Load("one", prompt=256, out=64, clients=1, weight=4.0), FLOODS["long"]),
        (Load("one", prompt=64, out=16, clients=1, weight=10.0), FLOODS["long"]),
        (Load("one", prompt=64, out=16, clients=1, weight=100.0), FLOODS["prompts"]),
        (Load("one", prompt=64, out=16, clients=1), replace(FLOODS["long"], prices=Prices(8.0, 0.8, 16.0))),
    ],
)
def test_weights_and_prices_hold_for_who_sends_one_request_at_a_time(one: Load, flood: Load) -> None:
    """It has no work for an instant after each, and comes back."""
    assert parts(one, flood)[0] >= 0.8


@pytest.mark.parametrize("many", [Load("many", 256, 1, clients=32), Load("many", 1500, 1, clients=2)])
def test_who_sends_prompts_alone_has_no_more_than_its_part(many: Load) -> None:
    one, other = parts(Load("one", prompt=64, out=16, clients=1), many)
    assert one >= 0.47
    assert other >= 0.43


@pytest.mark.parametrize(("chats", "short"), [(4, Load("t", 256, 1, clients=8)), (1, Load("t", 300, 1, clients=2))])
def test_a_tenants_first_tokens_keep_its_other_answers_going(chats: int, short: Load) -> None:
    """Beside a stream that is always the furthest behind; and they do not wait for its answers to end either."""
    stream, chat, new = (
        Load("stream", prompt=64, out=4000, clients=1),
        Load("t", prompt=64, out=400, clients=chats),
        fresh(short),
    )
    run(stream, chat, new)
    assert chat.made >= 150 * chats
    assert new.made >= 60
    assert stream.made >= 1000


@pytest.mark.parametrize("kind", FLOODS)
def test_equal_weights_get_equal_priced_tokens(kind: str) -> None:
    one, two = fresh(FLOODS["long"], name="one"), fresh(FLOODS[kind], name="two")
    figures = run(one, two).shares.figures()
    assert figures["one"].served == pytest.approx(figures["two"].served, rel=0.15)


def test_shares_follow_the_weights() -> None:
    one, two = fresh(FLOODS["outputs"], name="one"), fresh(FLOODS["outputs"], name="two", weight=3.0)
    run(one, two)
    assert two.made == pytest.approx(3 * one.made, rel=0.15)


def test_dear_tokens_are_fewer() -> None:
    """A rank of twice the price."""
    one = fresh(FLOODS["outputs"], name="one")
    two = fresh(FLOODS["outputs"], name="two", prices=Prices(2.0, 0.2, 4.0))
    run(one, two)
    assert one.made == pytest.approx(2 * two.made, rel=0.15)


@pytest.mark.parametrize("price", [0.0, 1e-9, 1e9])
def test_only_the_ratios_of_prices_matter(price: float) -> None:
    one, two = (fresh(FLOODS["outputs"], name=name, prices=Prices(price, price, 2 * price)) for name in ("one", "two"))
    run(one, two)
    assert one.made == pytest.approx(two.made, rel=0.1)
    assert one.made > 1000


def test_tokens_at_no_price_are_not_served_for_ever() -> None:
    one, two = fresh(FLOODS["outputs"], name="one"), fresh(FLOODS["outputs"], name="two", prices=Prices(0, 0, 0))
    run(one, two, until=60)
    assert one.made > 100


def test_three_tenants_get_a_third_each() -> None:
    figures = run(*(fresh(FLOODS["long"], name=name) for name in ("one", "two", "three"))).shares.figures()
    served = [one.served for one in figures.values()]
    assert min(served) >= 0.85 * max(served)


def test_who_asks_for_little_has_it_and_the_others_share_the_rest() -> None:
    little = fresh(OTHERS["one a second"], rate=0.5)
    one, two = fresh(FLOODS["outputs"], name="one"), fresh(FLOODS["outputs"], name="two")
    run(one, two, little)
    alone = fresh(little)
    run(alone)
    assert little.made >= 0.9 * alone.made
    assert one.made == pytest.approx(two.made, rel=0.1)


def test_being_idle_saves_no_more_than_the_bound() -> None:
    """However long it was away: both want all there is from then on, and its lead is the same."""
    leads = []
    for since in (5.0, 20.0):
        old, new = fresh(FLOODS["outputs"], name="old"), fresh(FLOODS["outputs"], name="new", since=since)
        before = run(old, until=since).shares.figures()["old"].served
        after = run(fresh(old), new, until=since + 10).shares.figures()
        leads.append(after["new"].served - (after["old"].served - before))
    step = 256 * Prices().completion
    assert all(-step < lead < (AHEAD + 1) * step for lead in leads)
    assert leads[0] == pytest.approx(leads[1], abs=step)


def test_nothing_is_left_idle_when_the_other_tenant_has_gone() -> None:
    one, gone = fresh(FLOODS["outputs"], name="one"), Load("gone", prompt=64, out=64, flood=20)
    run(one, gone, until=40, warm=20)
    alone = fresh(FLOODS["outputs"], name="one")
    run(alone, until=40, warm=20)
    assert one.made == pytest.approx(alone.made, rel=0.05)


def test_few_blocks_are_shared_as_well() -> None:
    """The flood holds them all when the other comes."""
    one, other = fresh(FLOODS["long"], name="one"), fresh(OTHERS["4 clients"], since=10.0)
    scheduler = run(one, other, blocks=400, warm=10)
    quiet = fresh(OTHERS["4 clients"], since=10.0)
    run(quiet, blocks=400, warm=10)
    assert scheduler.preemptions
    assert other.made >= 0.45 * quiet.made
    assert other.p99() <= 2 * quiet.p99()
