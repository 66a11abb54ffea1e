"""Names that the table refuses, and PostgreSQL's errors for them."""

from __future__ import annotations

CHECK_VIOLATION = "23514"

BAD_NAMES = [
    ("pg_eventstream_channel_not_empty_no_cr_no_lf", "('', 'message')"),
    ("pg_eventstream_channel_not_empty_no_cr_no_lf", "(E'a\\rb', 'message')"),
    ("pg_eventstream_channel_not_empty_no_cr_no_lf", "(E'a\\nb', 'message')"),
    ("pg_eventstream_channel_not_empty_no_cr_no_lf", "(E'a\\n', 'message')"),
    ("pg_eventstream_type_not_empty_no_cr_no_lf", "('c', '')"),
    ("pg_eventstream_type_not_empty_no_cr_no_lf", "('c', E'\\rb')"),
    ("pg_eventstream_type_not_empty_no_cr_no_lf", "('c', E'a\\n\\nid: 7')"),
]
