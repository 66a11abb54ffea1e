"""Shows the events themselves, in the terminal and in the admin.

tail         follows the stream, with the delay of each event
lines        events of the tail as lines of text or JSON
browse       pages of events and channels, for the admin
"""
