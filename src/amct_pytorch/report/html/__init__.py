"""Ledgers as one self-contained HTML page."""
