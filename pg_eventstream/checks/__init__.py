"""System checks: they report what is wrong in a project, and how to fix it.

settings        the settings of this package and their surroundings
proxies         the settings of the GRIP proxies
tables          the tables, for ``manage.py check --database``
first_use       logs the results of the checks in processes where no command runs them
registration    registers a generator of messages as a check
"""
