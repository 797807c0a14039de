"""Parquet files whose footer is missing, read as far as they go.

A parquet file ends with a footer that says where each column of each row group lies; a recorder that was killed never wrote it, a
truncated file has lost it. The pages themselves carry their lengths, so that they can be walked from the beginning: whole row groups are
found, a new footer is written behind them, and pyarrow reads the result. Layout: Apache Parquet ``parquet.thrift`` (page header, footer).
"""

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .thrift import BINARY, I16, I32, I64, LIST, STRUCT, Damaged, Fields, read_struct, write_struct

MAGIC = b"PAR1"
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
PHYSICAL = ("BOOLEAN", "INT32", "INT64", "INT96", "FLOAT", "DOUBLE", "BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
CODECS = {"UNCOMPRESSED": 0, "SNAPPY": 1}
HEADER_BYTES = 1 << 16
"""A page header is shorter than this."""


@dataclass(frozen=True)
class _Page:
    """A page of ``values`` values at ``start``; ``size`` and ``plain`` are its bytes with its header, stored and uncompressed."""

    kind: int
    values: int
    encoding: int
    start: int
    size: int
    plain: int


def read_row_groups(file: Path, schema: pa.Schema, entries: Sequence[int | None]) -> tuple[list[pa.Table], bool]:
    """The row groups of a parquet file that can be read, in order, and whether these are all of it.

    Args:
        file: the file, with or without a footer.
        schema: of its columns, which a file without a footer no longer says.
        entries: numbers per row in each leaf column (``None``: any), for the same purpose.
    """
    try:
        with pq.ParquetFile(file) as handle:
            groups, count = _readable(handle), handle.metadata.num_row_groups
        return groups, len(groups) == count
    except (pa.ArrowException, OSError, ValueError):
        rebuilt = rebuild(file.read_bytes(), schema, entries)
        if rebuilt is None:
            return [], False
        with pq.ParquetFile(io.BytesIO(rebuilt)) as handle:
            return _readable(handle), False


def rebuild(content: bytes, schema: pa.Schema, entries: Sequence[int | None]) -> bytes | None:
    """A whole parquet file of the whole row groups at the beginning of ``content``; ``None`` where there is none."""
    buffer = io.BytesIO()
    pq.write_table(schema.empty_table(), buffer, compression="snappy")
    template = buffer.getvalue()
    leaves = pq.ParquetFile(io.BytesIO(template)).schema
    columns = [leaves.column(i) for i in range(len(leaves))]
    if not content.startswith(MAGIC) or len(columns) != len(entries):
        return None
    pages = _walk(content)
    groups: list[list[list[_Page]]] = []
    place = 0
    while place < len(pages) and (found := _row_group(pages, place, [c.physical_type == "BOOLEAN" for c in columns], entries)) is not None:
        groups.append(found)
        place += sum(map(len, found))
    if not groups:
        return None
    (length,) = struct.unpack("<I", template[-8:-4])
    footer, _ = read_struct(template[-8 - length : -8], 0)
    rows = [_rows(group, entries) for group in groups]
    footer[3] = (I64, sum(rows))
    footer[4] = (LIST, (STRUCT, [_group_fields(g, columns, count, i) for i, (g, count) in enumerate(zip(groups, rows, strict=True))]))
    end = groups[-1][-1][-1]
    tail = write_struct(footer)
    return content[: end.start + end.size] + tail + struct.pack("<I", len(tail)) + MAGIC


def _readable(handle: pq.ParquetFile) -> list[pa.Table]:
    tables = []
    for i in range(handle.metadata.num_row_groups):
        try:
            tables.append(handle.read_row_group(i, use_threads=False))
        except (pa.ArrowException, OSError, ValueError):
            break
    return tables


def _walk(content: bytes) -> list[_Page]:
    """All whole pages from the beginning on."""
    pages: list[_Page] = []
    place = len(MAGIC)
    while place < len(content):
        try:
            header, used = read_struct(content[place : place + HEADER_BYTES], 0)
            kind, plain, stored = (header[i][1] for i in (1, 2, 3))
            inner = header[{DATA_PAGE: 5, DICTIONARY_PAGE: 7, DATA_PAGE_V2: 8}[kind]][1]
            values, encoding = inner[1][1], inner[4 if kind == DATA_PAGE_V2 else 2][1]
        except (Damaged, KeyError, TypeError, IndexError):
            break
        if stored < 0 or values < 0 or place + used + stored > len(content):
            break
        pages.append(_Page(kind, values, encoding, place, used + stored, used + plain))
        place += used + stored
    return pages


def _row_group(pages: list[_Page], place: int, boolean: list[bool], entries: Sequence[int | None]) -> list[list[_Page]] | None:
    """The pages of each column of the row group that begins at ``place``: for the first number of rows with which all columns end where
    a page ends."""
    seen = 0
    for page in pages[place:]:
        if page.kind == DICTIONARY_PAGE:
            if seen:
                break
            continue
        seen += page.values
        per_row = entries[0] or 1
        if seen % per_row == 0 and (found := _columns(pages, place, seen // per_row, boolean, entries)) is not None:
            return found
    return None


def _columns(pages: list[_Page], place: int, rows: int, boolean: list[bool], entries: Sequence[int | None]) -> list[list[_Page]] | None:
    columns = []
    for is_boolean, per_row in zip(boolean, entries, strict=True):
        column: list[_Page] = []
        seen = 0
        if place < len(pages) and pages[place].kind == DICTIONARY_PAGE and not is_boolean:
            column.append(pages[place])
            place += 1
        while place < len(pages) and pages[place].kind != DICTIONARY_PAGE and (per_row is None or seen < rows * per_row):
            seen += pages[place].values
            column.append(pages[place])
            place += 1
        if not seen or (per_row is not None and seen != rows * per_row):
            return None
        columns.append(column)
    return columns


def _rows(group: list[list[_Page]], entries: Sequence[int | None]) -> int:
    """Rows of a group, from its first column of known width."""
    for column, per_row in zip(group, entries, strict=True):
        if per_row is not None:
            return sum(page.values for page in column if page.kind != DICTIONARY_PAGE) // per_row
    return 0


def _group_fields(group: list[list[_Page]], columns: list[Any], rows: int, ordinal: int) -> Fields:
    """``RowGroup`` of parquet.thrift."""
    chunks = [_chunk_fields(pages, column) for pages, column in zip(group, columns, strict=True)]
    plain = sum(page.plain for pages in group for page in pages)
    size = sum(page.size for pages in group for page in pages)
    first = group[0][0].start
    return {
        1: (LIST, (STRUCT, chunks)), 2: (I64, plain), 3: (I64, rows), 5: (I64, first), 6: (I64, size), 7: (I16, ordinal),
    }  # fmt: skip


def _chunk_fields(pages: list[_Page], column: Any) -> Fields:
    """``ColumnChunk`` of parquet.thrift; lerobot and our writers compress with snappy."""
    data = [page for page in pages if page.kind != DICTIONARY_PAGE]
    encodings = sorted({page.encoding for page in pages} | {3})  # 3: run lengths, of the levels
    meta: Fields = {
        1: (I32, PHYSICAL.index(column.physical_type)),
        2: (LIST, (I32, encodings)),
        3: (LIST, (BINARY, [part.encode() for part in column.path.split(".")])),
        4: (I32, CODECS["SNAPPY"]),
        5: (I64, sum(page.values for page in data)),
        6: (I64, sum(page.plain for page in pages)),
        7: (I64, sum(page.size for page in pages)),
        9: (I64, data[0].start),
    }
    if pages[0].kind == DICTIONARY_PAGE:
        meta[11] = (I64, pages[0].start)
    return {2: (I64, 0), 3: (STRUCT, meta)}
