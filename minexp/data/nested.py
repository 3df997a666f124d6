"""Lists of structs in a column, as rows of their own."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc


def unnest(rows: pa.Table, column: str, *keys: str) -> pa.Table:
    """The structs in a column's lists, one a row: their fields, `row` (int64: whose they are), and its ``keys``.

    A null list has none.
    """
    lists = rows[column].combine_chunks()
    place, structs = pc.list_parent_indices(lists).cast(pa.int64()), pc.list_flatten(lists)
    fields = {structs.type.field(n).name: pc.struct_field(structs, n) for n in range(structs.type.num_fields)}
    return pa.table({"row": place, **fields, **{key: rows[key].combine_chunks().take(place) for key in keys}})
