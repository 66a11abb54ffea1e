"""The management commands, in ``commands/``.

base            what they share: ``--database``, messages for errors, the log
importing       what ``eventstream_import`` does

The only importer of the publisher.
"""
