"""The management commands, in ``commands/``.

base            what they share: ``--database``, messages for errors, the log
importing       what ``eventstream_import`` does
progress        a line on a terminal that shows how far a command is
sending         what ``eventstream_send -`` does
metrics_port    ``--metrics-port``: what it is, and what serves there

The only importer of the publisher.
"""
