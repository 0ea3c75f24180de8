"""Pictures and videos: drawing predictions, reading and writing files of frames; processes that end with
their parent."""
