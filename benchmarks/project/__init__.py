"""A small site, built with pg_eventstream or with a package that it is compared with."""
