"""Has the ports of Ray Serve's replicas heard by this machine alone, where Ray's own are.

Each replica opens one for handles that speak gRPC, at all of the machine's addresses, and unpickles what comes in,
whoever sent it. Ours do not use it, and Ray has no setting for its address.
"""

from __future__ import annotations

from typing import Any

import ray
from grpc.aio import _server


def stay_on_this_machine() -> None:
    """For a replica, before Ray opens the port; in a cluster of several machines, nothing."""
    if ray.util.get_node_ip_address() != "127.0.0.1":
        return
    add_port = _server.Server.add_insecure_port

    def on_loopback(server: Any, address: str) -> int:
        port: int = add_port(server, address.replace("[::]", "127.0.0.1"))
        return port

    _server.Server.add_insecure_port = on_loopback
