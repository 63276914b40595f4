"""Sockets that outlive the process that serves them."""

import asyncio
import io
import socket
import sys

import pytest

from libs.process.listeners import Listeners, PortTaken
from libs.suite.child import Child
from libs.suite.child_process import free_port
from libs.suite.output import Output

HOST = "127.0.0.1"


def test_connections_wait_while_nobody_serves_and_are_refused_once_closed() -> None:
    listeners = Listeners(HOST, free_port())
    listeners.open()
    listeners.open()
    address = socket.socket(fileno=socket.dup(listeners.descriptors[0])).getsockname()
    with socket.create_connection(address, timeout=1):
        pass
    listeners.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=1)


def test_a_name_is_listened_on_at_all_its_addresses() -> None:
    listeners = Listeners("localhost", free_port())
    listeners.open()
    wanted = {info[4][0] for info in socket.getaddrinfo("localhost", None, type=socket.SOCK_STREAM)}
    assert len(listeners.descriptors) == len(wanted)
    listeners.close()


def test_a_taken_port_is_told_from_an_address_that_is_not_here() -> None:
    with socket.create_server((HOST, 0)) as taken, pytest.raises(PortTaken):
        Listeners(HOST, taken.getsockname()[1]).open()
    with pytest.raises(OSError, match="assign"):
        Listeners("203.0.113.1", free_port()).open()


async def test_a_process_that_does_not_stay_has_its_connections_refused() -> None:
    port = free_port()
    child = Child("auth", (sys.executable, "-c", "raise SystemExit(3)"), {}, listeners=Listeners(HOST, port))
    running = asyncio.create_task(child.run(Output(io.StringIO(), readable=True)))
    async with asyncio.timeout(30):
        while child.deaths == 0:
            await asyncio.sleep(0.01)
        _, writer = await asyncio.open_connection(HOST, port)
        writer.close()
        while True:
            try:
                _, writer = await asyncio.open_connection(HOST, port)
            except ConnectionRefusedError:
                break
            writer.close()
            await asyncio.sleep(0.05)
    assert child.exit_code == 3
    await child.stop(1)
    await running
