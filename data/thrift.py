"""The Thrift compact protocol, in which parquet files describe themselves: structs as mappings of field numbers, without a schema.

Source: the Apache Thrift document ``thrift-compact-protocol.md``.
"""

from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 12
Fields = dict[int, tuple[int, Any]]
"""A struct: field number -> (type, value); a list's value is (type of its entries, entries)."""
DEEPEST = 16


class Damaged(Exception):
    """The bytes are not what the protocol says."""


def read_struct(content: bytes, place: int, depth: int = 0) -> tuple[Fields, int]:
    """A struct that begins at ``place``, and where it ends.

    Raises:
        Damaged: these are not the bytes of one.
    """
    fields: Fields = {}
    number = 0
    while True:
        if place >= len(content) or depth > DEEPEST:
            raise Damaged
        head = content[place]
        place += 1
        if head == 0:
            return fields, place
        kind, step = head & 15, head >> 4
        if step:
            number += step
        else:
            number, place = _read_integer(content, place)
        fields[number], place = _read_value(content, place, kind, depth)


def _read_value(content: bytes, place: int, kind: int, depth: int) -> tuple[tuple[int, Any], int]:
    value: Any
    if kind in (TRUE, FALSE):
        return (kind, kind == TRUE), place
    if kind == BYTE:
        value, place = content[place : place + 1], place + 1
    elif kind in (I16, I32, I64):
        value, place = _read_integer(content, place)
    elif kind == DOUBLE:
        value, place = content[place : place + 8], place + 8
    elif kind == BINARY:
        length, place = _read_varint(content, place)
        value, place = content[place : place + length], place + length
    elif kind == LIST:
        if place >= len(content):
            raise Damaged
        length, inner = content[place] >> 4, content[place] & 15
        place += 1
        if length == 15:
            length, place = _read_varint(content, place)
        if length > len(content):
            raise Damaged
        entries = []
        for _ in range(length):
            if inner in (TRUE, FALSE):
                entries.append(content[place : place + 1])
                place += 1
            else:
                (_, entry), place = _read_value(content, place, inner, depth + 1)
                entries.append(entry)
        value = (inner, entries)
    elif kind == STRUCT:
        value, place = read_struct(content, place, depth + 1)
    else:
        raise Damaged
    if place > len(content):
        raise Damaged
    return (kind, value), place


def _read_varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(content) and shift < 70:
        byte = content[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
    raise Damaged


def _read_integer(content: bytes, place: int) -> tuple[int, int]:
    value, place = _read_varint(content, place)
    return (value >> 1) ^ -(value & 1), place


def write_struct(fields: Fields) -> bytes:
    """A struct in bytes; fields of ``read_struct`` give the bytes that were read."""
    out = bytearray()
    last = 0
    for number, (kind, value) in sorted(fields.items()):
        step = number - last
        out += bytes([(step << 4) | kind]) if 0 < step < 16 else bytes([kind]) + _varint(_zigzag(number))
        out += b"" if kind in (TRUE, FALSE) else _write_value(kind, value)
        last = number
    return bytes(out) + b"\x00"


def _write_value(kind: int, value: Any) -> bytes:
    if kind in (I16, I32, I64):
        return _varint(_zigzag(value))
    if kind == BINARY:
        return _varint(len(value)) + bytes(value)
    if kind == LIST:
        inner, entries = value
        head = bytes([(len(entries) << 4) | inner]) if len(entries) < 15 else bytes([0xF0 | inner]) + _varint(len(entries))
        return head + b"".join(entry if inner in (TRUE, FALSE) else _write_value(inner, entry) for entry in entries)
    return write_struct(value) if kind == STRUCT else bytes(value)


def _zigzag(value: int) -> int:
    return value << 1 if value >= 0 else ((-value) << 1) - 1


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
