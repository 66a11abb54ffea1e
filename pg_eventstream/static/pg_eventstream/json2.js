// Old pages load this file. It is empty, because every browser supports JSON.
