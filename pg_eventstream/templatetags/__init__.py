"""Template tags: `pg_eventstream` is what a page needs to begin its stream."""
