"""How the tables of this package get into a database.

placement    decides which databases get them
unmigrated   creates them where migrations are switched off
fixtures     decides which rows ``loaddata`` loads
"""
