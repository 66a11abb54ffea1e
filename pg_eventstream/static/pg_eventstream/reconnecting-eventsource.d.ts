// The classic script makes these global. (`declare var`, because it sets properties of the window.)
declare var ReconnectingEventSource: typeof import("./reconnecting-eventsource.mjs").ReconnectingEventSource;
type ReconnectingEventSource = import("./reconnecting-eventsource.mjs").ReconnectingEventSource;
declare var EventSourceNotAvailableError: typeof import("./reconnecting-eventsource.mjs").EventSourceNotAvailableError;
type EventSourceNotAvailableError = import("./reconnecting-eventsource.mjs").EventSourceNotAvailableError;
