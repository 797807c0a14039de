"""What the client must do on the oldest interpreter: wire and connection, without pytest. Prints `fine`."""

import sys
import threading

import numpy as np
from fake import Fake
from messages import messages
from triune_client import Client, Limits, ServerError, WireError, pack, unpack


def refused(kind, call, *arguments, **options):
    try:
        call(*arguments, **options)
    except kind as error:
        return str(error)
    raise AssertionError("nothing was raised")


def main():
    for message in messages():
        back = unpack(pack(message))
        assert list(back) == list(message)
        for key, value in message.items():
            if isinstance(value, np.ndarray):
                assert back[key].dtype == value.dtype and np.array_equal(back[key], value, equal_nan=value.dtype.kind == "f"), key
    assert len(pack({"observation/state": np.array([1.0, 2.0], np.float32), "prompt": "hi"})) == 80
    for frame in (b"", b"\xc1", b"\xdd\xff\xff\xff\xff", b"\x91" * 100000, pack([[{}] * 1000] * 100)):
        refused(WireError, unpack, frame)
    refused(WireError, unpack, bytes(11), Limits(frame=10))

    seen = {
        "images": {"agentview": np.full((8, 8, 3), 3, np.uint8)},
        "state": np.ones(3, np.float32),
        "instruction": "lift",
        "timestamp": 1.5,
    }
    with Fake(token="secret") as server, Client(server.url, token="secret") as client:
        assert client.welcome.rate == 20.0 and client.welcome.prefix == 2
        client.reset("a", seed=5)
        plan = client.infer(seen, "a", prefix=np.zeros((1, 2), np.float32), delay=1)
        assert plan.actions.dtype == np.float32 and plan.actions[0].tolist() == [11.0, 12.0] and plan.time == 1.5 and plan.round_trip > 0
        threads = [threading.Thread(target=client.infer, args=(seen, "slow")) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
        assert client.infer(seen, "slow").actions[0, 0] == 4 + 6.0
        assert "no camera wrist" in refused(ServerError, client.infer, seen, "bad")
        assert "worker died" in refused(ConnectionError, client.infer, seen, "gone")
        assert not client.connected
        client.reset("a")
        assert client.infer(seen, "a").actions[0, 0] == 6.0
        assert "token" in refused(ServerError, Client, server.url, "wrong")
        quick = Client(server.url, "secret", timeout=0.2)
        assert "within 0.2 s" in refused(TimeoutError, quick.infer, seen, "never")
        quick.close()
    assert "no connection" in refused(ConnectionError, Client, server.url)
    print("fine", sys.version.split()[0])


if __name__ == "__main__":
    main()
