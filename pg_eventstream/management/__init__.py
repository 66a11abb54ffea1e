"""The management commands, in ``commands/``.

base            what they share: ``--database``, messages for errors, the log
importing       what ``eventstream_import`` does
sending         what ``eventstream_send -`` does

The only importer of the publisher.
"""
