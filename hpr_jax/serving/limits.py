"""What a server takes from strangers, in one place."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
      upload: bytes of one upload.
      pixels: of one image, by its header.
      seconds: from the first byte of an upload to its answer.
      requests: that are worked on or wait; more are answered at once that there is no room.
      memory: bytes of all uploads that are held at the same time.
    """

    upload: int = 32 * 2**20
    pixels: int = 50_000_000
    seconds: float = 300.0
    requests: int = 512
    memory: int = 2**30


# Seconds in which a connection must have sent the head of a request.
HEAD_SECONDS = 10.0
# Seconds in which requests that are worked on may end after the server was asked to stop.
FAREWELL_SECONDS = 10
# Connections beyond the requests with room: for the page, the state, and those that are answered that there is no room.
MORE_CONNECTIONS = 256
# Scans of a JPEG times its pixels. A progressive photograph has ten scans or so; a file can claim a million, each of which
# takes a decoder as long as the first.
MOST_SCANNED = 2_000_000_000
# The most queries of each branch and layer that are answered.
MOST_QUERIES = 100
