"""When h is refreshed, and from what: recorded forwards, replayed in a sandbox."""
