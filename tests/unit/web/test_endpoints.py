"""Which address of a service gets the next connection."""

import asyncio
from collections.abc import Sequence

import pytest

from libs.web.upstream.endpoints import EJECTED_SECONDS_MAX, REFRESH_SECONDS, Address, Endpoints

A, B, C = ("10.0.0.1", 80), ("10.0.0.2", 80), ("10.0.0.3", 80)


class Names:
    """A name server and a clock."""

    def __init__(self, *addresses: Address) -> None:
        self.addresses: Sequence[Address] = addresses
        self.is_away = False
        self.look_ups = 0
        self.now = 100.0
        self.endpoints = Endpoints([("service", 80)], lambda: self.now, self.resolve)

    async def resolve(self, host: str, port: int) -> Sequence[Address]:
        self.look_ups += 1
        if self.is_away:
            raise OSError("no name server")
        return self.addresses

    async def first(self) -> Address:
        return (await self.endpoints.in_order())[0]

    async def refreshed(self) -> Address:
        """The first address once the look-up that this request begins in the background is done."""
        looked_up = self.look_ups
        await self.endpoints.in_order()
        while self.look_ups == looked_up:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        return await self.first()


async def test_connections_take_the_addresses_in_turn() -> None:
    names = Names(A, B, C)
    firsts = [await names.first() for _ in range(6)]
    assert sorted(firsts) == [A, A, B, B, C, C]
    assert firsts[:3] == firsts[3:]
    assert names.look_ups == 1


async def test_an_address_that_failed_is_tried_last_until_its_time_is_over() -> None:
    names = Names(A, B)
    names.endpoints.failed(A)
    assert [await names.first() for _ in range(4)] == [B] * 4
    assert (await names.endpoints.in_order())[-1] == A
    names.now += 1.1
    assert {await names.first() for _ in range(2)} == {A, B}


async def test_repeated_failures_eject_for_longer_and_an_answer_ends_it() -> None:
    names = Names(A, B)
    for _ in range(10):
        names.endpoints.failed(A)
    names.now += EJECTED_SECONDS_MAX - 1
    assert await names.first() == B
    names.endpoints.answered(A)
    assert {await names.first() for _ in range(2)} == {A, B}
    names.endpoints.failed(A)
    names.now += 1.1
    assert {await names.first() for _ in range(2)} == {A, B}


async def test_if_all_have_failed_the_next_to_return_is_tried() -> None:
    names = Names(A, B)
    names.endpoints.failed(B)
    names.now += 0.5
    names.endpoints.failed(A)
    assert [await names.first() for _ in range(2)] == [B, B]


async def test_addresses_that_come_and_go_are_noticed_after_seconds_and_at_once_after_a_failure() -> None:
    names = Names(A)
    assert await names.first() == A
    names.addresses = (B,)
    assert await names.first() == A
    names.now += REFRESH_SECONDS
    assert await names.refreshed() == B
    names.addresses = (C,)
    names.endpoints.failed(B)
    assert await names.refreshed() == C


async def test_a_name_server_that_is_away_changes_nothing_but_before_the_first_answer() -> None:
    names = Names(A)
    names.is_away = True
    with pytest.raises(OSError, match="no name server"):
        await names.endpoints.in_order()
    names.is_away = False
    assert await names.first() == A
    names.is_away = True
    names.now += REFRESH_SECONDS
    assert await names.refreshed() == A


async def test_several_hosts_have_their_addresses_together() -> None:
    endpoints = Endpoints([("10.0.0.1", 80), ("10.0.0.2", 80)], lambda: 0.0)
    assert {(await endpoints.in_order())[0] for _ in range(2)} == {A, B}
    assert endpoints.host_of(B) == "10.0.0.2"


async def test_a_name_that_cannot_be_resolved_keeps_its_addresses_and_others_change() -> None:
    now, away = 0.0, False
    found = {"one": [A], "two": [B]}

    async def resolve(host: str, _: int) -> Sequence[Address]:
        if away and host == "one":
            raise OSError
        return found[host]

    endpoints = Endpoints([("one", 80), ("two", 80)], lambda: now, resolve)
    assert set(await endpoints.in_order()) == {A, B}
    away, now = True, REFRESH_SECONDS
    found["two"] = [C]
    await endpoints.in_order()
    while endpoints.knows(B):
        await asyncio.sleep(0)
    assert set(await endpoints.in_order()) == {A, C}
