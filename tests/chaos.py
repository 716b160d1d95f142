"""Faults that overlap at random, over several relays on one broker: one seed decides all of them."""

import os
import random
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from outages import end_listeners
from relay import Relay
from servers import patience, standing_still

# What each lane does, and how likely each of it is. Lanes go on beside each other; within one, faults follow each other.
LANES = {
    "broker": {"end sessions": 4, "stand still": 2, "restart fast": 2, "restart immediate": 2},
    "workers": {"kill": 3, "stand still": 2},
    "more workers": {"kill": 2, "stand still": 3},
    "relays": {"reload": 4, "restart": 2},
    "streams": {"close": 4, "cut": 2},
}
# The longest pause before a fault of a lane, and the longest that these faults last, in seconds.
PAUSE, HOLD = 2.0, 3.0
LASTING = ("stand still", "restart fast", "restart immediate", "restart")


@dataclass(frozen=True)
class Fault:
    """What happens in a lane, after a pause, for how long, and to which: ``pick`` is from 0 to below 1."""

    kind: str
    pause: float
    hold: float
    pick: float


def plan(seed, seconds):
    """Return the faults of each lane, which take about so many seconds."""
    dice = random.Random(seed)
    planned = {}
    for lane, kinds in LANES.items():
        faults, left = [], seconds
        while left > 0:
            (kind,) = dice.choices(list(kinds), list(kinds.values()))
            hold = dice.uniform(0, HOLD) if kind in LASTING else 0.0
            faults.append(Fault(kind, dice.uniform(0, PAUSE), hold, dice.random()))
            left -= faults[-1].pause + faults[-1].hold
        planned[lane] = faults
    return planned


class Chaos:
    """
    Relays, and what befalls them while others read and publish; ``with`` ends the relays.

    Args:
        broker: The server that all relays are on.
        home: A folder for the relays' logs.
        flags: Those of each relay.

    """

    def __init__(self, broker, home, flags):
        self.broker = broker
        self.home = home
        self.flags = flags
        self.relays = []
        # With those that have been replaced.
        self.all_relays = []
        # Whose streams are closed, and the TCP proxies that some of them go through.
        self.fleets = []
        self.proxies = []
        self.errors = []
        self.done = threading.Event()

    def __enter__(self):
        try:
            for flags in self.flags:
                self.relays.append(self._start(flags))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for relay in self.all_relays:
            relay.stop()

    def _start(self, flags, port=0):
        relay = Relay(self.home, *flags, port=port, **self.broker.environment)
        relay.__enter__()
        self.all_relays.append(relay)
        return relay

    def begin(self, planned):
        """Start a thread for each lane; `done` is set when all have ended."""
        lanes = [threading.Thread(target=self._go, args=each, daemon=True) for each in planned.items()]

        def wait():
            for lane in lanes:
                lane.join()
            self.done.set()

        for lane in lanes:
            lane.start()
        threading.Thread(target=wait, daemon=True).start()

    def _go(self, lane, faults):
        act = getattr(self, f"_{lane.split()[-1]}")
        try:
            for fault in faults:
                time.sleep(fault.pause)
                print(f"{lane}: {fault.kind}, {fault.pick:.3f}, {fault.hold:.1f} s")
                act(fault)
        except BaseException as exc:
            self.errors.append(exc)

    def _broker(self, fault):
        if fault.kind == "end sessions":
            end_listeners(self.broker)
        elif fault.kind == "stand still":
            with standing_still(*self.broker.processes()):
                time.sleep(fault.hold)
        else:
            self.broker.stop(fault.kind.split()[1])
            time.sleep(fault.hold)
            self.broker.start()

    def _workers(self, fault):
        workers = []
        for relay in list(self.relays):
            with suppress(OSError):  # it is being restarted
                workers += relay.workers()
        pid = chosen(workers, fault.pick)
        if pid and fault.kind == "kill":
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        elif pid:
            with standing_still(pid):
                time.sleep(fault.hold)

    def _relays(self, fault):
        number = int(fault.pick * len(self.relays))
        relay = self.relays[number]
        if fault.kind == "reload":
            relay.signal(signal.SIGHUP)
        else:
            assert relay.stop() == 0, relay.log
            time.sleep(fault.hold)
            self.relays[number] = self._start(self.flags[number], relay.port)

    def _streams(self, fault):
        if fault.kind == "cut":
            chosen(self.proxies, fault.pick).end_connections()
            return
        streams = [stream for fleet in self.fleets for stream in fleet.streams]
        for stream in random.Random(fault.pick).sample(streams, len(streams) // 4):
            with suppress(OSError):  # it has ended already
                stream.page.socket.shutdown(socket.SHUT_RDWR)


def chosen(items, pick):
    return items[int(pick * len(items))] if items else None


def read_until(fleets, condition, what, seconds, state=None):
    """Let the fleets read until ``condition()`` holds."""
    end = time.monotonic() + patience(seconds)
    while not condition():
        assert time.monotonic() < end, f"not within {patience(seconds)} s: {what}; {state() if state else ''}"
        for fleet in fleets:
            fleet.step(0.01)
