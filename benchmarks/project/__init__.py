"""One small site, built with either package: pg_eventstream, or a peer to compare it with."""
