window.received = []; // the events of the streams
window.states = []; // "open" and "error", with the readyState then

function record(source, types) {
  const note = ({ type, data, lastEventId, origin }) =>
    window.received.push({ type, data, id: lastEventId, origin });
  for (const type of types) source.addEventListener(type, note);
  for (const type of ["open", "error"]) {
    source.addEventListener(type, () => window.states.push(`${type} ${source.readyState}`));
  }
  return source;
}

function listen(url, options, types = ["message"]) {
  window.source = record(new ReconnectingEventSource(url, options), types);
}
