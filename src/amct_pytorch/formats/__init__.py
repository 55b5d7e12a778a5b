"""Number formats as values: their ranges, their rounding, their packing."""

from amct_pytorch.formats.integer import INT8, IntFormat

__all__ = ["INT8", "IntFormat"]
