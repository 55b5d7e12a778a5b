"""Ledgers as one self-contained HTML page."""

from amct_pytorch.report.html.write import check_installed, read_ledger, report_path, write_report

__all__ = ["check_installed", "read_ledger", "report_path", "write_report"]
