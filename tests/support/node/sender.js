// A sender that is not Python. Reads a JSON list of queries ({text, values, name}, or plain
// SQL) from standard input, runs them in that order on one connection, and writes what became
// of each: {rows} or {error, code, constraint}. The database is the first argument.

import { text } from "node:stream/consumers";
import pg from "pg";

const client = new pg.Client({ connectionString: process.argv[2] });
await client.connect();
const results = [];
for (const query of JSON.parse(await text(process.stdin))) {
  try {
    results.push({ rows: (await client.query(query)).rowCount });
  } catch ({ message, code, constraint }) {
    results.push({ error: message, code, constraint });
  }
}
await client.end();
console.log(JSON.stringify(results));
