"""A JPEG's picture without what is written beside it: places, names, dates, comments, previews, what follows it.

The compressed pixels are copied as they are.
"""

_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
_COMMENT, _JFIF, _ADOBE = 0xFE, 0xE0, 0xEE


def picture_alone(data: bytes) -> bytes | None:
    """The file with the segments that a decoder needs, up to its first end; None where it is not laid out like that."""
    if data[:2] != bytes((0xFF, _START)):
        return None
    kept, place = [data[:2]], 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a marker may be filled up in front
            place += 1
            continue
        if marker in _ALONE:
            return None
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        kept.append(_needed(marker, data[place:end]))
        if marker == _SCAN:
            place, end = end, _end_of_scan(data, end)
            kept.append(data[place:end])
            if data[end : end + 2] == bytes((0xFF, _END)):
                return b"".join([*kept, data[end : end + 2]])
        place = end
    return None


def _needed(marker: int, segment: bytes) -> bytes:
    """What is kept of a segment. JFIF and Adobe say which colours are stored; to_rgb applies no colour profile."""
    if marker == _JFIF and segment[4:9] == b"JFIF\0" and len(segment) >= 18:
        return segment[:2] + (16).to_bytes(2, "big") + segment[4:16] + b"\0\0"  # without its preview
    if marker == _ADOBE and segment[4:9] == b"Adobe":
        return segment
    return b"" if 0xE0 <= marker <= 0xEF or marker == _COMMENT else segment


def _end_of_scan(data: bytes, place: int) -> int:
    """Where the next marker is that ends coded data, in which 0xFF is followed by 0 or by a restart."""
    while (place := data.find(b"\xff", place)) >= 0:
        if place + 1 < len(data) and data[place + 1] not in (0, 0xFF, *range(0xD0, 0xD8)):
            return place
        place += 1
    return len(data)
