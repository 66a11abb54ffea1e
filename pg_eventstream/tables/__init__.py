"""How our tables come into a database.

placement    which databases get them
unmigrated   creates them where migrations are switched off
fixtures     what happens to rows that ``loaddata`` loads
"""
