// A client that is not a browser: writes each event of the streams at these URLs, as a JSON list
// of the URL's number, the event's id and its data, one a line, until it is killed.

import { EventSource } from "eventsource";

process.argv.slice(2).forEach((url, number) => {
  new EventSource(url).addEventListener("message", ({ lastEventId, data }) => {
    console.log(JSON.stringify([number, lastEventId, data]));
  });
});
