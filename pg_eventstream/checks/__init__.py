"""System checks: what is wrong in a project is reported at start, with its remedy.

settings     the settings, and what surrounds them
tables       the tables, for ``manage.py check --database``
first_use    logs what the checks find where no command has run them
"""
