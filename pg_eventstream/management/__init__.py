"""The commands, in ``commands/``, and `importing`: what ``eventstream_import`` does.

The one place that imports the publisher.
"""
