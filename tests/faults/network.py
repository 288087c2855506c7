"""A network that stops: a way to a store on loopback, on which everything stands still when it is told to."""

from __future__ import annotations

import contextlib
import os
import socket
import threading

import torch.distributed as dist


class Way:
    """Passes every byte on, both ways, until `stall`; connections stay open meanwhile. Use it in a `with` statement."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._flowing = threading.Event()
        self._flowing.set()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def stall(self) -> None:
        self._flowing.clear()

    def go_on(self) -> None:
        self._flowing.set()

    def __enter__(self) -> Way:
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on()
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                self._sockets += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._flowing.wait()
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def join_over(port: int) -> None:
    """In a rank: leave the group, and join one whose store is reached over this port."""
    dist.destroy_process_group()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
