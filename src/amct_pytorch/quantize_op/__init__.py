"""A documented import path; the code is in `amct_pytorch.low_bit`."""
