"""The demo, ``python -m pg_eventstream.demo``: a Django project and the servers that it needs.

    __main__     starts everything
    check        checks without a person that events arrive once and in order
    settings     the project, with its models, views and urls
    apps         its one app

Sends events as any project does. Starts its servers with `pg_eventstream.servers`.
"""
