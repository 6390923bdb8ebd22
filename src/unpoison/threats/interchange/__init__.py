"""Poisons from and for other tools, one file for each format.

- `triple`: a folder with `poisons.pickle`, `base_indices.pickle` and `target.pickle`, the format of the
  poisoning benchmark, which gradient matching, EPIC, Friendly Noise and PureGen read as well;
- `metapoison`: `poisondataset-60.pkl` of MetaPoison;
- `table`: a folder with `poisons.csv` and image files, or a `.parquet` file.

Foreign pickles are read by the restricted unpickler, which runs nothing: beside numpy arrays and plain
containers it admits `PIL.Image.Image`, for which it creates a stand-in that only takes 8-bit pixels.

What these formats do not contain has to be given. The clean training set is always needed: changes are
measured against it, and a poison set belongs to one. Since 8-bit images are rounded, `eps` is checked again
after reading. Poison sets of unpoison are stored by `PoisonSet.save`, never as pickles; pickles are written
here alone, for tools that read nothing else.
"""

from unpoison.threats.interchange.metapoison import read_metapoison, write_metapoison
from unpoison.threats.interchange.table import read_poison_table, write_poison_table
from unpoison.threats.interchange.triple import read_triple, write_triple

__all__ = [
    "read_metapoison",
    "read_poison_table",
    "read_triple",
    "write_metapoison",
    "write_poison_table",
    "write_triple",
]
