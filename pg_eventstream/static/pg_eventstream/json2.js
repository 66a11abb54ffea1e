// Old pages load this file. It is empty: every browser has JSON of its own.
