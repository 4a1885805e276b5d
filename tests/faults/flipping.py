"""One bit turned over in what two ends of gRPC say to each other."""

from collections import defaultdict

from tests.tcp import Change, Way

_PREFACE_BYTES = len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
_HEADER_BYTES = 9
_DATA = 0
_NOTHING = -1


class Messages:
    """
    Finds the bytes of messages in HTTP/2, over all connections of a way, and turns one bit over.

    Use as a :data:`tests.tcp.Change`. Source: RFC 9113, section 4.1; a message has gRPC's five bytes in front.

    Args:
        way: In which messages.
        byte: Which of their bytes, counted from the first; below zero for none.
        bit: 0 to 7.

    Attributes:
        seen: Bytes of messages so far, by way.
    """

    def __init__(self, way: Way = Way.THERE, byte: int = _NOTHING, bit: int = 0) -> None:
        self.seen: dict[Way, int] = defaultdict(int)
        self._way, self._byte, self._bit = way, byte, bit
        # What is left of the frame or preface that passes, and whether it is one with messages.
        self._left: dict[Way, int] = {Way.THERE: _PREFACE_BYTES, Way.BACK: 0}
        self._is_data: dict[Way, bool] = defaultdict(bool)
        self._header: dict[Way, bytes] = defaultdict(bytes)

    def __call__(self, way: Way, before: int, data: bytes) -> bytes:
        changed = bytearray(data)
        for place, byte in enumerate(data):
            if self._left[way]:
                self._left[way] -= 1
                if self._is_data[way]:
                    if (way, self.seen[way]) == (self._way, self._byte):
                        changed[place] = byte ^ 1 << self._bit
                    self.seen[way] += 1
                continue
            self._header[way] += bytes((byte,))
            if len(self._header[way]) == _HEADER_BYTES:
                self._left[way] = int.from_bytes(self._header[way][:3], "big")
                self._is_data[way] = self._header[way][3] == _DATA
                self._header[way] = b""
        return bytes(changed)


def replacing(way: Way, old: bytes, new: bytes) -> Change:
    """Put other bytes in the place of the first that are these; as many."""
    assert len(old) == len(new)
    is_done = False

    def change(going: Way, before: int, data: bytes) -> bytes:
        nonlocal is_done
        if going is not way or is_done or old not in data:
            return data
        is_done = True
        return data.replace(old, new, 1)

    return change
