// Shows the events of a stream as they arrive, the newest at the top. Their data is always set as
// text, never as HTML.
(() => {
  const MOST_ROWS = 500;
  const LOOKS = { "stream-error": "danger", "stream-reset": "warning", "keep-alive": "text-muted" };

  const view = document.getElementById("pg-eventstream");
  const role = (name) => view.querySelector(`[data-role="${name}"]`);
  const rows = role("events");
  const types = [...view.querySelectorAll("[data-type]")].map((element) => element.dataset.type);

  function showState(text, look) {
    role("state").textContent = text;
    role("state").className = `label label-${look}`;
  }

  function showEvent({ type, data, lastEventId }) {
    if (type === "keep-alive" && !role("keep-alive").checked) return;
    const row = document.createElement("tr");
    row.className = LOOKS[type] ?? "";
    const time = new Date().toLocaleTimeString();
    row.append(
      ...[time, type, lastEventId, data].map((text) => {
        const cell = document.createElement("td");
        cell.textContent = text;
        return cell;
      }),
    );
    rows.prepend(row);
    if (rows.childElementCount > MOST_ROWS) rows.lastElementChild.remove();
    role("none").hidden = true;
  }

  role("clear").addEventListener("click", () => rows.replaceChildren());

  const source = new ReconnectingEventSource(view.dataset.url);
  showState("connecting", "default");
  source.addEventListener("open", () => showState("open", "success"));
  source.addEventListener("error", () => {
    if (source.readyState === ReconnectingEventSource.CLOSED) showState("ended", "danger");
    else showState("reconnecting", "warning");
  });
  for (const type of new Set([...types, "stream-reset", "stream-error", "keep-alive"])) {
    source.addEventListener(type, showEvent);
  }
})();
